"""Handles: several transfers as one, whose arrival makes tokens valid."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from dejavu.device.base import Stream
from dejavu.errors import DeadlineError, DejavuError, TransferError
from dejavu.kv.layout import Window
from dejavu.kv.pool import Landing
from dejavu.transport.carrier import DEFAULT_DEADLINE_S, Transfer
from dejavu.transport.staging import cancelled, wrap

LOOK_S = 0.02  # how soon a wait for one part sees that another one has failed
LONGEST_S = 3600.0  # of one wait without a deadline


@dataclass(frozen=True, slots=True)
class Group:
    """Name the parts of a handle that together bring layers [first_layer, last_layer), with all heads of the pool."""

    first_layer: int
    last_layer: int
    parts: tuple[int, ...]


def group_layers(windows: Sequence[Window], num_heads: int) -> tuple[Group, ...]:
    """Find the layers that become whole together, given each part's window; none where a head is in no part."""
    edges = sorted({edge for window in windows for edge in (window.first_layer, window.last_layer)})
    groups = []
    for first, last in pairwise(edges):
        parts = tuple(i for i, w in enumerate(windows) if w.first_layer <= first and last <= w.last_layer)
        if sum(windows[i].num_heads for i in parts) == num_heads:
            groups.append(Group(first, last, parts))
    return tuple(groups)


class Handle(Transfer):
    """Follow the parts of one call of the library. It ends when all of them have: well, or with the first error.

    Where a part fails, or cannot be started, the others are cancelled. Tokens that are received become valid when
    somebody looks (`done`, `error` or `wait`), layer by layer as they come; those of a failed handle are void. `order`
    puts later work of a stream behind the bytes, whoever looks. One thread uses a handle at a time.
    """

    def __init__(
        self, nbytes: int, num_parts: int = 1, landing: Landing | None = None, groups: Sequence[Group] = ()
    ) -> None:
        self.nbytes = nbytes
        self._awaited = num_parts  # parts that are still to be started
        self._parts: list[Transfer] = []
        self._running: dict[int, Transfer] = {}
        self._held: list[object] = []  # memory, pieces and stream of each part, which have to live until it has ended
        self._landing = landing
        self._groups = list(groups)
        self._failure: TransferError | None = None

    @property
    def moved_bytes(self) -> int:
        """Give the sum over the parts."""
        return sum(part.moved_bytes for part in self._parts)

    @property
    def done(self) -> bool:
        """Tell whether every part has ended; marks what has arrived."""
        if self._running:
            self._look()
        if self._running or self._awaited:
            return False
        self._held.clear()
        if self._landing is not None:
            self._land(self._landing)
        return True

    @property
    def error(self) -> TransferError | None:
        """Give the first error, once all parts have ended."""
        return self._failure if self.done else None

    def wait(self, deadline_s: float | None = DEFAULT_DEADLINE_S) -> None:
        """Block until every part has ended."""
        self._check_started()
        end_s = float("inf") if deadline_s is None else time.monotonic() + deadline_s
        while not self.done:
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                raise DeadlineError(
                    f"a transfer has moved {self.moved_bytes} of {self.nbytes} bytes in {deadline_s} s: "
                    "a peer has not posted the other side, has stopped, or is slow"
                )
            with suppress(DeadlineError, TransferError):  # what it was is seen by the next look
                next(iter(self._running.values())).wait(min(left_s, LOOK_S if len(self._running) > 1 else LONGEST_S))
        if self._failure is not None:
            raise self._failure

    def order(self, stream: Stream, deadline_s: float | None = DEFAULT_DEADLINE_S) -> None:
        """Let later work of `stream` wait for all parts; raises the error of one that has failed already."""
        self._check_started()
        for part in self._parts:
            part.order(stream, deadline_s)
        if self._failure is not None:
            raise self._failure

    def cancel(self) -> None:
        """End all parts early. Until `done`, bytes may still be read and written."""
        if not self.done:
            self._fail(cancelled())

    def start(self, post: Callable[[], Transfer]) -> None:
        """Start the next part; nothing is started after a failure."""
        if self._failure is not None:
            return
        assert self._awaited > 0, "more parts than announced"
        try:
            part = post()
        except DejavuError as error:  # it becomes the handle's, as if it had come later
            self._fail(wrap(error))
            return
        self._awaited -= 1
        self._running[len(self._parts)] = part
        self._parts.append(part)
        self._held.append(post)

    def _check_started(self) -> None:
        assert not self._awaited, "a wait for layers that are still to be computed: say layer_done for all of them"

    def _look(self) -> None:
        """Take note of the parts that have ended since."""
        ended = [i for i, part in self._running.items() if part.done]
        failures = [error for i in ended if (error := self._running.pop(i).error) is not None]
        if failures:
            self._fail(failures[0])
        if ended and self._landing is not None and self._failure is None:
            self._arrive(self._landing)

    def _arrive(self, landing: Landing) -> None:
        whole = [group for group in self._groups if self._is_whole(group)]
        for group in whole:
            landing.arrive(group.first_layer, group.last_layer)
            self._groups.remove(group)

    def _is_whole(self, group: Group) -> bool:
        return all(i < len(self._parts) and i not in self._running for i in group.parts)

    def _fail(self, error: TransferError) -> None:
        self._awaited = 0
        if self._failure is None:
            self._failure = error
        for part in self._running.values():
            part.cancel()

    def _land(self, landing: Landing) -> None:
        """End the landing: what has not arrived by now never will."""
        self._landing = None
        if self._failure is None:
            landing.close()
        else:
            landing.abort()
