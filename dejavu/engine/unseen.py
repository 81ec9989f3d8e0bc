"""Tokens on their way from the draw to the host, and to the next pass, which may begin before they are seen there."""

from dataclasses import dataclass, field

from torch import Tensor

from dejavu.model.sampling import download, upload


class Landing:
    """Bring tokens to pinned memory in the order of the stream: again the same, once they were read."""

    def __init__(self) -> None:
        self.idle: dict[int, list[Tensor]] = {}  # by the number of tokens

    def take(self, token_ids: Tensor) -> Tensor:
        """Give a tensor that holds the tokens when the stream has passed this point."""
        if token_ids.device.type == "cpu":
            return token_ids
        idle = self.idle.setdefault(len(token_ids), [])
        return idle.pop().copy_(token_ids, non_blocking=True) if idle else download(token_ids)

    def give(self, host: Tensor, token_ids: Tensor) -> None:
        """Take back what `take` gave for these tokens, and was read."""
        if host is not token_ids:
            self.idle[len(host)].append(host)


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
