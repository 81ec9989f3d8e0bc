"""Loads that are one message: plain sizes, blocks of a microbatch, many pieces; over a link, or to and from a store."""

from typing import Any

from dejavu.device import Buffer, Device, Stream
from dejavu.transport.carrier import Carrier, Gathering
from dejavu.transport.link import LinkCarrier

from .contents import Check
from .shapes import Exchange
from .timing import World

KEPT_KEY = 1_000_000  # of the message that a store gives back while another one goes in
POST_DEADLINE_S = 60.0


class MessageLoad:
    """Move one message between the memories of two ranks, or of one rank and a store."""

    can_gate = True
    arrival = -1  # the rank that sees the bytes arrive

    def __init__(self, world: World, carrier: Carrier, exchange: Exchange, direction: str, window: int) -> None:
        """Allocate this rank's memories; the receiver of a link is the last rank."""
        self.world = world
        self.carrier = carrier
        self.exchange = exchange
        self.direction = direction
        self.window = window
        self.nbytes = exchange.nbytes * (2 if direction == "both" else 1)
        self.num_pieces = len(exchange.source)
        self.is_driven = isinstance(carrier, LinkCarrier)
        self.num_copies = self.num_pieces if carrier.gathering is Gathering.NAIVE else 2
        is_link = direction == "link"
        self.stream: Stream = world.device.create_stream("load")
        self.source = allocate(world.device, exchange.source_bytes) if world.rank == 0 else None
        self.target = allocate(world.device, exchange.target_bytes) if world.rank > 0 or not is_link else None
        self.check = Check(world.device, exchange.pairs, exchange.source_bytes, exchange.target_bytes)

    @property
    def peer(self) -> int:
        """Give the other rank; a store is the own one."""
        return 1 - self.world.rank if self.direction == "link" else self.world.rank

    def prepare(self, index: int) -> list[Any]:
        """Post the receive of a link."""
        return [self._receive(index)] if self.direction == "link" and self.target else []

    def start(self, index: int) -> list[Any]:
        """Post the send, or for a store what the direction says."""
        ways: dict[str, list[Any]] = {
            "link": [self._send],
            "out": [self._send],
            "in": [self._fetch],
            "both": [self._send, self._fetch],
        }
        return [post(index) for post in ways[self.direction]] if self.source else []

    def refresh(self, seed: int) -> None:
        """Make fresh contents, and spoil the target."""
        if self.source:
            self.check.fill(self.source, seed)
        if self.target:
            self.check.poison(self.target, seed)
        if self.source and self.direction in ("in", "both"):
            self._post(self.carrier.send, KEPT_KEY, self.source, self.exchange.source).wait(POST_DEADLINE_S)

    def count_wrong(self, seed: int) -> int:
        """Count what differs after the last transfer; what a store has taken is read back for it."""
        if self.target is None:
            return 0
        wrong = 0
        if self.direction in ("link", "in", "both"):
            wrong += self.check.count_wrong(self.target)
        if self.direction in ("out", "both"):
            self.check.poison(self.target, seed)
            self._receive(0).wait(POST_DEADLINE_S)
            wrong += self.check.count_wrong(self.target)
        return wrong

    def close(self) -> None:
        """Free the memories, which no peer uses any more."""
        for key in (*range(self.window), KEPT_KEY):
            self.carrier.forget(key)
        release(self.carrier, self.source, self.target)
        self.stream.close()

    def _send(self, index: int) -> Any:
        return self._post(self.carrier.send, index, self.source, self.exchange.source)

    def _receive(self, index: int) -> Any:
        return self._post(self.carrier.receive, index, self.target, self.exchange.target)

    def _fetch(self, _: int) -> Any:
        return self._receive(KEPT_KEY)

    def _post(self, move: Any, key: int, memory: Buffer | None, pieces: Any) -> Any:
        return move(self.peer, key, memory, pieces, stream=self.stream)


def allocate(device: Device, nbytes: int) -> Buffer:
    """Allocate memory that peers can map, and touch all of it."""
    memory = device.allocate_exportable(nbytes)
    device.fill(memory, 0, stream=device.compute_stream)
    return memory


def release(carrier: Carrier, *memories: Buffer | None) -> None:
    """Free memories, after the peers of the carrier have unmapped them."""
    unregister = getattr(carrier, "unregister", None)
    for memory in memories:
        if memory is not None:
            if unregister is not None:
                unregister(memory)
            memory.close()
