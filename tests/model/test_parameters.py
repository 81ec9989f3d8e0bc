"""Check the table of shapes against published parameter counts, and that shards tile the model."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from math import prod

import pytest

from dejavu.model.parameters import stage_elements, stage_parameters
from dejavu.model.spec import Shard
from dejavu.model.table import MODELS

# parameters as transformers counts them for the published checkpoints
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "smollm2-135m": 134_515_008,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    spec = MODELS[name]
    assert stage_elements(spec, Shard(0, spec.num_layers, spec.num_layers)) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["gpt2", "opt-350m", "bloom-560m", "llama-3-8b"])
@pytest.mark.parametrize(("pp", "tp"), [(1, 4), (2, 2), (4, 1)])
def test_shards_cover_every_layer_element_once(name, pp, tp):
    spec = MODELS[name]
    each = spec.num_layers // pp
    covered: Counter[str] = Counter()
    for stage in range(pp):
        for rank in range(tp):
            shard = Shard(stage * each, (stage + 1) * each, spec.num_layers, rank, tp)
            for piece in (piece for parameter in stage_parameters(spec, shard) for piece in parameter.pieces):
                covered[piece.name] += prod(stop - start for start, stop in piece.window)
    whole = stage_parameters(spec, Shard(0, spec.num_layers, spec.num_layers))
    layers = [parameter for parameter in whole if parameter.name.startswith("layers.")]
    assert len(layers) >= 6 * spec.num_layers
    for parameter in layers:
        copies = tp if "norm" in parameter.name else 1
        for piece in parameter.pieces:
            assert covered[piece.name] == prod(piece.shape) * copies, piece.name


def test_planning_needs_no_torch():
    modules = "spec, table, families, parameters, batch"
    code = f"import sys; from dejavu.model import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
