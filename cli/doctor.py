"""`dejavu doctor`: print what this machine can do."""

import json
from dataclasses import asdict

import click
import rich_click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dejavu.cluster.doctor import Fact, State, checks, examine, serves_on_cpu

STYLES = {State.OK: "green", State.MISSING: "red", State.NOT_APPLICABLE: "dim"}

HELP = """Say what this machine can do, and for what is missing how to get it.

Starts a small MPI job, and measures where there is something to measure. Exits with 0 if serving on CPU works."""


@click.command(cls=rich_click.RichCommand, help=HELP)
@click.option("--json", "as_json", is_flag=True, help="End with one line of JSON.")
def command(as_json: bool) -> int:
    """Make the checks."""
    console = Console()
    facts = []
    with console.status("") as status:
        for check in checks():
            status.update(f"checking {check[0]}")
            facts.append(examine(check))
    console.print(fact_table(facts))
    works = serves_on_cpu(facts)
    console.print("Serving on CPU works." if works else "Serving does not work: see what is missing.", style="bold")
    if as_json:
        click.echo(json.dumps({"serves_on_cpu": works, "facts": [asdict(fact) for fact in facts]}))
    return 0 if works else 1


def fact_table(facts: list[Fact]) -> Table:
    """Lay out the facts, each with its remedy below it."""
    table = Table("capability", "state", "found", box=None, padding=(0, 2, 0, 0))
    for fact in facts:
        found = Text(fact.value)
        if fact.remedy and fact.remedy not in fact.value:
            found.append(f"\nto get it: {fact.remedy}", style="yellow")
        table.add_row(fact.name, Text(fact.state.value, style=STYLES[fact.state]), found)
    return table
