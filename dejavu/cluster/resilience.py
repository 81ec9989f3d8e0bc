"""Hold runs with failures against one without: outputs, the latency of each request, and progress over time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import Any

from dejavu.engine.journal import Past
from dejavu.request import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """Hold one request's latency, from its arrival to its last token, in each run; NaN where it was not served."""

    request_id: str
    tokens: int
    whole_s: float
    failure_s: float
    restart_s: float
    failure_ratio: float
    restart_ratio: float


@dataclass(frozen=True, slots=True)
class ProgressRow:
    """Say how many tokens a run had given out at a time, without those that a restart threw away."""

    run: str
    time_s: float
    tokens: int


def read_outputs(directory: Path) -> dict[str, list[int]]:
    """Read the tokens of each request of a run that has ended well; nothing of one that has not."""
    path = directory / "outputs.jsonl"
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["request_id"]: line["token_ids"] for line in lines}


def differing(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> list[str]:
    """Name the requests whose tokens are not those expected, or that are not there."""
    return [name for name, tokens in expected.items() if list(found.get(name, ())) != list(tokens)]


def latencies(past: Past) -> dict[str, float]:
    """Give the seconds from each request's arrival to its last token, of those that have ended."""
    done = (p.completion for p in past.requests.values() if p.completion.finish_reason)
    return {c.request.request_id: c.finish_s - c.request.arrival_s for c in done}


def latency_rows(
    outputs: Mapping[str, Sequence[int]], whole: Past, failure: Past, restart: Mapping[str, float]
) -> list[LatencyRow]:
    """Put each request's latencies beside each other."""
    first, second = latencies(whole), latencies(failure)
    rows = []
    for name, tokens in outputs.items():
        base, failed, restarted = first[name], second.get(name, nan), restart.get(name, nan)
        rows.append(LatencyRow(name, len(tokens), base, failed, restarted, failed / base, restarted / base))
    return rows


def progress_rows(run: str, times: Sequence[float], offset_s: float = 0.0, before: int = 0) -> list[ProgressRow]:
    """Count tokens up over time, from `before` on, `offset_s` later than they say."""
    return [ProgressRow(run, time_s + offset_s, before + number) for number, time_s in enumerate(times, 1)]


@dataclass(frozen=True, slots=True)
class Restart:
    """Hold a run that ended with a failure, and the one that served again what it had not finished."""

    first: Past
    second: Past

    @property
    def offset_s(self) -> float:
        """Give how much later the second run's clock began."""
        return self.second.origin_s - self.first.origin_s

    def latencies(self) -> dict[str, float]:
        """Give each request's latency: over both runs, where the first did not finish it."""
        arrivals = {name: p.completion.request.arrival_s for name, p in self.first.requests.items()}
        later = {
            name: p.completion.finish_s + self.offset_s - arrivals[name]
            for name, p in self.second.requests.items()
            if p.completion.finish_reason
        }
        return latencies(self.first) | later

    def outputs(self) -> dict[str, list[int]]:
        """Give each request's tokens from the run that finished it."""
        both = {**self.first.requests, **self.second.requests}
        return {name: p.completion.token_ids for name, p in both.items() if p.completion.finish_reason}

    def progress(self) -> list[ProgressRow]:
        """Count tokens, and what the failure threw away."""
        times = sorted(time_s for p in self.first.requests.values() for time_s in p.times_s)
        kept = sum(len(p.times_s) for p in self.first.requests.values() if p.completion.finish_reason)
        lost_s = times[-1] if times else 0.0
        again = sorted(time_s for p in self.second.requests.values() for time_s in p.times_s)
        fall = ProgressRow("restart", lost_s, kept)
        return [*progress_rows("restart", times), fall, *progress_rows("restart", again, self.offset_s, kept)]


def run_progress(run: str, past: Past) -> list[ProgressRow]:
    """Count a run's tokens over time."""
    return progress_rows(run, sorted(time_s for p in past.requests.values() for time_s in p.times_s))


def workload_line(request: Request) -> dict[str, Any]:
    """Write a request as a line of a workload; it arrives at once."""
    defaults = SamplingParams()
    sampling = {name: value for name, value in asdict(request.sampling).items() if value != getattr(defaults, name)}
    if biases := sampling.get("logit_bias"):
        sampling["logit_bias"] = {str(token_id): bias for token_id, bias in biases}
    own = {"request_id": request.request_id, "prompt_token_ids": request.prompt_token_ids}
    return {**own, "max_tokens": request.sampling.max_tokens, "seed": request.sampling.seed, **sampling}


def write_remaining(past: Past, path: Path) -> None:
    """Write a workload of the requests that a run did not finish."""
    lines = [workload_line(progress.completion.request) for progress in past.unfinished]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
