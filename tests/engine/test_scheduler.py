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

    def __init__(self, looks_ahead=False):
        self.looks_ahead = looks_ahead
        self.cached = {}  # serial -> tokens in the cache
        self.serials = {}  # (microbatch, row) -> serial
        self.under_way = deque()
        self.prompts = {}
        self.known = {}  # serial -> tokens that are there before the first one is sampled

    def take(self, work):
        if work.microbatch in {w.microbatch for w, _ in self.under_way}:
            assert self.looks_ahead, "two passes of one microbatch"
            assert len(self.under_way) == 1, "looking ahead where others are under way"
        for admission in work.admissions:
            self.serials[admission.microbatch, admission.row] = admission.serial
            self.prompts[admission.serial] = admission.request.prompt_token_ids
            known = admission.request.prompt_token_ids + admission.outputs
            self.known[admission.serial] = len(known)
            self.cached[admission.serial] = list(known[: admission.num_cached])
        tokens, results = list(work.token_ids) or self.unseen(work), []
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

    def unseen(self, work):
        """Give what the only pass under way draws for each row."""
        ((_, sampled),) = self.under_way
        drawn = {token.serial: token.token_id for token in sampled.tokens}
        return [drawn[row.serial] for row in work.rows]


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 100), min_size=1, max_size=9),
        st.integers(1, 9),
        st.booleans(),
        st.sampled_from([0.0, 0.0, 0.0, 0.5]),
    ),
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
    looks_ahead=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_request_gets_its_tokens(
    requests, num_microbatches, microbatch_size, prompt_chunk, max_prompt_tokens, cut_at, looks_ahead, seed
):
    waiting = deque(
        Request(str(n), tuple(prompt), SamplingParams(max_tokens=output, ignore_eos=ignore, presence_penalty=reads))
        for n, (prompt, output, ignore, reads) in enumerate(requests)
    )
    wanted = {request.request_id: expected_output(request) for request in waiting}
    table = RowTable(num_microbatches, microbatch_size, 4, num_microbatches * microbatch_size * 5)
    options = num_microbatches, prompt_chunk, max_prompt_tokens, (EOS,), False, False, cut_at, looks_ahead
    scheduler = Scheduler(*options)
    pipeline, seated, outputs = NaivePipeline(looks_ahead), {}, {request_id: [] for request_id in wanted}
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
                if table.occupants.get((admission.microbatch, admission.row)) is not admission:
                    assert looks_ahead, "a token of a request that has ended"
                    continue
                assert token.index == len(outputs[admission.request.request_id])
                output = outputs[admission.request.request_id]
                output.append(token.token_id)
                if output == wanted[admission.request.request_id]:
                    table.release(admission)
        elif action == "fail":
            pipeline.under_way.clear()
            scheduler = Scheduler(*options)
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


def draw(scheduler, work, token_id, index):
    tokens = tuple(SampledToken(row.serial, index, token_id, None) for row in work.rows if row.samples)
    scheduler.sampled(Sampled(work.step, work.microbatch, tokens, 0.0))


def ahead(*prompts, **params):
    scheduler = Scheduler(2, 0, 8192, (EOS,), looks_ahead=True)
    for number, prompt in enumerate(prompts):
        request = Request(str(number), prompt, SamplingParams(**params))
        scheduler.admit(Admission(number, 0, number, (number,), request))
    return scheduler


def test_the_only_pass_is_followed_by_one_that_takes_what_it_draws():
    scheduler = ahead((1, 2), (3,), max_tokens=3)
    first, second = scheduler.next_work(), scheduler.next_work()
    assert (first.token_ids, second.token_ids) == ((1, 2, 3), ())
    assert [(row.context, row.num_new, row.samples) for row in second.rows] == [(2, 1, True), (1, 1, True)]
    assert scheduler.next_work() is None, "two are enough"
    draw(scheduler, first, 50, 0)
    third = scheduler.next_work()
    assert third.token_ids == ()
    draw(scheduler, second, 51, 1)
    assert scheduler.next_work() is None, "the third token is the last one"
    draw(scheduler, third, 52, 2)
    assert not scheduler.places


def test_a_row_that_ended_unseen_is_dropped():
    scheduler = ahead((1, 2), (3,), max_tokens=9)
    _, second = scheduler.next_work(), scheduler.next_work()
    scheduler.sampled(Sampled(0, 0, (SampledToken(0, 0, EOS, None), SampledToken(1, 0, 50, None)), 0.0))
    third = scheduler.next_work()
    assert [row.serial for row in second.rows] == [0, 1]
    assert [row.serial for row in third.rows] == [1]
    assert third.token_ids == ()
    draw(scheduler, second, 51, 1)
    assert set(scheduler.places) == {1}


def test_a_draw_that_reads_the_output_waits_for_it():
    scheduler = ahead((1, 2), (3,), max_tokens=9, frequency_penalty=0.1)
    first = scheduler.next_work()
    assert scheduler.next_work() is None
    draw(scheduler, first, 50, 0)
    assert scheduler.next_work().token_ids == (50, 50)


def test_nothing_goes_ahead_where_another_microbatch_is_under_way():
    scheduler = ahead((1, 2), max_tokens=9)
    scheduler.admit(Admission(7, 1, 0, (3,), Request("7", (4,), SamplingParams(max_tokens=9))))
    assert [scheduler.next_work().microbatch for _ in range(2)] == [0, 1]
    assert scheduler.next_work() is None
