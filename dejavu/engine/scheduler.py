"""Which microbatch goes next through the pipeline, and with which tokens: the first stage's books, and pure."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from dejavu.engine.messages import Admission, Resume, RowWork, Sampled, Work
from dejavu.request import finish_reason


@dataclass(slots=True)
class RowProgress:
    """Follow one request through its row. Tokens [0, context) are in the cache, or in a pass under way.

    A request that begins with outputs has `known` tokens to take before it is sampled again: where another pipeline
    has processed its prompt or a failure has interrupted it, only the last one; where its KV was lost, all of them.
    """

    admission: Admission
    context: int
    num_output: int
    prompt_len: int
    num_known: int  # tokens of the prompt, and what is repeated behind it
    next_token: int | None = None  # sampled, not yet passed through the pipeline
    drawing: int = 0  # passes under way that draw a token for it
    is_new: bool = True  # no pass has told the other stages of it

    @classmethod
    def begin(cls, admission: Admission) -> "RowProgress":
        """Begin behind what the cache holds: at the prompt, or behind it."""
        prompt_len, num_output = len(admission.request.prompt_token_ids), len(admission.outputs)
        return cls(admission, admission.num_cached, num_output, prompt_len, prompt_len + num_output)

    @property
    def prompt_left(self) -> int:
        """Give the number of known tokens still to process: of the prompt, and what is repeated behind it."""
        return max(0, self.num_known - self.context)

    @property
    def takes_one(self) -> bool:
        """Tell whether the next pass is a token step: one token behind the prompt."""
        if self.next_token is not None:
            return True
        return self.context >= self.prompt_len and self.num_known == self.context + 1

    @property
    def is_unseen(self) -> bool:
        """Tell whether the token to pass next is still being drawn, if there is any."""
        return self.drawing > 0 and self.next_token is None

    @property
    def takes_unseen(self) -> bool:
        """Tell whether a token step could take the token that is being drawn: it is not the last one by its number."""
        return self.is_unseen and self.num_output + self.drawing < self.admission.request.sampling.max_tokens

    def known(self, start: int, count: int) -> tuple[int, ...]:
        """Give the known tokens [start, start + count)."""
        prompt = self.admission.request.prompt_token_ids
        behind = start - len(prompt)
        return (prompt[start:] + self.admission.outputs[max(0, behind) :])[:count]


@dataclass(slots=True)
class Microbatch:
    """Hold the rows of one microbatch, and how many of its passes are under way: at most one, or two looking ahead."""

    index: int
    rows: dict[int, RowProgress] = field(default_factory=dict)
    step: int = 0
    in_flight: int = 0


class Scheduler:
    """Choose the next pass, round robin over the microbatches that are not under way.

    New prompts go first, whole (`prompt_chunk` 0), up to `max_prompt_tokens` in a pass; then every row takes a token
    step. With a `prompt_chunk` each pass takes the token steps and up to so many prompt tokens together. With a
    `cut_at`, prompt passes take up to so many tokens, and longer prompts several of them: memory asks for it. With
    `prompts_only` a request ends here with its first token. With `tells_seats` each pass also tells who was seated with
    a prompt that another pipeline has processed, before its own first pass, for ranks that swap.

    With `looks_ahead` the only pass under way is followed by a second one before its tokens are seen: the rows take
    what it draws where that lies, and the second pass names no tokens. What that computes for a row that turns out to
    have ended is dropped: its token here, its KV since only a later pass can be given the same blocks.
    """

    def __init__(
        self,
        num_microbatches: int,
        prompt_chunk: int,
        max_prompt_tokens: int,
        eos_token_ids: tuple[int, ...],
        prompts_only: bool = False,
        tells_seats: bool = False,
        cut_at: int = 0,
        looks_ahead: bool = False,
    ) -> None:
        self.microbatches = [Microbatch(index) for index in range(num_microbatches)]
        self.prompt_chunk = prompt_chunk
        self.max_prompt_tokens = cut_at or max_prompt_tokens
        self.cuts_prompts = prompt_chunk + cut_at > 0
        self.eos_token_ids = eos_token_ids
        self.prompts_only = prompts_only
        self.tells_seats = tells_seats
        self.looks_ahead = looks_ahead
        self.seated: list[Admission] = []  # that no pass has told the other stages of
        self.places: dict[int, tuple[Microbatch, int]] = {}  # serial → (microbatch, row) of every live request
        self.turn = 0

    def admit(self, admission: Admission) -> None:
        """Put a request into its row, in place of one that has ended."""
        microbatch = self.microbatches[admission.microbatch]
        if previous := microbatch.rows.get(admission.row):
            self.release(previous.admission.serial)
        microbatch.rows[admission.row] = RowProgress.begin(admission)
        self.places[admission.serial] = microbatch, admission.row
        if self.tells_seats and admission.num_cached:
            self.seated.append(admission)

    def resume(self, resume: Resume) -> None:
        """Go on after a failure: with these requests, at these steps."""
        for microbatch, step in zip(self.microbatches, resume.steps, strict=True):
            microbatch.step = step
        for admission in resume.admissions:
            self.admit(admission)

    def release(self, serial: int) -> int:
        """Drop a request, if it is still there; give the first step of its microbatch that is sure to be without it."""
        place = self.places.pop(serial, None)
        if place is None:  # its last pass is through
            return 0
        microbatch, row = place
        del microbatch.rows[row]
        self.seated = [seat for seat in self.seated if seat.serial != serial]
        return microbatch.step

    def sampled(self, result: Sampled) -> None:
        """Take the tokens of a finished pass; a request that ends with its token is dropped."""
        self.microbatches[result.microbatch].in_flight -= 1
        for token in result.tokens:
            if token.serial not in self.places:
                continue
            microbatch, row = self.places[token.serial]
            progress = microbatch.rows[row]
            progress.num_output += 1
            progress.drawing -= 1
            if not progress.drawing:  # else the next pass has taken it already
                progress.next_token = token.token_id
            params = progress.admission.request.sampling
            if self.prompts_only or finish_reason(params, self.eos_token_ids, progress.num_output, token.token_id):
                self.release(token.serial)

    def next_work(self) -> Work | None:
        """Give the next pass, or None while every microbatch is under way or has nothing to do."""
        count = len(self.microbatches)
        for offset in range(count):
            microbatch = self.microbatches[(self.turn + offset) % count]
            if self.may_start(microbatch) and (rows := list(self.choose_rows(microbatch))):
                self.turn = (microbatch.index + 1) % count
                return self.start(microbatch, rows)
        return None

    def may_start(self, microbatch: Microbatch) -> bool:
        """Tell whether a microbatch is not under way, or is alone there and may be followed by itself."""
        if not microbatch.in_flight:
            return True
        return self.looks_ahead and sum(each.in_flight for each in self.microbatches) == 1

    def choose_rows(self, microbatch: Microbatch) -> Iterator[tuple[RowProgress, int]]:
        """Give the rows of the next pass, each with its number of new tokens."""
        waiting = (p for p in microbatch.rows.values() if p.context < p.num_known and not p.takes_one)
        prompts = sorted(waiting, key=lambda p: p.admission.serial)
        if self.prompt_chunk and prompts and microbatch.in_flight:
            return  # tokens that nobody has seen cannot share a pass with prompts
        if self.prompt_chunk or not prompts:
            yield from ((p, 1) for p in choose_steps(microbatch))
        budget = self.prompt_chunk or self.max_prompt_tokens
        for index, progress in enumerate(prompts):
            num_new = min(progress.prompt_left, budget) if self.cuts_prompts else progress.prompt_left
            if num_new > budget and index:
                return
            if num_new == 0:
                return
            budget = max(0, budget - num_new)
            yield progress, num_new

    def start(self, microbatch: Microbatch, rows: list[tuple[RowProgress, int]]) -> Work:
        """Make the pass and mark its tokens as under way."""
        admissions = tuple(progress.admission for progress, _ in rows if progress.is_new)
        token_ids: list[int] = []
        row_works = []
        for progress, num_new in rows:
            if not progress.is_unseen:
                token_ids += take_tokens(progress, num_new)
            row_works.append(advance(progress, num_new))
        seated = tuple(seat for seat in self.seated if seat not in admissions)
        self.seated.clear()
        work = Work(microbatch.step, microbatch.index, tuple(row_works), admissions, tuple(token_ids), seated)
        microbatch.step += 1
        microbatch.in_flight += 1
        return work


def choose_steps(microbatch: Microbatch) -> list[RowProgress]:
    """Give the rows of a token step: those whose next tokens are known, or all whose tokens the pass under way draws.

    None while there are both, or while a row's next draw depends on the token that nobody has seen.
    """
    seen = [p for p in microbatch.rows.values() if p.takes_one]
    unseen = [p for p in microbatch.rows.values() if p.takes_unseen]
    if not unseen:
        return seen
    waits = seen or any(p.admission.request.sampling.reads_output for p in unseen)
    return [] if waits else unseen


def take_tokens(progress: RowProgress, num_new: int) -> tuple[int, ...]:
    """Give the next tokens of a row to pass through the pipeline: known ones, or the one sampled last."""
    if progress.next_token is None:
        return progress.known(progress.context, num_new)
    token = progress.next_token
    progress.next_token = None
    return (token,)


def advance(progress: RowProgress, num_new: int) -> RowWork:
    """Describe a row's part of a pass, and count its tokens as cached."""
    admission, context = progress.admission, progress.context
    is_prompt = context < progress.prompt_len or num_new > 1
    samples = progress.num_known <= context + num_new
    work = RowWork(admission.serial, admission.row, num_new, context, is_prompt, samples, progress.num_known)
    progress.context += num_new
    progress.drawing += samples
    progress.is_new = False
    return work
