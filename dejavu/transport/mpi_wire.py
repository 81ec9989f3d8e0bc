"""Notes and sleep for the wires that are built on MPI: small messages on a communicator of their own."""

import socket
from collections import deque
from typing import Any

from mpi4py import MPI

from dejavu.errors import DeadlineError
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.link import Wire
from dejavu.transport.notes import NOTE_BYTES, Kind, Note, unpack_note
from dejavu.transport.waiting import LONGEST_S, Doorbell, Patience, new_job_name

NOTE_TAG = 1
FIRST_DATA_TAG = 16
CLOSING_S = 30.0  # how long a rank that closes waits for the others
NAP_FAR_S, IDLE_NAP_FAR_S = 1e-3, 50e-3  # where ranks on other hosts, which cannot ring, may send


class MpiWire(Wire):
    """Exchange notes by MPI. Every rank of `comm` makes its wire at the same time, and closes it at the same time.

    Any MPI.Exception of a call that names a peer is taken for the loss of that peer.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        check_threads()
        super().__init__(comm.Get_rank(), comm.Get_size())
        self.comm = comm.Dup()
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.doorbell = Doorbell(self.comm.bcast(new_job_name()), self.rank)
        hosts: list[str] = self.comm.allgather(socket.gethostname())
        self.near = {rank for rank, host in enumerate(hosts) if host == hosts[self.rank]} - {self.rank}
        if len(self.near) == self.size - 1:
            self.longest_nap_s = LONGEST_S
        else:
            self.longest_nap_s, self.idle_nap_s = NAP_FAR_S, IDLE_NAP_FAR_S
        self._has_napped = False
        self._notes: deque[tuple[int, MPI.Request, bytes]] = deque()
        self._is_closed = False

    def post(self, peer: int, note: Note) -> None:
        """Send a note and ring."""
        if peer in self.lost:
            return
        data = note.pack()
        try:
            self._notes.append((peer, self.comm.Isend([data, MPI.BYTE], peer, NOTE_TAG), data))
        except MPI.Exception as error:
            self.lose(peer, error)
        self.ring(peer)

    def ring(self, peer: int) -> None:
        """Wake a peer of this host."""
        if peer in self.near:
            self.doorbell.ring(peer)

    def poll(self) -> bool:
        """Complete the notes that were sent, and take those that have come.

        Peers without transfers under way have little to say: they are looked at after a nap.
        """
        self._reap()
        has_come = False
        for peer in range(self.size):
            if peer == self.rank or peer in self.lost or not (self.users[peer] or self._has_napped):
                continue
            while (note := self._next(peer)) is not None:
                has_come = True
                self.deliver(peer, note)
        self._has_napped = False
        return has_come

    def nap(self, seconds: float | None) -> None:
        """Sleep at the doorbell."""
        self._has_napped = True
        self.doorbell.sleep(seconds)

    def wake(self) -> None:
        """Ring the own bell."""
        self.doorbell.ring(self.rank)

    def close(self) -> None:
        """Wait for the other ranks, and free the communicator; one that has lost a rank is left as it is."""
        if self._is_closed:
            return
        self._is_closed = True
        if self.meet():
            self.free()
        else:
            self.say_goodbye()
            self.forsake()
        self.doorbell.close()

    def meet(self) -> bool:
        """Wait until every rank closes; False where one is lost or does not come."""
        if self.lost:
            return False
        patience = Patience("the other ranks to close their carrier", CLOSING_S, self.doorbell.sleep)
        try:
            request = self.comm.Ibarrier()
            while not request.Test():
                patience.pause()
        except (MPI.Exception, DeadlineError):
            return False
        return True

    def say_goodbye(self) -> None:
        """Tell those that may wait for an answer that none will come: nothing else does, as this rank lives on."""
        for peer in range(self.size):
            if peer != self.rank:
                self.post(peer, Note(Kind.GOODBYE, 0))

    def free(self) -> None:
        """Free what every rank frees."""
        self.comm.Free()

    def forsake(self) -> None:
        """Let go, alone, of what has to be: some ranks will not close."""

    def test(self, peer: int, request: MPI.Request, status: MPI.Status | None = None) -> bool:
        """Tell whether a request is complete; one that fails means a lost peer, and never completes."""
        try:
            return bool(request.Test(status))
        except MPI.Exception as error:
            self.lose(peer, error)
            return False

    def _reap(self) -> None:
        while self._notes:
            peer, request, _ = self._notes[0]
            if not self.test(peer, request) and peer not in self.lost:
                return
            self._notes.popleft()

    def _next(self, peer: int) -> Note | None:
        data = bytearray(NOTE_BYTES)
        try:
            # A look makes progress only after it has looked: what has just come is seen by the next one.
            message = self.comm.Improbe(peer, NOTE_TAG) or self.comm.Improbe(peer, NOTE_TAG)
            if message is None:
                return None
            message.Recv([data, MPI.BYTE])
        except MPI.Exception as error:
            self.lose(peer, error)
            return None
        return unpack_note(data)


def check_threads() -> None:
    """Raise UnavailableError unless MPI lets a carrier's thread call it beside the others."""
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise UnavailableError("MPI runs without the MPI_THREAD_MULTIPLE that carriers need: leave mpi4py.rc be")


def bytes_of(buffer: Any) -> list[Any]:
    """Give what mpi4py takes for an array of bytes."""
    return [buffer, MPI.BYTE]
