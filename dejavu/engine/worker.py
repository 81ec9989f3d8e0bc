"""The worker: what a rank that holds a part of the model does, pass after pass."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dejavu.engine.handover import Mover
from dejavu.engine.messages import Stop, Work
from dejavu.engine.sink import Sink
from dejavu.engine.source import Source
from dejavu.measure.records import StepRecord
from dejavu.model.batch import Batch
from dejavu.transport.mpi import Channel


class Stage(Protocol):
    """Compute the layers of one stage: the real model, or one that waits instead."""

    hidden_size: int
    dtype: torch.dtype

    def forward(
        self, batch: Batch, hidden: Tensor | None, pool: Tensor, layer_done: Callable[[int], None] | None = None
    ) -> Tensor:
        """Give the hidden states of the batch's tokens, or on the last stage the logits of `batch.logit_rows`.

        `layer_done` is called with each layer's number in the model when its K and V are in the pool.
        """


class Worker:
    """Run passes until the source has no more: take, compute, hand on, record."""

    def __init__(
        self,
        channel: Channel,
        stage: Stage,
        pool: Tensor,
        source: Source,
        sink: Sink,
        mover: Mover,
        *,
        previous: int | None,
        followers: Sequence[int],
        peers: Sequence[int],
        place: tuple[int, int],
        now_s: Callable[[], float],
    ) -> None:
        """Join the parts; hidden states come from rank `previous`.

        `peers` are tensor ranks that get each pass from this one before it computes; `followers` are told the end.
        `place` is (stage, tensor rank), for the records.
        """
        self.channel = channel
        self.stage = stage
        self.pool = pool
        self.source = source
        self.sink = sink
        self.mover = mover
        self.previous = previous
        self.followers = followers
        self.peers = peers
        self.place = place
        self.now_s = now_s
        self.blocks: dict[tuple[int, int], list[int]] = {}
        self.steps: list[StepRecord] = []

    @torch.inference_mode()
    def run(self) -> None:
        """Work until the end of the run, then tell those that take their work from here."""
        while work := self.source.next():
            self.step(work)
        for rank in self.followers:
            self.channel.send(rank, Stop())

    def step(self, work: Work) -> None:
        """Take one pass through this stage."""
        for rank in self.peers:
            self.channel.send(rank, work)
        for admission in work.admissions:
            self.blocks[admission.microbatch, admission.row] = list(admission.blocks)
        hidden = self.receive_hidden(work)
        start_s = self.now_s()
        output = self.stage.forward(self.batch(work), hidden, self.pool, self.mover.begin(work))
        self.mover.end(work)
        compute_end_s = self.now_s()
        self.sink.put(work, output)
        self.record(work, start_s, compute_end_s)

    def receive_hidden(self, work: Work) -> Tensor | None:
        """Wait for the hidden states of a pass, [num_tokens, hidden_size]; None on the first stage."""
        if self.previous is None:
            return None
        num_tokens = sum(row.num_new for row in work.rows)
        hidden = torch.empty(num_tokens, self.stage.hidden_size, dtype=self.stage.dtype)
        return self.channel.receive_tensor(self.previous, hidden)

    def batch(self, work: Work) -> Batch:
        """Describe a pass to the model."""
        return Batch(
            token_ids=torch.tensor(work.token_ids, dtype=torch.int64),
            num_new=[row.num_new for row in work.rows],
            context=[row.context for row in work.rows],
            blocks=[self.blocks[work.microbatch, row.row] for row in work.rows],
            logit_rows=[index for index, row in enumerate(work.rows) if row.samples],
        )

    def record(self, work: Work, start_s: float, compute_end_s: float) -> None:
        """Note when this pass was here."""
        num_tokens = sum(row.num_new for row in work.rows)
        times = start_s, compute_end_s, self.now_s()
        self.steps.append(
            StepRecord(
                self.channel.rank,
                *self.place,
                work.microbatch,
                work.step,
                work.kind,
                len(work.rows),
                num_tokens,
                *times,
            )
        )
