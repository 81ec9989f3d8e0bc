"""Who of the processes that mpirun started plays which rank: the same pure reckoning on every survivor of a failure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Membership:
    """Map ranks, as the engine names them, to processes, which keep the number that they were started with.

    A rank keeps its meaning for the whole run; a failure changes which process plays it. `epoch` counts the changes.
    """

    epoch: int
    places: tuple[int | None, ...]  # by rank: the process that plays it; None plays nobody any more
    processes: tuple[int, ...]  # by the rank in the communicator of this epoch

    @classmethod
    def first(cls, size: int) -> "Membership":
        """Begin a run: every process plays the rank of its number."""
        return cls(0, tuple(range(size)), tuple(range(size)))

    @property
    def present(self) -> tuple[int, ...]:
        """Give the ranks that a process plays."""
        return tuple(rank for rank, process in enumerate(self.places) if process is not None)

    def rank_of(self, process: int) -> int:
        """Give the rank that a process plays."""
        return self.places.index(process)

    def route(self, rank: int) -> int:
        """Give a rank's place in the communicator."""
        process = self.places[rank]
        assert process is not None, f"nobody plays rank {rank}"
        return self.processes.index(process)

    def origin(self, place: int) -> int:
        """Give the rank that is played at a place in the communicator."""
        return self.rank_of(self.processes[place])

    def lost(self, survivors: Sequence[int]) -> tuple[int, ...]:
        """Give the ranks whose process is not among the survivors."""
        alive = set(survivors)
        return tuple(rank for rank in self.present if self.places[rank] not in alive)

    @property
    def vacant(self) -> tuple[int, ...]:
        """Give the ranks that nobody plays."""
        return tuple(rank for rank, process in enumerate(self.places) if process is None)


def reassign(
    before: Membership,
    survivors: Sequence[int],
    first_spare: int,
    hosts: Sequence[str],
    devices: Sequence[int] | None = None,
) -> Membership:
    """Give the membership after a failure: spares take the places of the dead, the lowest rank's first.

    `survivors` are the processes by their rank in the new communicator; the ranks from `first_spare` on are spares;
    `hosts` names each process's host, `devices` its GPU there. A spare on the host of the dead is preferred, since a
    process can map the memory that its host keeps; there one on the same GPU, which computes with it where it lies. A
    place for which no spare is left stays vacant.
    """
    sites = list(zip(hosts, devices or [0] * len(hosts), strict=True))
    alive = set(survivors)
    places = [process if process in alive else None for process in before.places]
    for rank in range(first_spare):
        if places[rank] is None and (spare := choose_spare(places, first_spare, sites, before.places[rank])):
            places[rank], places[spare] = places[spare], None
    return Membership(before.epoch + 1, tuple(places), tuple(survivors))


def enlist(before: Membership, process: int) -> Membership:
    """Give the membership with a process more, the last one in the communicator: it takes the lowest vacant rank."""
    rank = before.vacant[0]
    places = (*before.places[:rank], process, *before.places[rank + 1 :])
    return Membership(before.epoch + 1, places, (*before.processes, process))


def starter(membership: Membership, hosts: Sequence[str]) -> int:
    """Give the rank that starts the next process, on its own host: the lowest on that which has lost the most.

    `hosts` names each process's host; the first ones, one for each rank, say how many a host is to have.
    """
    wanted = Counter(hosts[: len(membership.places)])
    present = {rank: hosts[membership.places[rank] or 0] for rank in membership.present}
    there = Counter(present.values())
    return min(present, key=lambda rank: (there[present[rank]] - wanted[present[rank]], rank))


def is_cut_off(before: Membership, survivors: Sequence[int], hosts: Sequence[str]) -> bool:
    """Tell whether these survivors are the smaller side of a cut network, which has to stop: the other one may go on.

    Who is left is such a side if all others are on other hosts, and are the majority of the last agreed membership; of
    two halves, the one without the lowest process.
    """
    here = {hosts[process] for process in survivors}
    lost = set(before.processes) - set(survivors)
    if not lost or any(hosts[process] in here for process in lost):
        return False
    return (len(survivors), min(lost)) < (len(lost), min(survivors))


def choose_spare(
    places: Sequence[int | None], first_spare: int, sites: Sequence[tuple[str, int]], dead: int | None
) -> int | None:
    """Give the rank of the spare that follows a dead process: on the same host if there is one, else the lowest."""
    spares = {rank: sites[process] for rank in range(first_spare, len(places)) if (process := places[rank]) is not None}
    if dead is None:
        return min(spares, default=None)
    host, device = sites[dead]
    return min(spares, key=lambda rank: (spares[rank][0] != host, spares[rank][1] != device, rank), default=None)
