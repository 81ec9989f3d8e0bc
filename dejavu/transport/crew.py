"""Say of a run's processes what each of them has to know of the others, and of one that joins them."""

from dataclasses import dataclass, replace

from dejavu.transport.membership import Membership, enlist
from dejavu.transport.waiting import Door

Name = tuple[int, int]  # a process's job, and its rank in that job's COMM_WORLD
Life = tuple[int, Name | None]  # the descriptor of what tells of its end, and by what name MPI is told


@dataclass(frozen=True, slots=True)
class Newcomer:
    """Say who a process is that is to join."""

    host: str
    pid: int
    life: Life


@dataclass(frozen=True, slots=True)
class Crew:
    """Say all of a channel's processes that one of them has to know, in the order of their numbers."""

    doorbell: str
    hosts: tuple[str, ...]
    pids: tuple[int, ...]
    membership: Membership
    lives: tuple[Life, ...]
    doors: tuple[Door | None, ...]  # where other hosts ring, if they can

    def enlist(self, newcomer: Newcomer) -> "Crew":
        """Give the crew with a process more."""
        return replace(
            self,
            hosts=(*self.hosts, newcomer.host),
            pids=(*self.pids, newcomer.pid),
            membership=enlist(self.membership, len(self.pids)),
            lives=(*self.lives, newcomer.life),
            doors=(*self.doors, None),
        )
