"""The journal says again what happened, wherever its writer stopped."""

from __future__ import annotations

import json

from dejavu.engine.journal import Journal, read_journal
from dejavu.engine.messages import Admission, SampledToken
from dejavu.request import FinishReason, Request, SamplingParams, TokenLogprobs

REQUESTS = [
    Request("a", (5, 6, 7), SamplingParams(max_tokens=9, stop=("x",), logit_bias=((3, 1.5),), logprobs=2), 0.5),
    Request("b", (8,), SamplingParams(bad_words_ids=((1, 2), (3,)))),
    Request("c", (9,)),
]


def write(path):
    journal = Journal(path)
    journal.note("start", 12.5)
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
    journal.note("end", "b", FinishReason.CANCELLED, 1.75, "text")
    journal.note("steps", [[1, 2], [3]])
    journal.note_seats(1, [Admission(4, 2, 3, (7, 8), REQUESTS[0], outputs=(40, 41), num_cached=3)])
    journal.close()


def test_everything_comes_back(tmp_path):
    write(tmp_path / "journal")
    past = read_journal(tmp_path / "journal")
    assert (past.origin_s, past.is_complete, past.steps) == (12.5, True, [[1, 2], [3]])
    assert [progress.completion.request for progress in past.requests.values()] == REQUESTS
    assert [progress.completion.request.request_id for progress in past.unfinished] == ["a", "c"]
    first, second, third = past.requests.values()
    assert first.seat == (1, Admission(4, 2, 3, (7, 8), REQUESTS[0], outputs=(40, 41), num_cached=3))
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
    for cut in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:cut])
        past = read_journal(tmp_path / "cut")
        whole = data[:cut].count(b"\n")
        tokens = sum(json.loads(line)[0] == "token" for line in data.splitlines()[:whole])
        assert sum(len(p.completion.token_ids) for p in past.requests.values()) == tokens


def test_no_file_is_no_past(tmp_path):
    past = read_journal(tmp_path / "none")
    assert not past.requests
    assert not past.is_complete
