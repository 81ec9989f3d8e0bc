"""What a client asks for and what it gets: requests, sampling parameters, completions."""

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Say why a request ended."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens were generated
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Choose how the next token is taken from the logits.

    The names are those of the OpenAI API, and vLLM's where that API has none. `temperature` 0 is greedy. `top_k` 0
    and `top_p` 1 keep the whole vocabulary. A row's token is a pure function of the logits, the row's history and
    (`seed`, position), so a replayed step yields the same token.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many of the likeliest tokens to report beside the chosen one
    seed: int = 0

    @property
    def reads_output(self) -> bool:
        """Tell whether a draw depends on which tokens were drawn before, not on their number alone."""
        penalties = self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return penalties or any(len(word) > 1 for word in self.bad_words_ids)


@dataclass(frozen=True, slots=True)
class Request:
    """Hold one prompt, how to continue it, and when it arrives (seconds after the run's start)."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    arrival_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Hold the log-probability of a chosen token, and the likeliest ones as (token, log-probability), best first."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Completion:
    """Collect what one request has produced; times are seconds after the run's start, NaN until they happen."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text: str | None = None
    finish_reason: FinishReason | None = None
    admitted_s: float = float("nan")
    first_token_s: float = float("nan")
    kv_arrived_s: float = float("nan")  # when the token pipeline had all of its KV; never where nothing is handed over
    token_start_s: float = float("nan")  # when the pass for the second token began
    finish_s: float = float("nan")

    @property
    def handover_s(self) -> float:
        """Give the time from the first token to the KV's arrival: what a hand-over leaves exposed; NaN without one."""
        return max(0.0, self.kv_arrived_s - self.first_token_s) if self.was_handed_over else float("nan")

    @property
    def row_wait_s(self) -> float:
        """Give the time from a hand-over's end to the first token step: waiting for a row; NaN without a hand-over."""
        return self.token_start_s - max(self.kv_arrived_s, self.first_token_s) if self.was_handed_over else float("nan")

    @property
    def was_handed_over(self) -> bool:
        """Tell whether the request's KV has come from a prompt pipeline to a token pipeline."""
        return self.kv_arrived_s == self.kv_arrived_s

    @property
    def ttft_s(self) -> float:
        """Give the time to the first token, counted from the scheduled arrival."""
        return self.first_token_s - self.request.arrival_s

    @property
    def tpot_s(self) -> float:
        """Give the mean time per output token after the first; NaN with fewer than two tokens."""
        if len(self.token_ids) < 2:
            return float("nan")
        return (self.finish_s - self.first_token_s) / (len(self.token_ids) - 1)

    @property
    def normalized_latency_s(self) -> float:
        """Give the end-to-end latency per output token, as the paper reports it."""
        return (self.finish_s - self.request.arrival_s) / max(1, len(self.token_ids))


def finish_reason(
    params: SamplingParams, eos_token_ids: tuple[int, ...], num_output: int, token_id: int
) -> FinishReason | None:
    """Tell whether a request ends with `token_id`, its `num_output`-th token; stop strings are the controller's."""
    if token_id in params.stop_token_ids or (token_id in eos_token_ids and not params.ignore_eos):
        return FinishReason.STOP
    return FinishReason.LENGTH if num_output >= params.max_tokens else None
