"""The overhead benchmark: its phases and levels, and that it finds a cache that was streamed wrongly."""

import json
from contextlib import ExitStack

import pytest
from click.testing import CliRunner

from dejavu.benchmarks import overhead
from dejavu.benchmarks.serving import Serving
from dejavu.device import open_device
from dejavu.errors import UsageError
from dejavu.transport.local import LocalStore
from tests.documentation import unexplained

OPTIONS = {"model": "smollm2-135m", "batch": 1, "prompt_len": 3, "steps": 2, "dtype": None, "block_size": 2}
OPTIONS |= {"threads": 1, "levels": "all", "device": "cpu"}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    from dataclasses import replace

    from dejavu.model.table import MODELS

    tiny = replace(MODELS["smollm2-135m"], num_layers=3, vocab_size=211)
    monkeypatch.setitem(MODELS, "smollm2-135m", tiny)


def test_every_level_beside_none(tmp_path):
    arguments = ["--model", "smollm2-135m", "--batch", "1", "--prompt-len", "3", "--steps", "2", "--block-size", "2"]
    out = tmp_path / "run"
    more = ["--threads", "1", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(overhead.command, arguments + more, standalone_mode=False)
    assert done.return_value == 0, done.output
    rows = json.loads(done.output.splitlines()[-1])["rows"]
    assert unexplained("benchmarks.md", "bench overhead", rows[0]) == []
    assert [(row["phase"], row["optimization"]) for row in rows].__len__() == 15
    token_bytes = 3 * 2 * 3 * 64 * 4  # layers, K and V, heads, head_dim, float32
    sizes = {row["phase"]: row["bytes"] for row in rows if row["optimization"] == "full"}
    assert sizes == {"prompt": 3 * token_bytes, "token": token_bytes, "cache": 5 * token_bytes}
    assert {row["wrong"] for row in rows} == {0}
    assert all(row["slowdown_percent"] == 0 for row in rows if row["optimization"] == "none")
    assert (out / "overhead.csv").exists()


@pytest.mark.parametrize("level", ["naive", "full"])
def test_a_wrong_cache_is_found(level, monkeypatch):
    class Corrupting(LocalStore):
        def receive(self, peer, key, memory, pieces, *, stream):
            transfer = super().receive(peer, key, memory, pieces, stream=stream)
            transfer.wait()
            memory.tensor()[int(pieces.source[0])] ^= 4
            return transfer

    with open_device("cpu") as device, ExitStack() as held:
        settings = overhead.make_settings("cpu", OPTIONS)
        assert Serving(device, settings, held).count_wrong(level) == 0
        monkeypatch.setattr("dejavu.benchmarks.serving.LocalStore", Corrupting)
        messages = 2 + 2  # of two sets of prompts, whose few layers go together, and of two steps
        assert Serving(device, settings, held).count_wrong(level) == messages


def test_unknown_levels_are_refused():
    with pytest.raises(UsageError, match="no level 'fast'"):
        overhead.make_settings("cpu", OPTIONS | {"levels": "full,fast"})
