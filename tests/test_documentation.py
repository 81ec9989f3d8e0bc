"""What README.md and docs say: commands run, tables are the code's, every column is explained, links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from itertools import takewhile
from pathlib import Path

import click
import pytest

from dejavu.assets import data_names, data_path
from dejavu.benchmarks.figures import read_plans
from dejavu.cluster.resilience import LatencyRow, ProgressRow
from dejavu.config import ServeConfig, load_config
from dejavu.measure.failures import FailureRecord
from dejavu.measure.records import CeilingRecord, RankRecord, RequestRecord, StepRecord, TransferRecord
from dejavu.measure.summary import summarize
from dejavu.model.resolve import resolve_model
from dejavu.topology import build_topology, required_ranks
from tests.documentation import PAGE, ROOT, filled, unexplained

PAGES = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("*.md")) - {ROOT / "docs" / "notes.md"})]
RUN_ELSEWHERE = {"planning.md"}  # tests/planning/test_commands.py runs its blocks
BLOCK = re.compile(r"(?:^<!-- (?P<marker>\w+):[^\n]*-->\n)?^```sh\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`(dejavu [^`]+)`(?!`)")
PUBLISHED = sorted((ROOT / "results" / "published").glob("*.md"))
MARKERS = {None, "make", "checked"}  # run; print what make would do; check the options only, as running takes too long


def blocks(page):
    return [(match["marker"], match["text"]) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def shell_blocks():
    """Give each block once, also where several pages have it."""
    pages = [page for page in PAGES if page.name not in RUN_ELSEWHERE]
    found = {block: f"{page.name}-{number}" for page in pages for number, block in enumerate(blocks(page))}
    return [pytest.param(*block, id=name) for block, name in found.items()]


def command_lines(text):
    """Give the arguments of each `dejavu` in some lines of shell, up to where the shell goes on."""
    for line in text.replace("\\\n", " ").splitlines():
        words = list(takewhile(lambda word: word not in {"|", ">", "&&"}, shlex.split(line, comments=True)))
        program = next((word for word in words if word == "dejavu" or word.endswith("slurm.sbatch")), None)
        if program:
            arguments = words[words.index(program) + 1 :]
            yield arguments if program == "dejavu" else ["serve", *arguments]


def find_command(arguments):
    """Give the command that some arguments name, its name, and what is left of them."""
    command, name = import_module("dejavu.cli.main").command, "dejavu"
    while isinstance(command, click.Group) and arguments and arguments[0].islower():
        name, command, arguments = command.resolve_command(click.Context(command), list(arguments))
    return command, name, list(arguments)


def check(arguments):
    """Read arguments as the command line does, and where a job would be started, lay out its ranks."""
    command, name, rest = find_command(arguments)
    values = command.make_context(name, rest).params
    if "profile" in values and name in ("serve", "fail-inject") and not values.get("resume"):
        options = import_module("dejavu.cli.options")
        own = {key: value for key, value in values.items() if key in ServeConfig.model_fields}
        config = load_config(options.find_profile(values["profile"]), options.given(own))
        build_topology(config, resolve_model(config.model, "dummy").spec, required_ranks(config))


def environment():
    prefixes = ("OMPI_", "PMIX_", "PRTE_", "PMI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    root = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | root | {"PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("marker", "text"), shell_blocks())
def test_commands_run(marker, text, tmp_path):
    assert marker in MARKERS
    for arguments in command_lines(text):
        check(arguments)
    if marker == "checked":
        return
    settings = environment()
    if marker == "make":
        settings["MAKEFLAGS"] = "-n"  # print what would be done
        for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
            (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=tmp_path,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout, done.stdout


@pytest.mark.parametrize("plan", read_plans(), ids=lambda plan: plan.figure)
def test_commands_of_figures_are_right(plan):
    for run in plan.runs.values():
        check(list(map(str, run["command"])))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_commands_is_found(page):
    assert len(blocks(page)) == page.read_text(encoding="utf-8").count("```sh\n")


@pytest.mark.parametrize("page", [*PAGES, *PUBLISHED], ids=lambda page: f"{page.parent.name}/{page.name}")
def test_commands_in_sentences_are_there(page):
    """What stands in a sentence may have words such as NAME for values; commands and options have to exist."""
    for text in INLINE.findall(page.read_text(encoding="utf-8")):
        command, _, rest = find_command(text.split()[1:])
        known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
        flags = {word for word in rest if word.startswith("--")}
        takes_any = command.context_settings.get("ignore_unknown_options", False)
        assert takes_any or flags <= known, f"{text}: {flags - known}"


def test_tables_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert page == filled(page), "run `python -m tests.documentation`"


def table_names(title):
    """Give the first cells of the table under a bold title."""
    section = PAGE.read_text(encoding="utf-8").split(f"**{title}**")[1].split("\n**")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]


@pytest.mark.parametrize(
    ("title", "record"),
    [
        ("requests.csv", RequestRecord),
        ("steps.csv", StepRecord),
        ("transfers.csv", TransferRecord),
        ("ranks.csv", RankRecord),
        ("ceilings.csv", CeilingRecord),
    ],
)
def test_every_column_is_explained_in_order(title, record):
    assert table_names(title) == [field.name for field in fields(record)]


@pytest.mark.parametrize(
    ("title", "record"), [("failures.csv", FailureRecord), ("latency.csv", LatencyRow), ("progress.csv", ProgressRow)]
)
def test_every_column_of_failures_is_explained(title, record):
    assert unexplained("failures.md", title, [field.name for field in fields(record)]) == []


def test_every_benchmark_has_a_section():
    for name in import_module("dejavu.cli.bench").BENCHMARKS:
        assert unexplained("benchmarks.md", f"bench {name}", []) == []


def test_every_column_of_the_summary_is_explained_in_order():
    columns = summarize([], [], 1, 0).row()
    assert [name.replace("stageN", "stage0") for name in table_names("summary.csv")] == list(columns)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "notes.md", *PUBLISHED], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
        assert not anchor or anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


def anchors(page):
    """Give the names by which GitHub lets links point to a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", data_names("launch", ".yaml"))
def test_shipped_profiles_are_named_and_right(name):
    config = load_config(data_path("launch", name), {})
    assert config.name != "serve"
    assert f"`{name.removesuffix('.yaml')}`" in PAGE.read_text(encoding="utf-8")
    assert config.workload is None or Path(config.workload).is_file()
