import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dejavu.errors import UsageError
from dejavu.measure.report.compare import group_runs
from dejavu.measure.report.page import comparison_page, run_page
from dejavu.measure.report.runs import find_runs, read_run, read_runs
from dejavu.measure.report.tables import run_tables

from .make_runs import make_run, make_unfinished_run

VOID = {"meta", "link", "img", "br", "path", "use", "rect", "line", "image"}
FAILURES = (
    "failure_id,target,rank,kind,injected_s,detected_s,rebuilt_s,restored_s,resumed_s,recovery_s,steps_lost,"
    "tokens_replayed,prompts_recomputed,bytes_restored\n"
    "0,both stage 1,2,death,2.0,2.012,2.05,2.06,2.084,0.084,1,0,0,1048576\n"
)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium: apt-get install chromium")


class Outline(HTMLParser):
    """Check that tags nest, and collect the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_of_a_run_says_what_happened(tmp_path):
    page = run_page(read_run(make_run(tmp_path / "run", failures=FAILURES)))
    text = " ".join(Outline(page).text)
    assert "2 stages for prompts and tokens" in text
    assert "4 in 5.00 s" in text  # requests and makespan
    assert "2.40 tokens/s" in text
    assert "both stage 1 (rank 2) died at 2.00 s: noticed after 12.0 ms, rebuilt after 50.0 ms" in text
    assert "serving again after 84.0 ms. 1 step lost, 1.00 MiB of KV restored." in text
    assert "4.77 MiB" in text  # 5 transfers of 1 MB in 1 ms each: 1 GB/s
    assert "0 to 5" in text  # layers of stage 0


def test_transfers_stand_beside_a_plain_copy(tmp_path):
    path = make_run(tmp_path / "run")
    (path / "ceilings.csv").write_text(
        "rank,kind,transport,bytes,gbps\n1,activation,mpi,1000000,4\n2,activation,mpi,1000000,5\n"
    )
    run = read_run(path)
    row = next(table for table in run_tables(run) if table.title == "Transfers").rows[0]
    assert row[4:] == ("977 KiB", "1.00 ms", "1.00", "5.00", "20%")
    assert "a plain copy as long as a activation" in run_page(run)


def test_page_of_a_run_that_was_stopped_says_how_far_it_was(tmp_path):
    path = make_run(tmp_path / "run")
    (path / "status.json").write_text(
        json.dumps({"requests_done": 3, "requests_total": 8, "tokens_out": 41, "elapsed_s": 2.5})
    )
    (path / "result.json").write_text(json.dumps({"outcome": "error", "error": "stopped by SIGINT"}))
    text = " ".join(Outline(run_page(read_run(path))).text)
    assert "stopped by SIGINT, after 2.50 s: 3 of 8 requests were done, 41 tokens had been given out" in text


def test_a_run_that_was_killed_shows_what_it_had_recorded(tmp_path):
    whole, killed = read_run(make_run(tmp_path / "whole")), read_run(make_unfinished_run(tmp_path / "killed"))
    assert list(map(repr, killed.requests)) == list(map(repr, whole.requests))
    assert killed.steps == whole.steps
    known_at_the_end = {"peak_kv_bytes": 0.0}
    assert killed.summary == pytest.approx({**whole.summary, **known_at_the_end}, nan_ok=True)
    said = "This run goes on still, or was killed: all below is what it had recorded so far, 4 requests that had ended"
    assert f"{said} and 12 passes, the last until 6.0 s." in " ".join(Outline(run_page(killed)).text)


def test_a_line_that_a_stopped_run_was_writing_is_left_out(tmp_path):
    path = make_unfinished_run(tmp_path / "run")
    for file in (path / "parts").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    (path / "result.json").write_text(json.dumps({"outcome": "error", "error": "stopped by SIGINT"}))
    run = read_run(path)
    assert [request.request_id for request in run.requests] == ["<r0>", "<r1>", "<r2>"]
    assert (len(run.steps), run.summary["requests"], run.summary["output_tokens"]) == (10, 3, 9)
    assert "This run was cut off: " in " ".join(Outline(run_page(run)).text)


def test_page_of_a_run_that_failed_to_start(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"outcome": "error", "error": "no memory"}))
    text = " ".join(Outline(run_page(read_run(tmp_path))).text)
    assert "no memory, before anything was served" in text
    assert "no options" not in text


def test_a_failure_that_cost_nothing_but_time(tmp_path):
    failures = FAILURES.replace("0.084,1,0,0,1048576", "0.084,0,0,0,0")
    text = " ".join(Outline(run_page(read_run(make_run(tmp_path / "run", failures=failures)))).text)
    assert "serving again after 84.0 ms. Nothing was lost or computed again." in text


def test_what_guards_a_run_is_said_in_words(tmp_path):
    options = {"swap": True, "num_microbatches": 3, "replicate": "ring", "spares": 1}
    options |= {"kv_disk": "/var/kv", "on_failure": "wait"}
    text = " ".join(Outline(run_page(read_run(make_run(tmp_path / "run", options=options)))).text)
    assert "the KV of 2 at a time is on the device" in text
    assert "host memory, every step." in text
    assert "1 spare rank to take over" in text
    assert "KV is kept in files of /var/kv too." in text
    assert "Without a spare left a new process takes the place of one that is lost." in text


def test_page_needs_nothing_from_elsewhere(tmp_path):
    page = run_page(read_run(make_run(tmp_path / "run")))
    assert "<script" not in page
    links = re.findall(r'(?:href|src)="([^"#][^"]*)"', page)
    assert all(link.startswith("data:") for link in links), links
    assert not re.findall(r"#010[23]\d\d", page), "a stand-in colour was left"


def test_text_of_runs_is_escaped(tmp_path):
    path = make_run(tmp_path / "run", options={"workload": "<b>&.jsonl"})
    page = run_page(read_run(path))
    assert "<b>&.jsonl" not in page
    assert "&lt;b&gt;&amp;.jsonl" in page


def test_page_of_a_benchmark_shows_its_rows_and_pictures(tmp_path):
    path = make_run(tmp_path / "run")
    for name in ("requests", "steps", "transfers", "summary"):
        (path / f"{name}.csv").unlink()
    (path / "microbench.csv").write_text("transport,percent\nipc,98.7654321\n")
    (path / "microbench.png").write_bytes(b"\x89PNG")
    page = run_page(read_run(path))
    assert "98.8" in page
    assert "data:image/png;base64,iVBORw==" in page


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [("run.yaml", "- 1", "holds no mapping"), ("run.yaml", "{", "cannot read"), ("steps.csv", "a,b\n", "no column")],
)
def test_damaged_run_is_one_clear_error(tmp_path, file, content, message):
    path = make_run(tmp_path / "run")
    (path / file).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_run(path)


def test_missing_run_is_named(tmp_path):
    with pytest.raises(UsageError, match="no run directory"):
        read_run(tmp_path / "nowhere")


def test_run_under_way_has_a_page(tmp_path):
    path = make_run(tmp_path / "run")
    for file in ("result.json", "requests.csv", "steps.csv", "summary.csv", "transfers.csv"):
        (path / file).unlink()
    assert "unfinished" in run_page(read_run(path))


@pytest.mark.timeout(90)
@needs_browser
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_page_in_a_browser(tmp_path, width, dark):
    one, two = (make_run(tmp_path / f"run{i}", speed=i, options={"microbatch_size": i}) for i in (1, 2))
    (one / "failures.csv").write_text(FAILURES)
    for name, page in {"one": run_page(read_run(one)), "both": comparison_page(read_runs([one, two]))}.items():
        facts = browse(page, tmp_path / f"{name}.html", width, dark)
        assert facts["content_width"] <= facts["width"] == width, "the page scrolls sideways"
        assert facts["shown"] == facts["figures"], "every plot is shown once, at one of its widths"
        assert facts["is_dark"] == dark
        assert facts["smallest"] >= 6.5, "the labels of the plots are too small to read"


PROBE = """<script>window.onload = () => {
  const shown = [...document.querySelectorAll('figure svg')].filter(s => s.getBoundingClientRect().width > 0);
  const sizes = shown.flatMap(s => { const scale = s.getBoundingClientRect().width / s.viewBox.baseVal.width;
    return [...s.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize) * scale); });
  const page = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
  const facts = {width: window.innerWidth, content_width: document.documentElement.scrollWidth, shown: shown.length,
    figures: document.querySelectorAll('figure').length, is_dark: page[0] < 128, smallest: Math.min(...sizes)};
  parent.postMessage(facts, '*'); };</script>"""
FRAME = """<!doctype html><body><iframe src="{source}" style="border:0;width:{width}px;height:900px"></iframe><script>
  onmessage = event => {{ document.body.dataset.facts = JSON.stringify(event.data); }};</script>"""


def browse(page: str, path: Path, width: int, dark: bool) -> dict:
    """Open a page in a frame `width` pixels wide; give what it measured of itself. The console has to stay silent."""
    path.write_text(page.replace("</body>", PROBE + "</body>"))
    frame = path.with_suffix(".frame.html")
    frame.write_text(FRAME.format(source=path.name, width=width))
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", scheme]
    flags += [f"--user-data-dir={path.parent / 'browser'}", "--window-size=1500,1000", "--virtual-time-budget=5000"]
    command = [str(BROWSER), *flags, "--enable-logging=stderr", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-facts="([^"]*)"', done.stdout)
    assert found, done.stdout[-2000:]
    facts: dict = json.loads(found[1].replace("&quot;", '"'))
    return facts


def test_command_writes_page_and_pictures(tmp_path):
    run = make_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "dejavu.cli.main", "report", str(run)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert Path(last["page"]).read_text().startswith("<!doctype html>")
    assert all(Path(picture).read_bytes().startswith(b"\x89PNG") for picture in last["pictures"])
    assert len(last["pictures"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no run was named"),
        (["nowhere"], "no run directory"),
        (["--list"], "holds no runs"),
        (["nowhere", "--csv", "--markdown"], "give one of them"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "dejavu.cli.main", "report", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_list_has_parts_of_runs_and_those_that_went_wrong(tmp_path):
    runs = tmp_path / "results" / "runs"
    runs.mkdir(parents=True)
    whole = make_run(runs / "first")
    for part in ("whole", "failure"):
        make_run(runs / "second" / part)
        (runs / "second" / f"{part}.yaml").write_text("{}")
    (runs / "third").mkdir()
    (runs / "third" / "result.json").write_text(json.dumps({"outcome": "error", "error": "no memory"}))
    (make_run(runs / "fourth") / "run.yaml").write_text("- 1")
    program = [sys.executable, "-m", "dejavu.cli.main", "report", "--list"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, check=True)
    lines = {line.split()[0]: " ".join(line.split()) for line in done.stdout.splitlines()}
    assert lines["first"].endswith("ok 2.40 gpt2, pp 2")
    assert {"second/whole", "second/failure"} <= lines.keys()
    assert lines["third"] == "third error - no memory"
    assert "unreadable" in lines["fourth"]
    assert find_runs(runs)[0] == whole


def test_a_run_of_parts_stands_for_them(tmp_path):
    for part, failures in {"whole": "", "failure": FAILURES}.items():
        make_run(tmp_path / "run" / part, failures=failures)
        (tmp_path / "run" / f"{part}.yaml").write_text("{}")
    runs = read_runs([tmp_path / "run"])
    assert [run.name for run in runs] == ["run/whole", "run/failure"]
    assert [group.label for group in group_runs(runs)] == ["run/whole", "run/failure"], "a failure is no repeat"


def test_csv_and_markdown(tmp_path):
    runs = [str(make_run(tmp_path / name, speed=speed)) for name, speed in {"a": 1.0, "b": 2.0}.items()]
    base = [sys.executable, "-m", "dejavu.cli.main", "report", *runs]
    as_csv = subprocess.run([*base, "--csv"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert as_csv[0].startswith("run,repeats,tokens_per_s,tokens_per_s_ci95")
    assert len(as_csv) == 2  # repeats of one configuration
    markdown = subprocess.run([*base, "--markdown"], capture_output=True, text=True, check=True).stdout
    assert "| tokens/s | 3.60 ± " in markdown
