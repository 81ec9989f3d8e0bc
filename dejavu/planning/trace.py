"""Make workload traces, and read those that others published; one form comes out.

Read: ShareGPT JSON; LMSys-Chat-1M JSON, JSONL or Parquet (Zheng et al., arXiv 2309.11998); the Azure LLM inference
traces (Patel et al., arXiv 2311.18677), CSV; Mooncake's JSONL (Qin et al., arXiv 2407.00079); plain text, a prompt a
line; and this project's own forms. Written: `[[prompt_tokens, output_tokens, arrival_s], ...]`, or JSONL with prompts.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dejavu.errors import UsageError, WorkloadError
from dejavu.measure.files import replacing
from dejavu.planning.lengths import Lengths
from dejavu.planning.workload import WorkloadItem, read_workload

TraceFormat = Literal["auto", "workload", "sharegpt", "lmsys", "azure", "mooncake", "text"]
CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Describe lengths whose logarithm is normal: `median` tokens, `spread` the logarithm's standard deviation."""

    median: float
    spread: float
    most: int

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """Draw lengths from 1 to `most`."""
        drawn = generator.lognormal(np.log(self.median), self.spread, count)
        return [int(length) for length in np.clip(np.rint(drawn), 1, self.most)]


# Means of LMSys-Chat-1M are 69.5 prompt and 214.5 response tokens (arXiv 2309.11998, table 1); a log-normal's mean is
# median · exp(spread² / 2). The spreads are a choice: a long tail of prompts, a shorter one of responses.
LMSYS_PROMPT = LogNormal(median=31.8, spread=1.25, most=2048)
LMSYS_OUTPUT = LogNormal(median=130.1, spread=1.0, most=1024)


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """Hold one request of a trace: its lengths, and its prompt where the source has one."""

    lengths: Lengths
    prompt: str | None = None


def make_lmsys_like(num_requests: int, *, seed: int = 0, rate: float = 0.0) -> list[TraceEntry]:
    """Draw requests with the lengths of chats; they arrive as a Poisson process of `rate` per second (0: all at 0)."""
    if num_requests < 1:
        raise UsageError(f"{num_requests} requests make no trace: give at least 1")
    if not 0 <= rate < float("inf"):
        raise UsageError(f"rate {rate:g} is impossible: give requests per second, or 0 for all at once")
    generator = np.random.default_rng(seed)
    prompts = LMSYS_PROMPT.draw(generator, num_requests)
    outputs = LMSYS_OUTPUT.draw(generator, num_requests)
    gaps = generator.exponential(1 / rate, num_requests) if rate else np.zeros(num_requests)
    return [TraceEntry(Lengths(*row)) for row in zip(prompts, outputs, np.cumsum(gaps).tolist(), strict=True)]


def with_rate(entries: Sequence[TraceEntry], rate: float, seed: int = 0) -> list[TraceEntry]:
    """Let entries arrive in their order as a Poisson process of `rate` requests per second, or raise UsageError."""
    if not 0 < rate < float("inf"):
        raise UsageError(f"a rate of {rate:g} requests per second is impossible: give a finite number above 0")
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(entries))
    arrivals = np.cumsum(gaps).tolist()
    return [
        TraceEntry(entry.lengths._replace(arrival_s=arrival_s), entry.prompt)
        for entry, arrival_s in zip(entries, arrivals, strict=True)
    ]


def read_trace(
    path: Path,
    form: TraceFormat = "auto",
    *,
    count_tokens: CountTokens | None = None,
    output_len: int = 128,
    limit: int | None = None,
) -> list[TraceEntry]:
    """Read a trace of any known form, at most `limit` entries, in its order.

    Texts are counted by `count_tokens`; a prompt without a known answer gets `output_len` output tokens. Raise
    WorkloadError naming the file and the place of what is malformed.
    """
    chosen = guess_form(path) if form == "auto" else form
    counter = Counter(path, count_tokens)
    readers: Mapping[str, Callable[[], Iterator[TraceEntry]]] = {
        "workload": lambda: (read_item(item, counter, output_len) for item in read_workload(path)),
        "sharegpt": lambda: read_chats(path, "conversations", ("from", "value"), counter),
        "lmsys": lambda: read_chats(path, "conversation", ("role", "content"), counter),
        "azure": lambda: read_azure(path),
        "mooncake": lambda: read_mooncake(path),
        "text": lambda: read_text(path, counter, output_len),
    }
    try:
        entries = list(islice(readers[chosen](), limit))
    except OSError as error:
        raise WorkloadError(f"cannot read trace {path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8 text") from None
    if not entries:
        raise WorkloadError(f"{path} holds no request in the form {chosen!r}: name another with --format")
    return entries


def read_lengths(path: Path, **options: Any) -> list[Lengths]:
    """Read the lengths of a trace's requests; options as those of `read_trace`."""
    return [entry.lengths for entry in read_trace(path, **options)]


@dataclass(frozen=True, slots=True)
class Counter:
    """Count the tokens of texts; raise WorkloadError where there is no tokenizer to do it with."""

    path: Path
    count_tokens: CountTokens | None

    def count(self, text: str) -> int:
        """Give a text's tokens, at least 1."""
        if self.count_tokens is None:
            raise WorkloadError(f"{self.path} holds text, whose length needs a tokenizer: name a model with --model")
        return max(1, self.count_tokens(text))


def guess_form(path: Path) -> TraceFormat:
    """Tell a trace's form by the file's name and its first characters."""
    if path.suffix == ".parquet":
        return "lmsys"
    if path.suffix == ".csv":
        return "azure"
    if path.suffix == ".txt":
        return "text"
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(65536)
    except (OSError, UnicodeDecodeError):
        return "workload"  # whose reader says what is wrong
    marks: Mapping[str, TraceFormat] = {
        '"conversations"': "sharegpt",
        '"conversation"': "lmsys",
        '"input_length"': "mooncake",
        "ContextTokens": "azure",
    }
    return next((form for mark, form in marks.items() if mark in start), "workload")


def read_item(item: WorkloadItem, counter: Counter, output_len: int) -> TraceEntry:
    """Take one request of a workload file."""
    text = item.prompt if item.messages is None else "\n".join(message["content"] for message in item.messages)
    if item.prompt_token_ids is not None:
        prompt_tokens = len(item.prompt_token_ids)
    else:
        prompt_tokens = counter.count(text or "") if item.prompt_len is None else item.prompt_len
    lengths = Lengths(prompt_tokens, int(item.sampling.get("max_tokens", output_len)), item.arrival_s)
    return TraceEntry(lengths, item.prompt)


def read_chats(path: Path, key: str, names: tuple[str, str], counter: Counter) -> Iterator[TraceEntry]:
    """Take the first question and answer of each chat; chats that do not begin so are left out."""
    role, content = names
    for place, chat in read_objects(path):
        turns = chat.get(key)
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise WorkloadError(f"{place}: no list {key!r} of turns: give each chat one")
        if len(turns) < 2 or turns[0].get(role) not in ("human", "user"):
            continue
        question, answer = turns[0].get(content), turns[1].get(content)
        if not isinstance(question, str) or not isinstance(answer, str):
            raise WorkloadError(f"{place}: a turn without text in {content!r}: give each turn one")
        yield TraceEntry(Lengths(counter.count(question), counter.count(answer)), question)


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the objects of a JSON list, of JSON lines, or of a Parquet file, each with its place."""
    if path.suffix == ".parquet":
        objects: Iterable[tuple[str, Any]] = enumerate_places(path, read_parquet(path))
    else:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            objects = enumerate_places(path, parse_json(text, str(path)))
        else:
            lines = ((f"{path}:{index}", line) for index, line in enumerate(text.split("\n"), 1) if line.strip())
            objects = ((place, parse_json(line, place)) for place, line in lines)
    for place, value in objects:
        if not isinstance(value, dict):
            raise WorkloadError(f"{place}: no object: give each request one")
        yield place, value


def enumerate_places(path: Path, values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Name the place of each entry."""
    return ((f"{path}[{index}]", value) for index, value in enumerate(values))


def parse_json(text: str, place: str) -> Any:
    """Parse JSON; raise WorkloadError naming the place."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise WorkloadError(f"{place}: no JSON ({str(error).lower()}): mend or remove it") from None


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a Parquet file; raise WorkloadError where pyarrow is missing or the file is not one."""
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise WorkloadError(
            f"{path} is Parquet, which needs pyarrow: `pip install pyarrow`, or convert it to JSON"
        ) from None
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path, columns=["conversation"]).to_pylist()
    except (ValueError, KeyError) as error:
        raise WorkloadError(f"{path} is no Parquet file with a column 'conversation' ({error})") from None
    return rows


def read_azure(path: Path) -> Iterator[TraceEntry]:
    """Read TIMESTAMP, ContextTokens, GeneratedTokens; arrivals count from the first line's."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        needed = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
        if missing := [name for name in needed if name not in (rows.fieldnames or ())]:
            raise WorkloadError(f"{path}:1: no column {missing[0]}: an Azure trace has {', '.join(needed)}")
        first: datetime | None = None
        for row in rows:
            place = f"{path}:{rows.line_num}"
            moment = parse_moment(row["TIMESTAMP"], place)
            first = first or moment
            prompt, output = (parse_count(row[name], name, place) for name in needed[1:])
            yield TraceEntry(make_lengths(prompt, output, (moment - first).total_seconds(), place))


def parse_moment(text: str | None, place: str) -> datetime:
    """Parse a time such as 2023-11-16 18:15:46.6805900, whose last digit datetime does not know."""
    whole, _, fraction = (text or "").strip().partition(".")
    digits = len(fraction) - len(fraction.lstrip("0123456789"))
    try:
        moment = datetime.fromisoformat(f"{whole}.{fraction[:digits][:6]:0<6}{fraction[digits:]}")
    except ValueError:
        raise WorkloadError(f"{place}: TIMESTAMP {text!r} is no time: write it as 2023-11-16 18:15:46.68") from None
    return moment


def parse_count(value: Any, name: str, place: str) -> int:
    """Parse a number of tokens."""
    try:
        return int(value)
    except (TypeError, ValueError):
        raise WorkloadError(f"{place}: {name} {value!r} is no number: give whole tokens") from None


def make_lengths(prompt_tokens: int, output_tokens: int, arrival_s: float, place: str) -> Lengths:
    """Check one request's numbers."""
    if prompt_tokens < 0 or output_tokens < 0 or arrival_s < 0:
        raise WorkloadError(
            f"{place}: {prompt_tokens} prompt tokens, {output_tokens} output tokens, arrival {arrival_s:g} s: "
            "none of them can be negative"
        )
    return Lengths(max(1, prompt_tokens), output_tokens, arrival_s)


def read_mooncake(path: Path) -> Iterator[TraceEntry]:
    """Read timestamp (ms), input_length and output_length of each line."""
    for place, entry in read_objects(path):
        prompt, output = (parse_count(entry.get(name), name, place) for name in ("input_length", "output_length"))
        milliseconds = parse_count(entry.get("timestamp"), "timestamp", place)
        yield TraceEntry(make_lengths(prompt, output, milliseconds / 1e3, place))


def read_text(path: Path, counter: Counter, output_len: int) -> Iterator[TraceEntry]:
    """Take each line that is not blank as a prompt."""
    for line in path.read_text(encoding="utf-8-sig").split("\n"):
        if line.strip():
            yield TraceEntry(Lengths(counter.count(line.strip()), output_len), line.strip())


def write_trace(path: Path, entries: Sequence[TraceEntry]) -> None:
    """Write `[[prompt_tokens, output_tokens, arrival_s], ...]` (.json), or JSONL with the prompts' text (.jsonl)."""
    if path.suffix == ".json":
        lines = [json.dumps(list(entry.lengths)) for entry in entries]
        text = "[" + ",\n ".join(lines) + "]\n"
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(workload_line(entry, path)) + "\n" for entry in entries)
    else:
        raise UsageError(f"--out {path} has no known form: end it in .json (lengths) or .jsonl (prompts)")
    try:
        with replacing(path) as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}): name a writable file with --out") from None


def workload_line(entry: TraceEntry, path: Path) -> dict[str, Any]:
    """Give a request as one line of a workload file."""
    if entry.prompt is None:
        raise UsageError(f"this trace has lengths and no prompts, which {path.name} needs: write a .json file")
    _, output_tokens, arrival_s = entry.lengths
    return {"prompt": entry.prompt, "max_tokens": max(1, output_tokens), "arrival_s": arrival_s, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Bin:
    """Count the values in [low, high)."""

    low: float
    high: float
    count: int


def histogram(values: Sequence[float], num_bins: int = 12) -> list[Bin]:
    """Count values in bins of equal ratio, as lengths and gaps span decades; zeros have a bin of their own."""
    positive = np.array([value for value in values if value > 0])
    zeros = len(values) - len(positive)
    bins = [Bin(0.0, 0.0, zeros)] if zeros else []
    if not len(positive):
        return bins
    low, high = float(positive.min()), float(positive.max())
    edges = np.geomspace(low, high, num_bins + 1) if high > low else np.array([low, high])
    inside = np.searchsorted(edges[1:-1], positive, side="right")
    counts = np.bincount(inside, minlength=len(edges) - 1)
    return bins + [Bin(float(a), float(b), int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]


def gaps(lengths: Sequence[Lengths]) -> list[float]:
    """Give the times between arrivals, in seconds."""
    arrivals = sorted(request.arrival_s for request in lengths)
    return [later - earlier for earlier, later in pairwise(arrivals)]
