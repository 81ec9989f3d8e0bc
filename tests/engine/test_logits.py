"""The logits of several tensor ranks: a sum of parts among zeros is what lies beside each other."""

from __future__ import annotations

import pytest
import torch

from dejavu.engine.logits import LogitSum, OneRank
from dejavu.model.spec import Shard


@pytest.mark.parametrize(("vocab_size", "tp_size"), [(199, 2), (12, 3), (2, 4), (50272, 4)])
def test_every_rank_gets_the_whole_vocabulary(vocab_size, tp_size):
    """Each rank's tensor is kept until all are there; each is then given the sum, as between GPUs."""
    whole = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(7))
    given = []

    def all_reduce(tensor):
        assert tensor.is_contiguous()
        assert tensor.nbytes % 16 == 0, "a sum between GPUs takes whole vectors"
        given.append(tensor)

    results = []
    for tp_rank in range(tp_size):
        shard = Shard(0, 4, 4, tp_rank, tp_size)
        start, stop = shard.vocab_range(vocab_size)
        results.append(LogitSum(vocab_size, shard, all_reduce).gather(whole[:, start:stop]))
    total = sum(given)
    for tensor, result in zip(given, results, strict=True):
        tensor.copy_(total)
        assert torch.equal(result, whole)


def test_one_rank_has_it_all():
    part = torch.randn(2, 5)
    assert OneRank().gather(part) is part
