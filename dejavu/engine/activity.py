"""How busy each worker was lately: what the controller shows of a run that is going on."""

from dataclasses import dataclass, field

from dejavu.engine.messages import Busy

FRESH_S = 2.0  # a worker that has said nothing for so long has no passes


@dataclass(slots=True)
class Activity:
    """Keep the share of the time that each rank computed, between the last two times that it said so; count swaps."""

    told: dict[int, tuple[float, float]] = field(default_factory=dict)  # by rank: (moment, share)
    num_fetches: int = 0  # of all ranks
    swapped_bytes: int = 0

    def take(self, rank: int, busy: Busy, now_s: float) -> None:
        """Note what a rank has done since it said so last."""
        last_s, _ = self.told.get(rank, (0.0, 0.0))
        window_s = min(now_s - last_s, FRESH_S)
        self.told[rank] = now_s, min(1.0, busy.compute_s / window_s) if window_s > 0 else 0.0
        self.num_fetches += busy.num_fetches
        self.swapped_bytes += busy.swapped_bytes

    def share(self, rank: int, now_s: float) -> float:
        """Give the share of the time that a rank computed lately."""
        moment_s, share = self.told.get(rank, (-FRESH_S, 0.0))
        return share if now_s - moment_s < FRESH_S else 0.0
