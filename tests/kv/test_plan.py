"""Check plans against a model that places the cache element by element.

Every element of the source's cache has its own number. A plan's pieces are applied to plain bytes, and each byte of
each target pool, touched or not, is compared with what the model puts there.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dejavu.kv.layout import PoolLayout
from dejavu.kv.plan import Resharding
from dejavu.kv.side import CacheSide, RankCache, Selection

BACKGROUND, GARBAGE = 251, 253  # what a target and a source pool hold where nothing was put
ROWS = {"a": 19, "b": 5, "c": 8}  # the tokens of each row


@dataclass(frozen=True)
class Geometry:
    """Say how one side splits layers, heads and tokens."""

    layers: tuple[int, ...]  # 0, the first layers of the later stages, the number of layers
    heads: tuple[int, ...]
    block_size: int
    head_dim: int = 1
    itemsize: int = 4


def even(total, parts):
    return tuple(total * i // parts for i in range(parts + 1))


def make_side(geometry, lengths, first_rank, seed):
    """Make a side whose rows have shuffled blocks, with one block to spare for each row."""
    needs = [-(-length // geometry.block_size) + 1 for length in lengths.values()]
    ids = np.arange(sum(needs) + 2)
    if seed is not None:
        np.random.default_rng(seed).shuffle(ids)
    ends = np.cumsum(needs)
    rows = {key: ids[end - need : end].tolist() for key, need, end in zip(lengths, needs, ends, strict=True)}
    shapes = product(pairwise(geometry.layers), pairwise(geometry.heads))
    ranks = [
        RankCache(
            first_rank + i,
            PoolLayout(len(ids), l0, l1 - l0, geometry.block_size, h0, h1 - h0, geometry.head_dim, geometry.itemsize),
        )
        for i, ((l0, l1), (h0, h1)) in enumerate(shapes)
    ]
    return CacheSide(tuple(ranks), rows)


def put_elements(side, filler, spans, first_layer=0, last_layer=10**9):
    """Give each rank's pool, filled with `filler` but for tokens [start, stop) of the rows: numbers, one by one."""
    order = sorted(side.rows)
    pools = {}
    for each in side.ranks:
        layout = each.layout
        pool = np.full((*layout.shape, layout.itemsize), filler, dtype=np.uint8)
        window = layout.window
        for row, (start, stop) in spans.items():
            for token, layer in product(range(start, stop), range(window.first_layer, window.last_layer)):
                if not first_layer <= layer < last_layer:
                    continue
                block, slot = side.rows[row][token // layout.block_size], token % layout.block_size
                for plane, head in product(range(2), range(window.first_head, window.last_head)):
                    place = pool[block, layer - window.first_layer, plane, slot, head - window.first_head]
                    for dim in range(layout.head_dim):
                        number = hash_element(order.index(row), layer, plane, token, head, dim)
                        place[dim] = np.frombuffer(number.to_bytes(8, "little"), np.uint8)[: layout.itemsize]
        pools[each.rank] = pool.reshape(-1)
    return pools


def hash_element(row, layer, plane, token, head, dim):
    """Number an element; injective for small indices, below 2**32."""
    number = 0
    for digit, base in ((row, 5), (layer, 9), (plane, 2), (token, 41), (head, 13), (dim, 5)):
        assert digit < base
        number = number * base + digit
    return number


def apply_pieces(pieces, source, target):
    for a, b, n in zip(pieces.source.tolist(), pieces.target.tolist(), pieces.nbytes.tolist(), strict=True):
        assert a >= 0
        assert b >= 0
        assert n > 0
        assert a + n <= len(source)
        assert b + n <= len(target)
        target[b : b + n] = source[a : a + n]


def assert_maximal(pieces):
    """Assert that no two pieces of the list, wherever they stand in it, could be one."""
    starts = set(zip(pieces.source.tolist(), pieces.target.tolist(), strict=True))
    stops = (pieces.source + pieces.nbytes).tolist(), (pieces.target + pieces.nbytes).tolist()
    assert starts.isdisjoint(zip(*stops, strict=True))


def assert_disjoint(lists):
    start = np.concatenate([pieces.target for pieces in lists])
    stop = np.concatenate([pieces.target + pieces.nbytes for pieces in lists])
    order = np.argsort(start)
    assert (stop[order][:-1] <= start[order][1:]).all()


def check_plan(plan, sent, target, expected):
    """Apply a plan to the source's pools `sent` and compare every byte with `expected`; check its pieces' form."""
    for each in target.ranks:
        pool = np.full(each.layout.total_bytes, BACKGROUND, dtype=np.uint8)
        lists = [(transfer, transfer.pieces()) for transfer in plan.received_by(each.rank)]
        for transfer, pieces in lists:
            assert transfer.num_bytes == pieces.total_bytes
            assert_maximal(pieces)
            apply_pieces(pieces, sent[transfer.source_rank], pool)
        if lists:
            assert_disjoint([pieces for _, pieces in lists])
        assert pool.tobytes() == expected[each.rank].tobytes()


NUM_LAYERS, NUM_HEADS = 5, 6
GRID = [
    Geometry(even(NUM_LAYERS, pp), even(NUM_HEADS, tp), block_size)
    for pp, tp, block_size in product((1, 2, 3, 4), (1, 2, 3), (1, 2, 3, 16))
]
WHOLE = Selection.of({"a": (0, 19), "b": (0, 5), "c": (0, 8)})
PART = Selection.of({"c": (2, 7), "a": (3, 18), "b": (4, 4)}, 1, 4)
STEP = Selection.of({"b": (4, 5), "c": (7, 8), "a": (16, 17)})


@cache
def source_of(geometry):
    side = make_side(geometry, ROWS, 0, seed=1)
    return side, put_elements(side, GARBAGE, {row: (0, length) for row, length in ROWS.items()})


@cache
def target_of(geometry, selection):
    side = make_side(geometry, ROWS, 100, seed=2)
    spans = dict(zip(selection.rows, zip(selection.start, selection.stop, strict=True), strict=True))
    last = NUM_LAYERS if selection.last_layer is None else selection.last_layer
    return side, put_elements(side, BACKGROUND, spans, selection.first_layer, last)


@pytest.mark.parametrize("selection", [WHOLE, PART, STEP], ids=["whole", "part", "step"])
def test_every_pair_of_geometries(selection):
    layers = (selection.last_layer or NUM_LAYERS) - selection.first_layer
    for index, (one, other) in enumerate(product(GRID, GRID)):
        if selection is WHOLE and index % 5:  # many pieces: every fifth pair, in which each geometry meets many others
            continue
        source, sent = source_of(one)
        target, expected = target_of(other, selection)
        plan = Resharding(source, target).plan(selection)
        assert plan.num_bytes == selection.num_tokens * layers * 2 * NUM_HEADS * 4
        check_plan(plan, sent, target, expected)


@st.composite
def splits(draw, total, max_parts):
    inner = draw(st.lists(st.integers(1, total - 1), max_size=max_parts - 1, unique=True)) if total > 1 else []
    return (0, *sorted(inner), total)


@st.composite
def cases(draw):
    num_layers, num_heads = draw(st.integers(1, 7)), draw(st.integers(1, 6))
    head_dim, itemsize = draw(st.integers(1, 3)), draw(st.sampled_from((4, 8)))
    sides = [
        Geometry(
            draw(splits(num_layers, 4)),
            draw(splits(num_heads, 3)),
            draw(st.sampled_from((1, 2, 3, 4, 6, 16))),
            head_dim,
            itemsize,
        )
        for _ in range(2)
    ]
    lengths = {key: draw(st.integers(0, 20)) for key in draw(st.sampled_from(("x", "xy", "xyz")))}
    spans = {}
    for row in draw(st.permutations(list(lengths))):
        bounds = draw(st.tuples(st.integers(0, lengths[row]), st.integers(0, lengths[row])))
        spans[row] = (min(bounds), max(bounds))
    layers = draw(st.tuples(st.integers(0, num_layers), st.integers(0, num_layers)))
    seeds = draw(st.tuples(*[st.none() | st.integers(0, 9)] * 2))  # None: blocks in order, so that neighbours merge
    return sides, lengths, Selection.of(spans, min(layers), max(layers)), spans, seeds


@settings(max_examples=300, deadline=None, database=None)
@given(cases())
def test_random_sides(case):
    (one, other), lengths, selection, spans, seeds = case
    source, target = make_side(one, lengths, 0, seeds[0]), make_side(other, lengths, 100, seeds[1])
    sent = put_elements(source, GARBAGE, {row: (0, length) for row, length in lengths.items()})
    expected = put_elements(target, BACKGROUND, spans, selection.first_layer, selection.last_layer)
    plan = Resharding(source, target).plan(selection)
    layers = selection.last_layer - selection.first_layer
    assert plan.num_bytes == selection.num_tokens * layers * 2 * one.heads[-1] * one.head_dim * one.itemsize
    check_plan(plan, sent, target, expected)


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_neighbouring_blocks_are_one_piece(block_size):
    geometry = Geometry((0, 3), (0, 2), block_size)
    lengths = {"a": 8, "b": 8}
    source, target = make_side(geometry, lengths, 0, None), make_side(geometry, lengths, 100, None)
    (transfer,) = Resharding(source, target).plan(Selection.of({"b": (0, 8), "a": (0, 8)})).transfers
    assert len(transfer.pieces()) == 2  # the spare block of row a lies between the rows


def test_the_end_of_a_part_block_meets_the_next_block():
    geometry = Geometry((0, 3), (0, 2), 4)
    source, target = make_side(geometry, {"a": 12}, 0, None), make_side(geometry, {"a": 12}, 100, None)
    (transfer,) = Resharding(source, target).plan(Selection.of({"a": (1, 12)})).transfers
    pieces = transfer.pieces()
    assert len(pieces) == 6  # K and V of three layers; the last V runs on through both whole blocks
    layout = source.ranks[0].layout
    assert sorted(pieces.nbytes.tolist()) == [3 * layout.token_bytes] * 5 + [
        3 * layout.token_bytes + 2 * layout.block_bytes
    ]


def test_layer_by_layer_is_the_whole():
    (source, sent), (target, expected) = source_of(GRID[30]), target_of(GRID[-2], WHOLE)
    plan = Resharding(source, target).plan(WHOLE)
    pools = {each.rank: np.full(each.layout.total_bytes, BACKGROUND, np.uint8) for each in target.ranks}
    for layer in range(NUM_LAYERS):
        part = plan.clip_layers(layer, layer + 1)
        assert part.num_bytes * NUM_LAYERS == plan.num_bytes
        assert {(t.window.first_layer, t.window.last_layer) for t in part.transfers} == {(layer, layer + 1)}
        for transfer in part.transfers:
            apply_pieces(transfer.pieces(), sent[transfer.source_rank], pools[transfer.target_rank])
    assert all(pools[rank].tobytes() == expected[rank].tobytes() for rank in pools)
    twice = plan.clip_layers(2, 4).clip_layers(0, 3)
    assert (twice.selection.first_layer, twice.selection.last_layer) == (2, 3)
    assert {(a.first_layer, a.last_layer) for a in twice.arrivals()} == {(2, 3)}
    assert plan.clip_layers(2, 4).clip_layers(3, 9).selection.last_layer == 4


def is_valid(target, pool, expected, arrival):
    """Tell whether all that an arrival names lies in the pool as it should."""
    layout = next(each.layout for each in target.ranks if each.rank == arrival.target_rank)
    shape = (*layout.shape, layout.itemsize)
    got, wanted = pool.reshape(shape), expected.reshape(shape)
    layers = slice(arrival.first_layer - layout.first_layer, arrival.last_layer - layout.first_layer)
    for row, start, stop in zip(arrival.rows, arrival.start, arrival.stop, strict=True):
        for token in range(start, stop):
            place = (target.rows[row][token // layout.block_size], layers, slice(None), token % layout.block_size)
            if not np.array_equal(got[place], wanted[place]):
                return False
    return True


@pytest.mark.parametrize(("one", "other"), [(5, 47), (47, 5), (16, 30), (2, 13), (40, 21)])
@pytest.mark.parametrize("selection", [WHOLE, PART], ids=["whole", "part"])
def test_arrivals_name_exactly_the_ranks_that_make_tokens_valid(one, other, selection):
    (source, sent), (target, expected) = source_of(GRID[one]), target_of(GRID[other], selection)
    plan = Resharding(source, target).plan(selection)
    covered = []
    for arrival in plan.arrivals():
        spans = zip(arrival.rows, arrival.start, arrival.stop, strict=True)
        assert list(spans) == [
            span for span in zip(selection.rows, selection.start, selection.stop, strict=True) if span[1] < span[2]
        ]
        covered += [(arrival.target_rank, layer) for layer in range(arrival.first_layer, arrival.last_layer)]
        pool = np.full(len(expected[arrival.target_rank]), BACKGROUND, dtype=np.uint8)
        transfers = {t.source_rank: t for t in plan.received_by(arrival.target_rank)}
        for rank in arrival.source_ranks:
            assert not is_valid(target, pool, expected[arrival.target_rank], arrival)
            apply_pieces(transfers[rank].pieces(), sent[rank], pool)
        assert is_valid(target, pool, expected[arrival.target_rank], arrival)
    first, last = selection.first_layer, NUM_LAYERS if selection.last_layer is None else selection.last_layer
    assert sorted(covered) == sorted(
        (each.rank, layer)
        for each in target.ranks
        for layer in range(max(first, each.layout.window.first_layer), min(last, each.layout.window.last_layer))
    )


def test_what_a_source_lacks_never_becomes_valid():
    lengths = {"a": 4}
    target = make_side(Geometry((0, 4), (0, 2), 2), lengths, 100, 3)
    half = PoolLayout(8, 0, 2, 2, 0, 1, 1, 4)  # layers 0 and 1, one head of two
    stage = PoolLayout(8, 2, 1, 2, 0, 2, 1, 4)  # layer 2
    rows = {"a": [5, 2]}
    assert Resharding(CacheSide((RankCache(0, half),), rows), target).plan(Selection.of({"a": (0, 3)})).arrivals() == ()
    replica = Resharding(CacheSide((RankCache(0, stage),), rows), target).plan(Selection.of({"a": (0, 3)}))
    assert [(a.first_layer, a.last_layer, a.source_ranks) for a in replica.arrivals()] == [(2, 3, (0,))]
    assert replica.clip_layers(0, 2).transfers == ()


def byte_map(pieces):
    triples = zip(pieces.source.tolist(), pieces.target.tolist(), pieces.nbytes.tolist(), strict=True)
    return {b + i: a + i for a, b, n in triples for i in range(n)}


def test_a_side_must_be_whole():
    one, other = PoolLayout(4, 0, 2, 2, 0, 2, 1, 4), PoolLayout(4, 2, 2, 2, 0, 1, 1, 4)
    half, wide = PoolLayout(4, 0, 2, 2, 0, 1, 1, 4), PoolLayout(4, 2, 1, 2, 0, 2, 1, 4)
    twice_and_never = (RankCache(0, half), RankCache(1, half), RankCache(2, wide))  # heads 0 and 1 of two layers
    for ranks in [
        (RankCache(0, one), RankCache(1, other)),  # head 1 of layers 2 and 3 is missing
        (RankCache(0, one), RankCache(1, one)),  # held twice
        twice_and_never,
        (RankCache(0, one), RankCache(0, PoolLayout(4, 2, 2, 2, 0, 2, 1, 4))),  # one rank, two pools
        (RankCache(0, one), RankCache(1, PoolLayout(4, 2, 2, 3, 0, 2, 1, 4))),  # two block sizes
    ]:
        with pytest.raises(AssertionError):
            CacheSide(ranks, {})


def test_tokens_without_a_block_are_a_bug():
    side = make_side(Geometry((0, 1), (0, 1), 2), {"a": 2}, 0, None)
    other = CacheSide((RankCache(9, side.ranks[0].layout),), {"a": [0, 99]})
    with pytest.raises(AssertionError):
        Resharding(side, side).plan(Selection.of({"a": (0, 5)}))
    with pytest.raises(AssertionError):
        Resharding(side, other).plan(Selection.of({"a": (0, 4)}))
    with pytest.raises(AssertionError):
        Selection.of({"a": (3, 2)})
