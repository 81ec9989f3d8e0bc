"""Where a worker's result goes: hidden states to the next stage, logits into the next tokens."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dejavu.engine.flight import Finish
from dejavu.engine.messages import Admission, RowWork, Sampled, SampledToken, Work
from dejavu.model.sampling import Draw, RowState, start_draw
from dejavu.model.spec import ModelSpec, Shard
from dejavu.transport.mpi import Channel


class Sink(Protocol):
    """Take what a stage computed for a pass."""

    def put(self, work: Work, output: Tensor) -> Finish | None:
        """Hand the result on as far as it goes without waiting, for whoever takes it or for the device.

        Give what is left to do when the compute stream has passed what was queued here, or None.
        """


class NextStage:
    """Send hidden states to the same tensor rank of the next stage."""

    def __init__(self, channel: Channel, rank: int) -> None:
        self.channel = channel
        self.rank = rank

    def put(self, work: Work, output: Tensor) -> None:
        """Send the pass and its hidden states."""
        self.channel.send(self.rank, work)
        self.channel.send_tensor(self.rank, output.contiguous())


class ToLeader:
    """Send this tensor rank's part of the logits to the last stage's leader, which samples."""

    def __init__(self, channel: Channel, leader: int) -> None:
        self.channel = channel
        self.leader = leader

    def put(self, work: Work, output: Tensor) -> None:
        """Send the logits, if any token is due."""
        if output.shape[0]:
            self.channel.send_tensor(self.leader, output.contiguous())


class Sampling:
    """Turn logits into tokens, on the last stage's leader, and tell who waits for them."""

    def __init__(
        self,
        channel: Channel,
        spec: ModelSpec,
        shards: Sequence[tuple[int, Shard]],
        now_s: Callable[[], float],
        tell: Sequence[Callable[[Sampled], None]],
    ) -> None:
        """Take the (rank, shard) of the stage's tensor ranks, this one first, and whom to tell each result."""
        self.channel = channel
        self.spec = spec
        self.shards = shards
        self.now_s = now_s
        self.tell = tell
        self.rows: dict[tuple[int, int], RowState] = {}

    def put(self, work: Work, output: Tensor) -> Finish:
        """Sample a token for every row whose prompt is complete."""
        for admission in work.admissions:
            self.admit(admission)
        due = [row for row in work.rows if row.samples]
        states = [self.rows[work.microbatch, row.row] for row in due]
        draw = start_draw(self.gather(output), states) if due else None
        return lambda: self.finish(work, due, states, draw)

    def finish(self, work: Work, due: list[RowWork], states: list[RowState], draw: Draw | None) -> None:
        """Take the tokens that were drawn, and tell them."""
        tokens = []
        for row, state, result in zip(due, states, draw.read() if draw else [], strict=True):
            tokens.append(SampledToken(row.serial, len(state.output), result.token_id, result.logprobs))
            state.output.append(result.token_id)
        sampled = Sampled(work.step, work.microbatch, tuple(tokens), self.now_s(), work.start_s)
        for tell in self.tell:
            tell(sampled)

    def admit(self, admission: Admission) -> None:
        """Begin a row's history."""
        request = admission.request
        output = [] if admission.first_token is None else [admission.first_token]
        state = RowState(request.sampling, self.spec.eos_token_ids, list(request.prompt_token_ids), output)
        self.rows[admission.microbatch, admission.row] = state

    def gather(self, logits: Tensor) -> Tensor:
        """Put the tensor ranks' vocabulary parts beside each other."""
        if len(self.shards) == 1:
            return logits
        whole = torch.empty(logits.shape[0], self.spec.vocab_size)
        for rank, shard in self.shards:
            start, stop = shard.vocab_range(self.spec.vocab_size)
            part = logits if rank == self.channel.rank else torch.empty(logits.shape[0], stop - start)
            whole[:, start:stop] = part if rank == self.channel.rank else self.channel.receive_tensor(rank, part)
        return whole
