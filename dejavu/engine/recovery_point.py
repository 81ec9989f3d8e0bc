"""What a failure has left of the KV, and what has to be computed again: pure arithmetic of recovery points."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dejavu.engine.messages import Admission

ALL_TOKENS = 1 << 62  # more than any request has


@dataclass(frozen=True, slots=True)
class Restored:
    """Say what a failure has left of one pipeline's KV: the first so many tokens of these requests, by their serials.

    Of all others everything is there where it is `intact`, and else nothing. `acknowledged` is by microbatch the last
    step that has to be there: the replicas of all ranks that lost their memory had said that they have it, and are
    there still; -1 where they had not. It is empty where nobody lost memory, so that everything has to be there. Behind
    it at most `most_behind` steps of each can be lost, where that can be told.
    """

    intact: bool
    tokens: Mapping[int, int] = field(default_factory=dict)
    acknowledged: Sequence[int] = ()
    most_behind: Sequence[int] = ()

    def limit(self, serial: int, there: int) -> int:
        """Give how many of the `there` tokens of a request are left."""
        return min(there, self.tokens.get(serial, there if self.intact else 0))

    def excuses(self, microbatch: int, begun: int | None, last: int) -> int:
        """Give the steps that a request may have lost of those up to `last`, the last one known, without any fault.

        Its KV was there whole with step `begun`, if it is known.
        """
        if not self.acknowledged:
            return 0
        point = self.acknowledged[microbatch]
        if begun is None or point < begun:
            return ALL_TOKENS
        most = self.most_behind[microbatch] if self.most_behind else ALL_TOKENS
        return max(0, min(last - point, most))


def join_restored(parts: Iterable[tuple[bool, Mapping[int, int]]]) -> Restored:
    """Say what a pipeline's ranks have together, of each of which it is told as `Restored` tells of all."""
    ranks = [Restored(keeps_kv, tokens) for keeps_kv, tokens in parts]
    named = set[int]().union(*(rank.tokens for rank in ranks))
    left = {serial: min(rank.limit(serial, ALL_TOKENS) for rank in ranks) for serial in named}
    return Restored(all(rank.intact for rank in ranks), left)


def tokens_there(admission: Admission, outputs: Sequence[int], computed: int = 0) -> int:
    """Count the tokens of a request in a row whose KV was there, at most all but the last, which is to be passed again.

    `computed` are those of its prompt that passes since the last recovery have brought.
    """
    if len(outputs) > len(admission.outputs):  # all before the last one has gone through every stage
        return len(admission.request.prompt_token_ids) + len(outputs) - 1
    return max(computed, admission.num_cached)  # its prompt was under way, or is still, or the last recovery


@dataclass(slots=True)
class Repeated:
    """Count what has to be computed again after a failure.

    `steps` are those of the microbatch that is set back the furthest: each passes one token of each of its rows. Of the
    `prompts`, of `prompts_avoidable` there was a copy that should have served; of the `steps`, `steps_beyond` were not
    behind the recovery point. Both are faults of this program.
    """

    prompts: int = 0
    tokens: int = 0
    steps: int = 0
    prompts_handed_over: int = 0
    prompts_avoidable: int = 0
    steps_beyond: int = 0

    def count(self, admission: Admission, there: int, excused: int) -> None:
        """Count one request that goes on in its row, where `there` tokens were; `excused` steps may be lost of them."""
        prompt = len(admission.request.prompt_token_ids)
        if admission.num_cached < prompt if admission.outputs else admission.num_cached == 0 < there:
            is_avoidable = admission.num_cached < min(there, prompt) and excused < ALL_TOKENS
            self.count_prompt(is_avoidable=is_avoidable)
        if admission.outputs:
            tokens = prompt + len(admission.outputs) - 1 - max(admission.num_cached, prompt)
            self.tokens += tokens
            self.steps = max(self.steps, tokens)
            lost = max(there, prompt) - max(admission.num_cached, prompt)
            self.steps_beyond = max(self.steps_beyond, lost - excused)

    def count_prompt(self, *, is_avoidable: bool) -> None:
        """Count a prompt that is computed again."""
        self.prompts += 1
        self.prompts_avoidable += is_avoidable
