"""Where a worker's work comes from: the first stage's leader schedules it, every other rank is handed it."""

from collections.abc import Callable
from typing import Protocol

from dejavu.engine.flight import Flights
from dejavu.engine.handover import Mover
from dejavu.engine.messages import Admissions, Release, Released, Resume, Sampled, Stop, Work
from dejavu.engine.scheduler import Scheduler
from dejavu.topology import CONTROLLER
from dejavu.transport.mpi import Channel


class Source(Protocol):
    """Give a worker its passes, one after the other."""

    def next(self) -> Work | None:
        """Wait for the next pass, without spinning; None when the run is over."""


class Upstream:
    """Take the passes that another rank hands on."""

    def __init__(self, channel: Channel, mover: Mover, flights: Flights) -> None:
        self.channel = channel
        self.mover = mover
        self.flights = flights

    def next(self) -> Work | None:
        """Wait for the next pass, as long as it takes."""
        patience = self.channel.patience("work", None)
        self.mover.look()
        self.flights.look()
        while True:
            while item := self.channel.poll():
                match item[1]:
                    case Work() as work:
                        return work
                    case Stop():
                        return None
                    case message:
                        self.mover.take(message)
            patience.pause(at_most_s=min(self.mover.look(), self.flights.look()))


class Scheduled:
    """Decide the passes: from the controller's admissions and the tokens that the last stage sampled."""

    def __init__(
        self, channel: Channel, mover: Mover, flights: Flights, scheduler: Scheduler, now_s: Callable[[], float]
    ) -> None:
        self.channel = channel
        self.mover = mover
        self.flights = flights
        self.scheduler = scheduler
        self.now_s = now_s
        self.stopped = False

    def next(self) -> Work | None:
        """Wait until a microbatch can go."""
        patience = self.channel.patience("work", None)
        while not self.stopped:
            self.listen()
            pause_s = min(self.mover.look(), self.flights.look())
            if work := self.scheduler.next_work():
                return work._replace(start_s=self.now_s())
            patience.pause(at_most_s=pause_s)
        return None

    def listen(self) -> None:
        """Take all messages that have come."""
        while item := self.channel.poll():
            match item[1]:
                case Admissions(admissions):
                    for admission in admissions:
                        self.scheduler.admit(admission)
                case Resume() as resume:
                    self.scheduler.resume(resume)
                case Release(serial):
                    self.channel.send(CONTROLLER, Released(serial, self.scheduler.release(serial)))
                case Sampled() as result:
                    self.scheduler.sampled(result)
                case Stop():
                    self.stopped = True
                case message:
                    self.mover.take(message)
