"""What NCCL does by itself: ncclSend and ncclRecv of whole messages, as a reference beside the `nccl` carrier."""

from typing import Any

from dejavu.device import Buffer, Device, Stream
from dejavu.device.pieces import Pieces
from dejavu.transport.carrier import Carrier, Gathering
from dejavu.transport.nccl_group import NcclGroup

from .ceilings import Copied


class PlainNccl(Carrier):
    """Send messages of one piece, in the order of the calls: NCCL knows no keys. Not for serving.

    Both sides have to post every message, and soon: the kernel of the first one waits on the GPU for the other's.
    """

    name = "nccl"

    def __init__(self, device: Device, comm: Any) -> None:
        """Connect the ranks of `comm`, all at the same time."""
        self.device = device
        self.gathering = Gathering.PACKED
        self._group = NcclGroup(device, comm.allgather, comm.rank)
        self._connect(comm.rank)

    def send(self, peer: int, key: int, memory: Buffer, pieces: Pieces, *, stream: Stream) -> Any:
        """Queue ncclSend of all the memory behind what `stream` has to do."""
        self._follow(stream)
        self._group.send(memory.tensor(), peer)
        return Copied(self.device, self.device.compute_stream)

    def receive(self, peer: int, key: int, memory: Buffer, pieces: Pieces, *, stream: Stream) -> Any:
        """Queue ncclRecv into all the memory."""
        self._follow(stream)
        self._group.receive(memory.tensor(), peer)
        return Copied(self.device, self.device.compute_stream)

    def close(self) -> None:
        """Part, as the other rank does."""
        self._group.close()

    def _connect(self, rank: int) -> None:
        """Send one byte: the first call blocks its host until the other side makes its own."""
        with self.device.allocate(1) as byte:
            (self._group.receive if rank else self._group.send)(byte.tensor(), 1 - rank)
            self.device.compute_stream.synchronize()

    def _follow(self, stream: Stream) -> None:
        with self.device.create_event() as begun:
            begun.record(stream)
            begun.wait(self.device.compute_stream)
