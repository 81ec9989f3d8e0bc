"""Serve with KV streaming at each level beside none, in one process and in turns: what does streaming cost a step?

This is the paper's Figure 7 (arXiv 2403.01876), and its test of streaming the whole cache: every prompt pass and token
step streams its new KV into pinned host memory, by the calls that serving uses. Below `full` a step is over when its KV
has left; at `full` it leaves behind the next step's compute. `slowdown_percent` is the median over the turns of the
level's time beside the same turn's time without streaming; `cache` is a prompt pass and all token steps together.
After the last turn the store gives the whole cache back, and `wrong` counts the bytes that differ from the pool's.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import rich_click as click

from dejavu.errors import UsageError

from .driver import Row, finish, open_run_directory
from .plots_serving import plot_slowdown

if TYPE_CHECKING:
    from .serving import Serving

LEVELS = ("none", "naive", "buffered", "layered", "full")
DEFAULTS = {
    "cpu": {"model": "smollm2-135m", "batch": 4, "prompt_len": 64, "dtype": "float32", "block_size": 0},
    "cuda": {"model": "opt-13b", "batch": 8, "prompt_len": 512, "dtype": "float16", "block_size": 16},
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold what was asked for, with the defaults of the device filled in."""

    kind: str
    model: str
    batch: int
    prompt_len: int
    steps: int
    dtype: str
    block_size: int
    threads: int
    levels: tuple[str, ...]

    @property
    def capacity(self) -> int:
        """Count the tokens of a row."""
        return self.prompt_len + self.steps


@click.command()
@click.option("--model", help="Of the table  [default: GPUs opt-13b, CPUs smollm2-135m]")
@click.option("--batch", type=click.IntRange(1), help="Rows  [default: GPUs 8, CPUs 4]")
@click.option("--prompt-len", type=click.IntRange(1), help="Tokens of each prompt  [default: GPUs 512, CPUs 64]")
@click.option("--steps", default=16, show_default=True, type=click.IntRange(2), help="Token steps of a turn.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Number format.")
@click.option("--block-size", type=click.IntRange(1), help="Tokens of a block  [default: GPUs 16, CPUs a row]")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="Threads; 0 takes all cores.")
@click.option("--level", "levels", default="all", show_default=True, help="Levels, such as buffered,full.")
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(1), help="Turns of each level.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where.")
@click.option("--out", help="The run directory.")
def command(out: str | None, repeats: int, **options: Any) -> int:
    """Time serving steps with KV streaming at each level beside none."""
    from .links import choose_device
    from .serving import Serving

    with choose_device(options["device"], 0) as device:
        settings = make_settings(device.properties.kind, options)
        with ExitStack() as held:
            serving = Serving(device, settings, held)
            rows = measure(serving, settings, repeats)
        facts: dict[str, Any] = {"device": device.properties.name, "model": settings.model}
    wrong = sum(row["wrong"] for row in rows)
    error = f"{wrong} bytes of the streamed cache differ from the pool's" if wrong else None
    shown = {**options, "repeats": repeats}
    directory = open_run_directory("overhead", out)
    plot_slowdown(rows, directory.path / "overhead.png", f"{settings.model}, {facts['device']}")
    return finish(directory, "overhead", rows, shown, error=error, **facts)


def make_settings(kind: str, options: Row) -> Settings:
    """Fill the defaults in. Raises UsageError."""
    given = {name: value for name, value in options.items() if value is not None and name in DEFAULTS[kind]}
    chosen: dict[str, Any] = DEFAULTS[kind] | given
    names = LEVELS[1:] if options["levels"] == "all" else [part.strip() for part in options["levels"].split(",")]
    if unknown := [name for name in names if name not in LEVELS[1:]]:
        raise UsageError(f"no level {unknown[0]!r}: use all, or some of {', '.join(LEVELS[1:])}")
    block_size = chosen.pop("block_size") or chosen["prompt_len"] + options["steps"]
    more = {"steps": options["steps"], "threads": options["threads"], "block_size": block_size}
    return Settings(kind, levels=("none", *names), **chosen, **more)


def measure(serving: "Serving", settings: Settings, repeats: int) -> list[Row]:
    """Run all levels in turns, the order turned round each time, and compare."""
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(repeats + 1):
        for level in settings.levels if turn % 2 else reversed(settings.levels):
            for phase, seconds in serve_once(serving, level).items():
                if turn:  # the first one warms up
                    times.setdefault((phase, level), []).append(seconds)
    wrong = {level: serving.count_wrong(level) for level in settings.levels if level != "none"}
    return [make_row(serving, settings, times, phase, level, wrong) for phase, level in times]


def serve_once(serving: "Serving", level: str) -> Row:
    """Give the seconds of a prompt pass and of a token step at a level, and of both together for the whole cache."""
    prompt_s = timed(lambda: serving.run_prompts(level)) / serving.num_prompts
    token_s = timed(lambda: serving.run_steps(level)) / serving.settings.steps
    return {"prompt": prompt_s, "token": token_s, "cache": prompt_s + serving.settings.steps * token_s}


def timed(work: Callable[[], None]) -> float:
    """Give the seconds that `work` takes."""
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def make_row(
    serving: "Serving",
    settings: Settings,
    times: dict[tuple[str, str], list[float]],
    phase: str,
    level: str,
    wrong: dict[str, int],
) -> Row:
    """Put one level's times into columns."""
    own, base = times[phase, level], times[phase, "none"]
    slowdowns = sorted(100 * (one / other - 1) for one, other in zip(own, base, strict=True))
    return {
        "phase": phase,
        "optimization": level,
        "model": settings.model,
        "batch": settings.batch,
        "prompt_len": settings.prompt_len,
        "bytes": 0 if level == "none" else serving.phase_bytes[phase],
        "step_ms": 1e3 * statistics.median(own),
        "none_ms": 1e3 * statistics.median(base),
        "slowdown_percent": statistics.median(slowdowns),
        "slowdown_min": slowdowns[0],
        "slowdown_max": slowdowns[-1],
        "wrong": wrong.get(level, 0),
    }
