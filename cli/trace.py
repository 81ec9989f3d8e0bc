"""`dejavu trace`: make, convert and show workload traces."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich.console import Console
from rich.table import Table

from dejavu.errors import UsageError

if TYPE_CHECKING:
    from dejavu.planning.trace import Bin, TraceEntry

FORMS = ["auto", "workload", "sharegpt", "lmsys", "azure", "mooncake", "text"]
WIDTH = 40  # of the longest bar


@click.group(
    help="Make, convert and show workload traces.\n\nWritten are [[prompt_tokens, output_tokens, arrival_s], ...] "
    "(.json), or lines with prompts (.jsonl); `dejavu serve`, `plan` and `simulate` take both."
)
def command() -> None:
    """Hold the subcommands."""


def add_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Add several options to a command."""

    def add(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return add


reading = add_options(
    click.argument("file", type=click.Path(path_type=Path)),
    click.option("--format", "form", type=click.Choice(FORMS), default="auto", show_default=True, help="Its form."),
    click.option("--model", help="Count the tokens of texts with this model's tokenizer."),
    click.option("--output-len", type=int, default=128, show_default=True, help="Output tokens where none are known."),
    click.option("--limit", type=int, help="Read at most so many requests."),
)
writing = add_options(
    click.option("--out", type=click.Path(path_type=Path), required=True, help="The file to write: .json or .jsonl."),
    click.option("--rate", type=float, default=0.0, help="Poisson arrivals per second; 0 keeps arrivals. [0]"),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of lengths and arrivals."),
)


@command.command(help="Make a trace whose lengths are like those of chats (log-normal, fitted to LMSys-Chat-1M).")
@click.option("--num-requests", type=int, default=512, show_default=True, help="Requests to make.")
@writing
def make(num_requests: int, out: Path, rate: float, seed: int) -> int:
    """Make a trace."""
    from dejavu.planning.trace import make_lmsys_like, write_trace

    entries = make_lmsys_like(num_requests, seed=seed, rate=rate)
    write_trace(out, entries)
    click.echo(f"wrote {len(entries)} requests to {out}")
    return 0


@command.command(help="Convert FILE: ShareGPT, LMSys-Chat, Azure or Mooncake traces, text, or this program's own.")
@reading
@writing
def convert(out: Path, rate: float, seed: int, **source: Any) -> int:
    """Convert a trace."""
    from dejavu.planning.trace import with_rate, write_trace

    entries: Sequence[TraceEntry] = read(**source)
    if rate < 0:
        raise UsageError(f"--rate {rate:g} is impossible: give requests per second above 0")
    if rate:
        entries = with_rate(entries, rate, seed)
    write_trace(out, entries)
    click.echo(f"wrote {len(entries)} requests to {out}")
    return 0


@command.command(help="Show FILE: histograms of prompt and output lengths, and of the gaps between arrivals.")
@reading
def show(**source: Any) -> int:
    """Show a trace."""
    from dejavu.planning.trace import gaps, histogram

    lengths = [entry.lengths for entry in read(**source)]
    console = Console()
    columns: dict[str, Sequence[float]] = {
        "prompt tokens": [request.prompt_tokens for request in lengths],
        "output tokens": [request.output_tokens for request in lengths],
        "gaps between arrivals, s": gaps(lengths),
    }
    for title, values in columns.items():
        if values:
            mean = sum(values) / len(values)
            console.print(bars(histogram(values), f"{title}: {len(values)}, mean {mean:.4g}"))
    return 0


def read(file: Path, form: Any, model: str | None, output_len: int, limit: int | None) -> list["TraceEntry"]:
    """Read a trace; the tokenizer is loaded only where a model is named."""
    from dejavu.planning.trace import read_trace

    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} leaves nothing: give at least 1")
    return read_trace(file, form, count_tokens=counter(model) if model else None, output_len=output_len, limit=limit)


def counter(model: str) -> Callable[[str], int]:
    """Give the function that counts a text's tokens."""
    from dejavu.model.resolve import resolve_model
    from dejavu.model.tokenizer import load_tokenizer

    directory = resolve_model(model).directory
    tokenizer = load_tokenizer(directory) if directory else None
    if tokenizer is None:
        raise UsageError(f"--model {model} has no tokenizer: name one that has")
    return lambda text: len(tokenizer.encode(text))


def bars(bins: Sequence["Bin"], title: str) -> Table:
    """Draw a histogram."""
    table = Table(title=title, box=None, show_header=False, title_justify="left", pad_edge=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    most = max(each.count for each in bins)
    for each in bins:
        table.add_row(f"{each.low:.3g} - {each.high:.3g}", str(each.count), "█" * round(WIDTH * each.count / most))
    return table
