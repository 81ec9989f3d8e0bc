"""Replicas: what they hold after every pass, whatever requests come, go and leave behind, and how it comes back."""

import os
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.device import Location, Pieces, open_device
from dejavu.kv.layout import PoolLayout
from dejavu.kv.replica import (
    HeldRow,
    ReplicaBooks,
    ReplicaStore,
    StoreShape,
    TokenCopier,
    block_message,
    count_bytes,
    filled_blocks,
    list_pieces,
)

NUM_MICROBATCHES, NUM_ROWS, ROW_LEN = 2, 3, 14


def make_layout(block_size):
    per_row = -(-ROW_LEN // block_size)
    return PoolLayout(NUM_MICROBATCHES * NUM_ROWS * per_row, 3, 2, block_size, 1, 2, 3, 4)


def shape_of(layout):
    return StoreShape(NUM_MICROBATCHES, NUM_ROWS, -(-ROW_LEN // layout.block_size))


@pytest.fixture(scope="module")
def device():
    with open_device("cpu") as opened:
        yield opened


@dataclass
class Owner:
    """Play a stage that computes: every token of every request has its own bytes in every layer."""

    pool: np.ndarray  # [block, layer, k/v, token, head, head_dim]
    free: set
    rows: dict = field(default_factory=dict)  # place → [serial, blocks, length]
    serial: int = 0

    def admit(self, place, num_tokens, block_size):
        if place in self.rows:
            self.free |= set(self.rows.pop(place)[1])
        blocks = sorted(self.free)[: -(-num_tokens // block_size)]
        self.free -= set(blocks)
        self.serial += 1
        self.rows[place] = [self.serial, blocks, 0]
        return self.rows[place]

    def compute(self, place, start, stop, block_size):
        serial, blocks, _ = self.rows[place]
        for token in range(start, stop):
            self.pool[blocks[token // block_size], :, :, token % block_size] = 1000 * serial + token
        self.rows[place][2] = stop


def tokens_of(pool, blocks, length, block_size):
    return [pool[blocks[token // block_size], :, :, token % block_size] for token in range(length)]


def check(store, owner, microbatch, block_size, layout):
    """Hold a microbatch in the store against its owner's pool."""
    held = store.pool.tensor().numpy().view(np.int32).reshape(layout.shape)
    known = store.rows()
    for place, (serial, blocks, length) in owner.rows.items():
        if place[0] != microbatch or length == 0:
            continue
        assert known[place] == (serial, length, tuple(blocks))
        for token, (there, here) in enumerate(
            zip(
                tokens_of(held, blocks, length, block_size),
                tokens_of(owner.pool, blocks, length, block_size),
                strict=True,
            )
        ):
            assert (there == here).all(), (place, token)
            assert (there == 1000 * serial + token).all(), (place, token)


def draw_pass(draw, owner, microbatch, block_size):
    """Draw a pass: new requests take rows (of requests that have ended or not), and rows get tokens."""
    admissions, rows = [], []
    for row in draw(st.sets(st.integers(0, NUM_ROWS - 1), min_size=1)):
        place = microbatch, row
        state = owner.rows.get(place)
        if state is None or state[2] == ROW_LEN or draw(st.integers(0, 4)) == 0:
            serial, blocks, _ = owner.admit(place, ROW_LEN, block_size)
            cached = draw(st.sampled_from((0, 0, 5)))  # a prompt that came from another pipeline
            owner.compute(place, 0, cached, block_size)
            admissions.append((place, serial, blocks, cached))
        length = owner.rows[place][2]
        new = draw(st.integers(1, min(6, ROW_LEN - length))) if length == 0 else 1
        owner.compute(place, length, length + new, block_size)
        rows.append((place, length + new))
    return admissions, rows


@settings(max_examples=40, deadline=None)
@given(data=st.data(), block_size=st.sampled_from((1, 4, 7, 14)), every=st.sampled_from((1, 1, 3)))
def test_a_replica_equals_its_owner_after_every_pass(device, data, block_size, every):
    layout = make_layout(block_size)
    owner = Owner(np.full(layout.shape, -1, np.int32), set(range(layout.num_blocks)))
    books = ReplicaBooks(every)
    with (
        ReplicaStore.allocate(device, layout, shape_of(layout)) as store,
        device.allocate_exportable(layout.total_bytes) as memory,
        device.allocate_host(layout.total_bytes) as packed,
    ):
        owner.pool = memory.tensor().numpy().view(np.int32).reshape(layout.shape)
        owner.pool[:] = -1
        for step in range(data.draw(st.integers(1, 12))):
            microbatch = step % NUM_MICROBATCHES
            admissions, rows = draw_pass(data.draw, owner, microbatch, block_size)
            for admission in admissions:
                books.admit(*admission)
            for place, length in rows:
                books.advance(place, length)
            copies = books.due(microbatch, step // NUM_MICROBATCHES)
            if copies is None:
                assert every > 1
                continue
            assert sum(copy.stop - copy.start for copy in copies) * layout.bytes_per_token == count_bytes(
                layout, copies
            )
            send(device, memory, store, packed, layout, copies, is_direct=data.draw(st.booleans()))
            store.write(microbatch, step // NUM_MICROBATCHES, copies)
            assert store.step(microbatch) == step // NUM_MICROBATCHES
            check(store, owner, microbatch, block_size, layout)


def send(device, memory, store, packed, layout, copies, *, is_direct):
    """Copy to the store straight, or as a message."""
    stream = device.compute_stream
    if is_direct:
        TokenCopier(store.pool, memory, layout).copy(copies)
    elif copies:
        pieces = list_pieces(layout, copies)
        assert pieces.total_bytes == count_bytes(layout, copies)
        device.pack(packed, memory, pieces, stream=stream)
        device.pack(store.pool, packed, pieces.inverse, stream=stream)


def test_one_token_a_row_is_what_a_step_costs():
    layout, books = make_layout(4), ReplicaBooks()
    for row in range(NUM_ROWS):
        books.admit((0, row), row, (3 * row, 3 * row + 1), 5)
    assert count_bytes(layout, books.due(0, 0)) == NUM_ROWS * 5 * layout.bytes_per_token
    for row in range(NUM_ROWS):
        books.advance((0, row), 6)
    copies = books.due(0, 1)
    assert [(copy.start, copy.stop) for copy in copies] == [(5, 6)] * NUM_ROWS
    assert count_bytes(layout, copies) == NUM_ROWS * layout.bytes_per_token
    assert books.due(0, 2) == []


def test_tokens_wait_for_their_step_and_new_requests_do_not():
    books = ReplicaBooks(every=4)
    books.admit((0, 0), 1, (0,), 0)
    books.advance((0, 0), 3)
    assert [(copy.start, copy.stop) for copy in books.due(0, 1)] == [(0, 3)]
    for step in (2, 3):
        books.advance((0, 0), step + 2)
        assert books.due(0, step) is None
    books.advance((0, 0), 6)
    assert [(copy.start, copy.stop) for copy in books.due(0, 4)] == [(3, 6)]


def test_who_goes_on_after_a_failure_is_not_copied_again():
    books = ReplicaBooks()
    books.adopt({(0, 0): HeldRow(7, 9, (0, 1)), (0, 1): HeldRow(8, 4, (2,)), (1, 0): HeldRow(6, 4, (3,))})
    books.admit((0, 0), 7, (0, 1), 8)  # one token less was whole everywhere
    books.admit((0, 1), 9, (2,), 2)
    books.admit((1, 0), 6, (4,), 3)  # begins again, elsewhere
    assert [(copy.serial, copy.start, copy.stop) for copy in books.due(1, 0)] == [(6, 0, 3)]
    assert [(copy.serial, copy.start, copy.stop) for copy in books.due(0, 0)] == [(9, 0, 2)]
    books.advance((0, 0), 9)
    assert [(copy.serial, copy.start, copy.stop) for copy in books.due(0, 1)] == [(7, 8, 9)]


def test_a_store_is_opened_again_and_gives_blocks_back(device):
    layout = make_layout(4)
    rng = np.random.default_rng(1)
    contents = rng.integers(0, 2**31, layout.shape, dtype=np.int32)
    with (
        ReplicaStore.allocate(device, layout, shape_of(layout)) as store,
        device.allocate_exportable(layout.total_bytes) as memory,
    ):
        assert store.rows() == {}
        assert [store.step(microbatch) for microbatch in range(NUM_MICROBATCHES)] == [-1, -1]
        store.pool.tensor().numpy()[:] = contents.view(np.uint8).ravel()
        books = ReplicaBooks()
        books.admit((1, 2), 5, (3, 0), 6)
        store.write(1, 8, books.due(1, 8))
        fd = store.memory.export_fd()
        opened = device.import_host_fd(fd, store.memory.nbytes)
        os.close(fd)
        with ReplicaStore(opened, layout, store.shape) as again:
            assert again.memory.location is Location.HOST
            assert (again.rows(), again.step(1), again.step(0)) == ({(1, 2): (5, 6, (3, 0))}, 8, -1)
            assert filled_blocks(layout, again.rows().values()) == [0, 3]
            memory.tensor().zero_()
            assert again.restore(device, memory, [3, 0, 4], stream=device.compute_stream) == 3 * layout.block_bytes
            expected = np.zeros_like(contents)
            expected[[3, 0, 4]] = contents[[3, 0, 4]]
            assert (memory.tensor().numpy() == expected.view(np.uint8).ravel()).all()
        message = block_message(layout, [4, 3, 0])
        assert isinstance(message, Pieces)
        with device.allocate_host(message.total_bytes) as packed:
            device.pack(packed, store.pool, message, stream=device.compute_stream)
            memory.tensor().zero_()
            device.pack(memory, packed, message.inverse, stream=device.compute_stream)
        assert (memory.tensor().numpy() == expected.view(np.uint8).ravel()).all()
