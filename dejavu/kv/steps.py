"""Stream token steps: one new token of each row, again and again, with as little work for the host as can be."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from dejavu.device.base import Stream
from dejavu.errors import TransferError
from dejavu.kv.handle import Handle, group_layers
from dejavu.kv.layout import Ints
from dejavu.kv.packing import PackedStep
from dejavu.kv.plan import Overlap, Resharding
from dejavu.kv.pool import KVPool, Landing
from dejavu.kv.stream import LARGEST_KEY, Level, check_level, message_key
from dejavu.transport.carrier import Carrier, Transfer

Move = Callable[..., Transfer]  # a carrier's send or receive


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """Keep what the messages of all steps between two ranks have in common."""

    peer: int
    first_key: int
    step: PackedStep
    row_bytes: int


class StepStreamer:
    """Send, or receive, the new tokens of one microbatch's rows, step after step.

    Made once, it keeps what does not change between steps: peers, keys, the planes' offsets. Both sides name a step by
    its number, and list its rows in the same order; which rows of their microbatch these are is each side's own.

    At level `full` a step leaves behind the next one's compute. Below it, later work of `stream` waits until the step
    has been sent; so post a step's receive before its send where two ranks send to each other.
    """

    def __init__(
        self,
        carrier: Carrier,
        pool: KVPool,
        resharding: Resharding,
        microbatch: int,
        *,
        transfer: int,
        level: Level = Level.FULL,
    ) -> None:
        """Plan for `microbatch` of this pool; `transfer` is a number that no other transfer of these ranks has."""
        check_level(carrier, level)
        self.carrier = carrier
        self.pool = pool
        self.level = level
        self.microbatch = microbatch
        pairs = resharding.overlaps
        self._out = [make_template(pool, pair, transfer) for pair in pairs if pair.source_rank == pool.rank]
        self._in = [make_template(pool, pair, transfer) for pair in pairs if pair.target_rank == pool.rank]
        self._groups = group_layers([template.step.window for template in self._in], pool.layout.num_heads)

    def send(self, step: int, rows: Ints, position: Ints, *, stream: Stream) -> Handle:
        """Send token `position[i]` of each row `rows[i]`, as the work that `stream` has now leaves it.

        Both are int64 [n], rows numbered in the microbatch, each at most once.
        """
        handle = self._post(self._out, self.carrier.send, step, rows, position, None, stream)
        if self.level is not Level.FULL:
            with suppress(TransferError):  # of a step that has failed already: the handle has it
                handle.order(stream)
        return handle

    def receive(self, step: int, rows: Ints, position: Ints, *, stream: Stream) -> Handle:
        """Receive token `position[i]` of each row `rows[i]`, for which its blocks have room.

        A row's token is valid, as with `stream_in`, once all of the pool's layers of it have arrived.
        """
        landing = self._begin(rows, position) if self._in else None
        return self._post(self._in, self.carrier.receive, step, rows, position, landing, stream)

    def _begin(self, rows: Ints, position: Ints) -> Landing:
        pairs = zip(rows.tolist(), position.tolist(), strict=True)
        return self.pool.begin([(self.microbatch, row, token, token + 1) for row, token in pairs])

    def _post(
        self,
        templates: list[Template],
        move: Move,
        step: int,
        rows: Ints,
        position: Ints,
        landing: Landing | None,
        stream: Stream,
    ) -> Handle:
        table = self.pool.rows.table[self.microbatch][rows]
        templates = templates if len(rows) else []
        nbytes = len(rows) * sum(template.row_bytes for template in templates)
        handle = Handle(nbytes, len(templates), landing, self._groups if landing else ())
        for template in templates:
            pieces = template.step.packing(table, position).pieces
            key = (template.first_key + step) & LARGEST_KEY
            handle.start(partial(move, template.peer, key, self.pool.memory, pieces, stream=stream))
        return handle


def make_template(pool: KVPool, pair: Overlap, transfer: int) -> Template:
    """Plan the messages of a pair of ranks, one of which is the pool's."""
    window = pair.window
    peer = pair.target_rank if pair.source_rank == pool.rank else pair.source_rank
    key = message_key(transfer, pair.source_rank, pair.target_rank, window.first_layer, window.last_layer)
    row_bytes = 2 * window.num_layers * pair.piece_bytes
    return Template(peer, key, PackedStep(pool.layout, window), row_bytes)
