"""What an `ipc` carrier knows of its peers, and which of its sends may take a stream."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from dejavu.device.base import Buffer, Event
from dejavu.errors import TransferError
from dejavu.transport.ipc_line import Line
from dejavu.transport.ipc_memory import Imports
from dejavu.transport.ipc_messages import Post
from dejavu.transport.ipc_transfers import IpcReceive, IpcSend
from dejavu.transport.lanes import MAX_LANES, is_reached


@dataclass(slots=True, eq=False)
class Peer:
    """Hold what this rank knows of another one."""

    rank: int
    line: Line
    words: Buffer  # its flags
    imports: Imports  # its memories
    introduced: set[int] = field(default_factory=set)  # this rank's memories that it knows
    posts: dict[int, Post] = field(default_factory=dict)  # by key: places without a send
    sends: dict[int, IpcSend] = field(default_factory=dict)  # by key: sends without a place
    receives: dict[int, IpcReceive] = field(default_factory=dict)  # by number
    lost: TransferError | None = None
    ended_s: float | None = None  # when its line ended


@dataclass(slots=True, eq=False)
class Copying:
    """Be one send whose copies are queued, or held back."""

    peer: Peer
    send: IpcSend
    post: Post
    is_withdrawn: bool = False


@dataclass(slots=True, eq=False)
class Unready:
    """Be one receive whose memory earlier work still uses."""

    peer: Peer
    receive: IpcReceive
    post: Post
    event: Event


class SendQueue:
    """Hold sends back that would wait for their bytes on a lane that an earlier send needs.

    Bytes may be made by work that waits for earlier sends, and lanes keep their order. So a send whose bytes are not
    ready takes a lane only while it is among the first `MAX_LANES` that have not ended.
    """

    def __init__(self) -> None:
        self._unfinished: dict[IpcSend, None] = {}  # in the order in which they were posted
        self._held: dict[IpcSend, Copying] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, send: IpcSend) -> None:
        """Note a send that was posted."""
        self._unfinished[send] = None

    def end(self, send: IpcSend) -> None:
        """Note that a send has ended, well or not."""
        self._unfinished.pop(send, None)
        self._held.pop(send, None)

    def may_start(self, send: IpcSend) -> bool:
        """Tell whether a send may take a lane now."""
        return is_reached(send.ready) or any(one is send for one in islice(self._unfinished, MAX_LANES))

    def hold(self, item: Copying) -> None:
        """Keep a send whose place is known."""
        self._held[item.send] = item

    @property
    def held(self) -> list[IpcSend]:
        """List the sends that are held back."""
        return list(self._held)

    def take(self, wanted: Callable[[Copying], bool]) -> list[Copying]:
        """Give, and let go of, the sends that are held and wanted."""
        taken = [item for item in self._held.values() if wanted(item)]
        for item in taken:
            del self._held[item.send]
        return taken
