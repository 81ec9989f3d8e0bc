"""The first stage's books, against a naive pipeline that checks every pass it is given."""

from collections import deque
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.engine.messages import Admission, Resume, Sampled, SampledToken
from dejavu.engine.rows import RowTable
from dejavu.engine.scheduler import Scheduler
from dejavu.request import Request, SamplingParams

EOS = 99


def next_token(last, position):
    return (last * 31 + position * 17 + 7) % 101


def expected_output(request):
    """Generate what a request must produce, by hand."""
    last, position, output = request.prompt_token_ids[-1], len(request.prompt_token_ids), []
    while len(output) < request.sampling.max_tokens:
        output.append(next_token(last, position))
        last, position = output[-1], position + 1
        if last == EOS and not request.sampling.ignore_eos:
            break
    return output


class NaivePipeline:
    """Follow each request's cached tokens, and answer passes later, in order, as the stages do."""

    def __init__(self):
        self.cached = {}  # serial -> tokens in the cache
        self.serials = {}  # (microbatch, row) -> serial
        self.under_way = deque()
        self.prompts = {}
        self.known = {}  # serial -> tokens that are there before the first one is sampled

    def take(self, work):
        assert work.microbatch not in {w.microbatch for w, _ in self.under_way}, "two passes of one microbatch"
        for admission in work.admissions:
            self.serials[admission.microbatch, admission.row] = admission.serial
            self.prompts[admission.serial] = admission.request.prompt_token_ids
            known = admission.request.prompt_token_ids + admission.outputs
            self.known[admission.serial] = len(known)
            self.cached[admission.serial] = list(known[: admission.num_cached])
        tokens, results = list(work.token_ids), []
        for row in work.rows:
            assert self.serials[work.microbatch, row.row] == row.serial
            cache, prompt = self.cached[row.serial], self.prompts[row.serial]
            assert row.context == len(cache)
            assert row.is_prompt == (row.context < len(prompt) or row.num_new > 1)
            cache += [tokens.pop(0) for _ in range(row.num_new)]
            assert tuple(cache[: len(prompt)]) == prompt[: len(cache)]
            assert row.samples == (len(cache) >= self.known[row.serial])
            if row.samples:
                index = len(cache) - len(prompt)
                results.append(SampledToken(row.serial, index, next_token(cache[-1], len(cache)), None))
        assert not tokens
        self.under_way.append((work, Sampled(work.step, work.microbatch, tuple(results), 0.0)))


requests = st.lists(
    st.tuples(st.lists(st.integers(0, 100), min_size=1, max_size=9), st.integers(1, 9), st.booleans()),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(
    requests=requests,
    num_microbatches=st.integers(1, 3),
    microbatch_size=st.integers(1, 3),
    prompt_chunk=st.integers(0, 5),
    max_prompt_tokens=st.integers(1, 20),
    cut_at=st.sampled_from([0, 0, 1, 4, 7]),
    seed=st.integers(0, 2**32),
)
def test_every_request_gets_its_tokens(
    requests, num_microbatches, microbatch_size, prompt_chunk, max_prompt_tokens, cut_at, seed
):
    waiting = deque(
        Request(str(n), tuple(prompt), SamplingParams(max_tokens=output, ignore_eos=ignore))
        for n, (prompt, output, ignore) in enumerate(requests)
    )
    wanted = {request.request_id: expected_output(request) for request in waiting}
    table = RowTable(num_microbatches, microbatch_size, 4, num_microbatches * microbatch_size * 5)
    scheduler = Scheduler(num_microbatches, prompt_chunk, max_prompt_tokens, (EOS,), cut_at=cut_at)
    pipeline, seated, outputs = NaivePipeline(), {}, {request_id: [] for request_id in wanted}
    random = Random(seed)
    for turn in range(6000):
        action = random.choice(["seat", "work", "answer"] * 10 + ["fail"] * (turn < 1500))
        if action == "seat" and waiting and (admission := table.admit(int(waiting[0].request_id), waiting[0])):
            waiting.popleft()
            seated[admission.serial] = admission
            scheduler.admit(admission)
        elif action == "work" and (work := scheduler.next_work()):
            new = sum(r.num_new for r in work.rows if r.is_prompt)
            alone = sum(r.is_prompt for r in work.rows) == 1
            assert new <= (prompt_chunk or cut_at or max_prompt_tokens) or (alone and not prompt_chunk + cut_at)
            pipeline.take(work)
        elif action == "answer" and pipeline.under_way:
            _, result = pipeline.under_way.popleft()
            scheduler.sampled(result)
            for token in result.tokens:
                admission = seated[token.serial]
                assert token.index == len(outputs[admission.request.request_id])
                output = outputs[admission.request.request_id]
                output.append(token.token_id)
                if output == wanted[admission.request.request_id]:
                    table.release(admission)
        elif action == "fail":
            pipeline.under_way.clear()
            scheduler = Scheduler(num_microbatches, prompt_chunk, max_prompt_tokens, (EOS,), cut_at=cut_at)
            for serial, admission in seated.items():
                output = outputs[admission.request.request_id]
                if table.occupants.get((admission.microbatch, admission.row)) is not admission:
                    continue
                there = random.randint(0, len(admission.request.prompt_token_ids) + len(output) - 1) if output else 0
                seated[serial] = table.renew(admission, outputs=tuple(output), num_cached=there)
            live = [a for a in seated.values() if table.occupants.get((a.microbatch, a.row)) is a]
            scheduler.resume(Resume(tuple(live), tuple(random.randrange(9) for _ in range(num_microbatches))))
        if not waiting and outputs == wanted and not pipeline.under_way:
            break
    assert outputs == wanted
    assert not scheduler.places
    assert scheduler.next_work() is None
    assert len(table.blocks.free) == table.num_blocks


def admit(scheduler, table, *prompts, max_tokens=4):
    seats = [
        table.admit(n, Request(str(n), tuple(prompt), SamplingParams(max_tokens=max_tokens)))
        for n, prompt in enumerate(prompts)
    ]
    for seat in seats:
        scheduler.admit(seat)
    return seats


def test_prompts_go_before_token_steps_and_share_a_pass():
    table, scheduler = RowTable(1, 3, 8, 6), Scheduler(1, 0, 5, ())
    admit(scheduler, table, [1, 2, 3], [4, 5], [6])
    first = scheduler.next_work()
    assert (first.kind, first.token_ids) == ("prompt", (1, 2, 3, 4, 5))
    assert scheduler.next_work() is None
    scheduler.sampled(Sampled(0, 0, tuple(SampledToken(r.serial, 0, 50, None) for r in first.rows), 0.0))
    second = scheduler.next_work()
    assert (second.kind, second.token_ids) == ("prompt", (6,))
    scheduler.sampled(Sampled(1, 0, (SampledToken(2, 0, 60, None),), 0.0))
    third = scheduler.next_work()
    assert (third.kind, sorted(third.token_ids)) == ("token", [50, 50, 60])


def test_cut_prompts_go_before_token_steps():
    table, scheduler = RowTable(1, 2, 8, 6), Scheduler(1, 0, 8192, (), cut_at=3)
    admit(scheduler, table, [1, 2], [3, 4, 5, 6, 7])
    first = scheduler.next_work()
    assert (first.kind, first.token_ids) == ("prompt", (1, 2, 3))
    scheduler.sampled(Sampled(0, 0, (SampledToken(0, 0, 50, None),), 0.0))
    second = scheduler.next_work()
    assert (second.kind, second.token_ids) == ("prompt", (4, 5, 6))


def test_chunks_run_beside_token_steps():
    table, scheduler = RowTable(1, 2, 8, 6), Scheduler(1, 2, 8192, ())
    admit(scheduler, table, [1], [2, 3, 4, 5])
    first = scheduler.next_work()
    assert (first.kind, first.token_ids) == ("prompt", (1, 2))
    scheduler.sampled(Sampled(0, 0, (SampledToken(0, 0, 50, None),), 0.0))
    second = scheduler.next_work()
    assert (second.kind, second.token_ids) == ("mixed", (50, 3, 4))


def test_microbatches_take_turns():
    table, scheduler = RowTable(3, 1, 8, 3), Scheduler(3, 0, 8, ())
    admit(scheduler, table, [1], [2], [3])
    assert [scheduler.next_work().microbatch for _ in range(3)] == [0, 1, 2]
    assert scheduler.next_work() is None


def test_released_request_takes_no_further_step_and_its_late_token_is_ignored():
    table, scheduler = RowTable(1, 1, 8, 1), Scheduler(1, 0, 8, ())
    (seat,) = admit(scheduler, table, [1, 2])
    scheduler.next_work()
    scheduler.release(seat.serial)
    table.release(seat)
    new = table.admit(99, Request("new", (7,), SamplingParams(max_tokens=2)))
    scheduler.admit(new)
    scheduler.sampled(Sampled(0, 0, (SampledToken(seat.serial, 0, 55, None),), 0.0))
    work = scheduler.next_work()
    assert work.token_ids == (7,)
    assert work.rows[0].serial == new.serial


def test_a_prompt_with_tokens_from_before_a_loss_is_one_prompt():
    """What is said of the pass's share of its prompts counts what has to be processed again as a part of them."""
    scheduler = Scheduler(1, 0, 8192, ())
    scheduler.admit(
        Admission(0, 0, 0, (0,), Request("0", (1, 2, 3, 4), SamplingParams(max_tokens=9)), outputs=(5, 6, 7))
    )
    work = scheduler.next_work()
    assert sum(row.num_new for row in work.rows) == 7
    assert work.prompt_share == 1.0
