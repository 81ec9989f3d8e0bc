"""The MPI carrier: control messages and tensors between ranks, by point-to-point calls that never spin."""

import os
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

from dejavu.errors import DeadlineError, EndedByPeerError, PeerLostError
from dejavu.transport.carrier import UnavailableError
from dejavu.transport.crew import Crew, Life, Newcomer
from dejavu.transport.half_made import guard_half_made
from dejavu.transport.lifeline import Lifeline
from dejavu.transport.membership import Membership, reassign
from dejavu.transport.obituary import declare_dead, own_name
from dejavu.transport.registry import INTERFACE
from dejavu.transport.tcp_meeting import own_address
from dejavu.transport.waiting import Door, Doorbell, Patience, new_job_name

CONTROL, TENSOR = 1, 2
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
BRIDGE_TAG, NOTICE = 3, 4
OPEN: set["Channel"] = set()  # all channels of this process
ABANDONED: list[object] = []  # requests of failed communicators, and the memory that MPI may still use


def suspecting(
    method: Callable[Concatenate["Channel", Parameters], Result],
) -> Callable[Concatenate["Channel", Parameters], Result]:
    """Let a method of Channel raise PeerLostError on every rank where MPI reports on one that a rank has died.

    Open MPI's error classes vary, so any error is a suspicion: the communicator is revoked, which ends the waits of all
    ranks at it, and they find out together who is left.
    """

    @wraps(method)
    def checked(self: "Channel", /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        except MPI.Exception as error:
            self.revoke()
            raise self.describe_loss(error) from error

    return checked


class Channel:
    """Exchange objects and tensors with the other ranks of a communicator, of which it owns a duplicate.

    Objects are pickled: the ranks of one job trust each other. Messages from one rank arrive in the order in which
    they were sent, objects and tensors apart. Sends return at once; their memory is kept until they are complete.
    Every rank of `comm` has to make its channel at the same time. Waits pass `deadline_s`, or raise DeadlineError.

    Ranks are those of the engine, and `membership` says which process plays each. When a rank dies, every call of every
    rank raises PeerLostError, until all have called `recover`; what was under way is lost then.
    """

    def __init__(
        self, comm: MPI.Intracomm, deadline_s: float, crew: Crew | None = None, lifeline: Lifeline | None = None
    ) -> None:
        """Make a channel together with all of `comm`.

        A process that was enlisted makes its own as the last of its `crew`, with the `lifeline` that they know of it.
        """
        guard_half_made()
        self.comm = comm if crew else comm.Dup()
        self.lifeline = lifeline or Lifeline()
        if crew:
            self.process = crew.membership.processes[comm.Get_rank()]
            self.doorbell = Doorbell(crew.doorbell, self.process)
        else:
            self.process = comm.Get_rank()
            crew, self.doorbell = meet(self.comm, self.lifeline.fd)
        self.deadline_s = deadline_s
        self.pending: deque[tuple[MPI.Request, object]] = deque()  # with the memory that MPI may still use
        self.is_recoverable = False
        OPEN.add(self)
        self.know(crew)

    @property
    def crew(self) -> Crew:
        """Give what a process that joins has to know."""
        hosts, pids = tuple(self.process_hosts), tuple(self.pids)
        return Crew(self.doorbell.job, hosts, pids, self.membership, tuple(self.lives), self.doors)

    def know(self, crew: Crew) -> None:
        """Take all processes as they are from now on."""
        self.process_hosts, self.pids, self.lives = list(crew.hosts), list(crew.pids), list(crew.lives)
        self.doors = crew.doors
        self.join(crew.membership)

    def join(self, membership: Membership) -> None:
        """Take the ranks as they are played from now on."""
        self.membership = membership
        self.rank = membership.rank_of(self.process)
        self.size = len(membership.places)
        here = self.process_hosts[self.process]
        places = membership.places
        self.near = {r for r in membership.present if self.process_hosts[places[r] or 0] == here} - {self.rank}

    @property
    def hosts(self) -> list[str]:
        """Give the host of the process that plays each rank; nothing where nobody does."""
        return ["" if p is None else self.process_hosts[p] for p in self.membership.places]

    def send(self, dest: int, message: object, *, ring: bool = True) -> None:
        """Post an object to `dest`; without a `ring` it is seen when something else wakes that rank, or soon."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self.post(dest, CONTROL, data, data, ring=ring)

    def send_to_all(self, dests: Sequence[int], message: object) -> None:
        """Post an object to several ranks."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        for dest in dests:
            self.post(dest, CONTROL, data, data)

    def send_if_whole(self, dest: int, message: object) -> None:
        """Post an object to `dest`, unless a rank was lost, which the next call of another method tells."""
        with suppress(PeerLostError):
            self.send(dest, message)

    def notify(self, dest: int) -> None:
        """Let `dest` find `is_notified` until the next change of membership; any thread may."""
        with suppress(MPI.Exception):
            self.comm.Isend([b"", MPI.BYTE], self.membership.route(dest), NOTICE).Free()

    def is_notified(self) -> bool:
        """Tell whether anybody has notified this rank."""
        try:
            return self.comm.Iprobe(MPI.ANY_SOURCE, NOTICE)
        except MPI.Exception:  # of a lost rank, which other calls tell
            return False

    def send_tensor(self, dest: int, tensor: Tensor) -> None:
        """Post a contiguous CPU tensor to `dest`, which has to know its size; it must not change until it is sent."""
        self.post(dest, TENSOR, as_bytes(tensor), tensor)

    @suspecting
    def post(self, dest: int, tag: int, data: Any, memory: object, *, ring: bool = True) -> None:
        """Send bytes, wake the receiver, and hold `memory` until the send is complete."""
        request = self.comm.Isend([data, MPI.BYTE], self.membership.route(dest), tag)
        if ring:
            self.ring(dest)
        self.reap()
        if not request.Test():
            self.pending.append((request, memory))

    def reap(self) -> None:
        """Let go of completed sends."""
        while self.pending and self.pending[0][0].Test():
            self.pending.popleft()

    @suspecting
    def poll(self, source: int = MPI.ANY_SOURCE) -> tuple[int, Any] | None:
        """Give (rank, object) if one has come, else None."""
        self.heed_alarm()
        self.reap()
        status = MPI.Status()
        place = source if source == MPI.ANY_SOURCE else self.membership.route(source)
        # Open MPI looks at what has been taken in, and only then takes in what has come: one that has just come needs a
        # second look, which whoever was woken for it would otherwise have only after a further sleep.
        message = self.comm.Improbe(place, CONTROL, status) or self.comm.Improbe(place, CONTROL, status)
        if message is None:
            return None
        data = bytearray(status.Get_count(MPI.BYTE))
        message.Recv([data, MPI.BYTE])
        return self.membership.origin(status.Get_source()), pickle.loads(data)  # noqa: S301

    def receive(self, source: int = MPI.ANY_SOURCE, deadline_s: float | None = None) -> tuple[int, Any]:
        """Wait for an object and give (rank, object); without a deadline for as long as it takes."""
        patience = self.patience(f"a message of rank {source}", deadline_s)
        while (item := self.poll(source)) is None:
            patience.pause()
        return item

    @suspecting
    def receive_tensor(self, source: int, out: Tensor) -> Tensor:
        """Wait for the tensor that `source` sent and put it into `out`, contiguous and of the same size."""
        request = self.comm.Irecv([as_bytes(out), MPI.BYTE], self.membership.route(source), TENSOR)
        try:
            self.wait(request.Test, f"a tensor of rank {source}")
        except DeadlineError:
            request.Cancel()  # a late message must not be written into memory that is somebody else's by then
            self.pending.append((request, out))
            raise
        except PeerLostError:
            ABANDONED.append((request, out))
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

    def lost_processes(self) -> list[int]:
        """Give the processes that MPI knows to have died; none where it does not watch them (no ULFM)."""
        try:
            failed = self.comm.Get_failed()
        except (MPI.Exception, NotImplementedError):
            return []
        return sorted(self.translate(failed, self.comm.Get_group()))

    def translate(self, group: MPI.Group, known: MPI.Group) -> list[int]:
        """Give the processes of a group, in its order, whose members belong to the present communicator's group."""
        places = group.Translate_ranks(list(range(group.Get_size())), known)
        return [self.membership.processes[place] for place in places]

    def describe_loss(self, error: MPI.Exception) -> Exception:
        """Say who has died, if anybody is known to have; else give the error as it is."""
        if lost := self.lost_processes():
            return PeerLostError(
                f"{self.names(lost)} died: look for its last words above, and in `dmesg` for a lack of memory"
            )
        if error.Get_error_class() == MPI.ERR_REVOKED:
            return EndedByPeerError("another rank has ended the job: look for its error above")
        return PeerLostError(f"MPI lost a rank, or failed ({error.Get_error_string()}): look for errors above")

    def revoke(self) -> None:
        """Let every rank that waits at this channel fail at once."""
        with suppress(MPI.Exception):
            if not self.comm.Is_revoked():
                self.comm.Revoke()
        for rank in self.membership.present:
            self.ring(rank)

    def ring(self, rank: int) -> None:
        """Wake another rank, if it can be: one that joined later cannot from another host."""
        process = self.membership.places[rank]
        assert process is not None
        if rank in self.near:
            self.doorbell.ring(process)
        elif rank != self.rank and (door := self.doors[process]):
            self.doorbell.ring_far(door)

    def follow_lives(self) -> None:
        """Map what tells of the end of the other processes of this host; before any of them may have ended well."""
        here = self.process_hosts[self.process]
        for process in self.membership.processes:
            is_new = process != self.process and process not in self.lifeline.others
            if self.process_hosts[process] == here and is_new:
                with suppress(FileNotFoundError, ProcessLookupError):  # it has died already, as MPI will tell
                    self.lifeline.follow(process, self.pids[process], self.lives[process][0])

    def is_followed(self, process: int) -> bool:
        """Tell whether `await_end` can tell of a process."""
        return process in self.lifeline.others

    def await_end(self, process: int, seconds: float) -> bool:
        """Wait, at most so long, for the end of another process of this host; any thread may."""
        return self.lifeline.await_end(process, seconds)

    def raise_alarm(self) -> None:
        """Let every rank of this host see that a process has ended, this one too; any thread may."""
        for rank in {self.rank, *self.near}:
            if (process := self.membership.places[rank]) is not None:
                self.doorbell.ring(process, alarm=True)

    def heed_alarm(self) -> None:
        """Where somebody has raised the alarm, tell MPI who has died, and raise PeerLostError as it would, later."""
        if not self.doorbell.has_alarm:
            return
        self.doorbell.has_alarm = False
        followed = [process for process in self.membership.processes if process in self.lifeline.others]
        dead = [process for process in followed if self.lifeline.has_ended(process)]
        declared = [process for process in dead if (name := self.lives[process][1]) and declare_dead(name)]
        if declared:
            self.revoke()
            raise PeerLostError(f"{self.names(declared)} died: look for its last words above")

    def names(self, processes: Sequence[int]) -> str:
        """Name processes for people."""
        ranks = ", ".join(f"{self.membership.rank_of(p)} on {self.process_hosts[p]}" for p in processes)
        return f"rank {ranks}"

    def recover(self, first_spare: int, devices: Sequence[int] | None = None) -> tuple[int, ...]:
        """Find out with all other survivors who is left, let spares take the places of the dead, and begin anew.

        `devices` is each process's GPU, the same on all ranks; see `reassign`.
        Gives the ranks that were lost. Every survivor calls this after a PeerLostError; who dies meanwhile is lost,
        too. Afterwards no message of before arrives any more. A rank that nobody plays is vacant in `membership`.
        Raises PeerLostError where a rank has ended the job for a reason of its own.
        """
        ABANDONED.extend(self.pending)
        self.pending.clear()
        self.revoke()
        before = self.membership
        comm, survivors = self.shrink()
        self.comm = comm
        self.join(reassign(before, survivors, first_spare, self.process_hosts, devices))
        return before.lost(survivors)

    def enlist(self, newcomer: Newcomer, leader: int, recruit: MPI.Intercomm | None) -> None:
        """Let a process join that was started later; it takes the lowest vacant rank.

        All ranks call this after `recover`, before they send anything; rank `leader` gives its `recruit`, which calls
        `join_crew`. Raises PeerLostError, on all of them, where somebody has died meanwhile: then `recover` is next.
        """
        comm, place = self.comm, self.membership.route(leader)

        def build() -> MPI.Intercomm:
            pair = recruit.Merge(False) if recruit else MPI.COMM_SELF
            return comm.Create_intercomm(place, pair, 1, BRIDGE_TAG)

        bridge = unanimous(comm, build)
        union = unanimous(comm, lambda: bridge.Merge(False))
        is_whole = agree(union, True)
        self.comm = union
        self.know(self.crew.enlist(newcomer))
        self.follow_lives()
        if not is_whole:
            raise PeerLostError("a rank died while another one joined")

    @suspecting
    def split(self, color: int) -> MPI.Intracomm:
        """Make a communicator of the ranks that give the same `color`, in their order; all ranks call this."""
        part = self.comm.Split(color, self.rank)
        assert isinstance(part, MPI.Intracomm)
        return part

    def shrink(self) -> tuple[MPI.Intracomm, list[int]]:
        """Make a communicator of the survivors; give it, and the processes in its order.

        It must not be revoked before all have agreed on it, so that nobody is left waiting for a communicator.
        """
        comm: MPI.Comm = self.comm
        while True:
            if MPI.COMM_WORLD.Is_revoked():
                raise EndedByPeerError("another rank has ended the job: look for its error above")
            comm = comm.Shrink()
            assert isinstance(comm, MPI.Intracomm)
            survivors = self.translate(comm.Get_group(), self.comm.Get_group())
            if (verdict := agree(comm, not MPI.COMM_WORLD.Is_revoked())) is not None:
                break
        if not verdict:
            raise EndedByPeerError("another rank has ended the job: look for its error above")
        return comm, survivors

    def patience(self, what: str, deadline_s: float | None) -> Patience:
        """Begin a wait that sleeps at this rank's doorbell."""
        return Patience(what, deadline_s, self.doorbell.sleep)

    @suspecting
    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Return when `ready()` is true; raise DeadlineError after the channel's deadline."""
        if ready():
            return
        patience = self.patience(what, self.deadline_s)
        while not ready():
            patience.pause()
            self.heed_alarm()

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
        self.leave()
        self.comm.Free()

    def agree_to_leave(self) -> None:
        """Wait for all ranks that are left, so that nobody takes another's leaving for a death."""
        agree(self.comm, True)
        self.leave()

    def leave(self) -> None:
        """Give up the doorbell, and the communicator as it is."""
        self.doorbell.close()
        self.lifeline.close()
        OPEN.remove(self)


def meet(comm: MPI.Intracomm, lifeline: int) -> tuple[Crew, Doorbell]:
    """Find out who takes part, together with all ranks at a run's start, and make this one's doorbell.

    `lifeline` is this rank's descriptor.
    """
    name = comm.bcast(new_job_name())
    mine = socket.gethostname(), os.getpid(), (lifeline, own_name())
    found: list[tuple[str, int, Life]] = comm.allgather(mine)
    hosts, pids, lives = zip(*found, strict=True)
    doorbell = Doorbell(name, comm.Get_rank(), far_address(hosts, comm.Get_rank()))
    doors: list[Door | None] = comm.allgather(doorbell.door)
    return Crew(name, hosts, pids, Membership.first(len(found)), lives, tuple(doors)), doorbell


def far_address(hosts: Sequence[str], rank: int) -> str | None:
    """Give the address where other hosts ring this rank; None without any, or without a way to them by name."""
    if len(set(hosts)) == 1:
        return None
    with suppress(UnavailableError):
        return own_address(os.environ.get(INTERFACE), list(hosts), rank)
    return None


def join_crew(parent: MPI.Intercomm, crew: Crew, lifeline: Lifeline, deadline_s: float) -> Channel:
    """Be the process that the others `enlist`, and whose `parent` leads them; raise PeerLostError where that fails."""
    try:
        bridge = MPI.COMM_SELF.Create_intercomm(0, parent.Merge(True), 0, BRIDGE_TAG)
        union = bridge.Merge(True)
    except MPI.Exception as error:
        raise PeerLostError(f"the others could not let this process join ({error}): they start another one") from error
    agree(union, True)  # a loss meanwhile is met again at the first look
    return Channel(union, deadline_s, crew, lifeline)


def unanimous(comm: MPI.Intracomm, action: Callable[[], Result]) -> Result:
    """Do something together with all ranks, and give its result; PeerLostError on all of them where one has failed."""
    error = None
    try:
        result = action()
    except MPI.Exception as raised:
        error = raised
        with suppress(MPI.Exception):
            comm.Revoke()
    if not agree(comm, error is None):
        raise PeerLostError("a rank died while another one was to join") from error
    return result


def agree(comm: MPI.Intracomm, opinion: bool) -> bool | None:
    """Tell whether all ranks agree; None, on all of them, where one has died meanwhile."""
    try:
        return bool(comm.Agree(int(opinion)))
    except MPI.Exception:
        return None


def survivors_are_sought() -> bool:
    """Tell whether other ranks may be looking for survivors, this one among them, when it leaves."""
    return any(channel.is_recoverable for channel in OPEN)


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
