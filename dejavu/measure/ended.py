"""Requests that have ended, a line each in a file that only grows, until outputs.jsonl and requests.csv are written.

The controller forgets a request with its line. Lines come in the order of the ends, and name the order of submission.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dejavu.measure.lines import make_line, read_line, read_lines
from dejavu.measure.parts import PARTS
from dejavu.measure.records import RequestRecord
from dejavu.request import Completion, FinishReason, TokenLogprobs

ENDED = "ended.jsonl"


@dataclass(frozen=True, slots=True)
class Ended:
    """Hold what is left of a request: its line of outputs.jsonl and its row of requests.csv."""

    output: Mapping[str, Any]
    record: RequestRecord

    @classmethod
    def of(cls, completion: Completion) -> "Ended":
        """Take what stays of a request."""
        return cls(output(completion), RequestRecord.from_completion(completion))

    @classmethod
    def read(cls, written: Mapping[str, Any], record: dict[str, Any]) -> "Ended":
        """Read what `ended_line` wrote."""
        reason = record.pop("finish_reason")
        values: dict[str, Any] = {name: math.nan if value is None else value for name, value in record.items()}
        return cls(written, RequestRecord(**values, finish_reason=None if reason is None else FinishReason(reason)))


@dataclass(slots=True)
class EndedNames:
    """Name the requests of a run that have ended, count their tokens, and say when the last one ended."""

    names: set[str] = field(default_factory=set)
    num_tokens: int = 0
    latest_s: float = 0.0


def ended_line(number: int, completion: Completion) -> str:
    """Write a request, the `number`-th that was submitted."""
    done = Ended.of(completion)
    return make_line([number, done.output, plain(asdict(done.record))])


def ended_file(directory: Path) -> Path:
    """Name the file of a run's requests that have ended."""
    return directory / PARTS / ENDED


def ended_names(directory: Path) -> EndedNames:
    """Name the requests of a run that have ended."""
    ended = EndedNames()
    for _, (_, written, record) in read_lines(ended_file(directory)):
        ended.names.add(written["request_id"])
        ended.num_tokens += len(written["token_ids"])
        ended.latest_s = max(ended.latest_s, record["finish_s"] or 0.0)
    return ended


def read_ended(directory: Path) -> Iterator[Ended]:
    """Read the requests of a run that have ended in the order of their submission, one at a time."""
    path = ended_file(directory)
    places = np.array([(values[0], end) for end, values in read_lines(path)], dtype=np.int64).reshape(-1, 2)
    if not len(places):
        return
    starts = np.concatenate([[0], places[:-1, 1]])
    with path.open("rb") as file:
        for offset in starts[np.argsort(places[:, 0], kind="stable")].tolist():
            file.seek(offset)
            values = read_line(file.readline())
            assert values
            yield Ended.read(values[1], values[2])


def output(completion: Completion) -> dict[str, Any]:
    """Give a request's line of outputs.jsonl; log-probabilities only where they were asked for."""
    line = {
        "request_id": completion.request.request_id,
        "prompt_tokens": len(completion.request.prompt_token_ids),
        "token_ids": list(completion.token_ids),
        "text": completion.text,
        "finish_reason": None if completion.finish_reason is None else completion.finish_reason.value,
    }
    if completion.request.sampling.logprobs is not None:
        line["logprobs"] = [logprobs_object(token) for token in completion.logprobs]
    return line


def logprobs_object(token: TokenLogprobs) -> dict[str, Any]:
    """Give a token's log-probabilities for JSON, which has no minus infinity: null is a probability of zero."""
    return {"logprob": plain(token.chosen), "top": [[token_id, plain(value)] for token_id, value in token.top]}


def plain(value: Any) -> Any:
    """Give a value for JSON: numbers that are not finite, at any depth, become null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
