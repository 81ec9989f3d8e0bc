"""The command line as a user meets it: help, errors, dry runs."""

import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

import dejavu.cli.serve
from dejavu.cli.bench import BENCHMARKS
from dejavu.cli.main import COMMANDS, command, main
from dejavu.config import ServeConfig, choices

DUMMY = ["--model", "gpt2", "--load-format", "dummy"]


def clean_environment(**changes):
    prefixes = ("OMPI_", "PMIX_", "PRTE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return kept | changes


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "dejavu.cli.main", *arguments],
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def words(text):
    return " ".join(text.replace("│", " ").split())


@pytest.fixture(autouse=True)
def outside_mpi(monkeypatch):
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_help_is_quick_and_imports_nothing_heavy():
    program = "import sys; from dejavu.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    times = []
    for _ in range(12):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
        times.append(time.perf_counter() - started)
        if times[-1] < 0.3:
            break
    assert min(times) < 0.3
    heavy = {"torch", "mpi4py", "transformers", "numpy", "pydantic", "tokenizers"}
    assert not heavy & set(done.stderr.split())


def test_help_lists_every_command_with_a_line_each():
    lines = CliRunner().invoke(command, ["--help"]).output.splitlines()
    for name, help_line in COMMANDS.items():
        assert any(words(line) == f"{name} {help_line}" for line in lines), name
    assert CliRunner().invoke(command, []).output == CliRunner().invoke(command, ["--help"]).output


@pytest.mark.parametrize(
    ("package", "names"), [("dejavu.cli", list(COMMANDS)), ("dejavu.benchmarks", list(BENCHMARKS))]
)
def test_every_listed_command_exists(package, names):
    for name in names:
        assert import_module(f"{package}.{name.replace('-', '_')}").command.name is not None


@pytest.mark.parametrize("width", [80, 120])
def test_serve_help_shows_each_field_in_the_width(width):
    shown = run("serve", "--help", COLUMNS=str(width)).stdout
    assert max(map(len, shown.splitlines())) <= width
    for name, field in ServeConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        for choice in choices(field.annotation):
            assert choice in shown
    assert "Tensor-parallel ranks per stage" in words(shown)
    for group in ("Model", "Parallelism", "Scheduling", "Workload", "Run"):
        assert f"─ {group} ─" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serv"], "error: no command 'serv': did you mean 'serve'?"),
        (["xyz"], "error: no command 'xyz': `dejavu --help` lists them"),
        (["bench", "xyz"], "error: no command 'xyz': `dejavu bench --help` lists them"),
        (
            ["serve", "--layers-per-stag", "1"],
            "error: no option '--layers-per-stag': did you mean '--layers-per-stage'?",
        ),
        (["serve", "--qqq"], "error: no option '--qqq': `dejavu serve --help` lists them"),
        (["serve", "--pp"], "error: option '--pp' requires an argument"),
        (["serve", "--pp", "0"], "error: pp '0' in the command line: input should be greater than or equal to 1"),
        (["serve", "--dtype", "int8"], "error: invalid value for '--dtype': 'int8' is not one of"),
        (["serve", "nowhere.yaml"], "error: no profile 'nowhere.yaml': give a file, or a shipped one ("),
        (["serve", "--pp", "13", *DUMMY, "--dry-run"], "error: pp 13 is more than the model's 12 layers"),
        (["serve", "--tp", "5", *DUMMY, "--dry-run"], "error: tensor degree 5 does not divide the model's 12"),
        (["serve", "--model", "no-such-model", "--dry-run"], "error: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_only_rank_0_complains_where_every_rank_finds_the_same_error(capsys, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert main(["serve", "--pp", "0"]) == 2
    assert capsys.readouterr().err == ""


def test_profile_is_overridden_by_the_command_line(tmp_path, capsys):
    profile = tmp_path / "mine.yaml"
    profile.write_text("model: gpt2\nload-format: dummy\npp: 3\ntp: 2\n")
    assert main(["serve", str(profile), "--tp", "1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert " -n 4 " in out
    profile.write_text("pp: 3\nmicrobatchsize: 2\n")
    assert main(["serve", str(profile), "--dry-run"]) == 2
    assert "did you mean 'microbatch_size'?" in capsys.readouterr().err


def test_dry_run_prints_ranks_and_a_line_without_itself(capsys):
    arguments = ["serve", "--dry-run", "--pp", "2", "--tp", "2", "--name", "x-y", *DUMMY, "--device", "cpu"]
    assert main(arguments) == 0
    *table, line = capsys.readouterr().out.strip().splitlines()
    assert line.endswith("-m dejavu.cli.main serve " + " ".join(arguments[2:]))
    assert " -n 5 " in line
    rows = [[cell.strip() for cell in row.strip("│").split("│")] for row in table if row.startswith("│")]
    assert rows[0][:2] == ["0", "controller"]
    assert rows[1:] == [
        [str(1 + 2 * stage + half), "both", str(stage), layers, f"{half} of 2", "cpu"]
        for stage, layers in enumerate(["0-5", "6-11"])
        for half in (0, 1)
    ]


def test_dry_run_leaves_nothing_behind(tmp_path):
    before = set(Path.cwd().glob("results/runs/*"))
    done = run("serve", *DUMMY, "--out", str(tmp_path / "run"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists()
    assert set(Path.cwd().glob("results/runs/*")) == before


def test_booleans_have_both_spellings(monkeypatch):
    seen = []
    monkeypatch.setattr(dejavu.cli.serve, "start", lambda config, arguments: seen.append((config, arguments)) or 0)
    assert main(["serve", "--chat", "--no-progress", "--kv-memory", "1.5G"]) == 0
    config, arguments = seen[0]
    assert (config.chat, config.progress, config.kv_memory) == (True, False, 3 * 2**29)
    assert config.model_fields_set == {"chat", "progress", "kv_memory"}
    assert arguments == ["serve", "--chat", "--no-progress", "--kv-memory", "1.5G"]


def test_interrupt_is_130(monkeypatch, capsys):
    def interrupted(config, arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(dejavu.cli.serve, "start", interrupted)
    assert main(["serve"]) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted"


def test_color_goes_to_terminals_only():
    assert "\x1b" not in run("serve", "--pp", "0").stderr
