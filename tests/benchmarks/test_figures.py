import json

import pytest
from click.testing import CliRunner

from dejavu.benchmarks import reproduce
from dejavu.benchmarks.figures import Measure, read_plan, read_plans
from dejavu.device import num_cuda_devices
from dejavu.errors import ConfigError, UsageError

ROWS = [
    {"arrangement": "colocated", "makespan_s": 10.0, "rate": None},
    {"arrangement": "disaggregated", "makespan_s": 4.0, "rate": None},
    {"arrangement": "colocated", "makespan_s": 6.0, "rate": 2.0},
    {"arrangement": "disaggregated", "makespan_s": 5.0, "rate": 2.0},
]


def value(**keys):
    return Measure("a", {"column": "makespan_s", **keys})


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (value(), 10.0),
        (value(take="min"), 4.0),
        (value(take="median"), 5.5),
        (value(take="first", where={"rate": 2.0}), 6.0),
        (value(where={"arrangement": "colocated"}, over={"arrangement": "disaggregated"}), 2.5),
        (value(where={"arrangement": "colocated"}, over={"arrangement": "disaggregated"}, take="min"), 1.2),
        (value(where={"arrangement": "none such"}), None),
        (value(where={"rate": 2.0}, over={"rate": 2.0}, over_column="rate", take="first"), 3.0),
    ],
)
def test_number_is_read_off_the_rows(measure, expected):
    assert measure.read({"rows": ROWS}) == expected


def test_number_of_another_table():
    measure = Measure("a", {"table": "latency", "column": "failure_ratio", "take": "median"})
    assert measure.read({"rows": ROWS, "latency": [{"failure_ratio": 1.5}, {"failure_ratio": None}]}) == 1.5


def test_milliseconds_stand_in_for_seconds():
    assert Measure("a", {"column": "recovery_s"}).read({"rows": [{"recovery_ms": 906.6}]}) == pytest.approx(0.9066)


def test_table_that_is_missing_has_no_number():
    assert value(table="latency").read({"rows": ROWS}) is None


def test_verdict_knows_which_way_is_better():
    faster, slower = Measure("a", {}, 1.88), Measure("a", {}, 1.24, "lower")
    assert faster.verdict(1.9).startswith("at least")
    assert faster.verdict(1.8).startswith("behind")
    assert slower.verdict(1.05).startswith("at least")
    assert slower.verdict(None) == "not measured"
    assert faster.verdict(1.9, (1.7, 2.0)) == "at least as good as the paper's; single turns on both sides"
    assert faster.verdict(1.9, (1.89, 2.0)) == "at least as good as the paper's"
    assert Measure("a", {}, 1.24, "neither").verdict(9.9) == "for comparison"


def test_every_figure_of_the_package_is_whole():
    plans = read_plans()
    assert len({plan.figure for plan in plans}) == len(plans) >= 2
    for plan in plans:
        assert plan.runs.keys() <= {"cpu", "gpu"}
        assert all(run["command"] for run in plan.runs.values())
        assert all({"column"} <= measure.value.keys() for measure in plan.measures)


def write_figure(into, stem, kind, machine, ours):
    row = {"measure": "a ratio", "ours": ours, "paper": 2.0, "verdict": "for comparison"}
    made = {"command": ["dejavu", "x"], "date": "2026-11-23", "machine": machine, "commit": "abc1234", "seconds": 3}
    (into / "figures").mkdir(exist_ok=True)
    (into / "figures" / f"{stem}-{kind}.json").write_text(json.dumps({**made, "rows": [row]}))


def call(*arguments):
    return CliRunner().invoke(reproduce.command, arguments, standalone_mode=False, catch_exceptions=False)


def test_page_has_both_kinds_of_machine_beside_each_other(tmp_path):
    (tmp_path / "README.md").write_text("# Ours\n\nbefore\n")
    write_figure(tmp_path, "figure-8", "cpu", "a processor", 1.44)
    write_figure(tmp_path, "figure-8", "gpu", "2 x a GPU", 1.2)
    for _ in range(2):  # the second time between the marks
        assert call("--into", str(tmp_path), "--page").return_value == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Ours\n\nbefore\n")
    assert text.count("### Figure 8") == 1
    assert "| a ratio | GPUs | 1.20 | 2.00 | for comparison |\n| a ratio | CPU cores | 1.44 | 2.00 |" in text
    assert "**CPU cores**: a processor, 2026-11-23, commit abc1234, 3 s.\n`dejavu x`" in text


def test_numbers_of_another_commands_table_are_on_the_page(tmp_path):
    (tmp_path / "figures").mkdir()
    columns = "phase,optimization,model,slowdown_percent,slowdown_min,slowdown_max"
    (tmp_path / "cost.csv").write_text(
        f"{columns}\nprompt,full,small,1.5,-0.5,3\nprompt,full,large,0.5,0.25,1\ntoken,full,large,2.5,2.25,3\n"
    )
    described = {"command": "dejavu y", "machine": "a GPU", "date": "2026-11-22", "commit": "1234567"}
    table = {"file": "../cost.csv", "where": {"model": "large"}}
    path = tmp_path / "figures" / "figure-7-gpu.yaml"
    path.write_text(json.dumps({**described, "tables": {"rows": table}}))
    call("--into", str(tmp_path), "--page")
    text = (tmp_path / "README.md").read_text()
    assert "prompt pass, fully optimised, % | GPUs | 0.500 (0.250 to 1.00) | 2.00 | at least as good as" in text
    assert "token step, fully optimised, % | GPUs | 2.50 (2.25 to 3.00) | 2.00 | behind the paper's |" in text
    assert "**GPUs**: a GPU, 2026-11-22, commit 1234567, [table](cost.csv).\n`dejavu y`" in text
    assert "copy per piece, % | GPUs" not in text, "what the table does not have is left out"
    write_figure(tmp_path, "figure-7", "gpu", "a GPU", 3.0)  # since then it was run here
    call("--into", str(tmp_path), "--page")
    assert "| a ratio | GPUs | 3.00 |" in (tmp_path / "README.md").read_text()


def test_requests_with_other_tokens_are_on_the_page(tmp_path):
    write_figure(tmp_path, "figure-8", "gpu", "a GPU", 1.5)
    (tmp_path / "figures" / "figure-8-gpu.csv").write_text(
        "arrangement,requests,same_tokens,wrong\ncolocated,160,true,0\nchunked,160,false,17\n"
    )
    assert call("--page", "--into", str(tmp_path)).exit_code == 0
    text = (tmp_path / "README.md").read_text()
    assert "tokens than in the first arrangement, near-ties in 16 bits: chunked 17 of 160." in text


def test_damaged_description_of_a_table_is_named(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "figure-7-gpu.yaml").write_text("command: x\n")
    with pytest.raises(ConfigError, match="describes no measured figure"):
        call("--into", str(tmp_path), "--page")


@pytest.mark.parametrize("flags", [[], ["--gpu"]])
def test_what_would_be_run_is_listed(flags):
    listed = call(*flags, "--list").output
    assert [line.split(":")[0] for line in listed.splitlines()[::2]] == [f"figure {p.figure}" for p in read_plans()]
    assert ("--device cuda" in listed) == bool(flags)


@pytest.mark.skipif(num_cuda_devices() > 0, reason="has a GPU")
def test_figures_of_gpus_need_one():
    with pytest.raises(UsageError, match="--gpu cannot be had"):
        call("--gpu")


def test_damaged_description_is_named(tmp_path):
    path = tmp_path / "figure-1.yaml"
    path.write_text("figure: '1'\nmeasures: []\n")
    with pytest.raises(ConfigError, match="describes no figure"):
        read_plan(path)
