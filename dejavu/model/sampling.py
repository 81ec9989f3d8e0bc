"""Take the next token of every row from the last stage's logits, as a pure function of what each row has seen.

Order, as vLLM's: (1) bad words, (2) `min_tokens`, (3) logit bias, (4) repetition penalty over prompt and output,
(5) frequency and presence penalty over the output, then for rows with a temperature (6) temperature, (7) top-k,
(8) top-p of what top-k left, (9) the draw. A row whose temperature is below 1e-5 is greedy: the largest logit
after (5), the lowest token id among equals.

The draw takes argmax(logit / temperature + Gumbel noise), where the noise of a token is a hash of (seed, position,
token id) and of nothing else: there is no generator, so a replayed step, another batch or another split of the model
draws the same token. It is preferred to inverting the cumulative distribution because it forgives rounding: an error
of at most e in the logits changes the token with a probability of at most about 2e / temperature, whatever the
vocabulary, while every boundary of a cumulative sum over 50 000 tokens moves.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dejavu.request import SamplingParams, TokenLogprobs

GREEDY_BELOW = 1e-5  # a temperature under which dividing by it would overflow float32
NUCLEUS_GUESS = 1024  # likeliest tokens that top-p looks at before it sorts a whole row
MASK64 = (1 << 64) - 1


@dataclass(slots=True)
class RowState:
    """Hold what the draw of a row depends on; `output` grows by the token drawn, by the caller's hand.

    `num_unseen` tokens were drawn behind `output` that nobody has seen yet: not for rows that read their output.
    """

    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    prompt: list[int]
    output: list[int]
    num_unseen: int = 0
    is_plain: bool = field(init=False)

    def __post_init__(self) -> None:
        """Note whether an argmax of the raw logits is all that this row ever needs."""
        without_effect = ("max_tokens", "stop", "stop_token_ids", "ignore_eos", "seed", "temperature", "top_k", "top_p")
        neutral = replace(SamplingParams(), **{name: getattr(self.params, name) for name in without_effect})
        self.is_plain = self.is_greedy and self.params == neutral

    @property
    def position(self) -> int:
        """Count the output tokens before the one to draw."""
        return len(self.output) + self.num_unseen

    @property
    def is_greedy(self) -> bool:
        """Tell whether the likeliest token is taken, without a draw."""
        return self.params.temperature < GREEDY_BELOW

    @property
    def is_truncated(self) -> bool:
        """Tell whether top-k or top-p leaves a part of the vocabulary only."""
        return self.params.top_k > 0 or self.params.top_p < 1.0


class Sampled(NamedTuple):
    """Hold one row's new token, and its log-probabilities where the request asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class Draw:
    """Hold tokens that are being drawn: each row's, and what is reported of some rows, in host memory.

    From a GPU they come in stream order: read them when the stream has passed the draw.
    """

    token_ids: Tensor  # int64 [num_rows]
    drawn: Tensor  # the same on the device, for what is queued behind the draw
    reported: dict[int, int]  # row → the number of likeliest tokens that it asked for
    logprobs: tuple[Tensor, Tensor, Tensor] | None  # of these rows: the token's, the likeliest ones', and their ids

    def read(self) -> list[Sampled]:
        """Give each row's token."""
        reports = dict(zip(self.reported, self._reports(), strict=True)) if self.logprobs else {}
        return [Sampled(token_id, reports.get(row)) for row, token_id in enumerate(self.token_ids.tolist())]

    def _reports(self) -> Iterator[TokenLogprobs]:
        assert self.logprobs is not None
        chosen, values, ids = (part.tolist() for part in self.logprobs)
        for i, count in enumerate(self.reported.values()):
            yield TokenLogprobs(chosen[i], tuple(zip(ids[i][:count], values[i][:count], strict=True)))


def sample(logits: Tensor, rows: Sequence[RowState]) -> list[Sampled]:
    """Draw one token per row and wait for it; arguments as `start_draw`."""
    draw = start_draw(logits, rows)
    if logits.is_cuda:
        torch.cuda.current_stream(logits.device).synchronize()
    return draw.read()


def start_draw(
    logits: Tensor,
    rows: Sequence[RowState],
    likeliest: Callable[[Tensor], Tensor] | None = None,
    land: Callable[[Tensor], Tensor] | None = None,
) -> Draw:
    """Begin to draw one token per row; `logits` is float32 [num_rows, vocab], read only.

    `likeliest` gives the argmax of each row, `land` brings tokens to the host, where there is a better way than usual.

    A token that an id in its parameters names must be in the
    vocabulary. Log-probabilities are those of the raw logits, before any of the module's steps, as vLLM's. On a GPU
    everything is queued on torch's current stream, without waiting for it.
    """
    assert logits.shape[0] == len(rows), f"{logits.shape[0]} rows of logits for {len(rows)} rows"
    if all(row.is_plain for row in rows):
        token_ids = likeliest(logits) if likeliest else logits.argmax(dim=-1)
        return Draw((land or download)(token_ids), token_ids, {}, None)
    scores = add_noise(process_logits(logits, rows), rows)
    token_ids = scores.argmax(dim=-1)
    reported = {index: row.params.logprobs for index, row in enumerate(rows) if row.params.logprobs is not None}
    return Draw(
        (land or download)(token_ids), token_ids, reported, _logprobs(logits, reported, token_ids) if reported else None
    )


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Give a tensor of some numbers on the device; from pinned memory, since other copies wait for the stream."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """Give a tensor in host memory, which holds the numbers when the stream has passed this point."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def process_logits(logits: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Apply steps 1 to 8 of the module's order: a new float32 [num_rows, vocab], -inf where a token is banned.

    The softmax of a row of the result is the distribution that a row with a temperature draws from.
    """
    scores = logits.clone(memory_format=torch.contiguous_format)
    _ban(scores, rows)
    _bias(scores, rows)
    _penalize_repetition(scores, rows)
    _penalize_frequency(scores, rows)
    drawn = [index for index, row in enumerate(rows) if not row.is_greedy]
    if drawn:
        temperature = [1.0 if row.is_greedy else row.params.temperature for row in rows]
        scores.div_(upload(temperature, scores.device)[:, None])
        _update(scores, [index for index in drawn if rows[index].params.top_k > 0], rows, _keep_top_k)
        _update(scores, [index for index in drawn if rows[index].params.top_p < 1.0], rows, _keep_top_p)
    return scores


def add_noise(scores: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Add Gumbel noise, in place, to the processed logits of the rows that have a temperature; returns `scores`."""
    drawn = [index for index, row in enumerate(rows) if not row.is_greedy]
    _update(scores, [index for index in drawn if rows[index].is_truncated], rows, _add_noise_where_kept)
    _update(scores, [index for index in drawn if not rows[index].is_truncated], rows, _add_noise_everywhere)
    return scores


def gumbel_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Hash keys and token ids into standard Gumbel noise.

    `keys` is int32 [..., 2] of `draw_key`, `token_ids` int32 of a shape that broadcasts with `keys[..., 0]`; the result
    is float32. The mixer is the 32-bit finaliser of hash-prospector (xorshift 16, 15, 15), which here takes one half
    of the key before it and the other half in its middle. The uniform number has 31 bits and is turned into noise in
    float64, so that devices whose logarithms differ in the last bit agree after rounding.
    """
    mixed = token_ids * _signed32(0x9E3779B1) + keys[..., 0]
    mixed ^= (mixed >> 16) & 0xFFFF
    mixed *= 0x21F0AAAD
    mixed += keys[..., 1]
    mixed ^= (mixed >> 15) & 0x1FFFF
    mixed *= 0x735A2D97
    mixed ^= (mixed >> 15) & 0x1FFFF
    # 1 - uniform in (0, 1): the winning side, close to 0, is the one that floating point resolves finely
    uniform = mixed.bitwise_and_(0x7FFFFFFF).to(torch.float64).add_(0.5).mul_(2.0**-31)
    return uniform.neg_().log1p_().neg_().log_().neg_().to(torch.float32)


def draw_key(seed: int, position: int) -> tuple[int, int]:
    """Hash (seed, position) into two signed 32-bit halves: two rounds of splitmix64 (Steele et al., OOPSLA 2014)."""
    mixed = _splitmix64(_splitmix64(seed & MASK64) ^ (position & MASK64))
    return _signed32(mixed & 0xFFFFFFFF), _signed32(mixed >> 32)


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def _signed32(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def _update(
    scores: Tensor,
    selected: list[int],
    rows: Sequence[RowState],
    step: Callable[[Tensor, Sequence[RowState]], Tensor],
) -> None:
    """Replace the selected rows of `scores` by what `step` makes of them."""
    if len(selected) == len(rows):
        scores.copy_(step(scores, rows))
    elif selected:
        index = upload(selected, scores.device)
        scores[index] = step(scores[index], [rows[i] for i in selected])


def _put(scores: Tensor, row_ids: list[int], token_ids: list[int], values: list[float], accumulate: bool) -> None:
    if not row_ids:
        return
    where = upload([row_ids, token_ids], scores.device)
    scores.index_put_((where[0], where[1]), upload(values, scores.device), accumulate=accumulate)


def _ban(scores: Tensor, rows: Sequence[RowState]) -> None:
    banned = [(index, token_id) for index, row in enumerate(rows) for token_id in banned_tokens(row)]
    row_ids, token_ids = [index for index, _ in banned], [token_id for _, token_id in banned]
    _put(scores, row_ids, token_ids, [-math.inf] * len(banned), accumulate=False)


def banned_tokens(row: RowState) -> list[int]:
    """List the tokens that must not come next: ends before `min_tokens`, and the last token of a bad word.

    A bad word of several tokens bans its last one where the others are the end of the row's prompt and output, as in
    transformers.
    """
    banned = [word[-1] for word in row.params.bad_words_ids if _ends_with(row, word[:-1])]
    if row.position < row.params.min_tokens:
        banned += row.eos_token_ids + row.params.stop_token_ids
    return banned


def _ends_with(row: RowState, start_of_word: tuple[int, ...]) -> bool:
    length = len(start_of_word)
    if not length:
        return True
    history = row.output if len(row.output) >= length else row.prompt[-length:] + row.output
    return tuple(history[-length:]) == start_of_word


def _bias(scores: Tensor, rows: Sequence[RowState]) -> None:
    biased = [(index, *pair) for index, row in enumerate(rows) for pair in row.params.logit_bias]
    _put(scores, [b[0] for b in biased], [b[1] for b in biased], [b[2] for b in biased], accumulate=True)


def _penalize_repetition(scores: Tensor, rows: Sequence[RowState]) -> None:
    """Divide positive logits of tokens in the prompt or the output by the penalty, multiply negative ones (CTRL)."""
    penalized = [index for index, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if not penalized:
        return
    row_ids, token_ids = _occurrences([(index, rows[index].prompt + rows[index].output) for index in penalized], scores)
    penalty = upload([row.params.repetition_penalty for row in rows], scores.device)[row_ids]
    score = scores[row_ids, token_ids]
    # a token that occurs twice is written twice with the same value, computed from the score before
    scores[row_ids, token_ids] = torch.where(score < 0, score * penalty, score / penalty)


def _penalize_frequency(scores: Tensor, rows: Sequence[RowState]) -> None:
    """Subtract, from the tokens of the output, frequency_penalty for each occurrence and presence_penalty once."""
    per_row = [(row.params.frequency_penalty, row.params.presence_penalty) for row in rows]
    penalized = [index for index, penalties in enumerate(per_row) if any(penalties) and rows[index].output]
    if not penalized:
        return
    vocab_size = scores.shape[1]
    places = [index * vocab_size + np.array(rows[index].output, dtype=np.int64) for index in penalized]
    flat, counts = np.unique(np.concatenate(places), return_counts=True)
    factors = np.array(per_row, dtype=np.float32)[flat // vocab_size]
    penalty = factors[:, 0] * counts.astype(np.float32) + factors[:, 1]
    scores.view(-1)[upload(flat, scores.device)] -= upload(penalty, scores.device)


def _occurrences(histories: list[tuple[int, list[int]]], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Give the (row, token) of every token of the histories, as two int64 tensors on the scores' device."""
    row_ids = np.repeat([index for index, _ in histories], [len(tokens) for _, tokens in histories])
    token_ids = np.concatenate([np.array(tokens, dtype=np.int64) for _, tokens in histories])
    return upload(row_ids, scores.device), upload(token_ids, scores.device)


def _keep_top_k(scores: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Mask what is less likely than each row's k-th token; equals of the k-th stay, as in transformers and vLLM."""
    counts = [min(row.params.top_k, scores.shape[1]) for row in rows]
    largest = scores.topk(max(counts), dim=-1).values
    threshold = largest.gather(1, upload(counts, scores.device)[:, None] - 1)
    return scores.masked_fill(scores < threshold, -math.inf)


def _keep_top_p(scores: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Mask all but the likeliest tokens that together reach top_p; equals of the last one stay."""
    top_p = upload([row.params.top_p for row in rows], scores.device, torch.float64)[:, None]
    total = scores.double().logsumexp(dim=-1, keepdim=True)
    guess = NUCLEUS_GUESS if scores.device.type == "cpu" else scores.shape[1]  # a GPU sorts faster than it is asked
    largest = scores.topk(min(guess, scores.shape[1]), dim=-1).values
    threshold, covered = _nucleus_threshold(largest, total, top_p)
    if largest.shape[1] < scores.shape[1] and not bool(covered.all()):
        wide = ~covered[:, 0]
        threshold[wide] = _nucleus_threshold(scores[wide].sort(descending=True).values, total[wide], top_p[wide])[0]
    return scores.masked_fill(scores < threshold, -math.inf)


def _nucleus_threshold(largest: Tensor, total: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Find the last score inside top_p: (it, whether `largest`, in falling order, reaches top_p), each [rows, 1]."""
    mass = (largest - total).exp().cumsum(dim=-1)
    needed = (mass < top_p).sum(dim=-1, keepdim=True)  # tokens before the one that reaches top_p
    covered = needed < largest.shape[1]
    return largest.gather(1, needed.clamp(max=largest.shape[1] - 1)), covered


def _keys(rows: Sequence[RowState], device: torch.device) -> Tensor:
    keys = [draw_key(row.params.seed, row.position) for row in rows]
    return upload(keys, device, torch.int32)


def _add_noise_everywhere(scores: Tensor, rows: Sequence[RowState]) -> Tensor:
    token_ids = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)
    return scores + gumbel_noise(_keys(rows, scores.device)[:, None], token_ids)


def _add_noise_where_kept(scores: Tensor, rows: Sequence[RowState]) -> Tensor:
    """Hash only the tokens that top-k and top-p left: the noise of a token is the same either way.

    A GPU hashes all, sooner than it could tell how many those are.
    """
    if scores.device.type != "cpu":
        return _add_noise_everywhere(scores, rows)
    row_ids, token_ids = (scores > -math.inf).nonzero(as_tuple=True)
    noise = gumbel_noise(_keys(rows, scores.device)[row_ids], token_ids.to(torch.int32))
    return scores.index_put((row_ids, token_ids), noise, accumulate=True)


def _logprobs(logits: Tensor, reported: dict[int, int], token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the log-probabilities of the rows that ask: their tokens', the likeliest ones', and whose those are."""
    index = upload(list(reported), logits.device)
    logprobs = logits[index].log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids[index][:, None])[:, 0]
    values, ids = logprobs.topk(max(reported.values()), dim=-1)
    return download(chosen), download(values), download(ids)
