"""Pair parts of rows in two pools: every byte of them, and no other, wherever the blocks lie."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dejavu.kv.layout import PoolLayout
from dejavu.kv.swap import Part, pair_parts

LAYOUT = st.builds(
    PoolLayout,
    num_blocks=st.just(24),
    first_layer=st.integers(0, 3),
    num_layers=st.integers(1, 3),
    block_size=st.integers(1, 5),
    first_head=st.integers(0, 2),
    num_heads=st.integers(1, 2),
    head_dim=st.just(2),
    itemsize=st.just(2),
)


@given(layout=LAYOUT, data=st.data())
def test_moves_the_parts_and_nothing_else(layout, data):
    orders = [data.draw(st.permutations(range(24))) for _ in range(2)]
    parts = []
    for row in range(data.draw(st.integers(1, 4))):
        host, device = (order[row * 6 : row * 6 + 6] for order in orders)
        stop = data.draw(st.integers(0, 6 * layout.block_size))
        parts.append(Part(host, device, data.draw(st.integers(0, stop)), stop))
    source = np.arange(layout.total_bytes) % 251
    found, wanted = (np.full(layout.total_bytes, 255) for _ in range(2))
    pieces = pair_parts(layout, parts)
    for start, to, nbytes in zip(pieces.source, pieces.target, pieces.nbytes, strict=True):
        found[to : to + nbytes] = source[start : start + nbytes]
    shape = (24, layout.num_layers, 2, layout.block_size, layout.token_bytes)
    for part in parts:
        for token in range(part.start, part.stop):
            block, place = divmod(token, layout.block_size)
            taken = source.reshape(shape)[part.device[block], :, :, place]
            wanted.reshape(shape)[part.host[block], :, :, place] = taken
    assert (found == wanted).all()
    assert pieces.total_bytes == sum(part.num_tokens for part in parts) * layout.bytes_per_token


def test_whole_blocks_are_one_piece():
    layout = PoolLayout(8, 0, 3, 4, 0, 2, 4, 4)
    pieces = pair_parts(layout, [Part((0, 1, 2), (5, 6, 7), 0, 9)])
    assert sorted(pieces.nbytes.tolist()) == [layout.token_bytes] * 6 + [layout.block_bytes] * 2
