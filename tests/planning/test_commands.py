"""Run `dejavu plan`, `simulate` and `trace` as a user does; and every command of their page."""

import csv
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from dejavu.measure.report.runs import read_run
from dejavu.planning.profile import Profile, PromptTime, TokenTime
from tests.documentation import unexplained

main = import_module("dejavu.cli.main").main

DATA = Path(__file__).parent / "data"
PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
PAPER = (
    "plan --paper --memory-gb 80 --devices-per-machine 2 --prompt-len 1000 --output-len 220 --dtype-bytes 2 --batch 8 "
    "--token-ms 80 --layers 64 --attention-size 9216 --layer-params 1019215872"
)


SIMULATE = "simulate --stages 2 --prompt-ms 3 --token-ms 2"
PLAN = (
    "plan --devices 2 --memory-gb 10 --layers 4 --layer-params 10 --attention-size 512 --prompt-ms 10 --token-ms 1 "
    "--num-requests 4"
)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run a command line in an empty directory; give its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(line):
        code = main(shlex.split(line))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def rows_of(output, bench):
    last = json.loads(output.rstrip("\n").rsplit("\n", 1)[-1])
    assert set(last) == {"bench", "run", "rows"}
    assert last["bench"] == bench
    return last["rows"]


def make_profile(path):
    Profile(
        model="opt-13b",
        device="a device",
        date="2026-11-22",
        num_layers=40,
        prompt=tuple(PromptTime(n, b, 1, n * b * 0.1) for n in (128, 1024) for b in (1, 32)),
        token=tuple(TokenTime(n, b, 1, 15 + n * b * 0.0005) for n in (128, 1024) for b in (1, 32)),
        memory_bytes=80 * 10**9,
        bandwidths_gbps={"host": 25.0},
    ).save(path)


def test_paper_cases(run):
    for more, split in (
        ("--devices 4 --prompt-ms 6000", (1, 3)),
        ("--devices 8 --prompt-ms 20000 --stream-slowdown 1.2", (4, 4)),
    ):
        code, out, _ = run(f"{PAPER} {more}")
        assert code == 0
        (row,) = rows_of(out, "plan")
        assert (row["prompt_devices"], row["token_devices"]) == split


def test_simulate_paper(run):
    for case in json.loads((DATA / "expected.json").read_text()):
        names = {"num_machines": "stages", "num_prompt_machines": "prompt-stages", "num_token_machines": "token-stages"}
        names |= {"prompt_time": "prompt-ms", "token_time": "token-ms", "cache_time": "cache-ms", "rps": "rate"}
        options = " ".join(f"--{names[name]} {case[name]}" for name in case if name in names)
        code, out, _ = run(f"simulate --paper --trace {DATA / case['trace']} {options}")
        assert code == 0
        (row,) = rows_of(out, "simulate")
        for name in ("makespan_s", "throughput_requests_per_s"):
            assert row[name] == pytest.approx(case[name], abs=1e-6, rel=0)
        for part, value in case["latency_per_token_s"].items():
            assert row[f"latency_per_token_s_{part}"] == pytest.approx(value, abs=1e-6, rel=0)


def test_simulate_writes_what_it_says(run, tmp_path):
    trace = tmp_path / "few.json"
    trace.write_text("[[10, 1], [10, 5]]")
    code, out, _ = run(
        f"simulate --trace {trace} --stages 4 --prompt-ms 10 --token-ms 1 --admit-ms 0 --out o --trace-out t.json"
    )
    assert code == 0  # fewer requests than stages
    (row,) = rows_of(out, "simulate")
    assert unexplained("planning.md", "dejavu simulate", row) == []
    assert row["makespan_s"] == pytest.approx(0.050 + 4 * 0.004)
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    with (tmp_path / "o" / "requests.csv").open() as file:
        requests = list(csv.DictReader(file))
    assert [r["output_tokens"] for r in requests] == ["1", "5"]
    assert requests[0]["tpot_s"] == ""
    report = read_run(tmp_path / "o")
    assert (report.outcome, len(report.requests), len(report.tables["simulate"])) == ("ok", 2, 1)
    asked = {"trace": str(trace), "stages": 4, "prompt_ms": 10, "token_ms": 1, "admit_ms": 0, "trace_out": "t.json"}
    assert report.config == asked | {"out": "o"}
    code, _, err = run("simulate --stages 1 --prompt-ms 1 --token-ms 1 --num-requests 1 --out o")
    assert (code, "already holds a run" in err) == (2, True)


def test_sweep(run, tmp_path):
    make_profile(tmp_path / "profile.yaml")
    code, out, _ = run("simulate --sweep --profile profile.yaml --machines 3 --num-requests 40 --out o")
    assert code == 0
    rows = rows_of(out, "simulate")
    assert unexplained("planning.md", "dejavu simulate", rows[0]) == []
    assert {row["machines"] for row in rows} == {1, 2, 3}
    assert (tmp_path / "o" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "o" / "sweep.csv").read_text().splitlines()) == len(rows) + 1


def test_plan_by_profile(run, tmp_path):
    make_profile(tmp_path / "profile.yaml")
    code, out, _ = run("plan --devices 3 --profile profile.yaml --num-requests 30 --batch 4 --out o")
    assert code == 0
    rows = rows_of(out, "plan")
    assert unexplained("planning.md", "dejavu plan", rows[0]) == []
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert "pay" in out
    best = yaml.safe_load((tmp_path / "o" / "best.yaml").read_text())
    assert best["model"] == "opt-13b"
    assert best["microbatch_size"] == 4
    assert len(read_run(tmp_path / "o").tables["plan"]) == len(rows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("simulate --stages 4 --prompt-ms -3 --token-ms 2", "prompt_ms -3"),
        ("simulate --stages 4 --prompt-ms 3", "--token-ms is missing"),
        ("simulate --prompt-ms 3 --token-ms 2", "pipelines are not clear"),
        ("simulate --stages 2 --token-stages 2 --prompt-ms 3 --token-ms 2", "pipelines are not clear"),
        ("simulate --prompt-stages 2 --prompt-ms 3 --token-ms 2", "--token-stages is missing"),
        ("simulate --stages 4 --prompt-ms 3 --token-ms 2 --kill abc", "--kill 'abc'"),
        ("simulate --stages 4 --prompt-ms 3 --token-ms 2 --num-requests 3 --paper", "3 requests cannot fill 4 stages"),
        ("simulate --stages 4 --prompt-ms 3 --token-ms 2 --trace nothing.json", "nothing.json"),
        ("simulate --sweep", "--profile is missing"),
        (f"{PAPER} --devices 2 --prompt-ms 1", "no valid split"),
        (f"{PAPER} --devices 4", "--prompt-ms is missing"),
        (f"{PAPER} --devices 4 --prompt-ms -5", "--prompt-ms -5"),
        ("plan --devices 2 --layers 8 --layer-params 1 --attention-size 1 --prompt-ms 1 --token-ms 1", "--memory-gb"),
        (f"{SIMULATE} --rate -1", "a rate of -1"),
        (f"{SIMULATE} --replicas 0", "0 replicas"),
        (f"{SIMULATE} --kill 1:7", "no pipeline 7"),
        (f"{SIMULATE} --kill -1", "kill_s -1"),
        (f"{SIMULATE} --batch 0", "rows 0"),
        (f"{SIMULATE} --swap-bytes 1 --host-gbps 0", "host link"),
        (f"{SIMULATE} --swap-bytes 1 --resident 0", "0 resident"),
        (f"{SIMULATE} --replica-bytes -1", "replica_bytes_per_token -1"),
        (f"{SIMULATE} --num-requests 0", "--num-requests 0"),
        ("simulate --prompt-stages 1 --token-stages 1 --prompt-ms 3 --token-ms 2 --prompt-ahead -5", "for -5 requests"),
        (f"{PLAN} --num-requests 0", "no requests to plan for"),
        (f"{PLAN} --batch -3", "rows -3"),
        (f"{PLAN} --stream-slowdown -1", "-1 times as long"),
        (f"{PLAN} --ttft -1", "ttft_s of -0.001"),
        (f"{PLAN} --layers 0", "num_layers 0"),
        (f"{PLAN} --memory-gb 1e-9", "no layout fits"),
        (f"{PLAN} --devices 0", "0 devices"),
        ("trace show nothing.csv", "nothing.csv"),
        ("trace make --out x.txt", "no known form"),
        ("trace make --out x.json --num-requests 0", "0 requests"),
    ],
)
def test_bad_input_is_one_line(run, line, message):
    code, out, err = run(line)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message in err


def test_trace_there_and_back(run, tmp_path):
    assert run("trace make --num-requests 30 --seed 5 --rate 2 --out a.json")[0] == 0
    assert run("trace convert a.json --limit 20 --out b.json")[0] == 0
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads((tmp_path / "a.json").read_text())[:20]
    code, out, _ = run("trace show b.json")
    assert code == 0
    assert "prompt tokens: 20" in out
    counts = re.findall(r"^ *\S+ - \S+ +(\d+)", out.split("output tokens")[0], re.MULTILINE)
    assert sum(map(int, counts)) == 20


def commands_of(page):
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("dejavu ") for line in lines if line.startswith("dejavu ")]


def test_every_command_of_the_page_runs(run, tmp_path):
    make_profile(tmp_path / "opt-13b.yaml")
    (tmp_path / "azure.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50.99,396,109\n"
    )
    lines = commands_of(PAGE.read_text(encoding="utf-8"))
    assert len(lines) >= 8
    for line in lines:
        if line.startswith("bench validate"):  # minutes of an engine: tests/benchmarks runs a part of it
            continue
        code, _, err = run(line)
        assert code == 0, f"{line}: {err}"


@pytest.mark.parametrize("name", ["plan", "simulate", "trace make", "trace convert", "trace show"])
def test_the_page_has_every_flag(name):
    """What `--help` lists, the page explains."""
    command, *sub = name.split()
    found = import_module(f"dejavu.cli.{command}").command
    for part in sub:
        found = found.commands[part]
    page = PAGE.read_text(encoding="utf-8")
    flags = {flag for option in found.params if option.param_type_name == "option" for flag in option.opts}
    assert not [flag for flag in flags if f"`{flag}`" not in page]
