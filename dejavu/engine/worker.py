"""The worker: what a rank that holds a part of the model does, pass after pass."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dejavu.engine.flight import Flight, Flights
from dejavu.engine.handover import Mover
from dejavu.engine.inlet import Inlet
from dejavu.engine.messages import Admission, Stop, Work
from dejavu.engine.sink import Sink
from dejavu.engine.source import Source
from dejavu.engine.timeline import Timeline
from dejavu.engine.unseen import UnseenTokens
from dejavu.model.batch import Batch
from dejavu.transport.mpi import Channel

NO_TOKENS = torch.empty(0, dtype=torch.int64)


class Stage(Protocol):
    """Compute the layers of one stage: the real model, or one that waits instead."""

    hidden_size: int
    dtype: torch.dtype

    def warm_up(self, pool: Tensor, row_counts: Sequence[int], prompt_tokens: int) -> None:
        """Prepare token steps of so many rows, and prompts where they have any tokens, where that takes time."""

    def forward(
        self, batch: Batch, hidden: Tensor | None, pool: Tensor, layer_done: Callable[[int], None] | None = None
    ) -> Tensor:
        """Give the hidden states of the batch's tokens, or on the last stage the logits of `batch.logit_rows`.

        `layer_done` is called with each layer's number in the model when its K and V are in the pool.
        """

    def likeliest(self, logits: Tensor) -> Tensor:
        """Give the likeliest token of each row of logits; the stage may have found those of its last pass already."""


class BlockTable(Protocol):
    """Know in which blocks of this rank's pool the rows of its microbatches lie."""

    def admit(self, admission: Admission) -> None:
        """Let a request take a row."""

    def find(self, microbatch: int, row: int) -> list[int]:
        """Give a row's blocks, in the order of its tokens."""


class GivenBlocks:
    """Take blocks as the controller gave them out: a row has the same ones to its end."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, int], list[int]] = {}

    def admit(self, admission: Admission) -> None:
        """Note the blocks."""
        self.blocks[admission.microbatch, admission.row] = list(admission.blocks)

    def find(self, microbatch: int, row: int) -> list[int]:
        """Give the blocks."""
        return self.blocks[microbatch, row]


class Worker:
    """Run passes until the source has no more: take, compute, hand on, record.

    On a GPU a step only queues its pass, behind those that are under way; `flights` sees to what is left to do for it.
    """

    def __init__(
        self,
        channel: Channel,
        stage: Stage,
        pool: Tensor,
        blocks: BlockTable,
        inlet: Inlet,
        source: Source,
        sink: Sink,
        mover: Mover,
        flights: Flights,
        timeline: Timeline,
        unseen: UnseenTokens,
        *,
        followers: Sequence[int],
        peers: Sequence[int],
    ) -> None:
        """Join the parts.

        `peers` are tensor ranks that get each pass from this one before it computes; `followers` are told the end.
        """
        self.channel = channel
        self.stage = stage
        self.pool = pool
        self.inlet = inlet
        self.source = source
        self.sink = sink
        self.mover = mover
        self.flights = flights
        self.timeline = timeline
        self.unseen = unseen
        self.followers = followers
        self.peers = peers
        self.blocks = blocks

    @torch.inference_mode()
    def run(self) -> None:
        """Work until the end of the run, then tell those that take their work from here."""
        while work := self.source.next():
            self.step(work)
        self.flights.drain()
        for rank in self.followers:
            self.channel.send(rank, Stop())

    def step(self, work: Work) -> None:
        """Take one pass through this stage."""
        begun_s = time.monotonic()
        for rank in self.peers:
            self.channel.send(rank, work)
        for admission in work.admissions:
            self.blocks.admit(admission)
        hidden = self.inlet.take(work)
        start = self.timeline.mark()
        layer_done = self.mover.begin(work)  # before the batch: it may decide where rows lie
        output = self.stage.forward(self.batch(work, hidden), hidden, self.pool, layer_done)
        self.inlet.release()
        self.mover.end(work)
        computed = self.timeline.mark()
        finish = self.sink.put(work, output)
        landed = self.timeline.mark()
        self.flights.add(Flight(work, start, computed, landed, finish, time.monotonic() - begun_s))

    def batch(self, work: Work, hidden: Tensor | None) -> Batch:
        """Describe a pass to the model; only the first stage, which gets no hidden states, needs the tokens."""
        return Batch(
            token_ids=self.token_ids(work) if hidden is None else NO_TOKENS,
            num_new=[row.num_new for row in work.rows],
            context=[row.context for row in work.rows],
            blocks=[self.blocks.find(work.microbatch, row.row) for row in work.rows],
            logit_rows=[index for index, row in enumerate(work.rows) if row.samples],
            prompt_share=work.prompt_share,
        )

    def token_ids(self, work: Work) -> Tensor:
        """Give the new tokens; those of a pass that names none lie where they are drawn."""
        if not work.token_ids:
            return self.unseen.take(work.microbatch, [row.row for row in work.rows])
        return torch.tensor(work.token_ids, dtype=torch.int64)
