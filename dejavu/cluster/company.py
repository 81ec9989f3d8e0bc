"""Keep the ranks of a run together: assemble them, and after the loss of one let a spare take its place."""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any, NoReturn

from dejavu.cluster.accelerator import accelerator_indices, share_memory
from dejavu.cluster.injection import IncidentLog
from dejavu.cluster.keeping import crosses_hosts, needs_replica_carrier
from dejavu.cluster.launcher import RUN_DIR
from dejavu.cluster.muster import Loss, Lost, Recruiting
from dejavu.engine.controller import Controller
from dejavu.engine.losses import note_losses
from dejavu.engine.messages import Ready, Rehearse
from dejavu.engine.recovery import Death, Gathered, who_died
from dejavu.engine.recovery_point import Restored, join_restored
from dejavu.engine.seating import Lane
from dejavu.engine.setup import EngineSetup
from dejavu.errors import EndedByPeerError, PeerLostError
from dejavu.measure.clock import ClockSample, RunClock, estimate_offset
from dejavu.measure.run_directory import RunDirectory
from dejavu.topology import CONTROLLER
from dejavu.transport.membership import is_cut_off
from dejavu.transport.mpi import Channel
from dejavu.transport.recruit import Recruit

LOAD_DEADLINE_S = 1800.0
CLOCK_SAMPLES = 10
MOST_FALSE_ALARMS = 3  # in a row, after which an error that is no rank's death is one of this program


class Rounds:
    """Reform the ranks after each loss, on every rank alike."""

    def __init__(self, channel: Channel, setup: EngineSetup, lost: Lost = ()) -> None:
        """Begin with nobody lost; or, in a process that has joined, with who was lost before."""
        self.channel = channel
        self.setup = setup
        channel.is_recoverable = setup.is_recoverable
        self.false_alarms = 0
        directory = os.environ.get(RUN_DIR, "/nowhere")
        self.incidents = IncidentLog(Path(directory))
        self.result = RunDirectory(Path(directory)).result_file
        self.recruiting = Recruiting(channel, setup, directory, Recruit)
        self.lost = list(lost)  # until `settle` has told

    def reform(self, error: PeerLostError) -> tuple[Death, ...]:
        """Find out who is left, and let spares take the places of the dead; raise the error where that cannot be."""
        if not self.setup.is_recoverable:
            self.give_up(error)
        while True:
            self.count_survivors(error, time.monotonic())
            try:
                return self.settle()
            except EndedByPeerError:
                raise
            except PeerLostError as again:
                error = again

    def give_up(self, error: PeerLostError) -> NoReturn:
        """End the run, and say who was lost; raise the error itself where this rank does not know."""
        now, membership = time.monotonic(), self.channel.membership
        self.lost += [Loss(membership.rank_of(process), process, now) for process in self.channel.lost_processes()]
        if not self.lost or isinstance(error, EndedByPeerError):
            raise error
        who = self.note_end(self.lost)
        remedy = "look for its last words above, and start with --spares"
        raise PeerLostError(f"{who}, and there is no spare to take over: {remedy}") from error

    def note_end(self, lost: Lost) -> str:
        """Leave word of who was lost with the run, for whoever goes on with it; give it in words."""
        deaths = [(self.describe(loss.rank, loss.process), loss.detected_s) for loss in lost]
        note_losses(self.incidents.path.parent, deaths)
        return " and ".join(who_died(death.target, death.process, death.kind) for death, _ in deaths)

    def count_survivors(self, error: PeerLostError, detected_s: float) -> None:
        """Agree on who is left; raise an error where the run cannot go on with them."""
        topology, before = self.setup.topology, self.channel.membership
        devices = accelerator_indices(self.channel.process_hosts, self.setup.num_devices)  # the same on every rank
        lost = self.channel.recover(topology.first_spare, devices)
        if self.result.exists():
            raise EndedByPeerError("another rank has ended the job: look for its error above")
        membership = self.channel.membership
        if is_cut_off(before, membership.processes, self.channel.process_hosts):
            raise PeerLostError("most other ranks are out of reach: this side of a cut network stops") from error
        self.false_alarms = 0 if lost else self.false_alarms + 1
        if self.false_alarms > MOST_FALSE_ALARMS:
            raise error
        self.lost += [Loss(rank, before.places[rank] or 0, detected_s) for rank in lost]
        workers = [loss for loss in self.lost if loss.rank < topology.first_spare]
        vacant = [loss for loss in workers if membership.places[loss.rank] is None]
        if vacant and not self.setup.is_refilled:
            who = self.note_end(vacant)
            raise PeerLostError(f"{who}, and no spare is left to take over: start with more --spares") from error

    def settle(self) -> tuple[Death, ...]:
        """Let processes join who are to, and give who was lost; all ranks call this together."""
        if self.setup.is_refilled and self.recruiting.muster(self.lost):
            self.false_alarms = 0
        lost, self.lost = self.lost, []
        return tuple(self.describe(loss.rank, loss.process) for loss in lost)

    def describe(self, rank: int, process: int) -> Death:
        """Say what is known of a process that died."""
        mine = [incident for incident in self.incidents.read() if incident.pid == self.channel.pids[process]]
        injected_s = min((incident.time_s for incident in mine if incident.fault >= 0), default=nan)
        is_hang = any(incident.kind != "kill" for incident in mine)
        successor = self.channel.membership.places[rank]
        return Death(self.setup.topology.name(rank), process, successor, "hang" if is_hang else "death", injected_s)

    def refill(self) -> None:
        """Start a process for a spare that was used up, and let all ranks pause for it to join if none is left."""
        if self.setup.is_refilled and self.recruiting.is_called_for():
            self.channel.revoke()

    def dismiss(self) -> None:
        """End what was started and is not needed any more."""
        self.recruiting.dismiss()


class WorkerCompany(Rounds):
    """See all workers as the controller does, from the start, or where it `continues` an earlier controller's run."""

    def __init__(self, channel: Channel, setup: EngineSetup, controller: Controller, *, continues: bool) -> None:
        super().__init__(channel, setup)
        self.controller = controller
        self.continues = continues
        self.gathered_epoch: int | None = None

    def gather(self) -> Gathered:
        """Wait until everybody is ready to go on, and share the clock."""
        ranks = [placement.rank for placement in self.setup.topology.workers]
        workers_comm(self.channel, self.setup)
        if self.channel.membership.epoch == 0:
            for line in share_memory(self.channel, self.setup, ranks, LOAD_DEADLINE_S):
                self.controller.announce(line)
        ready = self.controller.wait_ready(ranks, LOAD_DEADLINE_S)
        self.call_rehearsal()
        if self.gathered_epoch is None:
            for line in describe_links(ready):
                self.controller.announce(line)
            if not self.continues:
                self.controller.start_clock()
                self.controller.journal.note("start", *self.controller.clock.describe())
        self.gathered_epoch = self.channel.membership.epoch
        share_clock(self.channel, ranks, self.controller.clock)
        left = [self.what_is_left(number, lane, ready) for number, lane in enumerate(self.controller.seating.lanes)]
        num_bytes = sum(answer.restored_bytes for answer in ready.values())
        return Gathered(left, num_bytes, sum(answer.kept_bytes for answer in ready.values()))

    def what_is_left(self, number: int, lane: Lane, ready: Mapping[int, Ready]) -> Restored:
        """Say what a pipeline has of its KV by what its ranks say, and what it has to have by what they said before.

        What is swapped is known by its flushes, which nobody is told of.
        """
        left = join_restored((ready[rank].keeps_kv, ready[rank].tokens) for rank in lane.ranks)
        lane.forget_replicas(rank for rank in lane.ranks if ready[rank].has_new_replica)
        is_swapped = self.setup.caches[number].is_swapped
        lost = [rank for rank in lane.ranks if is_swapped or not ready[rank].keeps_kv]
        most_behind = lane.most_behind(lost, self.setup.config.replicate_every) if self.copies_in_step(lane) else ()
        return replace(left, acknowledged=lane.acknowledged(lost), most_behind=most_behind)

    def copies_in_step(self, lane: Lane) -> bool:
        """Tell whether every rank copies a pass before it begins another one, as a CPU does on its own host."""
        crosses = any(crosses_hosts(self.channel, self.setup, rank) for rank in lane.ranks)
        return lane.is_replicated and not self.setup.on_cuda and not crosses

    def call_rehearsal(self) -> None:
        """Let spares prepare what they may have to take over; before requests are taken, wait for it."""
        spares = [rank for rank in self.channel.membership.present if rank >= self.setup.topology.first_spare]
        for rank in spares:
            self.channel.send(rank, Rehearse())
        if self.gathered_epoch is None and not self.continues:
            self.controller.wait_ready(spares, LOAD_DEADLINE_S)

    def assemble(self) -> None:
        """Gather everybody at the start; nothing to do where a loss has made that necessary already."""
        if self.gathered_epoch != self.channel.membership.epoch:
            self.gather()


def describe_links(answers: Mapping[int, Ready]) -> list[str]:
    """Say how the GPUs are joined, each way once with the ranks that use it."""
    users: dict[str, list[int]] = {}
    for rank, ready in sorted(answers.items()):
        for note in ready.notes:
            users.setdefault(note, []).append(rank)
    return [f"{note} (rank {', '.join(map(str, ranks))})" for note, ranks in users.items()]


def share_clock(channel: Channel, workers: list[int], clock: RunClock) -> None:
    """Tell the run's clock, and let workers on other hosts find out how far theirs is off."""
    for rank in workers:
        channel.send(rank, clock.origin_s)
        if rank not in channel.near:
            for _ in range(CLOCK_SAMPLES):
                channel.receive(rank, channel.deadline_s)
                channel.send(rank, time.monotonic())


def join_clock(channel: Channel) -> RunClock:
    """Take the controller's clock."""
    _, origin_s = channel.receive(CONTROLLER)
    if CONTROLLER in channel.near:
        return RunClock.join(origin_s)
    samples = []
    for _ in range(CLOCK_SAMPLES):
        sent_s = time.monotonic()
        channel.send(CONTROLLER, None)
        _, remote_s = channel.receive(CONTROLLER, channel.deadline_s)
        samples.append(ClockSample(sent_s, remote_s, time.monotonic()))
    return RunClock.join(origin_s, estimate_offset(samples))


def workers_comm(channel: Channel, setup: EngineSetup) -> Any:
    """Make the workers' own communicator, where a rank is one less, if KV moves between them; all ranks call this."""
    if not setup.moves_kv and not needs_replica_carrier(channel, setup):
        return None
    is_worker = setup.topology.placements[channel.rank].shard is not None
    return channel.split(int(is_worker))
