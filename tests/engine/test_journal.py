"""The journal says again what happened, wherever its writer stopped."""

from __future__ import annotations

import errno
import json
import os
import random
import time
from contextlib import closing

import pytest

from dejavu.engine.journal import Journal, read_journal
from dejavu.engine.messages import Admission, SampledToken
from dejavu.engine.segments import files_of
from dejavu.errors import DejavuError, UsageError
from dejavu.measure.clock import RunClock
from dejavu.measure.ended import ended_names, read_ended
from dejavu.request import Completion, FinishReason, Request, SamplingParams, TokenLogprobs

REQUESTS = [
    Request("a", (5, 6, 7), SamplingParams(max_tokens=9, stop=("x",), logit_bias=((3, 1.5),), logprobs=2), 0.5),
    Request("b", (8,), SamplingParams(bad_words_ids=((1, 2), (3,)))),
    Request("c", (9,)),
]


def write(path):
    journal = Journal(path)
    journal.note("start", 12.5, 1000.5, "boot")
    for request in REQUESTS:
        journal.note_request(request)
    journal.note("complete")
    journal.note("admitted", 4, "a", 0.25)
    journal.note("admitted", 5, "b", 0.5)
    journal.note_seats(1, [Admission(4, 2, 3, (7, 8), REQUESTS[0])])
    for index, time_s in enumerate((1.0, 2.0, 3.0)):
        logprobs = TokenLogprobs(-0.5, ((40 + index, -0.5), (2, -1.5)))
        journal.note_token(SampledToken(4, index, 40 + index, logprobs), time_s, time_s - 0.25)
    journal.note_token(SampledToken(5, 0, 50, None), 1.5, 1.0)
    journal.note_end(Completion(REQUESTS[1], [50], text="text", finish_reason=FinishReason.CANCELLED, finish_s=1.75))
    journal.note_prompts([Admission(4, 0, 1, (5,), REQUESTS[0], (7, 8))])
    journal.note("moved", 4, 3)
    journal.note("given_up", 4)
    journal.note("steps", [[1, 2], [3]])
    journal.note_seats(1, [Admission(4, 2, 3, (7, 8), REQUESTS[0], outputs=(40, 41), num_cached=3)])
    journal.note("computed", 4, 7)
    journal.close()


def test_everything_comes_back(tmp_path):
    write(tmp_path / "journal")
    past = read_journal(tmp_path / "journal")
    assert (past.origin_s, past.origin) == (12.5, (1000.5, "boot"))
    assert (past.is_complete, past.steps) == (True, [[1, 2], [3]])
    assert [progress.completion.request for progress in past.requests.values()] == REQUESTS
    assert [progress.completion.request.request_id for progress in past.unfinished] == ["a", "c"]
    first, second, third = past.requests.values()
    assert first.seat == (1, Admission(4, 2, 3, (7, 8), REQUESTS[0], outputs=(40, 41), num_cached=7))
    assert first.prompt == Admission(4, 0, 1, (5,), REQUESTS[0], (7, 8))
    assert (first.keeps_prompt, first.num_moved) == (False, 3)
    assert first.completion.token_ids == [40, 41, 42]
    assert first.completion.logprobs[2] == TokenLogprobs(-0.5, ((42, -0.5), (2, -1.5)))
    assert (first.completion.admitted_s, first.completion.first_token_s) == (0.25, 1.0)
    assert first.completion.token_start_s == 1.75
    assert (second.seat, second.completion.finish_reason) == (None, FinishReason.CANCELLED)
    assert (second.completion.finish_s, second.completion.text) == (1.75, "text")
    assert third.serial == -1


def test_journal_that_was_cut_anywhere_is_read_as_far_as_it_goes(tmp_path):
    write(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for cut in (*range(0, len(data), 9), *(at + 1 for at, byte in enumerate(data) if byte == ord("\n"))):
        (tmp_path / "cut").write_bytes(data[:cut])
        past = read_journal(tmp_path / "cut")
        whole = data[:cut].count(b"\n")
        tokens = sum(json.loads(line)[0] == "token" for line in data.splitlines()[:whole])
        assert sum(len(p.completion.token_ids) for p in past.requests.values()) == tokens


def test_no_file_is_no_past(tmp_path):
    past = read_journal(tmp_path / "none")
    assert not past.requests
    assert not past.is_complete


def test_what_power_left_at_the_end_is_cut_off_before_further_lines(tmp_path):
    write(tmp_path / "journal")
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    for tail in (lines[-1][:-3], bytes(40), b"\n" * 3, lines[-1].replace(b"7", b"8")):
        (tmp_path / "torn").write_bytes(b"".join(lines[:-1]) + tail)
        past = read_journal(tmp_path / "torn")
        assert past.num_bytes == len(b"".join(lines[:-1]))
        with closing(Journal(tmp_path / "torn", past)) as journal:
            journal.note("complete")
        assert (tmp_path / "torn").read_bytes() == b"".join(lines[:-1]) + lines[4]


def test_corrupted_line_amid_others_is_refused(tmp_path):
    write(tmp_path / "journal")
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    number = next(index for index, line in enumerate(lines) if line.startswith(b'["token"'))
    for broken in (lines[number].replace(b"40", b"41", 1), b"\0" * 9 + b"\n", b"[]\n"):
        (tmp_path / "torn").write_bytes(b"".join([*lines[:number], broken, *lines[number + 1 :]]))
        with pytest.raises(UsageError, match=f"line {number + 1} of .* is corrupted: restore it"):
            read_journal(tmp_path / "torn")


def test_only_one_process_writes_a_journal(tmp_path, monkeypatch):
    monkeypatch.setattr("dejavu.engine.segments.LOCK_S", 0.05)
    with closing(Journal(tmp_path / "journal")), pytest.raises(UsageError, match="is still going on"):
        Journal(tmp_path / "journal")
    Journal(tmp_path / "journal").close()


def test_a_disk_that_is_full_ends_the_run_with_how_to_go_on(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal")
    journal.note("complete")
    with monkeypatch.context() as patch:
        patch.setattr("dejavu.engine.segments.os.write", lambda *_: raise_full())
        with pytest.raises(DejavuError, match=r"No space left.*--resume"):
            journal.flush()
    journal.close()


def raise_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_clock_goes_on_after_the_host_was_started_again(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.note("start", time.monotonic() + 1e6, time.time() - 60, "another boot")
    journal.close()
    assert read_journal(tmp_path / "journal").clock().now_s() == pytest.approx(60, abs=5)
    set_back = RunClock.resume(0.0, time.time() + 500, "another boot", 7.0)
    assert set_back.now_s() == pytest.approx(7, abs=5)
    clock = RunClock.start()
    assert RunClock.resume(*clock.describe(), 0.0) == clock


def wait_for_syncer(journal):
    """Wait until what was to be removed is."""
    while journal.segments.done:
        time.sleep(0.01)


class Serving:
    """Drive a journal as a controller does: requests, tokens, ends, in a random order."""

    def __init__(self, directory, seed, told, past):
        self.path, self.ended = directory / "journal.jsonl", directory / "parts" / "ended.jsonl"
        self.ended.parent.mkdir(exist_ok=True)
        self.draw, self.told = random.Random(seed), told
        self.journal = Journal(self.path, past, self.ended, segment_bytes=2000)
        self.running = {}
        self.serial = past.next_serial if past else 0
        for progress in past.unfinished if past else ():
            self.begin(progress.completion)

    def begin(self, completion):
        self.journal.note("admitted", self.serial, completion.request.request_id, 0.5)
        self.running[self.serial] = completion
        self.serial += 1

    def step(self, name):
        """Take a request, or give one of those that run a token, its last one now and then."""
        if len(self.running) < 4:
            self.journal.note_request(Request(name, (1, 2, 3)))
            self.begin(Completion(Request(name, (1, 2, 3)), admitted_s=0.5))
        serial = self.draw.choice(list(self.running))
        completion = self.running[serial]
        token_id = self.draw.randrange(100)
        self.journal.note_token(SampledToken(serial, len(completion.token_ids), token_id, None), 1.0, 0.5)
        completion.token_ids.append(token_id)
        self.journal.note("steps", [[self.serial]])
        if self.draw.random() < 0.2:
            completion.finish_reason, completion.finish_s = FinishReason.LENGTH, 1.0
            self.journal.note_end(self.running.pop(serial))
            self.told[completion.request.request_id] = tuple(completion.token_ids)
        self.journal.flush()


@pytest.mark.parametrize("seed", range(3))
def test_files_of_requests_that_have_ended_go_and_nothing_is_lost_or_told_twice(tmp_path, seed, monkeypatch):
    """Against a controller that forgets nothing; it is cut off four times, once amid a line."""
    monkeypatch.setattr("dejavu.engine.journal.SYNC_EVERY_S", 0.01)
    past, told, most_files = None, {}, 0
    for life in range(4):
        serving = Serving(tmp_path, seed + life, told, past)
        for number in range(250):
            serving.step(f"{life}-{number}")
            if number % 20 == 0:
                wait_for_syncer(serving.journal)
                most_files = max(most_files, len(files_of(serving.path)))
        serving.journal.close()
        with serving.path.open("a") as file:
            file.write('["token", 3, ')
        past = read_journal(serving.path, ended_names(tmp_path))
        expected = {c.request.request_id: c.token_ids for c in serving.running.values()}
        assert {p.completion.request.request_id: p.completion.token_ids for p in past.unfinished} == expected
        assert (past.num_ended, past.ended_tokens) == (len(told), sum(map(len, told.values())))
        assert (past.next_serial, past.steps) == (serving.serial, [[serving.serial]])
    found = [(done.output["request_id"], tuple(done.output["token_ids"])) for done in read_ended(tmp_path)]
    assert dict(found) == told
    assert len(found) == len(told) > 100
    order = [tuple(map(int, name.split("-"))) for name, _ in found]
    assert order == sorted(order)
    assert most_files < 15  # of more than fifty
    assert int(max(file.stem for file in files_of(serving.path))[-6:]) > 50
