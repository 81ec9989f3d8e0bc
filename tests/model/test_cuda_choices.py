"""Check that ranks of one host agree on how to multiply."""

import pytest

from dejavu.model.cuda_choices import Variant, agree, recall
from dejavu.model.cuda_products import fastest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEJAVU_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("first", [Variant(1, 1, 8, 4, 2, True), None])
def test_the_first_choice_counts(first, tmp_path):
    with pytest.raises(KeyError):
        recall(("gpu", 8))
    assert agree(("gpu", 8), first) == first
    assert agree(("gpu", 8), Variant(2, 1, 8, 3)) == first
    assert recall(("gpu", 8)) == first
    with pytest.raises(KeyError):
        recall(("gpu", 16))
    assert len(list((tmp_path / "cache" / "products").iterdir())) == 1


def test_an_own_kernel_beside_attention_may_be_slower_by_itself():
    own = Variant(2, 1, 8, 3)
    times_us = {None: 12.3, own: 13.8}
    assert fastest(times_us, "qkv") == own
    assert fastest(times_us, "ffn_in") is None
    assert fastest({None: 12.3, own: 17.3}, "qkv") is None
