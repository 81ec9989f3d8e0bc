"""Tokens on their way from the draw to the next pass, which may begin before the host has seen them."""

from dataclasses import dataclass, field

from torch import Tensor

from dejavu.model.sampling import upload


@dataclass(slots=True)
class UnseenTokens:
    """Keep what the newest pass of each microbatch draws where it is drawn: (its rows, int64 [rows])."""

    drawn: dict[int, tuple[list[int], Tensor]] = field(default_factory=dict)

    def note(self, microbatch: int, rows: list[int], token_ids: Tensor) -> None:
        """Keep the tokens of these rows in place of those of the pass before."""
        self.drawn[microbatch] = rows, token_ids

    def take(self, microbatch: int, rows: list[int]) -> Tensor:
        """Give the tokens of some of the rows, for what is queued behind their draw."""
        drawn_rows, token_ids = self.drawn[microbatch]
        if rows == drawn_rows:
            return token_ids
        places = [drawn_rows.index(row) for row in rows]
        return token_ids.index_select(0, upload(places, token_ids.device))
