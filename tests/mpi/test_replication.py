"""Serve with replication over real ranks: the same tokens, and replicas that hold what their owners do."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from dejavu.cluster.keeping import Replicating
from dejavu.config import ServeConfig
from dejavu.engine.handover import Movers
from dejavu.engine.replication import Receiving, ReplicaHolder, ReplicaSource
from dejavu.engine.ring import pool_name
from dejavu.kv.replica import RowCopy, filled_blocks, list_pieces

pytestmark = [pytest.mark.mpi(min_size=7), pytest.mark.timeout(60)]

CASES = [
    {"pp": 3, "block_size": 4},
    {"pp": 2, "tp": 2, "replicate_every": 3},
    {"pp": 3, "prompt_chunk": 5, "replica_transport": "tcp", "block_size": 16},
    {"dp": 2, "pp": 2, "num_microbatches": 3, "replica_transport": "mpi"},
    {"prompt_pp": 1, "token_pp": 3, "block_size": 4},
    {"prompt_pp": 2, "token_pp": 2, "token_tp": 2, "replica_transport": "tcp"},
    {"pp": 1},
    {"pp": 2, "num_microbatches": 4, "swap": True, "block_size": 4},
]


def make_config(directory: Any, case: dict[str, Any]) -> ServeConfig:
    fixed = {"dtype": "float32", "threads": 1, "row_len": 40, "num_requests": 1, "prompt_len": 1, "output_len": 1}
    shape = {"replicate": "ring", "microbatch_size": 2, "stall_timeout": 20, **case}
    return ServeConfig(model=str(directory), **fixed, **shape)


def same_tokens(layout: Any, rows: Any, one: Any, other: Any) -> None:
    """Compare the tokens of rows in two pools of one layout."""
    pieces = list_pieces(layout, [RowCopy(place, row.serial, row.blocks, 0, row.length) for place, row in rows.items()])
    for offset, nbytes in zip(pieces.source.tolist(), pieces.nbytes.tolist(), strict=True):
        there, here = one.view(offset, nbytes), other.view(offset, nbytes)
        assert bytes(there.tensor().numpy()) == bytes(here.tensor().numpy())


def compare(mover: Receiving, replicating: Replicating) -> None:
    """Hold a replica against the pool that its owner has left with the keeper."""
    owner = replicating.setup.topology.placements[mover.owner]
    found = replicating.vault.get(pool_name(owner), replicating.source.device)
    assert found
    with found[0] as pool:
        rows, books = mover.store.rows(), mover.books.rows
        assert rows
        assert {place: (book.serial, book.copied, tuple(book.blocks)) for place, book in books.items()} == rows
        same_tokens(mover.layout, rows, mover.store.pool, pool)


def restore(replicating: Replicating) -> None:
    """Have every rank get the KV of a pool that it takes anew."""
    old = replicating.source
    with ExitStack() as stack, old.device.allocate_exportable(old.pool.nbytes) as memory:
        source = ReplicaSource(old.device, memory, old.device.compute_stream)
        movers, restored = replace(replicating, source=source, is_new=True).start(stack)
        mover = next(mover for mover in movers if not isinstance(mover, ReplicaHolder))
        assert restored.rows
        assert restored.nbytes % mover.layout.block_bytes == 0
        assert restored.nbytes // mover.layout.block_bytes == len(filled_blocks(mover.layout, restored.rows.values()))
        same_tokens(mover.layout, restored.rows, memory, old.pool)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()))
def test_replicas_hold_what_their_owners_do(world, reference_of, monkeypatch, case):
    reference = reference_of("llama")
    config = make_config(reference.directory, case)
    made: list[Replicating] = []
    start, report = Replicating.start, Movers.report

    def start_noted(self: Replicating, stack: Any) -> Any:
        made.append(self)
        return start(self, stack)

    def report_compared(self: Movers, *arguments: Any) -> Any:
        reported = report(self, *arguments)
        receiving = [mover for mover in self.movers if isinstance(mover, Receiving)]
        for mover in receiving:
            compare(mover, made[0])
        if receiving:
            restore(made[0])
        return reported

    monkeypatch.setattr(Replicating, "start", start_noted)
    monkeypatch.setattr(Movers, "report", report_compared)
    (completions, replicated), outcome = world.serve(
        config, lambda controller: (controller.generate(reference.requests), controller.replicated)
    )
    assert [tuple(c.token_ids) for c in completions] == list(reference.token_ids)
    check_acknowledged(config, replicated, outcome)
    check_bytes(config, outcome)


def owners(config: ServeConfig, outcome: Any) -> list[int]:
    """Give the ranks that have a replica: all that generate tokens."""
    first = 1 + config.prompt_pp * (config.prompt_tp or config.tp)
    return sorted(rank for rank in outcome.reports if rank >= first)


def check_acknowledged(config: ServeConfig, replicated: dict[tuple[int, int], int], outcome: Any) -> None:
    """Hold the last acknowledged step of each rank and microbatch against the last one that there was."""
    for rank in owners(config, outcome):
        last = Counter({s.microbatch: s.step for s in sorted(outcome.reports[rank].steps, key=lambda s: s.step)})
        for microbatch, step in last.items():
            assert step - replicated[rank, microbatch] < config.replicate_every, (rank, microbatch)


def check_bytes(config: ServeConfig, outcome: Any) -> None:
    """Hold the bytes of every transfer against the tokens of its pass; prompts that came from elsewhere come on top."""
    transfers = [transfer for report in outcome.reports.values() for transfer in report.transfers]
    for rank in owners(config, outcome):
        own = [transfer for transfer in transfers if (transfer.kind, transfer.source) == ("replica", rank)]
        steps = outcome.reports[rank].steps
        assert own
        if config.replicate_every > 1:
            continue
        per_token = min(transfer.bytes for transfer in own)
        assert all(transfer.bytes % per_token == 0 for transfer in own)
        if not config.is_disaggregated:
            assert Counter(t.bytes // per_token for t in own) == Counter(step.num_tokens for step in steps)
