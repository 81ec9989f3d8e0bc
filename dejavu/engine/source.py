"""Where a worker's work comes from: the first stage's leader schedules it, every other rank is handed it."""

from typing import Protocol

from dejavu.engine.messages import Admissions, Release, Sampled, Stop, Work
from dejavu.engine.scheduler import Scheduler
from dejavu.transport.mpi import Channel


class Source(Protocol):
    """Give a worker its passes, one after the other."""

    def next(self) -> Work | None:
        """Wait for the next pass, without spinning; None when the run is over."""


class Upstream:
    """Take the passes that another rank hands on."""

    def __init__(self, channel: Channel, rank: int) -> None:
        self.channel = channel
        self.rank = rank

    def next(self) -> Work | None:
        """Wait for the next pass, as long as it takes."""
        _, message = self.channel.receive(self.rank)
        return None if isinstance(message, Stop) else message


class Scheduled:
    """Decide the passes: from the controller's admissions and the tokens that the last stage sampled."""

    def __init__(self, channel: Channel, scheduler: Scheduler) -> None:
        self.channel = channel
        self.scheduler = scheduler
        self.stopped = False

    def next(self) -> Work | None:
        """Wait until a microbatch can go."""
        patience = self.channel.patience("work", None)
        while not self.stopped:
            self.listen()
            if work := self.scheduler.next_work():
                return work
            patience.pause()
        return None

    def listen(self) -> None:
        """Take all messages that have come."""
        while item := self.channel.poll():
            match item[1]:
                case Admissions(admissions):
                    for admission in admissions:
                        self.scheduler.admit(admission)
                case Release(serial):
                    self.scheduler.release(serial)
                case Sampled() as result:
                    self.scheduler.sampled(result)
                case Stop():
                    self.stopped = True
                case other:
                    raise AssertionError(f"unexpected message {other!r}")
