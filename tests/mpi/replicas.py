"""Hold every replica of a run against its owner's pool, and restore it, when the run ends; all ranks call `watch`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from dejavu.cluster.keeping import Replicating
from dejavu.device.vault import Vault
from dejavu.engine.handover import Movers
from dejavu.engine.messages import Report
from dejavu.engine.replication import Receiving, ReplicaHolder, ReplicaSource
from dejavu.engine.ring import pool_name, replica_holder, replica_owner
from dejavu.kv.replica import RowCopy, filled_blocks, list_pieces

START = Replicating.start


def watch(change: Callable[[Any, str, Any], None]) -> None:
    """Have each rank check what it has before it reports; `change` sets an attribute of a class."""
    made: list[Replicating] = []
    report = Movers.report

    def start_noted(self: Replicating, stack: Any) -> Any:
        made.append(self)
        return START(self, stack)

    def report_compared(self: Movers, *arguments: Any) -> Any:
        reported = report(self, *arguments)
        receiving = [mover for mover in self.movers if isinstance(mover, Receiving)]
        for mover in receiving:
            compare(mover, made[-1])
        if receiving:
            restore(made[-1], reported)
        return reported

    change(Replicating, "start", start_noted)
    change(Movers, "report", report_compared)
    change(Vault, "drop", lambda self, prefix: [])  # a rank that is done lets go of what others still look at


def same_tokens(layout: Any, rows: Any, one: Any, other: Any) -> None:
    """Compare the tokens of rows in two pools of one layout."""
    pieces = list_pieces(layout, [RowCopy(place, row.serial, row.blocks, 0, row.length) for place, row in rows.items()])
    for offset, nbytes in zip(pieces.source.tolist(), pieces.nbytes.tolist(), strict=True):
        there, here = one.view(offset, nbytes), other.view(offset, nbytes)
        assert torch.equal(there.tensor().cpu(), here.tensor().cpu())


def compare(mover: Receiving, replicating: Replicating) -> None:
    """Hold a replica against the pool that its owner has left with the keeper."""
    owner = replicating.setup.topology.placements[mover.owner]
    name = pool_name(owner, swapped=replicating.setup.config.swap)
    found = replicating.shelf.vault.get(name, replicating.source.device)
    assert found
    with found[0] as pool:
        rows, books = mover.store.rows(), mover.books.rows
        assert rows
        assert {place: (book.serial, book.copied, tuple(book.blocks)) for place, book in books.items()} == rows
        same_tokens(mover.layout, rows, mover.store.pool, pool)


def restore(replicating: Replicating, report: Report) -> None:
    """Have every rank get the KV of a pool that it takes anew."""
    old = replicating.source
    with ExitStack() as stack, old.device.allocate_exportable(old.pool.nbytes) as memory:
        source = ReplicaSource(old.device, memory, old.device.compute_stream)
        movers, restored = START(replace(replicating, source=source, is_new=True), stack)
        mover = next(mover for mover in movers if not isinstance(mover, ReplicaHolder))
        assert restored.rows
        assert restored.nbytes % mover.layout.block_bytes == 0
        assert restored.nbytes // mover.layout.block_bytes == len(filled_blocks(mover.layout, restored.rows.values()))
        same_tokens(mover.layout, restored.rows, memory, old.pool)
        for each in movers:  # nobody leaves before all have what was sent to them
            each.report(report, replicating.channel.rank, float)
        meet(replicating)


def meet(replicating: Replicating) -> None:
    """Tell the holder that its bytes are here: a connection that it closes before takes them for lost."""
    channel, topology = replicating.channel, replicating.setup.topology
    owner, holder = (find(topology, channel.hosts, channel.rank) for find in (replica_owner, replica_holder))
    if holder != channel.rank:
        channel.send(holder, "restored")
        assert channel.receive(owner, channel.deadline_s)[1] == "restored"
