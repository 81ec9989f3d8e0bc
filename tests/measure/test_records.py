"""CSV files: what was written is what comes back, and other programs can read it too."""

import csv
import math
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dejavu.errors import UsageError
from dejavu.measure.records import RequestRecord, StepRecord, read_csv, write_csv
from dejavu.request import Completion, FinishReason, Request


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(slots=True)
class Everything:
    text: str
    number: int
    time_s: float
    yes: bool
    word: Literal["a", "b"]
    colour: Colour | None
    maybe: int | None


rows = st.builds(
    Everything,
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(["", ",", '"', "a\rb", "\r\n", " x ", "nan"]),
    number=st.integers(),
    time_s=st.floats(),
    yes=st.booleans(),
    word=st.sampled_from(["a", "b"]),
    colour=st.sampled_from([None, *Colour]),
    maybe=st.none() | st.integers(),
)


def cells(row):
    values = [getattr(row, field.name) for field in fields(row)]
    return ["nan" if isinstance(value, float) and math.isnan(value) else value for value in values]


@settings(max_examples=60, deadline=None)
@given(st.lists(rows, max_size=4))
@example([Everything("a\rb", 1, 0.1, True, "a", None, None)])
def test_rows_come_back_bit_for_bit(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    write_csv(path, written, Everything)
    read = read_csv(path, Everything)
    assert [cells(row) for row in read] == [cells(row) for row in written]
    assert [list(map(type, cells(row))) for row in read] == [list(map(type, cells(row))) for row in written]
    with path.open(newline="") as file:  # an independent reader sees as many columns everywhere
        assert {len(line) for line in csv.reader(file)} == {7}


def test_request_row_of_a_completion(tmp_path):
    request = Request("q", prompt_token_ids=(5, 6, 7), arrival_s=1.0)
    done = Completion(request, [1, 2, 3, 4, 5], finish_reason=FinishReason.LENGTH)
    done.admitted_s, done.first_token_s, done.token_start_s, done.finish_s = 1.25, 2.0, 2.5, 4.0
    done.kv_arrived_s = 2.125
    waiting = Completion(Request("w", (1,), arrival_s=3.5))
    path = tmp_path / "requests.csv"
    write_csv(path, [RequestRecord.from_completion(each) for each in (done, waiting)], RequestRecord)
    assert path.read_text() == (
        "request_id,prompt_tokens,output_tokens,arrival_s,admitted_s,first_token_s,kv_arrived_s,token_start_s,finish_s,"
        "ttft_s,tpot_s,normalized_latency_s,handover_s,row_wait_s,finish_reason\n"
        "q,3,5,1.0,1.25,2.0,2.125,2.5,4.0,1.0,0.5,0.6,0.125,0.375,length\n"
        "w,1,0,3.5,,,,,,,,,,,\n"
    )
    assert read_csv(path, RequestRecord)[0] == RequestRecord.from_completion(done)


def test_numpy_numbers_are_written_as_numbers(tmp_path):
    step = StepRecord(1, 0, 0, 0, 7, "mixed", 2, 9, np.float64(0.1), np.float64(0.2), float("nan"))
    step.rank = np.int64(1)
    write_csv(tmp_path / "steps.csv", [step], StepRecord)
    assert (tmp_path / "steps.csv").read_text().splitlines()[1] == "1,0,0,0,7,mixed,2,9,0.1,0.2,,0.0"


def test_no_rows_leave_a_header_that_reads_as_no_rows(tmp_path):
    write_csv(tmp_path / "steps.csv", [], StepRecord)
    assert (tmp_path / "steps.csv").read_text().startswith("rank,stage,tp_rank,microbatch,step,kind,")
    assert read_csv(tmp_path / "steps.csv", StepRecord) == []


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "steps.csv"
    write_csv(path, [], StepRecord)
    before = path.read_bytes()

    def failing():
        yield StepRecord(1, 0, 0, 0, 7, "token", 2, 9, 0.0, 0.1, 0.2)
        raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"):
        write_csv(path, failing(), StepRecord)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


STEP = "1,0,0,0,7,token,2,9,0.0,0.1,0.2,3.5"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot read .*steps.csv"),
        ("", "no column 'rank'"),
        ("rank,stage\n1,2\n", "no column 'tp_rank'"),
        ("HEADER\n" + STEP + "\n" + STEP.replace("7", "x") + "\n", "line 3 of .*steps.csv is malformed"),
        ("HEADER\n" + STEP.replace("token", "decode") + "\n", "line 2 of .*steps.csv is malformed"),
        ("HEADER\n1,0,0\n", "line 2 of .*steps.csv is malformed"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, text, says):
    path = tmp_path / "steps.csv"
    if text is not None:
        path.write_text(text.replace("HEADER", ",".join(field.name for field in fields(StepRecord))))
    with pytest.raises(UsageError, match=says):
        read_csv(path, StepRecord)


def test_further_columns_in_another_order_are_passed_over(tmp_path):
    path = tmp_path / "steps.csv"
    names = [field.name for field in fields(StepRecord)]
    path.write_text(",".join(["new", *reversed(names)]) + "\n" + ",".join(["x", *reversed(STEP.split(","))]) + "\n")
    assert read_csv(path, StepRecord) == [StepRecord(1, 0, 0, 0, 7, "token", 2, 9, 0.0, 0.1, 0.2, 3.5)]


def test_column_that_older_runs_do_not_have_gets_its_default(tmp_path):
    path = tmp_path / "steps.csv"
    names = [field.name for field in fields(StepRecord)]
    path.write_text(",".join(names[:-1]) + "\n" + STEP.rpartition(",")[0] + "\n")
    assert read_csv(path, StepRecord)[0].swap_stall_ms == 0.0
