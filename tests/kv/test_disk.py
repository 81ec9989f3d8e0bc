"""KV in files: what comes back is right or does not come back, whatever happened to the bytes on the disk."""

import os
from concurrent.futures import Future
from contextlib import closing

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dejavu.kv.disk import HEADER_BYTES, KvFile, UnusableFileError, file_bytes, fit, load
from dejavu.kv.layout import PoolLayout
from dejavu.kv.replica import HeldRow, RowCopy, list_pieces

IDENTITY = {"run": "a", "model": "b"}


def make_layout(block_size, num_blocks=7):
    return PoolLayout(num_blocks, 3, 2, block_size, 1, 2, 3, 4)


def fill(pool, layout, blocks, serial, start, stop):
    """Compute tokens: each has its own bytes in every layer."""
    cells = pool.view(np.int32).reshape(layout.shape)
    for token in range(start, stop):
        place = cells[blocks[token // layout.block_size], :, :, token % layout.block_size]
        place[:] = 1000 * serial + token + np.arange(place.size).reshape(place.shape) * 100_000


def write(file, pool, copies):
    pieces = list_pieces(file.layout, copies)
    packed = np.empty(pieces.total_bytes, np.uint8)
    for source, target, nbytes in zip(pieces.source, pieces.target, pieces.nbytes, strict=True):
        packed[target : target + nbytes] = pool[source : source + nbytes]
    file.write(copies, packed)


def at_once(function, *arguments):
    done = Future()
    done.set_result(function(*arguments))
    return done


def read_back(file, most_bytes=100):
    """Load a file into an empty pool."""
    pool = np.zeros(file.layout.total_bytes, np.uint8)

    def take(copy, packed):
        pieces = list_pieces(file.layout, [copy])
        for source, target, nbytes in zip(pieces.source, pieces.target, pieces.nbytes, strict=True):
            pool[source : source + nbytes] = packed[target : target + nbytes]

    return pool, load(file, take, at_once, most_bytes)


def tokens_of(pool, layout, row):
    cells = pool.view(np.int32).reshape(layout.shape)
    size = layout.block_size
    return [cells[row.blocks[token // size], :, :, token % size] for token in range(row.length)]


def check(found, pool, layout, requests):
    """Hold what came back against what its requests computed."""
    for place, row in found.items():
        expected = np.zeros(layout.total_bytes, np.uint8)
        assert (row.serial, place) in requests
        blocks, length = requests[row.serial, place]
        assert row.length <= length
        assert row.blocks == tuple(blocks[: len(row.blocks)])
        fill(expected, layout, blocks, row.serial, 0, row.length)
        for here, there in zip(tokens_of(pool, layout, row), tokens_of(expected, layout, row), strict=True):
            assert (here == there).all(), (place, row)


def make_file(path, block_size=4):
    """Write three requests: one by a prompt and steps, one that took another's row and blocks, one of few tokens."""
    layout = make_layout(block_size)
    pool = np.zeros(layout.total_bytes, np.uint8)
    requests = {(3, (0, 0)): ((5, 2), 8), (6, (0, 1)): ((0, 3), 6), (7, (1, 0)): ((1, 4), 3)}
    file = KvFile.create(path, IDENTITY, layout)
    fill(pool, layout, (0, 4), 2, 0, 7)
    write(file, pool, [RowCopy((0, 1), 2, (0, 4), 0, 7)])
    for (serial, place), (blocks, length) in requests.items():
        fill(pool, layout, blocks, serial, 0, length)
        write(file, pool, [RowCopy(place, serial, blocks, 0, 2)])
        for token in range(2, length):
            write(file, pool, [RowCopy(place, serial, blocks, token, token + 1)])
    return file, layout, requests


def test_everything_comes_back(tmp_path):
    file, layout, requests = make_file(tmp_path / "file")
    file.close()
    with closing(KvFile.open(tmp_path / "file", IDENTITY, layout)) as again:
        assert {place: row.length for place, row in again.rows().items()} == {(0, 0): 8, (0, 1): 6, (1, 0): 3}
        pool, loaded = read_back(again)
        assert loaded.num_broken == 0
        assert {place: (row.serial, row.length) for place, row in loaded.rows.items()} == {
            (0, 0): (3, 8),
            (0, 1): (6, 6),
            (1, 0): (7, 3),
        }
        check(loaded.rows, pool, layout, requests)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Give a file, its layout, and what was written."""
    path = tmp_path_factory.mktemp("whole") / "file"
    file, layout, requests = make_file(path)
    file.close()
    return path, layout, requests


def damage(draw, data, layout):
    """Do to a file what a loss of power or a bad disk can: give what it is then, and what of it is known to be gone."""
    kind = draw(st.sampled_from(("flip", "truncate", "zeros", "older", "swap")))
    at = draw(st.one_of(st.integers(0, len(data) - 1), st.integers(0, HEADER_BYTES + 7 * 4 * 20)))
    at = min(at, len(data) - 1)
    if kind == "flip":
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "truncate":
        del data[at:]
    elif kind == "zeros":  # pages whose names came to the disk before their bytes
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    elif kind == "older":  # tokens that were not written when power went
        begin = HEADER_BYTES + 20 * draw(st.integers(0, 27))
        data[begin : begin + 20] = bytes(20)
    else:  # a sector that was written elsewhere
        width = layout.bytes_per_token
        first, second = (len(data) - width * draw(st.integers(1, 28)) for _ in range(2))
        data[first : first + width] = data[second : second + width]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_gives_right_kv_or_none(tmp_path, whole, data):
    path = tmp_path / "file"
    before, layout, requests = whole
    contents = bytearray(before.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        if contents:
            damage(data.draw, contents, layout)
    path.write_bytes(contents)
    try:
        again = KvFile.open(path, IDENTITY, layout)
    except UnusableFileError:
        return
    with closing(again):
        pool, loaded = read_back(again)
        check(loaded.rows, pool, layout, requests)
        assert again.rows() == loaded.rows  # what does not count is gone
        assert read_back(again)[1] == type(loaded)(loaded.rows, 0)


def test_one_bad_byte_costs_its_request_the_tokens_from_there_and_others_nothing(tmp_path):
    file, layout, _ = make_file(tmp_path / "file")
    with closing(file):
        width = layout.bytes_per_token
        at = file.tokens_begin + (2 * layout.block_size + 1) * width + 9  # request 3's token 5
        os.pwrite(file.descriptor, b"!", at)
        _, loaded = read_back(file)
    assert loaded.num_broken == 3
    assert {place: row.length for place, row in loaded.rows.items()} == {(0, 0): 5, (0, 1): 6, (1, 0): 3}


def test_what_is_struck_out_does_not_come_back_behind_what_is_written_later(tmp_path):
    file, layout, requests = make_file(tmp_path / "file")
    with closing(file):
        file.strike([(HeldRow(3, 8, (5, 2)), 3)])
        assert file.rows()[0, 0] == HeldRow(3, 3, (5,))
        pool = np.zeros(layout.total_bytes, np.uint8)
        fill(pool, layout, (5, 2), 3, 0, 4)
        write(file, pool, [RowCopy((0, 0), 3, (5, 2), 3, 4)])
        pool, loaded = read_back(file)
        assert loaded.rows[0, 0] == HeldRow(3, 4, (5,))
        check(loaded.rows, pool, layout, requests)


def test_tokens_of_one_request_in_two_places_do_not_count(tmp_path):
    file, layout, _ = make_file(tmp_path / "file")
    with closing(file):
        pool = np.zeros(layout.total_bytes, np.uint8)
        write(file, pool, [RowCopy((0, 0), 3, (6, 2), 1, 3)])
        assert file.rows()[0, 0].length == 1


def test_file_of_another_run_model_or_layout_is_refused(tmp_path):
    file, layout, _ = make_file(tmp_path / "file")
    file.close()
    with pytest.raises(UnusableFileError, match="another run and model"):
        KvFile.open(tmp_path / "file", {"run": "c", "model": "d"}, layout)
    with pytest.raises(UnusableFileError, match="size"):
        KvFile.open(tmp_path / "file", IDENTITY, make_layout(4, 8))
    with pytest.raises(FileNotFoundError):
        KvFile.open(tmp_path / "none", IDENTITY, layout)


def test_new_file_takes_nothing_of_an_old_one(tmp_path):
    file, layout, _ = make_file(tmp_path / "file")
    contents = (tmp_path / "file").read_bytes()[HEADER_BYTES:]
    file.close()
    with closing(KvFile.create(tmp_path / "file", IDENTITY, layout)) as new:
        assert new.rows() == {}
        os.pwrite(new.descriptor, contents, HEADER_BYTES)  # as a file system that gives old blocks out again
        assert read_back(new)[1].rows == {}


def test_a_file_that_was_removed_is_noticed(tmp_path):
    file, *_ = make_file(tmp_path / "file")
    with closing(file):
        file.sync()
        (tmp_path / "file").unlink()
        with pytest.raises(FileNotFoundError, match="removed"):
            file.sync()


def test_space_is_taken_at_once(tmp_path):
    layout = make_layout(16)
    with closing(KvFile.create(tmp_path / "file", IDENTITY, layout)):
        assert (tmp_path / "file").stat().st_blocks * 512 >= file_bytes(layout)


@given(counts=st.lists(st.integers(1, 9), max_size=5), room=st.integers(1, 12))
def test_copies_are_divided_without_loss(counts, room):
    layout = make_layout(4)
    copies = [RowCopy((0, row), row, (row,), 2, 2 + count) for row, count in enumerate(counts)]
    divided, rest = [], copies
    while rest:
        some, rest = fit(layout, rest, room * layout.bytes_per_token)
        assert 0 < sum(copy.stop - copy.start for copy in some) <= room
        divided += [(copy.serial, token) for copy in some for token in range(copy.start, copy.stop)]
    assert divided == [(copy.serial, token) for copy in copies for token in range(copy.start, copy.stop)]
