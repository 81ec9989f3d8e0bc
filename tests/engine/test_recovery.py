"""What is said of failures, and how their times are kept."""

from math import isnan

import pytest

from dejavu.engine.recovery import Death, FailureBook, Gathered
from dejavu.engine.recovery_point import Repeated


def test_failure_while_ranks_load_counts_before_the_start_of_serving():
    """The run's clock begins anew when all are ready: what came before stays in order."""
    book = FailureBook()
    outage = book.begin([Death("stage 1", 2, 3, injected_s=0.9)], 1.0, 1.25, set())
    book.shift(-4.0)  # the new clock began four seconds after the first one
    book.resume(outage, Gathered([]), Repeated(), 0.001)
    (line,) = book.close_finished(0.002)
    (record,) = book.records
    times = [record.injected_s, record.detected_s, record.rebuilt_s, record.restored_s, record.resumed_s]
    assert times == pytest.approx([-3.1, -3.0, -2.75, 0.001, 0.002])
    assert record.recovery_s == pytest.approx(3.102)
    assert "stage 1 (rank 2) died, seen 3.00 s before serving: rank 3 takes over" in line


def test_what_was_not_caused_on_purpose_counts_from_its_detection():
    book = FailureBook()
    outage = book.begin([Death("stage 0", 1, 3, "hang")], 1.0, 1.25, {7})
    book.resume(outage, Gathered([], restored_bytes=3 << 20), Repeated(prompts=0, tokens=2, steps=1), 1.5)
    assert book.close_finished(1.6) == []
    (line,) = book.token(7, 2.0)
    (record,) = book.records
    assert isnan(record.injected_s)
    assert record.recovery_s == pytest.approx(1.0)
    assert "stage 0 (rank 1) stood still and was ended, seen at 1.00 s: rank 3 takes over" in line
    assert "3.00 MiB of KV restored from replicas; 2 tokens passed again; serving again after 1000 ms" in line


def test_run_that_is_started_again_closes_what_was_open():
    before = FailureBook()
    before.begin([Death("stage 1", 2, 3)], 1.0, 1.25, {7})
    book = FailureBook()
    book.adopt(before.records, {7, 8})
    outage = book.restart(9.0, {7, 8})
    book.resume(outage, Gathered([], kept_bytes=1 << 20), Repeated(), 9.5)
    assert book.token(7, 9.75) == []
    (line,) = book.token(8, 10.0)
    assert line.endswith(
        "all ranks were started again; 1.00 MiB of KV kept on the host; nothing recomputed; serving again after 9000 ms"
    )
    (record,) = book.records
    assert (record.rebuilt_s, record.restored_s, record.resumed_s) == (9.0, 9.5, 10.0)


def test_recovery_that_another_failure_interrupts_is_over_with_that_one():
    book = FailureBook()
    book.begin([Death("stage 1", 2, 3)], 1.0, 1.25, {7})
    outage = book.begin([Death("stage 0", 1, 4)], 1.5, 1.75, {7})
    book.resume(outage, Gathered([]), Repeated(), 2.0)
    assert len(book.token(7, 2.5)) == 2
    assert [(record.restored_s, record.resumed_s) for record in book.records] == [(2.0, 2.5)] * 2
