"""What transformers gives for a set of requests: the tokens of `generate`, and the log-probabilities behind them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dejavu.model.sampling import RowState, sample
from dejavu.request import FinishReason, Request, SamplingParams
from tests.model_zoo import VOCAB_SIZE, make_model

PROMPT_LENS = (7, 1, 12, 12, 30, 3, 17, 9, 24, 2)
MAX_TOKENS = (8, 3, 1, 9, 6, 8, 2, 7, 5, 9)
SAMPLED: dict[int, dict[str, Any]] = {  # request → how it samples; all others are greedy
    1: {"temperature": 0.8, "seed": 11},
    3: {"temperature": 1.3, "top_k": 20, "repetition_penalty": 1.4, "seed": 12},
    5: {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.7, "seed": 2**62 + 13},
    8: {"temperature": 0.6, "top_k": 40, "top_p": 0.8, "min_tokens": 3, "seed": 14},
}
SEEDS = {"opt": 3}  # where 0 gives dull texts


@dataclass(frozen=True, slots=True)
class Reference:
    """Hold the requests of one kind of model, and what must come out."""

    directory: Path
    requests: tuple[Request, ...]
    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[tuple[float, ...], ...], ...]  # per request and token, of the whole vocabulary
    reasons: tuple[FinishReason, ...]
    smallest_gap: float  # between the two best logits, over all greedy tokens

    @property
    def greedy(self) -> list[int]:
        """Name the requests that take the likeliest token."""
        return [index for index in range(len(self.requests)) if index not in SAMPLED]


def make_reference(kind: str, directory: Path) -> Reference:
    """Make the checkpoint of a kind in `directory`, and ask transformers for what it generates."""
    model = make_model(kind, SEEDS.get(kind, 0))
    model.save_pretrained(directory)
    generator = torch.Generator().manual_seed(17)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENS]
    texts = [answer(model, prompt, index) for index, prompt in enumerate(prompts)]
    requests = [make_request(i, prompts[i], tokens) for i, (tokens, _) in enumerate(texts)]
    cut = [until_stop(request, tokens) for request, (tokens, _) in zip(requests, texts, strict=True)]
    logits = [logits for _, logits in texts]
    best = torch.cat([logits[i] for i in range(len(texts)) if i not in SAMPLED]).topk(2).values
    return Reference(
        directory,
        tuple(requests),
        tuple(tokens for tokens, _ in cut),
        tuple(as_tuples(part[: len(tokens)].log_softmax(-1)) for part, (tokens, _) in zip(logits, cut, strict=True)),
        tuple(reason for _, reason in cut),
        float((best[:, 0] - best[:, 1]).min()),
    )


def answer(model: Any, prompt: list[int], index: int) -> tuple[list[int], torch.Tensor]:
    """Give the tokens after a prompt, and the logits that each was taken from, [tokens, vocabulary]."""
    if index in SAMPLED:
        return draw(model, prompt, sampling(index))
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=MAX_TOKENS[index],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


@torch.inference_mode()
def draw(model: Any, prompt: list[int], params: SamplingParams) -> tuple[list[int], torch.Tensor]:
    """Sample from transformers' logits, computed anew for each token without a cache."""
    state = RowState(params, (), prompt, [])
    rows = []
    for _ in range(params.max_tokens):
        rows.append(model(torch.tensor([prompt + state.output])).logits[:, -1])
        state.output.append(sample(rows[-1], [state])[0].token_id)
    return state.output, torch.cat(rows)


def sampling(index: int) -> SamplingParams:
    """Give a request's sampling parameters; those of every third ask for all log-probabilities."""
    values = SAMPLED.get(index, {})
    logprobs = None if index % 3 == 1 else VOCAB_SIZE
    return SamplingParams(max_tokens=MAX_TOKENS[index], ignore_eos=True, logprobs=logprobs, **values)


def make_request(index: int, prompt: list[int], tokens: list[int]) -> Request:
    """Make a request; the last one ends early at a stop token, one of the reference's own."""
    params = sampling(index)
    if index == len(PROMPT_LENS) - 1:
        params = replace(params, stop_token_ids=(tokens[len(tokens) // 2],))
    return Request(f"request {index}", tuple(prompt), params)


def until_stop(request: Request, tokens: list[int]) -> tuple[tuple[int, ...], FinishReason]:
    """Cut the tokens behind the first stop token."""
    stops = [place for place, token in enumerate(tokens) if token in request.sampling.stop_token_ids]
    return (tuple(tokens[: stops[0] + 1]), FinishReason.STOP) if stops else (tuple(tokens), FinishReason.LENGTH)


def as_tuples(matrix: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    """Give a matrix's rows as tuples of numbers."""
    return tuple(tuple(row) for row in matrix.tolist())
