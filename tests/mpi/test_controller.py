"""Drive a controller as a client does: requests at any time, cancel at any stage of a request's life, stop strings."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import pairwise

import pytest

from dejavu.config import ServeConfig
from dejavu.request import FinishReason, Request, SamplingParams

pytestmark = [pytest.mark.mpi(min_size=3), pytest.mark.timeout(100)]

CANCELLED = FinishReason.CANCELLED


class Letters:
    """Turn each token into three letters, so that a stop string can begin in one token and end in the next."""

    def push(self, token_id):
        return "abcdefghij"[token_id % 10] + "uvwxyz"[token_id % 6] + "-"

    def flush(self):
        return ""


def text_of(token_ids):
    return "".join(map(Letters().push, token_ids))


def make_config(**changes):
    """Serve in two microbatches of one row by stages that wait a little."""
    values = {"synthetic": (3.0, 2.0), "pp": 2, "microbatch_size": 1, "row_len": 400, "block_size": 16}
    return ServeConfig(model="gpt2", stall_timeout=20, num_requests=1, prompt_len=1, output_len=1, **values | changes)


def make_requests(count, max_tokens=12, **params):
    return [
        Request(
            f"r{n}", tuple(range(n, n + 3 + n % 4)), SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
        )
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def expected(world):
    """Give the tokens of the first requests when nothing disturbs them."""
    return [c.token_ids for c in world.generate(make_config(), make_requests(6, 40))]


def test_tokens_depend_on_nothing_but_the_request(world, expected):
    """One stage or two, many rows or one, small blocks or large: a hash of tokens and positions comes out the same."""
    for config in (make_config(pp=1, num_microbatches=1), make_config(microbatch_size=3, block_size=5, prompt_chunk=2)):
        assert [c.token_ids for c in world.generate(config, make_requests(6, 40))] == expected
    assert len({tuple(tokens) for tokens in expected}) == 6


def play(controller, requests, on_event):
    """Serve requests, and call `on_event(event, number of its tokens so far)`; give completions and events by id."""
    done, events = {}, {}
    for request in requests:
        controller.submit(request)
    for event, completion in controller.events():
        done[event.request_id] = completion
        events.setdefault(event.request_id, []).append(event)
        on_event(event, len(completion.token_ids))
    table = controller.seating.lanes[0].table
    return done, events, (len(table.occupants), len(table.blocks.free), controller.counts)


def check_rest(found, expected, cancelled):
    """Check that cancelled requests kept a beginning of their text, and the others all of it, and no row is left."""
    done, events, (occupied, free, counts) = found
    for number, tokens in enumerate(expected[: len(done)]):
        completion = done[f"r{number}"]
        got = completion.token_ids
        assert got == tokens[: len(got)]
        assert (completion.finish_reason == CANCELLED) == (f"r{number}" in cancelled)
        assert len(got) == len(tokens) or f"r{number}" in cancelled
        assert [e.finish_reason for e in events[f"r{number}"]][-1] == completion.finish_reason
        assert all(e.finish_reason is None for e in events[f"r{number}"][:-1])
        assert [e.token_id for e in events[f"r{number}"] if e.token_id is not None] == got
    assert occupied == 0
    assert free == 2 * 25
    assert counts.done == counts.submitted == len(done)


def test_cancel_while_running(world, expected):
    """The row goes to the next request at once, and a pass of the cancelled one under way does no harm."""

    def drive(controller):
        def on_event(event, count):
            if event.request_id == "r1" and count == 5:
                controller.cancel("r1")
            if event.request_id == "r3" and count == 1:
                controller.cancel("r3")

        return play(controller, make_requests(6, 40), on_event)

    found = world.serve(make_config(), drive)[0]
    check_rest(found, expected, {"r1", "r3"})
    assert 5 <= len(found[0]["r1"].token_ids) <= 8
    assert 1 <= len(found[0]["r3"].token_ids) <= 4


def test_cancel_while_waiting(world, expected):
    """A request without a row never gets one."""

    def drive(controller):
        def on_event(event, count):
            if event.request_id == "r0" and count == 2:
                controller.cancel("r4")

        return play(controller, make_requests(6, 40), on_event)

    found = world.serve(make_config(), drive)[0]
    check_rest(found, expected, {"r4"})
    assert found[0]["r4"].token_ids == []
    assert found[0]["r4"].admitted_s != found[0]["r4"].admitted_s


def test_cancel_before_arrival_during_the_prompt_and_after_the_end(world, expected):
    """One request is due in an hour, the first two are cancelled before any token; one that ended stays as it is."""

    def drive(controller):
        requests = make_requests(6, 40)
        requests[5] = replace(requests[5], arrival_s=3600.0)

        def on_event(event, count):
            if event.finish_reason == FinishReason.LENGTH and event.request_id == "r2":
                controller.cancel("r2")
                controller.cancel("r5")
                controller.cancel("no such request")

        controller.submit(requests[0])
        controller.poll()  # takes the row; its prompt is on the way
        assert list(controller.running)
        controller.cancel("r0")
        controller.submit(requests[1])
        controller.cancel("r1")  # before the controller has looked at it
        return play(controller, requests[2:], on_event)

    found = world.serve(make_config(), drive)[0]
    check_rest(found, expected, {"r0", "r1", "r5"})
    assert [found[0][name].token_ids for name in ("r0", "r1", "r5")] == [[], [], []]


def test_everything_cancelled_ends_the_run(world):
    """Passes may be under way at the stop; the next run of the same ranks is not disturbed."""

    def drive(controller):
        def on_event(event, count):
            for number in range(6):
                controller.cancel(f"r{number}")

        return play(controller, make_requests(6, 300), on_event)

    done, _, (occupied, _, _) = world.serve(make_config(), drive)[0]
    assert {c.finish_reason for c in done.values()} == {CANCELLED}
    assert occupied == 0


def test_submit_and_cancel_from_another_thread_while_serving(world, expected):
    def drive(controller):
        requests = make_requests(6, 40)

        def client():
            for request in requests[1:]:
                controller.submit(request)
            controller.cancel("r5")

        thread = threading.Thread(target=client)

        def on_event(event, count):
            if event.request_id == "r0" and count == 3:
                thread.start()
            if event.request_id == "r0" and count == 6:
                thread.join()

        return play(controller, requests[:1], on_event)

    check_rest(world.serve(make_config(), drive)[0], expected, {"r5"})


def test_cancel_right_after_submit_is_never_lost(world, expected):
    """Another thread may do both while the controller is between two looks at what it was asked for."""

    def drive(controller):
        requests = make_requests(2, 40)
        look = controller.take_inbox

        def look_then_be_overtaken():
            look()
            if controller.counts.submitted == 1:
                controller.submit(requests[1])
                controller.cancel("r1")

        controller.take_inbox = look_then_be_overtaken
        return play(controller, requests[:1], lambda *_: None)

    check_rest(world.serve(make_config(), drive)[0], expected, {"r1"})


@pytest.mark.parametrize("pp", [1, 2])
def test_stop_string_cuts_the_text(world, expected, pp):
    """It begins in one token and ends in the next; what was shown never holds it, nor a part of it."""
    whole = text_of(expected[0])
    stop = whole[31:35]
    first = whole.find(stop)
    requests = [replace(r, sampling=replace(r.sampling, stop=(stop,))) for r in make_requests(1, 40)]
    config = make_config(pp=pp, num_microbatches=2)
    done, events, _ = world.serve(config, lambda c: play(c, requests, lambda *_: None), Letters)[0]
    assert done["r0"].finish_reason == FinishReason.STOP
    assert done["r0"].text == whole[:first] == "".join(e.text for e in events["r0"])
    assert done["r0"].token_ids == expected[0][: (first + len(stop) + 2) // 3]


def test_min_tokens_lets_a_stop_string_pass(world, expected):
    whole = text_of(expected[0])
    stop = whole[:3]
    params = {"stop": (stop,), "min_tokens": 4}
    done = world.serve(make_config(), lambda c: c.generate(make_requests(1, 40, **params)), Letters)[0][0]
    again = whole.find(stop, 3)
    assert done.text.startswith(whole[:9])
    assert len(done.token_ids) >= 4
    assert done.finish_reason == (FinishReason.STOP if again > 0 else FinishReason.LENGTH)


def test_memory_for_few_requests_makes_the_others_wait(world, expected):
    """Rows are free, blocks are not: the requests come one after the other, in their order."""
    bytes_per_block = 16 * 2 * 12 * 64 * 4 * 6  # 16 tokens of six float32 layers of gpt2
    config = make_config(dtype="float32", microbatch_size=4, row_len=48, kv_memory=3 * bytes_per_block)
    completions, outcome = world.serve(config, lambda c: c.generate(make_requests(6, 40)))
    assert [c.token_ids for c in completions] == expected
    assert outcome.peak_blocks == (3,)
    for before, after in pairwise(completions):
        assert before.finish_s <= after.admitted_s


def test_request_that_never_fits_is_refused_and_the_others_are_served(world, expected):
    from dejavu.errors import CapacityError

    def drive(controller):
        with pytest.raises(CapacityError, match="'r0' needs 51 KV blocks of 16 tokens and the pool has 50: raise"):
            controller.submit(make_requests(1, 800)[0])
        return controller.generate(make_requests(6, 40))

    assert [c.token_ids for c in world.serve(make_config(), drive)[0]] == expected


def test_arrivals_are_respected(world):
    requests = [replace(r, arrival_s=0.2 * n) for n, r in enumerate(make_requests(4, 5))]
    completions = world.serve(make_config(), lambda c: c.generate(requests[::-1]))[0]
    for completion in completions:
        arrival_s = completion.request.arrival_s
        assert arrival_s <= completion.admitted_s <= completion.first_token_s <= completion.finish_s
        assert completion.admitted_s < arrival_s + 0.15
