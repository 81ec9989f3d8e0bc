"""Where a worker's result goes: hidden states to the next stage, logits into the next tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from dejavu.engine.flight import Finish
from dejavu.engine.logits import Logits, LogitSum
from dejavu.engine.messages import Admission, RowWork, Sampled, SampledToken, Work
from dejavu.engine.unseen import Landing, UnseenTokens
from dejavu.model.sampling import Draw, RowState, download, start_draw
from dejavu.model.spec import ModelSpec

if TYPE_CHECKING:
    from dejavu.transport.mpi import Channel


class Sink(Protocol):
    """Take what a stage computed for a pass."""

    def put(self, work: Work, output: Tensor) -> Finish | None:
        """Hand the result on as far as it goes without waiting, for whoever takes it or for the device.

        Give what is left to do when the compute stream has passed what was queued here, or None.
        """


class NextStage:
    """Send hidden states to the same tensor rank of the next stage."""

    def __init__(self, channel: "Channel", rank: int) -> None:
        self.channel = channel
        self.rank = rank

    def put(self, work: Work, output: Tensor) -> None:
        """Send the pass and its hidden states."""
        self.channel.send(self.rank, work)
        self.channel.send_tensor(self.rank, output.contiguous())


class StagedNextStage:
    """Send hidden states from a GPU to the next stage through pinned host memory, as soon as they are computed."""

    def __init__(self, channel: "Channel", rank: int) -> None:
        self.channel = channel
        self.rank = rank

    def put(self, work: Work, output: Tensor) -> Finish:
        """Queue the copy to the host; the pass and its hidden states leave when it is there."""
        host = download(output)

        def send() -> None:
            self.channel.send(self.rank, work)
            self.channel.send_tensor(self.rank, host)

        return send


class HiddenOut(Protocol):
    """Be the end of a way between two GPUs into which hidden states go."""

    name: str

    def send(self, hidden: Tensor) -> None:
        """Queue a contiguous tensor's way; it stays unchanged until the stream has passed this."""

    def abort(self, error: Exception) -> None:
        """End the waits for the other end."""

    def close(self) -> None:
        """Part, as the other end does at the same time."""


class DirectNextStage:
    """Send hidden states from GPU to GPU; the next stage may queue its pass before they are computed."""

    def __init__(self, channel: "Channel", rank: int, outbox: HiddenOut) -> None:
        self.channel = channel
        self.rank = rank
        self.outbox = outbox

    def put(self, work: Work, output: Tensor) -> None:
        """Send the pass, and queue its hidden states."""
        self.channel.send(self.rank, work)
        self.outbox.send(output.contiguous())


class ToLeader:
    """Send this tensor rank's part of the logits to the last stage's leader, which samples."""

    def __init__(self, channel: "Channel", leader: int) -> None:
        self.channel = channel
        self.leader = leader

    def put(self, work: Work, output: Tensor) -> None:
        """Send the logits, if any token is due."""
        if output.shape[0]:
            self.channel.send_tensor(self.leader, output.contiguous())


class ToSum:
    """Add this tensor rank's part of the logits to the sum with which the last stage's leader samples."""

    def __init__(self, logits: LogitSum) -> None:
        self.logits = logits

    def put(self, work: Work, output: Tensor) -> None:
        """Take part in the sum, if any token is due."""
        if output.shape[0]:
            self.logits.gather(output)


class Sampling:
    """Turn logits into tokens, on the last stage's leader, and tell who waits for them."""

    def __init__(
        self,
        spec: ModelSpec,
        logits: Logits,
        now_s: Callable[[], float],
        tell: Callable[[Sampled], None],
        unseen: UnseenTokens,
        likeliest: Callable[[Tensor], Tensor],
    ) -> None:
        """Take what brings the tensor ranks' logits together, whom to tell each result, and what keeps it till then.

        `likeliest` gives the argmax of each row of logits.
        """
        self.spec = spec
        self.logits = logits
        self.now_s = now_s
        self.tell = tell
        self.unseen = unseen
        self.likeliest = likeliest
        self.landing = Landing()
        self.rows: dict[tuple[int, int], RowState] = {}

    def put(self, work: Work, output: Tensor) -> Finish:
        """Sample a token for every row whose prompt is complete."""
        for admission in work.admissions:
            self.admit(admission)
        due = [row for row in work.rows if row.samples]
        states = [self.rows[work.microbatch, row.row] for row in due]
        draw = start_draw(self.logits.gather(output), states, self.likeliest, self.landing.take) if due else None
        if draw:
            self.unseen.note(work.microbatch, [row.row for row in due], draw.drawn)
        for state in states:
            state.num_unseen += 1
        return lambda: self.finish(work, due, states, draw)

    def finish(self, work: Work, due: list[RowWork], states: list[RowState], draw: Draw | None) -> None:
        """Take the tokens that were drawn, and tell them."""
        tokens = []
        for row, state, result in zip(due, states, draw.read() if draw else [], strict=True):
            tokens.append(SampledToken(row.serial, len(state.output), result.token_id, result.logprobs))
            state.output.append(result.token_id)
            state.num_unseen -= 1
        if draw:
            self.landing.give(draw.token_ids, draw.drawn)
        chunks = tuple((row.serial, row.context + row.num_new) for row in work.rows if not row.samples)
        sampled = Sampled(work.step, work.microbatch, tuple(tokens), self.now_s(), work.start_s, chunks)
        self.tell(sampled)

    def admit(self, admission: Admission) -> None:
        """Begin a row's history."""
        request = admission.request
        prompt, output = list(request.prompt_token_ids), list(admission.outputs)
        state = RowState(request.sampling, self.spec.eos_token_ids, prompt, output)
        self.rows[admission.microbatch, admission.row] = state
