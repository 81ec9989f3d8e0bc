"""What a run leaves behind, as rows: requests, steps, transfers; and how rows become CSV files and come back."""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from dejavu.errors import UsageError
from dejavu.measure.files import replacing
from dejavu.request import Completion, FinishReason

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")
Parse = Callable[[str], Any]

StepKind = Literal["prompt", "token", "mixed"]


@dataclass(slots=True)
class StepRecord:
    """Time one pass of one microbatch through one rank; seconds after the run's start on the controller's clock.

    The rank computes in [start_s, compute_end_s) and hands its result on in [compute_end_s, end_s).
    """

    rank: int
    stage: int
    tp_rank: int
    microbatch: int
    step: int
    kind: StepKind
    num_rows: int
    num_tokens: int
    start_s: float
    compute_end_s: float
    end_s: float
    swap_stall_ms: float = 0.0  # of the computing: what it waited for swapped KV


@dataclass(slots=True)
class RequestRecord:
    """Time one request; seconds after the run's start, NaN for what never happened."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    arrival_s: float
    admitted_s: float
    first_token_s: float
    kv_arrived_s: float
    token_start_s: float
    finish_s: float
    ttft_s: float
    tpot_s: float
    normalized_latency_s: float
    handover_s: float
    row_wait_s: float
    finish_reason: FinishReason | None

    @classmethod
    def from_completion(cls, completion: Completion) -> "RequestRecord":
        """Take the numbers of a request, finished or not."""
        return cls(
            request_id=completion.request.request_id,
            prompt_tokens=len(completion.request.prompt_token_ids),
            output_tokens=len(completion.token_ids),
            arrival_s=completion.request.arrival_s,
            admitted_s=completion.admitted_s,
            first_token_s=completion.first_token_s,
            kv_arrived_s=completion.kv_arrived_s,
            token_start_s=completion.token_start_s,
            finish_s=completion.finish_s,
            ttft_s=completion.ttft_s,
            tpot_s=completion.tpot_s,
            normalized_latency_s=completion.normalized_latency_s,
            handover_s=completion.handover_s,
            row_wait_s=completion.row_wait_s,
            finish_reason=completion.finish_reason,
        )


@dataclass(slots=True)
class TransferRecord:
    """Time the move of some bytes from rank `source` to rank `target`, as seen by `rank`; seconds as in StepRecord."""

    rank: int
    kind: str  # what moved, such as "handover"
    transport: str  # the carrier, such as "ipc"
    source: int
    target: int
    bytes: int
    start_s: float
    end_s: float


@dataclass(slots=True)
class CeilingRecord:
    """Say what plain copies of `bytes` reach on `rank`, beside which its transfers of that kind are held."""

    rank: int
    kind: str
    transport: str
    bytes: int  # of the median transfer of that kind
    gbps: float  # GB/s, of 1e9 bytes


@dataclass(slots=True)
class RankRecord:
    """Say how much processor time one rank took while serving: 0.05 of a core is a rank that waits without spinning.

    `host_us_per_step` is what its thread takes for a token step, the median: on a GPU to queue and finish it.
    """

    rank: int
    role: str
    stage: int  # -1 where the rank holds no part of the model
    cpu_s: float
    window_s: float
    core_share: float
    host_us_per_step: float


def write_csv(path: Path, rows: Iterable[Row], row_type: type[Row]) -> None:
    """Write rows under a header of their field names; floats come back bit for bit, NaN and None are empty cells."""
    names = [field.name for field in fields(row_type)]
    write_table(path, names, ([getattr(row, name) for name in names] for row in rows))


def write_table(path: Path, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a header and rows of cells in RFC 4180's form, with plain newlines between lines; replaces the file."""
    with replacing(path) as file:
        file.write(csv_line(columns))
        file.writelines(csv_line(row) for row in rows)


def csv_line(cells: Iterable[object]) -> str:
    """Put cells into one line of CSV."""
    return ",".join(quote(format_cell(cell)) for cell in cells) + "\n"


def quote(text: str) -> str:
    """Quote a cell where it needs it; a lone carriage return does, which Python 3.11's writer overlooks."""
    if any(mark in text for mark in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def format_cell(value: object) -> str:
    """Give the text of a cell."""
    if isinstance(value, float):  # NumPy's float64 too, whose own repr names its type
        return "" if math.isnan(value) else float.__repr__(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value.value if isinstance(value, Enum) else value)


def read_csv(path: Path, row_type: type[Row]) -> list[Row]:
    """Read what `write_csv` wrote; columns that `row_type` does not know are passed over.

    A column that older runs do not have is a field with a default.

    Raises UsageError naming the file, and the line, that is missing, incomplete or malformed.
    """
    return list(read_rows(path, row_type))


def read_rows(path: Path, row_type: type[Row]) -> Iterator[Row]:
    """Read rows one by one, as `read_csv` does."""
    hints = get_type_hints(row_type)
    parsers = {field.name: parser(hints[field.name]) for field in fields(row_type)}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.reader(file)
            header: list[str] = next(lines, [])
            optional = [field.name for field in fields(row_type) if field.default is not MISSING]
            wanted = {name: parse for name, parse in parsers.items() if name in header or name not in optional}
            for values in parse_rows(path, header, lines, wanted):
                yield row_type(**values)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read {path}: {error}") from None


def parse_rows(path: Path, header: list[str], lines: Any, parsers: Mapping[str, Parse]) -> Iterator[dict[str, Any]]:
    """Yield the wanted cells of each line, parsed; `lines` is a csv reader behind the header."""
    missing = [name for name in parsers if name not in header]
    if missing:
        raise UsageError(f"{path} has no column {missing[0]!r}: name a file that `dejavu serve` wrote")
    columns = [(name, header.index(name), parse) for name, parse in parsers.items()]
    for cells in lines:
        try:
            yield {name: parse(cells[index]) for name, index, parse in columns}
        except (ValueError, IndexError) as error:
            raise UsageError(f"line {lines.line_num} of {path} is malformed ({error}): write the file anew") from None


def parser(hint: Any) -> Parse:
    """Give the function that reads a cell of a field with this type."""
    if hint is float:
        return lambda text: float(text) if text else math.nan
    if hint is bool:
        return lambda text: ("false", "true").index(text) == 1
    if get_origin(hint) is Literal:
        return lambda text: get_args(hint)[get_args(hint).index(text)]
    if NoneType in get_args(hint):
        (inner,) = (parser(part) for part in get_args(hint) if part is not NoneType)
        return lambda text: inner(text) if text else None
    assert hint in (int, str) or issubclass(hint, Enum), hint
    return hint  # type: ignore[no-any-return]
