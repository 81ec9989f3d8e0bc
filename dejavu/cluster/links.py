"""What joins a worker's GPU to its neighbours': sums over its stage, and hidden states from and to other stages."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from dejavu.device import Device
from dejavu.engine.inlet import HiddenIn
from dejavu.engine.sink import HiddenOut
from dejavu.errors import TransferError
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.ipc_line import Exchange
from dejavu.transport.mailbox import MailboxIn, MailboxOut
from dejavu.transport.nccl_hop import NcclIn, NcclOut
from dejavu.transport.reduction import GroupSum, meet

if TYPE_CHECKING:
    from dejavu.transport.mpi import Channel

MEETING_S = 600.0  # a neighbour may still be starting, or compiling kernels


@dataclass(slots=True)
class Links:
    """Hold what this worker's GPU has with others; None where there is no such neighbour, or only MPI reaches it.

    `onward` names the way to the next stage, for people; empty where there is none.
    """

    sums: GroupSum | None = None
    inbox: HiddenIn | None = None
    outbox: HiddenOut | None = None
    onward: str = ""

    def leave(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End all waits where this rank has failed, before the first of them is closed: they share a stream."""
        if error is not None:
            for way in (self.sums, self.inbox, self.outbox):
                if way is not None:
                    way.abort(TransferError(f"this rank has failed: {error}"))

    def check(self) -> None:
        """Raise the error of a sum that gave up."""
        if self.sums is not None:
            self.sums.check()

    def describe(self) -> list[str]:
        """Say which ways are used, for people."""
        notes = [self.sums.describe()] if self.sums is not None else []
        if self.onward:
            notes.append(f"hidden states to the next stage: {self.onward}")
        return notes


def exchange_among(channel: "Channel", ranks: Sequence[int]) -> Exchange:
    """Give an allgather of bytes over `ranks` of a channel, this one among them, in their order."""

    def exchange(data: bytes) -> list[bytes]:
        for rank in ranks:
            if rank != channel.rank:
                channel.send(rank, data)
        return [data if rank == channel.rank else next_bytes(channel, rank) for rank in ranks]

    return exchange


def next_bytes(channel: "Channel", rank: int) -> bytes:
    """Wait for a rank's part in an exchange; at the end of a run, tokens that nobody needs may come before it."""
    while not isinstance(message := channel.receive(rank, MEETING_S)[1], bytes):
        pass
    return message


def open_sums(channel: "Channel", device: Device, ranks: Sequence[int], stack: ExitStack) -> GroupSum | None:
    """Join the tensor ranks of a stage; `stack` parts them again. UnavailableError where they have no way to sum."""
    if len(ranks) == 1:
        return None
    return stack.enter_context(GroupSum(device, exchange_among(channel, ranks), ranks.index(channel.rank)))


def open_outbox(channel: "Channel", device: Device, following: int, stack: ExitStack) -> HiddenOut | None:
    """Join this stage to the next one, which calls `open_inbox` at the same time."""
    exchange = exchange_among(channel, (channel.rank, following))
    ways: list[Callable[[], HiddenOut]] = [
        lambda: MailboxOut(device, exchange),
        lambda: NcclOut(device, exchange),
    ]
    return first_that_works(device, exchange, ways, stack)


def open_inbox(
    channel: "Channel",
    device: Device,
    previous: int,
    max_tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    stack: ExitStack,
) -> HiddenIn | None:
    """Join this stage to the one before, which calls `open_outbox` at the same time."""
    exchange = exchange_among(channel, (previous, channel.rank))
    ways: list[Callable[[], HiddenIn]] = [
        lambda: MailboxIn(device, exchange, max_tokens, hidden_size, dtype),
        lambda: NcclIn(device, exchange, hidden_size, dtype),
    ]
    return first_that_works(device, exchange, ways, stack)


class Way(Protocol):
    """Be one end of what joins two stages."""

    name: str

    def abort(self, error: Exception) -> None:
        """End the waits for the other end."""

    def close(self) -> None:
        """Part, as the other end does at the same time."""


End = TypeVar("End", bound=Way)


def first_that_works(
    device: Device, exchange: Exchange, ways: Sequence[Callable[[], End]], stack: ExitStack
) -> End | None:
    """Try a mailbox on one host, then NCCL between two GPUs; None where only the host's memory is left."""
    places = meet(device, exchange)
    if len({place.host for place in places}) > 1:
        ways = ways[1:]
    if len({(place.host, place.bus_id) for place in places}) == 1:
        ways = ways[:1]
    for way in ways:
        try:
            end = way()
        except UnavailableError:
            continue  # on both ends, and what is used instead is announced
        stack.push(Parting(end))
        return end
    return None


@dataclass(frozen=True, slots=True)
class Parting:
    """Close one end, alone where this rank has failed."""

    end: Way

    def __call__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Be called as the stack unwinds."""
        if error is not None:
            self.end.abort(TransferError(f"this rank has failed: {error}"))
        self.end.close()
