"""The profile of stages: what its roofline counts, what planning reads of it, and the command on a tiny model."""

import json
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from dejavu.benchmarks import profile
from dejavu.benchmarks.roofline import Ceilings, Work, prompt_work, stage_size, token_work
from dejavu.device import num_cuda_devices
from dejavu.model.resolve import resolve_model
from dejavu.model.spec import Shard
from dejavu.model.weights import dummy_stage
from dejavu.planning.profile import load_profile
from tests.benchmarks.test_microbench import run_bench
from tests.documentation import unexplained
from tests.model_zoo import make_checkpoint

main = import_module("dejavu.cli.main").main


def spec_of(kind, tmp_path):
    return resolve_model(str(make_checkpoint(kind, tmp_path / kind))).spec


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "bloom"])
@pytest.mark.parametrize("tp_rank", [0, 1])
def test_work_is_that_of_the_tensors(kind, tp_rank, tmp_path):
    spec = spec_of(kind, tmp_path)
    shard = Shard(0, spec.num_layers, spec.num_layers, tp_rank, 2)
    weights = dummy_stage(spec, shard, torch.float16)
    start, stop = shard.vocab_range(spec.vocab_size)
    layers = [tensor for name, tensor in weights.items() if name.startswith("layers.")]
    rest = [tensor for name, tensor in weights.items() if name.startswith(("head.norm", "embed.norm"))]
    logits = (stop - start) * spec.hidden_size
    matrices = sum(tensor.numel() for tensor in layers if tensor.dim() == 2)
    numbers = sum(tensor.numel() for tensor in [*layers, *rest]) + logits
    heads, kv_heads = spec.num_heads // 2, spec.num_kv_heads // 2

    size = stage_size(spec, shard, 2)
    step = token_work(size, batch=3, context=7)
    kv_bytes = 2 * 2 * kv_heads * spec.head_dim * spec.num_layers
    scores = 2 * 2 * heads * spec.head_dim * spec.num_layers  # a multiplication and an addition, for K and for V
    assert step.nbytes == 2 * numbers + 3 * 8 * kv_bytes
    assert step.flop == 3 * (2 * (matrices + logits) + 8 * scores)

    prompt = prompt_work(size, batch=3, prompt_len=5)
    assert prompt.nbytes == 2 * numbers + 15 * kv_bytes
    assert prompt.flop == 15 * 2 * matrices + 3 * 2 * logits + 3 * (1 + 2 + 3 + 4 + 5) * scores


def test_the_roofline_is_the_larger_time():
    ceilings = Ceilings(bytes_per_s=100.0, flop_per_s=1000.0)
    assert (ceilings.seconds(Work(50, 100)), ceilings.bound(Work(50, 100))) == (0.5, "memory")
    assert (ceilings.seconds(Work(50, 900)), ceilings.bound(Work(50, 900))) == (0.9, "compute")


def rows_of(model_ms=1.0):
    rows = []
    for tp in (1, 2):
        for batch in (1, 4):
            for length in (64, 256):
                rows.append({"kind": "prompt", "length": length, "batch": batch, "tp": tp, "ms": length * batch / tp})
                rows.append({"kind": "token", "length": length, "batch": batch, "tp": tp, "ms": 8.0 * model_ms / tp})
    return rows


def test_prompts_are_told_in_token_steps_of_their_own_length_and_batch():
    ratios = [row["token_steps"] for row in profile.with_ratios(rows_of()[:8])]
    assert ratios == [64 / 8, None, 256 / 8, None, 256 / 8, None, 1024 / 8, None]


def test_planning_and_simulation_read_the_profile(tmp_path, monkeypatch, capsys):
    device = SimpleNamespace(properties=SimpleNamespace(kind="cpu", name="a CPU", total_bytes=24_000_000_000))
    made = profile.make_profile(device, rows_of(), 12, {"model": "opt-125m", "dtype": "bfloat16"})
    made.save(tmp_path / "profile.yaml")
    assert load_profile(tmp_path / "profile.yaml") == made
    assert (made.dtype_bytes, made.tensor_degrees) == (2, [1, 2])
    monkeypatch.chdir(tmp_path)
    for line in ("plan --devices 2", "simulate --sweep --machines 2"):
        command = [*line.split(), "--profile", "profile.yaml", "--num-requests", "20", "--out", line[:4]]
        assert main(command) == 0, capsys.readouterr()


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_command_on_a_tiny_model(kind, tmp_path):
    if kind == "cuda" and num_cuda_devices() == 0:
        pytest.skip("no CUDA device, or no cuda-python")
    make_checkpoint("llama", tmp_path / "model")
    out = tmp_path / "run"
    model = ("--model", str(tmp_path / "model"), "--load-format", "auto", "--device", kind, "--threads", "1")
    case = ("--tp", "1,2", "--batch", "2", "--length", "4,8", "--max-tokens", "8", "--repeats", "1")
    done, text = run_bench("profile", *model, *case, "--out", str(out), timeout=110)
    assert done.returncode == 0, text
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert unexplained("benchmarks.md", "bench profile", rows[0]) == []
    assert [(row["kind"], row["length"], row["tp"]) for row in rows] == [
        (each, length, tp) for tp in (1, 2) for each, length in (("prompt", 4), ("token", 4), ("token", 8))
    ]
    for row in rows:
        assert row["wrong"] == 0
        assert row["percent_of_roofline"] == pytest.approx(100 * row["roofline_ms"] / row["ms"])
    assert load_profile(out / "profile.yaml").tensor_degrees == [1, 2]
    assert (out / "profile.png").stat().st_size > 10_000
    assert (out / "profile.csv").exists()


def test_wrong_logits_are_counted(monkeypatch, tmp_path):
    """Logits that are 2 % too large are wrong in each of the two rows of three passes."""
    from dejavu.benchmarks import stage_runs
    from dejavu.device import open_device

    spec = spec_of("llama", tmp_path)
    few = profile.run_few

    class Alone:
        rank, size = 0, 1
        gather = staticmethod(lambda value, root: [value])
        bcast = staticmethod(lambda value: value)

    with open_device("cpu") as device:
        group = stage_runs.Group(device, Alone, None)
        assert profile.verify(group, spec, torch.float32) == 0
        calls = []

        def spoiled(runs):
            calls.append(runs)
            outputs = few(runs)
            return [output * 1.02 for output in outputs] if len(calls) == 1 else outputs

        monkeypatch.setattr(profile, "run_few", spoiled)
        assert profile.verify(group, spec, torch.float32) == 6
