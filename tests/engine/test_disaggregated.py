"""What every rank's memory really holds, through random passes, copies and losses, against what the books take it for.

Each rank's pool says of each block whose tokens it has; a replica is the same once more, filled by the books that the
ranks keep. A failure takes processes, or memory with the replicas in it, and the controller too. After each, what the
books decide is held against the memories themselves.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from random import Random
from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.engine.disaggregated import Disaggregated
from dejavu.engine.journal import READERS, Journal, Past
from dejavu.engine.messages import Admissions, Expect, Release, Resend, Resume, SampledToken
from dejavu.engine.recovery_point import join_restored, tokens_there
from dejavu.engine.rows import RowTable
from dejavu.engine.seating import Colocated, Lane
from dejavu.kv.replica import HeldRow, ReplicaBooks
from dejavu.request import FinishReason, Request, SamplingParams

BLOCK = 4
MICROBATCHES = 2


class MemoryJournal(Journal):
    """Keep the lines; those that were not flushed are lost with the controller."""

    def __init__(self):
        self.lines, self.written = [], []
        self.segments = SimpleNamespace(book=SimpleNamespace(touch=lambda serial: None))

    def note_request(self, request):
        self.note("request", asdict(request), int(request.request_id))

    def note(self, kind, *values):
        self.lines.append(json.dumps([kind, *values]))

    def flush(self):
        self.written += self.lines
        self.lines = []

    def read(self):
        past = Past()
        for line in self.written:
            kind, *values = json.loads(line)
            READERS[kind](past, *values)
        return past


@dataclass
class Memory:
    """Hold whose tokens lie in each block, and how many of each request were written."""

    owner: dict = field(default_factory=dict)
    length: dict = field(default_factory=dict)

    def write(self, serial, blocks, start, stop):
        for block in blocks[start // BLOCK : -(-stop // BLOCK)]:
            if self.owner.get(block) != serial:
                self.owner[block] = serial
        self.length[serial] = stop

    def valid(self, serial, blocks):
        """Count the leading tokens of a request that are here."""
        length = self.length.get(serial, 0)
        mine = [self.owner.get(block) == serial for block in blocks[: -(-length // BLOCK)]]
        return length if all(mine) else BLOCK * mine.index(False)


@dataclass
class Rank:
    """Be one rank of the pipeline that generates tokens, with its replica in another rank's memory."""

    every: int
    pool: Memory = field(default_factory=Memory)
    replica: Memory = field(default_factory=Memory)
    rows: dict = field(default_factory=dict)  # the replica's index
    books: ReplicaBooks = field(default_factory=ReplicaBooks)
    late: list = field(default_factory=list)  # passes whose copies are not made
    has_new_replica: bool = False

    def __post_init__(self):
        self.restart()

    def restart(self):
        self.books, self.late = ReplicaBooks(self.every), []
        self.books.adopt(self.rows)

    def compute(self, work):
        self.copy()
        microbatch, step, rows = work
        for admission, is_new, context, stop in rows:
            assert self.pool.valid(admission.serial, admission.blocks) >= context, (admission, context)
            self.pool.write(admission.serial, admission.blocks, context, stop)
            place = microbatch, admission.row
            if is_new:
                self.books.admit(place, admission.serial, admission.blocks, admission.num_cached)
            self.books.advance(place, stop)
        self.late.append((microbatch, step, self.books.due(microbatch, step)))

    def copy(self):
        """Make the copies of the pass before; give what the replica then has."""
        told = {}
        for microbatch, step, copies in self.late:
            for copy in copies or ():
                if self.pool.valid(copy.serial, copy.blocks) >= copy.stop:  # else it has ended: others have its blocks
                    self.replica.write(copy.serial, copy.blocks, copy.start, copy.stop)
                self.rows[copy.place] = HeldRow(copy.serial, copy.stop, tuple(copy.blocks))
            if copies is not None:
                told[microbatch] = step
        self.late = []
        return told

    def lose(self):
        """Lose all of this device's memory, and take back what the replica has."""
        self.pool = Memory()
        for row in self.rows.values():
            have = self.replica.valid(row.serial, row.blocks)
            self.pool.write(row.serial, row.blocks, 0, min(have, row.length))
        return {row.serial: row.length for row in self.rows.values()}


class Machine:
    """Be the controller's loop and all ranks, with what they tell each other."""

    def __init__(self, random, every, is_split, is_replicated, chunk):
        self.random, self.every, self.is_split, self.is_replicated = random, every, is_split, is_replicated
        self.chunk = 0 if is_split else chunk
        self.num_prompt, self.num_token = 2 * is_split, 3
        self.prompt_pools = [Memory() for _ in range(self.num_prompt)]
        self.ranks = [Rank(every) for _ in range(self.num_token)]
        self.journal = MemoryJournal()
        self.outputs, self.requests, self.steps = {}, {}, {}
        self.void()
        self.make_seating()

    def make_seating(self):
        token_ranks = range(1 + self.num_prompt, 1 + self.num_prompt + self.num_token)
        self.token = Lane(token_ranks, RowTable(MICROBATCHES, 2, BLOCK, 14), is_replicated=self.is_replicated)
        if not self.is_split:
            self.seating = Colocated([self.token], self.send)
            return
        prompt = Lane(range(1, 3), RowTable(1, 2, BLOCK, 6, prompts_only=True))
        self.seating = Disaggregated(prompt, self.token, self.send, self.journal)

    def void(self):
        """Forget all that is under way."""
        self.prompting, self.sampled, self.moves = [], [], []
        self.rows, self.passes, self.ended_in_flight = {}, {}, {}
        for rank in self.ranks:
            rank.restart()

    def send(self, rank, message):
        is_head = rank == self.token.ranks[0]
        match message:
            case Admissions(admissions) | Resume(admissions):
                if is_head:
                    self.journal.note_seats(int(self.is_split), admissions)
                    for admission in admissions:
                        context = admission.num_cached
                        self.rows[admission.serial] = [admission, True, context]
                else:
                    self.journal.note_prompts(admissions)
                    self.prompting += admissions
                if isinstance(message, Resume) and is_head:
                    self.steps = dict(enumerate(message.steps))
            case Expect(serial):
                self.moves.append((rank, serial, message.blocks))
            case Resend(serial, num_tokens, blocks):
                pool = self.prompt_pools[rank - 1]
                assert pool.valid(serial, blocks) >= num_tokens, "sent again what is not there"
                self.moves.append((rank, serial, blocks))
            case Release(serial):
                gone = self.rows.pop(serial, None)
                self.seating.lanes[-1].released(serial, self.steps.get(gone[0].microbatch, 0) if gone else 0)
        self.journal.flush()

    # what can happen

    def do_seat(self):
        serial = len(self.requests)
        if serial < 9:
            size = self.random.randint(1, 9), self.random.randint(2, 7)
            request = Request(str(serial), tuple(range(size[0])), SamplingParams(max_tokens=size[1]))
            if self.seating.seat(serial, request):
                self.requests[serial], self.outputs[serial] = request, []
                self.journal.note_request(request)
                self.journal.note("admitted", serial, str(serial), 0.0)

    def do_prompt(self):
        if self.prompting:
            admission = self.prompting.pop(0)
            for pool in self.prompt_pools:
                pool.write(admission.serial, admission.blocks, 0, len(admission.request.prompt_token_ids))
            self.sampled.append(admission.serial)
            self.moves += [(rank, admission.serial, admission.blocks) for rank in range(1, 1 + self.num_prompt)]

    def do_first(self):
        if self.sampled:
            serial = self.sampled.pop(0)
            self.seating.first_token(serial, 7)
            self.take_token(serial, 0)

    def do_move(self):
        ready = [move for move in self.moves if all(move[1] != each.serial for each in self.prompting)]
        if ready:
            move = rank, serial, blocks = self.random.choice(ready)
            self.moves.remove(move)
            if rank > self.num_prompt:
                num_prompt = len(self.seating.handovers[serial].request.prompt_token_ids)
                kept = self.seating.handovers[serial].kept
                assert all(pool.valid(serial, kept) >= num_prompt for pool in self.prompt_pools)
                receiver = self.ranks[rank - 1 - self.num_prompt]
                receiver.copy()  # before it looks for messages
                receiver.pool.write(serial, blocks, 0, num_prompt)
            self.seating.moved(rank, serial)

    def do_begin(self):
        microbatch = self.random.randrange(MICROBATCHES)
        rows = [row for row in self.rows.values() if row[0].microbatch == microbatch]
        if not rows or microbatch in self.passes:
            return
        works, step = [], self.steps.get(microbatch, 0)
        for row in rows:
            admission, is_new, context = row
            known = len(admission.request.prompt_token_ids) + len(self.outputs[admission.serial])
            stop = min(known, context + self.chunk) if self.chunk else known
            works.append((admission, is_new, context, stop))
            row[1:] = False, stop
        self.passes[microbatch] = [(microbatch, step, works), 0]
        self.steps[microbatch] = step + 1

    def do_step(self):
        """Let a pass go through one more rank; the last one gives the tokens."""
        if self.passes:
            microbatch = self.random.choice(sorted(self.passes))
            work, position = self.passes[microbatch]
            self.ranks[position].compute(work)
            self.passes[microbatch][1] += 1
            if position + 1 == len(self.ranks):
                del self.passes[microbatch]
                self.finish(work)

    def finish(self, work):
        microbatch, step, rows = work
        self.token.passed(microbatch, step)
        for admission, _, _, stop in rows:
            serial = admission.serial
            if serial not in self.outputs or serial not in self.live:
                continue
            known = len(admission.request.prompt_token_ids) + len(self.outputs[serial])
            if stop < known:
                self.seating.computed(serial, stop)
                self.journal.note("computed", serial, stop)
                continue
            self.token.begun.setdefault(serial, step)
            if not self.outputs[serial]:
                self.seating.first_token(serial, 7)
            self.take_token(serial, len(self.outputs[serial]))
        self.journal.note("steps", [lane.steps for lane in self.seating.lanes])

    @property
    def live(self):
        seats = self.seating.handovers if self.is_split else self.seating.seats
        return {s for s in seats if not (self.is_split and seats[s].ended)}

    def take_token(self, serial, index):
        if serial not in self.live or index < len(self.outputs[serial]):
            return
        self.outputs[serial].append(7)
        self.journal.note_token(SampledToken(serial, index, 7, None), 0.0, 0.0)
        if len(self.outputs[serial]) == self.requests[serial].sampling.max_tokens:
            self.rows.pop(serial, None)
            self.end(serial, is_foreseen=True)

    def end(self, serial, *, is_foreseen):
        self.journal.note("end", str(serial), FinishReason.LENGTH, 0.0, None)
        self.seating.end(serial, is_foreseen=is_foreseen)

    def do_cancel(self):
        if self.live and self.random.random() < 0.03:
            self.end(self.random.choice(sorted(self.live)), is_foreseen=False)

    def do_tell(self):
        self.seating.tell()
        self.journal.flush()

    def do_copy(self):
        """Let a rank make its copies, and tell of them."""
        number = self.random.randrange(self.num_token)
        if self.is_replicated:
            self.token.take_replicated(self.token.ranks[number], self.ranks[number].copy().items())

    def do_fail(self):
        if self.random.random() < 0.15:
            self.fail()

    # a failure

    def fail(self):
        self.journal.flush()
        for microbatch in list(self.passes):  # how far they come is chance
            while self.random.random() < 0.5 and self.passes[microbatch][1] + 1 < self.num_token:
                self.ranks[self.passes[microbatch][1]].compute(self.passes[microbatch][0])
                self.passes[microbatch][1] += 1
        lost = {n for n in range(self.num_token) if self.random.random() < 0.25}
        keeps_prompts = [self.random.random() > 0.15 for _ in self.prompt_pools]
        for number, keeps in enumerate(keeps_prompts):
            if not keeps:
                self.prompt_pools[number] = Memory()
        if self.random.random() < 0.3:
            self.lose_controller()
        parts = self.lose_memory(lost)
        self.token.forget_replicas(
            rank for rank, r in zip(self.token.ranks, self.ranks, strict=True) if r.has_new_replica
        )
        owners = [self.token.ranks[n] for n in sorted(lost)]
        most = self.token.most_behind(owners, self.every) if self.is_replicated else ()
        left = [replace(join_restored(parts), acknowledged=self.token.acknowledged(owners), most_behind=most)]
        if self.is_split:
            left.insert(0, join_restored((keeps, {}) for keeps in keeps_prompts))
        self.void()
        before = self.alive()
        repeated = self.seating.resume({serial: self.outputs[serial] for serial in self.live}, left)
        assert (repeated.prompts_avoidable, repeated.steps_beyond) == (0, 0), repeated
        assert repeated.prompts == sum(not is_alive for is_alive in before.values()), (before, repeated)

    def lose_memory(self, lost):
        """Take the memory of some ranks, and the replicas in it; give what each rank has."""
        for number, rank in enumerate(self.ranks):
            rank.has_new_replica = (number + 1) % self.num_token in lost
            if rank.has_new_replica or not self.is_replicated:
                rank.replica, rank.rows = Memory(), {}
        return [(n not in lost, rank.lose() if n in lost else {}) for n, rank in enumerate(self.ranks)]

    def alive(self):
        """Tell of each request that has tokens whether its prompt's KV is anywhere, whatever the books say."""
        found = {}
        for serial in self.live:
            num_prompt = len(self.requests[serial].prompt_token_ids)
            if not self.is_split:
                admission = self.seating.seats[serial][1]
                there = tokens_there(admission, self.outputs[serial], self.seating.chunks.get(serial, 0))
                least = min(there, *(rank.pool.valid(serial, admission.blocks) for rank in self.ranks))
                found[serial] = least >= (num_prompt if self.outputs[serial] else min(1, there))
            elif self.outputs[serial]:
                handover = self.seating.handovers[serial]
                token = all(rank.pool.valid(serial, handover.blocks) >= num_prompt for rank in self.ranks)
                known = handover.num_there(self.outputs[serial], is_ready=serial in self.seating.ready)
                token = token and known >= num_prompt  # else what has come may be whole, and nobody has said so
                kept = handover.kept
                found[serial] = token or (
                    bool(kept) and all(pool.valid(serial, kept) >= num_prompt for pool in self.prompt_pools)
                )
        return found

    def lose_controller(self):
        """Begin anew from what the journal says."""
        past = self.journal.read()
        self.make_seating()
        for lane, steps in zip(self.seating.lanes, past.steps, strict=False):
            lane.steps = steps
        for progress in past.unfinished:
            assert progress.completion.token_ids == self.outputs[progress.serial]
            if progress.seat or progress.prompt:  # else no rank has heard of it, and it waits as before
                self.seating.adopt(progress)


ACTIONS = ("seat", "prompt", "first", "move", "begin", "step", "step", "step", "tell", "copy", "cancel", "fail")


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    every=st.integers(1, 3),
    is_split=st.booleans(),
    is_replicated=st.booleans(),
    chunk=st.sampled_from([0, 3]),
)
def test_what_is_there_is_used_and_nothing_else(seed, every, is_split, is_replicated, chunk):
    random = Random(seed)
    machine = Machine(random, every, is_split, is_replicated, chunk)
    actions = [action for action in ACTIONS if is_split or action not in ("prompt", "first", "move")]
    for _ in range(6000):
        getattr(machine, f"do_{random.choice(actions)}")()
        if len(machine.requests) == 9 and machine.seating.is_clean:
            break
    assert machine.seating.is_clean
    assert all(lane.table.is_empty for lane in machine.seating.lanes)
