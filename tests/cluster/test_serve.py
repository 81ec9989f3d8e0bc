"""`dejavu serve` as a user starts it: its results, its complaints, its ends, and what its idle ranks cost."""

import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from dejavu.cluster.job import prepare
from dejavu.cluster.launcher import find_mpirun
from dejavu.config import ServeConfig
from dejavu.errors import CapacityError, ModelError, TopologyError, UsageError, WorkloadError
from dejavu.measure.records import RankRecord, RequestRecord, StepRecord, read_csv
from dejavu.request import FinishReason
from tests.model_zoo import VOCAB_SIZE, make_checkpoint

pytestmark = pytest.mark.timeout(150)

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 120
FAULT_TOLERANT = ("--with-ft", "ulfm", "--mca", "coll", "^han")
GRACE_S = 2.0
MARK = "DEJAVU_TEST_MARK"


def run(program, *, ranks=0, flags=FAULT_TOLERANT, cwd=REPOSITORY):
    """Run `python PROGRAM`, under mpirun if `ranks` is given; give what ended, its processes and its time of end."""
    prefixes = ("OMPI_", "PMIX_", "PRTE_", "DEJAVU_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    mark = secrets.token_hex(8)
    environment |= {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    mpirun = [str(find_mpirun(os.environ["PATH"])), "-n", str(ranks), "--oversubscribe", "--bind-to", "none", *flags]
    command = [*(mpirun if ranks else []), sys.executable, *map(str, program)]
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    done.ended_s = time.monotonic()
    done.left = processes_left(f"{MARK}={mark}".encode())
    return done


def processes_left(mark):
    """Give the processes of a run that do not end within the grace: mpirun need not wait for its ranks' last breath."""
    deadline_s = time.monotonic() + GRACE_S
    while left := [path for path in Path("/proc").glob("[0-9]*") if has_mark(path, mark)]:
        if time.monotonic() > deadline_s:
            break
        time.sleep(0.05)
    return left


def has_mark(process, mark):
    try:
        return mark in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def serve(*arguments, **how):
    return run(["-m", "dejavu.cli.main", "serve", *arguments], **how)


def said(done):
    return f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Make a small Llama with a vocabulary of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    directory = make_checkpoint("llama", tmp_path_factory.mktemp("model"))
    words = {f"w{n}": n for n in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


REQUESTS = [
    {"prompt": "w5 w6 w7", "max_tokens": 9, "ignore_eos": True},
    {"prompt_token_ids": list(range(20, 45)), "max_tokens": 5, "ignore_eos": True, "request_id": "long"},
    {"prompt": "w9", "max_tokens": 1},
    {"prompt": "w5 w6 w7", "max_tokens": 9, "ignore_eos": True, "arrival_s": 0.3, "request_id": "again"},
    {"prompt": "w50 w60", "max_tokens": 12, "temperature": 0.9, "seed": 4, "ignore_eos": True, "logprobs": 2},
    {"prompt": "w50 w61", "max_tokens": 12, "temperature": 0.9, "ignore_eos": True, "arrival_s": 0.1},
]


def write_workload(path, requests):
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def read_outputs(directory):
    lines = (directory / "outputs.jsonl").read_text().splitlines()
    return {output["request_id"]: output for output in map(json.loads, lines)}


@pytest.fixture(scope="module")
def greedy(model):
    """Give what transformers generates for the first request."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model)
    reference.generation_config.eos_token_id = None
    return reference.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, do_sample=False)[0, 3:].tolist()


@pytest.fixture(scope="module")
def served(model, greedy, tmp_path_factory):
    """Serve the workload as a user does, outside mpirun."""
    directory = tmp_path_factory.mktemp("served")
    stopped = {**REQUESTS[0], "stop": [f" w{greedy[2]}"], "request_id": "stopped", "arrival_s": 0.2}
    workload = write_workload(directory / "workload.jsonl", [*REQUESTS, stopped])
    arguments = ["--model", model, "--workload", workload, "--pp", 2, "--microbatch-size", 1, "--block-size", 8]
    done = serve(*arguments, "--out", directory / "run")
    assert done.returncode == 0, said(done)
    assert done.left == []
    return done, directory / "run", arguments


def test_run_directory_is_named_last_and_complete(served):
    done, directory, _ = served
    assert done.stdout.splitlines()[-1] == f"Results in {directory}"
    names = {
        "run.yaml",
        "requests.csv",
        "steps.csv",
        "ranks.csv",
        "summary.csv",
        "trace.json",
        "outputs.jsonl",
    }
    assert {path.name for path in directory.iterdir()} == names | {"journal.jsonl", "status.json", "result.json"}
    assert json.loads((directory / "result.json").read_text())["outcome"] == "ok"
    assert json.loads((directory / "status.json").read_text())["state"] == "done"


def test_outputs_are_what_was_asked_for(served):
    outputs = read_outputs(served[1])
    assert list(outputs) == ["0", "long", "2", "again", "4", "5", "stopped"]
    for request, output in zip(REQUESTS, outputs.values(), strict=False):
        assert output["prompt_tokens"] == len(request.get("prompt_token_ids") or request["prompt"].split())
        assert len(output["token_ids"]) == request["max_tokens"]
        assert output["text"] == " ".join(f"w{token}" for token in output["token_ids"])
        assert output["finish_reason"] == "length"
    assert outputs["again"]["token_ids"] == outputs["0"]["token_ids"]
    assert [len(token["top"]) for token in outputs["4"]["logprobs"]] == [2] * 12


def test_times_are_in_order_and_counts_agree(served):
    _, directory, _ = served
    outputs = read_outputs(directory)
    requests = read_csv(directory / "requests.csv", RequestRecord)
    steps = read_csv(directory / "steps.csv", StepRecord)
    assert [r.request_id for r in requests] == list(outputs)
    for record, request in zip(requests, [*REQUESTS, {"arrival_s": 0.2}], strict=True):
        output = outputs[record.request_id]
        assert record.output_tokens == len(output["token_ids"])
        assert record.prompt_tokens == output["prompt_tokens"]
        assert record.arrival_s == request.get("arrival_s", 0.0)
        assert record.arrival_s <= record.admitted_s <= record.first_token_s <= record.finish_s
        assert record.ttft_s == pytest.approx(record.first_token_s - record.arrival_s)
        assert record.normalized_latency_s * record.output_tokens == pytest.approx(record.finish_s - record.arrival_s)
        assert math.isnan(record.tpot_s) == (record.output_tokens == 1)
    kv_tokens = sum(r.prompt_tokens + r.output_tokens - 1 for r in requests)
    late = 2  # steps that begin before the controller has seen the stop string
    for stage in (0, 1):
        mine = [step for step in steps if step.stage == stage]
        assert kv_tokens <= sum(step.num_tokens for step in mine) <= kv_tokens + late
        assert all(step.start_s <= step.compute_end_s <= step.end_s for step in mine)
        assert all(a.end_s <= b.start_s for a, b in pairwise(sorted(mine, key=lambda s: s.start_s)))
    starts = {(s.microbatch, s.step): s.compute_end_s for s in steps if s.stage == 0}
    assert all(starts[s.microbatch, s.step] <= s.start_s for s in steps if s.stage == 1)


def test_summary_and_trace_agree_with_the_rows(served):
    _, directory, _ = served
    requests = read_csv(directory / "requests.csv", RequestRecord)
    steps = read_csv(directory / "steps.csv", StepRecord)
    names, values = (line.split(",") for line in (directory / "summary.csv").read_text().splitlines())
    summary = {name: float(value or "nan") for name, value in zip(names, values, strict=True)}
    assert summary["requests"] == len(REQUESTS) + 1
    assert summary["output_tokens"] == sum(r.output_tokens for r in requests)
    assert summary["makespan_s"] == pytest.approx(max(r.finish_s for r in requests))
    assert summary["tokens_per_s"] == pytest.approx(summary["output_tokens"] / summary["makespan_s"])
    for latency in ("ttft_s", "tpot_s", "normalized_latency_s"):
        assert 0 < summary[f"p50_{latency}"] <= summary[f"p95_{latency}"] <= summary[f"p99_{latency}"]
    assert all(0 <= summary[f"stage{stage}_idle_fraction"] <= 1 for stage in (0, 1))
    assert summary["peak_kv_bytes"] > 0
    trace = json.loads((directory / "trace.json").read_text())["traceEvents"]
    computed = [event for event in trace if event["ph"] == "X" and event["pid"] in (1, 2)]
    assert len([e for e in computed if e["dur"] >= 0]) >= len(steps)


def test_inside_mpirun_gives_the_same(served, tmp_path):
    """The user's own mpirun, without a flag of the launcher's, and two tensor ranks in place of two stages."""
    _, directory, arguments = served
    done = serve(*arguments, "--pp", 1, "--tp", 2, "--out", tmp_path / "run", ranks=3, flags=())
    assert done.returncode == 0, said(done)
    found, expected = read_outputs(tmp_path / "run"), read_outputs(directory)
    for name, output in expected.items():
        assert {**found[name], "logprobs": None} == {**output, "logprobs": None}
    assert f"Results in {tmp_path / 'run'}" in done.stdout
    assert done.left == []


def test_stop_string_ends_the_text(served, greedy):
    """A word of the text that transformers generates ends it; the word itself is not shown."""
    outputs = read_outputs(served[1])
    assert outputs["0"]["token_ids"] == greedy
    text = outputs["0"]["text"]
    shown = text[: text.index(f" w{greedy[2]}")]
    assert outputs["stopped"]["text"] == shown
    assert outputs["stopped"]["token_ids"] == greedy[: len(shown.split()) + 1]
    assert outputs["stopped"]["finish_reason"] == "stop"


# -- bad input --------------------------------------------------------------------------------------------------------


def spoil(model, directory, spoiled):
    """Copy a checkpoint with one thing wrong."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, directory)
    if spoiled == "file":
        (directory / "model.safetensors").unlink()
        return directory
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    wrong = tensors.pop(name)
    if spoiled == "shape":
        tensors[name] = wrong[:-1].contiguous()
    save_file(tensors, directory / "model.safetensors")
    return directory


BAD_OPTIONS = [
    ({"tp": 3}, TopologyError, r"tensor degree 3 does not divide the model's 2 KV heads: use one of 1, 2"),
    ({"pp": 7}, TopologyError, r"pp 7 is more than the model's 6 layers: use at most 6"),
    ({"pp": 2, "layers_per_stage": (2, 3)}, TopologyError, r"layers_per_stage 2,3 adds up to 5: the model has 6"),
    ({"model": "no-such-model"}, ModelError, r"no-such-model"),
    ({"row_len": 300}, UsageError, r"row_len 300 is more than the 256 positions of .*: use at most 256"),
    ({"row_len": 40, "prompt_len": 40}, WorkloadError, r"40 prompt tokens leave no room .* row of 40 tokens: shorten"),
    ({"prompt_len": 200, "output_len": 100}, WorkloadError, r"need 300 of a row's 256 tokens: lower max_tokens to 56"),
    ({"kv_memory": 10_000}, CapacityError, r"kv_memory 10000 bytes holds 0 blocks of 64 tokens .* give at least 49152"),
    (
        {"kv_memory": 10_000, "block_size": 4},
        CapacityError,
        r"holds 3 blocks of 4 tokens and one row of 64 tokens needs 16",
    ),
]


@pytest.mark.parametrize(
    ("changes", "kind", "message"), BAD_OPTIONS, ids=lambda v: "-".join(v) if isinstance(v, dict) else ""
)
def test_bad_option_is_explained(model, changes, kind, message):
    with pytest.raises(kind, match=message) as caught:
        prepare(ServeConfig(**{"model": str(model)} | changes))
    check_line(str(caught.value))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_wrong_world_size_says_the_right_one(model, world_size):
    with pytest.raises(TopologyError, match=rf"{world_size} ranks were started .* needs 3 .*`mpirun -n 3`") as caught:
        prepare(ServeConfig(model=str(model), pp=2), world_size)
    check_line(str(caught.value))


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [("file", r"model\.safetensors"), ("tensor", r"layers\.3\.mlp\.up_proj"), ("shape", r"layers\.3\.mlp\.up_proj")],
)
def test_bad_checkpoint_is_explained(model, tmp_path, spoiled, message):
    directory = spoil(model, tmp_path / "spoiled", spoiled)
    with pytest.raises(ModelError, match=message) as caught:
        prepare(ServeConfig(model=str(directory)))
    check_line(str(caught.value))
    if spoiled == "shape":
        assert "87" in str(caught.value)
        assert "88" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "no JSON"),
        ('{"prompt": "w1", "max_tokens": 0}', "max_tokens"),
        ('{"prompt": "w1", "maxtokens": 3}', "maxtokens"),
        ('{"prompt_token_ids": [5, 199]}', "token 199 in prompt is outside the vocabulary"),
        ('{"prompt": "w1", "max_tokens": 256}', "lower max_tokens to 255"),
        ('{"prompt": "w1", "prompt_token_ids": [1]}', "given together"),
        ('{"prompt": "w1", "request_id": "first"}', "first"),
        ('["prompt"]', "no object"),
    ],
)
def test_bad_workload_line_is_named(model, tmp_path, line, message):
    workload = tmp_path / "workload.jsonl"
    workload.write_text('{"prompt": "w3", "request_id": "first"}\n\n' + line + "\n")
    with pytest.raises(WorkloadError, match=message) as caught:
        prepare(ServeConfig(model=str(model), workload=str(workload)))
    assert f"{workload}:3: " in str(caught.value)
    check_line(str(caught.value))


def check_line(message):
    """Check that an error is one lowercase sentence, not a report."""
    assert "\n" not in message
    assert not message.endswith(".")
    assert message[0].islower() or message[0] in "'/" or message[0].isdigit()
    assert ": " in message


def complaint(done):
    """Give the program's own lines on stderr; mpirun's notices begin and end with a rule, or name themselves."""
    lines = done.stderr.split("-" * 74)
    own = "\n".join(lines[::2]) if len(lines) > 1 else done.stderr
    return [line for line in own.splitlines() if line.strip()]


def test_bad_input_outside_mpirun_starts_nothing(model, tmp_path):
    done = serve("--model", model, "--prompt-len", 256, "--pp", 2, "--out", tmp_path / "run")
    assert done.returncode == 2, said(done)
    assert len(complaint(done)) == 1
    assert "256 prompt tokens leave no room" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("ranks", "flags"), [(4, FAULT_TOLERANT), (2, ())], ids=["ulfm", "plain"])
def test_wrong_world_size_inside_mpirun_is_one_line_of_rank_0(model, tmp_path, ranks, flags):
    done = serve("--model", model, "--pp", 2, "--out", tmp_path / "run", ranks=ranks, flags=flags)
    assert done.returncode == 2, said(done)
    (line,) = complaint(done)
    assert line.startswith(f"error: {ranks} ranks were started and pp 2 x tp 1 needs 3")
    assert done.left == []


def test_bad_checkpoint_inside_mpirun_is_one_line_of_rank_0(model, tmp_path):
    directory = spoil(model, tmp_path / "spoiled", "shape")
    done = serve("--model", directory, "--out", tmp_path / "run", ranks=2)
    assert done.returncode == 2, said(done)
    (line,) = complaint(done)
    assert "model.layers.3.mlp.up_proj.weight" in line
    assert done.left == []


# -- failures ---------------------------------------------------------------------------------------------------------


def fail(tmp_path, how, rank, *arguments, ranks):
    note = tmp_path / "note"
    program = [REPOSITORY / "tests/cluster/crash_program.py", how, rank, note, "serve", *arguments]
    done = run([*program, "--out", tmp_path / "run"], ranks=ranks)
    assert done.returncode not in (0, None), said(done)
    assert done.ended_s - float(note.read_text()) < 5, said(done)
    assert done.left == []
    return done, json.loads((tmp_path / "run" / "result.json").read_text())


def test_exception_on_one_rank_ends_the_job_with_its_traceback(tmp_path):
    arguments = ["--model", "gpt2", "--synthetic", "20,10", "--pp", 3]
    done, result = fail(tmp_path, "raise", 2, *arguments, ranks=4)
    assert (result["exit_code"], result["rank"]) == (1, 2)
    assert result["error"] == "rank 2 failed: ValueError: no such row"
    lines = done.stderr.splitlines()
    assert lines.count("rank 2: Traceback (most recent call last):") == 1
    assert "rank 2: ValueError: no such row" in lines
    assert sum("Traceback" in line for line in lines) == 1, said(done)
    assert sum(line.startswith("error: ") for line in lines) == 1, said(done)


def test_killed_rank_ends_the_job_with_its_name(tmp_path):
    """Its neighbours see it; the last rank, which waits for a living one only, ends when that one does."""
    done, result = fail(tmp_path, "kill", 1, "--model", "gpt2", "--synthetic", "20,10", "--pp", 3, ranks=4)
    assert result["exit_code"] == 1
    assert result["error"].startswith("stage 0 (rank 1) died, and there is no spare to take over")
    assert "Traceback" not in done.stderr, said(done)


def test_file_that_vanishes_while_loading_ends_the_job(model, tmp_path):
    directory = shutil.copytree(model, tmp_path / "model")
    file = directory / "model.safetensors"
    done, result = fail(tmp_path, f"lose={file}", 2, "--model", directory, "--pp", 2, ranks=3)
    assert result["rank"] in (1, 2)
    assert "model.safetensors" in result["error"], said(done)


# -- idle ranks -------------------------------------------------------------------------------------------------------


def test_idle_ranks_leave_their_cores_and_arrivals_are_awaited(tmp_path):
    """Stages that wait instead of computing: all the processor time is that of the engine itself."""
    arguments = ["--model", "gpt2", "--synthetic", "300,60", "--pp", 2, "--microbatch-size", 2]
    load = ["--num-requests", 6, "--rate", 3, "--output-len", 12]
    done = serve(*arguments, *load, "--out", tmp_path / "run")
    assert done.returncode == 0, said(done)
    ranks = read_csv(tmp_path / "run" / "ranks.csv", RankRecord)
    assert [(r.rank, r.role, r.stage) for r in ranks] == [(0, "controller", -1), (1, "both", 0), (2, "both", 1)]
    for record in ranks:
        assert record.window_s > 2
        assert record.core_share == pytest.approx(record.cpu_s / record.window_s)
        assert record.core_share < 0.05, ranks
    requests = read_csv(tmp_path / "run" / "requests.csv", RequestRecord)
    assert all(r.arrival_s <= r.admitted_s for r in requests)
    assert all(a.arrival_s < b.arrival_s for a, b in pairwise(requests))
    assert all(r.finish_reason == FinishReason.LENGTH for r in requests)
