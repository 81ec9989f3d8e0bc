"""Check the made-up weights: the same numbers in every window, type and order, and as random as they need be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dejavu.model import dummy
from dejavu.model.dummy import fill_piece
from dejavu.model.parameters import Piece, stage_parameters
from dejavu.model.spec import Shard
from dejavu.model.table import MODELS
from dejavu.model.weights import dummy_stage

WHOLE = Piece("layer.weight", (300, 170), ((0, 300), (0, 170)))


def make(piece: Piece, dtype: torch.dtype = torch.float32) -> Tensor:
    sizes = [stop - start for start, stop in piece.window]
    target = torch.empty(sizes[::-1] if piece.transposed else sizes, dtype=dtype)
    fill_piece(piece, target)
    return target


def test_windows_are_windows_of_the_whole(monkeypatch):
    whole = make(WHOLE)
    window = replace(WHOLE, window=((17, 250), (33, 101)))
    assert torch.equal(make(window), whole[17:250, 33:101])
    assert torch.equal(make(replace(window, transposed=True)), whole[17:250, 33:101].t())
    assert torch.equal(make(window, torch.bfloat16), whole[17:250, 33:101].bfloat16())
    monkeypatch.setattr(dummy, "_CHUNK_ELEMENTS", 1000)
    assert torch.equal(make(WHOLE), whole)


def test_vectors():
    vector = Piece("layer.bias", (100,), ((0, 100),))
    assert torch.equal(make(replace(vector, window=((30, 40),))), make(vector)[30:40])
    assert not torch.equal(make(vector), make(replace(vector, name="other.bias")))


def test_numbers_look_random():
    values = make(Piece("w", (1000, 1000), ((0, 1000), (0, 1000))))
    assert values.std().item() == pytest.approx(0.02, rel=0.01)
    assert values.mean().item() == pytest.approx(0, abs=1e-4)
    assert values.unique().numel() > 950_000
    # rows and columns are uncorrelated: the largest of 500k correlations of 1000 samples stays near 5 sigma
    for matrix in (values, values.t()):
        correlation = torch.corrcoef(matrix).fill_diagonal_(0)
        assert correlation.abs().max().item() < 0.2
        assert correlation.std().item() == pytest.approx(1000**-0.5, rel=0.1)
    # and so is the sign from one element to the next
    assert (values[:, 1:] * values[:, :-1]).mean().abs().item() < 1e-6


def test_scales_are_one_and_biases_are_not_zero():
    spec = replace(MODELS["gpt2"], num_layers=1, vocab_size=100, hidden_size=96, ffn_size=64, head_dim=8)
    shard = Shard(0, 1, 1)
    weights = dummy_stage(spec, shard, torch.float32)
    assert weights.keys() == {parameter.name for parameter in stage_parameters(spec, shard)}
    assert (weights["layers.0.norm1.weight"] == 1).all()
    assert (weights["head.norm.weight"] == 1).all()
    assert (weights["layers.0.qkv.bias"] != 0).all()
