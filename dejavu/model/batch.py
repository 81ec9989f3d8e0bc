"""Describe one forward pass over some rows of a microbatch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Batch:
    """List the rows of one pass: new token j of row i has position `context[i] + j`.

    `token_ids` (int64 [num_tokens], one row after the other) is read by the first stage only. `blocks[i]` are enough
    for `context[i] + num_new[i]` tokens. `logit_rows` are the rows whose last new token's logits are wanted.
    """

    token_ids: Tensor
    num_new: list[int]
    context: list[int]
    blocks: list[list[int]]
    logit_rows: list[int]
    prompt_share: float = 1.0  # of the prompts of the rows that process one, the part that is in this pass

    @property
    def num_rows(self) -> int:
        """Count the rows."""
        return len(self.num_new)

    @property
    def row_starts(self) -> list[int]:
        """Give each row's first new token as an index into the pass, and the number of tokens at the end."""
        return [0, *accumulate(self.num_new)]

    @property
    def positions(self) -> list[int]:
        """Give the position of every new token."""
        if self.is_token_generation:
            return self.context
        return [start + j for start, count in zip(self.context, self.num_new, strict=True) for j in range(count)]

    @property
    def is_token_generation(self) -> bool:
        """Tell whether every row has one new token after earlier ones."""
        return max(self.num_new) == 1 and min(self.context) > 0

    @property
    def logit_tokens(self) -> list[int]:
        """Give the tokens (indices into the pass) whose logits are wanted."""
        starts = self.row_starts
        return [starts[row + 1] - 1 for row in self.logit_rows]
