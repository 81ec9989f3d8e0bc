"""Summaries against numbers worked out by hand, and against a naive count."""

import io
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.measure.records import RequestRecord, StepRecord
from dejavu.measure.render import format_bytes, format_number, format_seconds, render_summary
from dejavu.measure.summary import Limits, idle_fractions, percentiles, summarize
from dejavu.request import Completion, FinishReason, Request


def request(number, arrival_s, first_s, finish_s, tokens, reason=FinishReason.LENGTH):
    done = Completion(Request(str(number), (1,) * 10, arrival_s=arrival_s), [0] * tokens, finish_reason=reason)
    done.first_token_s, done.finish_s = first_s, finish_s
    return RequestRecord.from_completion(done)


def step(rank, stage, start_s, compute_end_s, end_s=None):
    return StepRecord(rank, stage, 0, 0, 0, "token", 1, 1, start_s, compute_end_s, end_s or compute_end_s)


def draw(summary, width=80):
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=width).print(render_summary(summary))
    return file.getvalue()


REQUESTS = [
    request(0, 1.0, 2.0, 5.0, 4),  # ttft 1, tpot 1, normalized 1
    request(1, 2.0, 5.0, 9.0, 3),  # ttft 3, tpot 2, normalized 7/3
    request(2, 2.0, 4.0, 4.0, 1, FinishReason.STOP),  # ttft 2, no tpot, normalized 2
    request(3, 1.5, 2.5, 3.0, 2, FinishReason.CANCELLED),
    request(4, 8.0, math.nan, math.nan, 0, None),
]


def test_a_run_worked_out_by_hand():
    stalled = replace(step(2, 1, 5.0, 7.0, 8.0), swap_stall_ms=3.0)
    row = summarize(REQUESTS, [step(1, 0, 0.0, 4.0, 5.0), stalled], 2, 4096).row()
    assert row == pytest.approx(
        {
            "requests": 3,
            "cancelled_requests": 1,
            "prompt_tokens": 40,
            "output_tokens": 10,
            "makespan_s": 8.0,
            "requests_per_s": 3 / 8,
            "goodput_requests_per_s": 3 / 8,
            "tokens_per_s": 10 / 8,
            "p50_ttft_s": 2.0,
            "p95_ttft_s": 2.9,
            "p99_ttft_s": 2.98,
            "p50_tpot_s": 1.5,
            "p95_tpot_s": 1.95,
            "p99_tpot_s": 1.99,
            "p50_normalized_latency_s": 2.0,
            "p95_normalized_latency_s": 2 + 0.9 / 3,
            "p99_normalized_latency_s": 2 + 0.98 / 3,
            **{f"{p}_{name}": math.nan for name in ("handover_s", "row_wait_s") for p in ("p50", "p95", "p99")},
            "stage0_idle_fraction": 0.5,
            "stage1_idle_fraction": 0.75,
            "peak_kv_bytes": 4096,
            "swap_stall_ms": 1.5,
        },
        nan_ok=True,
    )
    assert list(row)[-3:] == ["stage1_idle_fraction", "peak_kv_bytes", "swap_stall_ms"]


@pytest.mark.parametrize(
    ("limits", "good"),
    [(Limits(), 3), (Limits(ttft_s=2.0), 2), (Limits(tpot_s=1.0), 2), (Limits(2.5, 0.5), 1), (Limits(0.5), 0)],
)
def test_goodput_counts_who_keeps_both_limits(limits, good):
    summary = summarize(REQUESTS, [], 2, 0, limits)
    assert summary.row()["goodput_requests_per_s"] == good / 8
    assert ("within limits" in draw(summary, 120)) == (good < 3)


def test_limits_are_given_in_ms():
    assert Limits.of_ms(250.0, None) == Limits(0.25, math.inf)


def test_a_hand_over_ends_when_the_kv_is_there():
    late, early = (Completion(Request("q", (1,)), [0, 0], finish_reason=FinishReason.LENGTH) for _ in range(2))
    for done, arrived_s in ((late, 2.25), (early, 1.5)):
        done.first_token_s, done.kv_arrived_s, done.token_start_s = 2.0, arrived_s, 3.0
    assert (late.handover_s, late.row_wait_s) == (0.25, 0.75)
    assert (early.handover_s, early.row_wait_s) == (0.0, 1.0)
    summary = summarize([RequestRecord.from_completion(late)], [], 1, 0)
    assert summary.latencies["handover_s"].p95 == 0.25
    assert "hand-over" in draw(summary)


@pytest.mark.parametrize("requests", [[], [request(4, 8.0, math.nan, math.nan, 0, None)]])
def test_a_run_without_requests_has_zeros_and_nan(requests):
    summary = summarize(requests, [], 2, 0)
    row = summary.row()
    assert (row["requests"], row["output_tokens"], row["peak_kv_bytes"]) == (0, 0, 0)
    assert all(math.isnan(row[name]) for name in ("tokens_per_s", "p99_ttft_s", "stage1_idle_fraction"))
    assert "nan" not in draw(summary)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 30), st.integers(0, 9)), min_size=1),
)
def test_idle_fractions_equal_a_count_of_ticks(drawn):
    steps = [step(1 + stage * 2 + tp, stage, float(start), float(start + length)) for stage, tp, start, length in drawn]
    first, last = min(s.start_s for s in steps), max(s.end_s for s in steps)
    got = idle_fractions(steps, 3)
    for stage in range(3):
        ranks = {s.rank for s in steps if s.stage == stage}
        idle_of_ranks = []
        for rank in ranks:
            busy = {t for s in steps if s.rank == rank for t in range(int(s.start_s), int(s.compute_end_s))}
            idle_of_ranks.append(1 - len(busy) / (last - first) if last > first else math.nan)
        expected = sum(idle_of_ranks) / len(ranks) if ranks else (1.0 if last > first else math.nan)
        assert got[stage] == pytest.approx(expected, nan_ok=True)


def test_percentiles_interpolate_and_pass_over_nan():
    assert percentiles([4.0, math.nan, 2.0]) == pytest.approx((3.0, 3.9, 3.98))
    assert percentiles([7.0]) == (7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 µs"),
        (4.5e-5, "45.0 µs"),
        (0.01234, "12.3 ms"),
        (0.99996, "1.00 s"),
        (75.04, "75.0 s"),
        (3600, "3600 s"),
    ],
)
def test_times_have_three_digits_and_a_unit(seconds, text):
    assert format_seconds(seconds) == text


def test_numbers_and_bytes_have_three_digits():
    assert [format_number(x) for x in (0.0123, 9.999, 1234.5, math.nan)] == ["0.0123", "10.0", "1234", "-"]
    assert [format_bytes(n) for n in (0, 1023, 1536, 2**20, 5 * 2**40)] == [
        *("0 B", "1023 B", "1.50 KiB", "1.00 MiB", "5.00 TiB"),
    ]


def test_the_table_fits_80_columns_and_names_what_it_shows():
    summary = summarize(REQUESTS, [step(1 + n, n, float(n), n + 1.0) for n in range(24)], 24, 3 * 2**20)
    text = draw(summary)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("3.00 MiB", "1.25 tokens/s", "1 cancelled", "2.00 s", "2.98 s", "23:96%", "p95"):
        assert part in text
