"""A stage that waits instead of computing, so that schedules can be studied at any scale on few cores."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dejavu.model.batch import Batch
from dejavu.model.spec import Shard


class SyntheticStage:
    """Take `prompt_ms` for a pass of prompts and `token_ms` for one of token steps, on this stage, without a core.

    A pass with chunks of prompts takes the chunks' part of `prompt_ms`, and at least `token_ms` with token steps in it.
    The hidden state of a token is its id. The next token is a hash of the last token and its position, so that a
    mistake in the order of tokens, rows or positions shows in the output.
    """

    hidden_size = 1
    dtype = torch.float32

    def __init__(self, shard: Shard, vocab_size: int, prompt_ms: float, token_ms: float) -> None:
        self.shard = shard
        self.vocab_size = vocab_size
        self.prompt_s = prompt_ms / 1e3
        self.token_s = token_ms / 1e3

    def warm_up(self, pool: Tensor, row_counts: Sequence[int], prompt_tokens: int) -> None:
        """Have nothing to prepare."""

    def forward(
        self, batch: Batch, hidden: Tensor | None, pool: Tensor, layer_done: Callable[[int], None] | None = None
    ) -> Tensor:
        """Wait; give the token ids as hidden states [num_tokens, 1], or logits [logit rows, vocabulary part]."""
        time.sleep(self.pass_s(batch))
        tokens = batch.token_ids.float()[:, None] if hidden is None else hidden
        return self.logits(batch, tokens) if self.shard.is_last else tokens

    def likeliest(self, logits: Tensor) -> Tensor:
        """Give the likeliest token of each row."""
        return logits.argmax(dim=-1)

    def pass_s(self, batch: Batch) -> float:
        """Give the time of a pass."""
        prompts = [new > 1 or before == 0 for new, before in zip(batch.num_new, batch.context, strict=True)]
        seconds = self.prompt_s * batch.prompt_share if any(prompts) else 0.0
        return seconds if all(prompts) else max(seconds, self.token_s)

    def logits(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Give logits with one peak in each row, at the hash of its last token and position."""
        start, stop = self.shard.vocab_range(self.vocab_size)
        last = torch.tensor(batch.num_new).cumsum(0) - 1
        logits = torch.zeros(len(batch.logit_rows), stop - start)
        for index, row in enumerate(batch.logit_rows):
            position = batch.context[row] + batch.num_new[row]
            peak = (int(tokens[last[row], 0]) * 31 + position * 17 + 7) % self.vocab_size
            if start <= peak < stop:
                logits[index, peak - start] = 1.0
        return logits
