"""The primitives of DéjàVuLib: move parts of a KV cache over a carrier, to or from a rank or a store.

    flush, fetch            one contiguous piece: a block, say
    scatter, gather         a region cut into pieces: some tokens of some rows, in some layers
    stream_out, stream_in   whatever two ranks share of a selection, between two layouts of the cache

Each returns at once, with a handle; the bytes move after the work that `stream` has by then, and never block it.
Both sides of a transfer make its messages from what both know: the two sides' layouts, the selection, the level and
the transfer's number, which no other transfer between the same ranks has at that time. They exchange nothing else.
"""

import struct
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

from dejavu.device.base import Buffer, Stream
from dejavu.device.pieces import Pieces, make_pieces
from dejavu.kv.handle import Handle, group_layers
from dejavu.kv.layout import Window
from dejavu.kv.packing import Packing, pack
from dejavu.kv.plan import Overlap, Resharding
from dejavu.kv.pool import KVPool, Landing
from dejavu.kv.side import Selection
from dejavu.transport.carrier import Carrier, Gathering

LARGEST_KEY = 2**63 - 1


class Level(StrEnum):
    """Say how far streaming is optimised, as in the paper's Figure 7; each level adds to the one before it.

    Both sides of a transfer use the same level, and carriers that were opened with its `gathering`.
    """

    NAIVE = "naive"  # a copy per piece, the whole prompt after its last layer
    BUFFERED = "buffered"  # pieces packed by one kernel
    LAYERED = "layered"  # each prompt layer as it is computed, small ones together
    FULL = "full"  # a step's tokens behind the next step's compute

    @property
    def gathering(self) -> Gathering:
        """Give what to open the carrier with."""
        return Gathering.NAIVE if self is Level.NAIVE else Gathering.PACKED

    @property
    def is_layered(self) -> bool:
        """Tell whether layers leave as they are computed."""
        return self in (Level.LAYERED, Level.FULL)


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """Be one message to or from `peer`: pieces of the pool (source) in canonical order (target)."""

    peer: int
    key: int
    window: Window
    pieces: Pieces


def message_key(transfer: int, source_rank: int, target_rank: int, first_layer: int, last_layer: int) -> int:
    """Give the key of a message, the same on both sides: 63 bits of a hash, so that stores can hold many transfers'."""
    words = struct.pack("<5q", transfer, source_rank, target_rank, first_layer, last_layer)
    return int.from_bytes(blake2b(words, digest_size=8).digest(), "little") & LARGEST_KEY


def flush(carrier: Carrier, peer: int, key: int, memory: Buffer, *, stream: Stream) -> Handle:
    """Send all of `memory` (`KVPool.block`, or a view of any buffer) as one piece."""
    handle = Handle(memory.nbytes)
    handle.start(lambda: carrier.send(peer, key, memory, _whole(memory), stream=stream))
    return handle


def fetch(
    carrier: Carrier, peer: int, key: int, memory: Buffer, *, stream: Stream, landing: Landing | None = None
) -> Handle:
    """Receive into all of `memory`; the tokens of `landing` (`KVPool.begin`) are valid once it is there."""
    handle = _receiving(memory.nbytes, landing)
    handle.start(lambda: carrier.receive(peer, key, memory, _whole(memory), stream=stream))
    return handle


def scatter(carrier: Carrier, peer: int, key: int, pool: KVPool, packing: Packing, *, stream: Stream) -> Handle:
    """Send a region of the pool (`KVPool.region`), in canonical order."""
    handle = Handle(packing.num_bytes)
    handle.start(lambda: carrier.send(peer, key, pool.memory, packing.pieces, stream=stream))
    return handle


def gather(
    carrier: Carrier,
    peer: int,
    key: int,
    pool: KVPool,
    packing: Packing,
    *,
    stream: Stream,
    landing: Landing | None = None,
) -> Handle:
    """Receive into a region of the pool; the tokens of `landing` (`KVPool.begin`) are valid once it is there."""
    handle = _receiving(packing.num_bytes, landing)
    handle.start(lambda: carrier.receive(peer, key, pool.memory, packing.pieces, stream=stream))
    return handle


def stream_out(
    carrier: Carrier,
    pool: KVPool,
    resharding: Resharding,
    selection: Selection,
    *,
    transfer: int,
    stream: Stream,
    level: Level = Level.FULL,
    message_bytes: int = 0,
) -> Handle:
    """Send what the target's ranks must get of this pool, all of it computed by the work that `stream` has now.

    `resharding` describes the two sides by their ranks' layouts; their rows are not looked at, only this pool's.
    """
    how = {"transfer": transfer, "message_bytes": message_bytes}
    streamer = LayerStreamer(carrier, pool, resharding, selection, stream=stream, level=level, **how)
    streamer.layer_done(pool.layout.window.last_layer - 1)
    return streamer.handle


def stream_in(
    carrier: Carrier,
    pool: KVPool,
    resharding: Resharding,
    selection: Selection,
    *,
    transfer: int,
    stream: Stream,
    level: Level = Level.FULL,
    message_bytes: int = 0,
) -> Handle:
    """Receive what the source's ranks have for this pool; tokens are valid once all layers of the pool have arrived.

    Called with what `stream_out` was called with on the other side, on each of the target's ranks. Until the handle
    is done the selected tokens are void.
    """
    check_level(carrier, level)
    pairs = [pair for pair in resharding.select(selection) if pair.target_rank == pool.rank]
    message_bytes = message_bytes or carrier.message_bytes
    messages = list(cut_messages(pool, pairs, selection, transfer, level, message_bytes))
    landing = pool.begin(pool.spans(selection), selection.first_layer, selection.last_layer) if messages else None
    groups = group_layers([message.window for message in messages], pool.layout.num_heads)
    handle = Handle(count_bytes(messages), len(messages), landing, groups)
    for message in messages:
        _post(handle, carrier, pool, message, stream, is_sent=False)
    return handle


class LayerStreamer:
    """Send a prompt's KV while it is computed: the model's loop says `layer_done` after each layer.

    At the levels below `layered` everything leaves after the last layer; from there on each layer, or as many as make
    up `message_bytes` (on both sides alike; 0 is as the carrier has it), since a message costs the same however small
    it is. `handle` is done once all layers were sent; `peer_bytes` says how much each rank gets.
    """

    def __init__(
        self,
        carrier: Carrier,
        pool: KVPool,
        resharding: Resharding,
        selection: Selection,
        *,
        transfer: int,
        stream: Stream,
        level: Level = Level.FULL,
        message_bytes: int = 0,
    ) -> None:
        """Plan the messages; `stream` is the one that the layers are computed on."""
        check_level(carrier, level)
        self.carrier = carrier
        self.pool = pool
        self.stream = stream
        self._is_layered = level.is_layered
        pairs = [pair for pair in resharding.select(selection) if pair.source_rank == pool.rank]
        messages = cut_messages(pool, pairs, selection, transfer, level, message_bytes or carrier.message_bytes)
        self._end = pool.layout.window.last_layer
        self._unsent = deque(sorted(messages, key=lambda message: message.window.last_layer))
        self.handle = Handle(count_bytes(self._unsent), len(self._unsent))
        self.peer_bytes: dict[int, int] = {}
        for message in self._unsent:
            self.peer_bytes[message.peer] = self.peer_bytes.get(message.peer, 0) + message.pieces.total_bytes

    def layer_done(self, layer: int) -> None:
        """Send what is complete with this layer (the model's number), behind the work that the stream has now.

        Layers are done in their order: this one and all before it.
        """
        ready = layer + 1 if self._is_layered else self._end if layer + 1 == self._end else 0
        while self._unsent and self._unsent[0].window.last_layer <= ready:
            _post(self.handle, self.carrier, self.pool, self._unsent.popleft(), self.stream, is_sent=True)


def cut_messages(
    pool: KVPool,
    pairs: Sequence[Overlap],
    selection: Selection,
    transfer: int,
    level: Level,
    message_bytes: int,
) -> Iterator[Message]:
    """Cut the pool's part of a selection into messages: one for each pair of ranks, and at some levels some layers."""
    if selection.num_tokens == 0:
        return
    for pair in pairs:
        window = pair.window
        step = bundle_layers(pool, window, selection, message_bytes) if level.is_layered else window.num_layers
        peer = pair.target_rank if pair.source_rank == pool.rank else pair.source_rank
        for layer in range(window.first_layer, window.last_layer, step):
            part = window.clip_layers(layer, layer + step)
            if layer == window.first_layer or part.num_layers < step:
                shape, origin = pack(pool.side, pool.layout, part, selection).pieces, layer
            key = message_key(transfer, pair.source_rank, pair.target_rank, layer, part.last_layer)
            yield Message(peer, key, part, shape.shifted((layer - origin) * pool.layout.layer_bytes, 0))


def bundle_layers(pool: KVPool, window: Window, selection: Selection, message_bytes: int) -> int:
    """Give how many layers make up a message: as few as have `message_bytes`, counted from what both sides know."""
    layer_bytes = 2 * selection.num_tokens * window.num_heads * pool.layout.head_bytes
    return min(window.num_layers, -(-message_bytes // layer_bytes))


def count_bytes(messages: Collection[Message]) -> int:
    """Count the bytes of messages."""
    return sum(message.pieces.total_bytes for message in messages)


def _post(handle: Handle, carrier: Carrier, pool: KVPool, message: Message, stream: Stream, *, is_sent: bool) -> None:
    move = carrier.send if is_sent else carrier.receive
    handle.start(lambda: move(message.peer, message.key, pool.memory, message.pieces, stream=stream))


def _receiving(nbytes: int, landing: Landing | None) -> Handle:
    if landing is None:
        return Handle(nbytes)
    everything = Window(landing.first_layer, landing.last_layer, 0, 1)
    return Handle(nbytes, 1, landing, group_layers([everything], 1))


def _whole(memory: Buffer) -> Pieces:
    return make_pieces([0], [0], [memory.nbytes])


def check_level(carrier: Carrier, level: Level) -> None:
    """Assert that a carrier was opened for a level."""
    assert carrier.gathering is level.gathering, f"open the carrier with gathering={level.gathering!r} for {level}"
