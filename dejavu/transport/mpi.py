"""The MPI carrier: control messages and tensors between ranks, by point-to-point calls that never spin."""

import pickle
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from mpi4py import MPI
from torch import Tensor

from dejavu.errors import DeadlineError, PeerLostError
from dejavu.transport.waiting import Doorbell, Patience, new_job_name

CONTROL, TENSOR = 1, 2
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
OPEN: set["Channel"] = set()  # all channels of this process


def naming_the_lost(
    method: Callable[Concatenate["Channel", Parameters], Result],
) -> Callable[Concatenate["Channel", Parameters], Result]:
    """Let a method of Channel raise PeerLostError where MPI reports that a rank has died."""

    @wraps(method)
    def checked(self: "Channel", /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        except MPI.Exception as error:
            if lost := self.lost_ranks():
                names = ", ".join(f"{rank} on {self.hosts[rank]}" for rank in lost)
                raise PeerLostError(
                    f"rank {names} died: look for its last words above, and in `dmesg` for a lack of memory"
                ) from error
            if error.Get_error_class() == MPI.ERR_REVOKED:
                raise PeerLostError("another rank has ended the job: look for its error above") from error
            raise

    return checked


class Channel:
    """Exchange objects and tensors with the other ranks of a communicator, of which it owns a duplicate.

    Objects are pickled: the ranks of one job trust each other. Messages from one rank arrive in the order in which
    they were sent, objects and tensors apart. Sends return at once; their memory is kept until they are complete.
    Every rank of `comm` has to make its channel at the same time. Waits pass `deadline_s`, or raise DeadlineError.
    """

    def __init__(self, comm: MPI.Intracomm, deadline_s: float) -> None:
        self.comm = comm.Dup()
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.deadline_s = deadline_s
        self.pending: deque[tuple[MPI.Request, object]] = deque()  # with the memory that MPI may still use
        self.doorbell = Doorbell(self.comm.bcast(new_job_name()), self.rank)
        self.hosts: list[str] = self.comm.allgather(socket.gethostname())
        OPEN.add(self)
        self.near = {rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]} - {self.rank}

    def send(self, dest: int, message: object, *, ring: bool = True) -> None:
        """Post an object to `dest`; without a `ring` it is seen when something else wakes that rank, or soon."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self.post(dest, CONTROL, data, data, ring=ring)

    def send_tensor(self, dest: int, tensor: Tensor) -> None:
        """Post a contiguous CPU tensor to `dest`, which has to know its size; it must not change until it is sent."""
        self.post(dest, TENSOR, as_bytes(tensor), tensor)

    @naming_the_lost
    def post(self, dest: int, tag: int, data: Any, memory: object, *, ring: bool = True) -> None:
        """Send bytes, wake the receiver, and hold `memory` until the send is complete."""
        request = self.comm.Isend([data, MPI.BYTE], dest, tag)
        if ring and dest in self.near:
            self.doorbell.ring(dest)
        self.reap()
        if not request.Test():
            self.pending.append((request, memory))

    def reap(self) -> None:
        """Let go of completed sends."""
        while self.pending and self.pending[0][0].Test():
            self.pending.popleft()

    @naming_the_lost
    def poll(self, source: int = MPI.ANY_SOURCE) -> tuple[int, Any] | None:
        """Give (rank, object) if one has come, else None."""
        self.reap()
        status = MPI.Status()
        # Open MPI looks at what has been taken in, and only then takes in what has come: one that has just come needs a
        # second look, which whoever was woken for it would otherwise have only after a further sleep.
        message = self.comm.Improbe(source, CONTROL, status) or self.comm.Improbe(source, CONTROL, status)
        if message is None:
            return None
        data = bytearray(status.Get_count(MPI.BYTE))
        message.Recv([data, MPI.BYTE])
        return status.Get_source(), pickle.loads(data)  # noqa: S301

    def receive(self, source: int = MPI.ANY_SOURCE, deadline_s: float | None = None) -> tuple[int, Any]:
        """Wait for an object and give (rank, object); without a deadline for as long as it takes."""
        patience = self.patience(f"a message of rank {source}", deadline_s)
        while (item := self.poll(source)) is None:
            patience.pause()
        return item

    @naming_the_lost
    def receive_tensor(self, source: int, out: Tensor) -> Tensor:
        """Wait for the tensor that `source` sent and put it into `out`, contiguous and of the same size."""
        request = self.comm.Irecv([as_bytes(out), MPI.BYTE], source, TENSOR)
        try:
            self.wait(request.Test, f"a tensor of rank {source}")
        except DeadlineError:
            request.Cancel()  # a late message must not be written into memory that is somebody else's by then
            self.pending.append((request, out))
            raise
        return out

    def all_reduce(self, tensor: Tensor, ranks: Sequence[int]) -> None:
        """Add up a contiguous `tensor` over `ranks` (this one among them), in place; the same bits on every rank.

        Each rank sends its part to every other: one hop, the best for the small sums of token steps. The parts are
        added in the order of `ranks`, 16-bit numbers in float32.
        """
        mine = tensor.clone()
        for rank in ranks:
            if rank != self.rank:
                self.send_tensor(rank, mine)
        total = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        part = torch.empty_like(tensor)
        for rank in ranks:
            total += mine if rank == self.rank else self.receive_tensor(rank, part)
        tensor.copy_(total)

    def lost_ranks(self) -> list[int]:
        """Give the ranks that MPI knows to have died; none where it does not watch them (no ULFM)."""
        try:
            failed = self.comm.Get_failed()
        except (MPI.Exception, NotImplementedError):
            return []
        return sorted(failed.Translate_ranks(list(range(failed.Get_size())), self.comm.Get_group()))

    def patience(self, what: str, deadline_s: float | None) -> Patience:
        """Begin a wait that sleeps at this rank's doorbell."""
        return Patience(what, deadline_s, self.doorbell.sleep)

    @naming_the_lost
    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Return when `ready()` is true; raise DeadlineError after the channel's deadline."""
        if ready():
            return
        patience = self.patience(what, self.deadline_s)
        while not ready():
            patience.pause()

    def flush(self) -> None:
        """Wait until all sends are complete."""

        def sent() -> bool:
            self.reap()
            return not self.pending

        self.wait(sent, "sends to complete")

    def close(self) -> None:
        """Complete the sends and free the communicator, once every rank does so."""
        self.flush()
        request = self.comm.Ibarrier()
        self.wait(request.Test, "the other ranks to close")
        self.doorbell.close()
        OPEN.remove(self)
        self.comm.Free()


def revoke_all() -> None:
    """Let every rank that waits at a channel, or at COMM_WORLD, fail at once; for a rank that has to leave the job."""
    for comm in [MPI.COMM_WORLD, *(channel.comm for channel in OPEN)]:
        with suppress(MPI.Exception):
            comm.Revoke()
    for _ in range(10):  # messages to other hosts leave in later calls of MPI
        MPI.COMM_SELF.Iprobe()
        time.sleep(0.005)


def as_bytes(tensor: Tensor) -> Any:
    """View a contiguous CPU tensor as a numpy array of bytes, sharing its memory."""
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy()
