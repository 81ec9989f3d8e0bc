"""A command group that lists its commands from a table and imports one only when it is run: `--help` stays quick."""

import difflib
from collections.abc import Mapping
from importlib import import_module

import click
import rich_click


class LazyGroup(rich_click.RichGroup):
    """Load the command `name` from the attribute `command` of the module `<package>.<name>`."""

    def __init__(self, *args: object, package: str, table: Mapping[str, str], **settings: object) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self.package = package
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Give the names in the table's order."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Give a stand-in that knows its one-line help, for listings."""
        help_line = self.table.get(cmd_name)
        return rich_click.RichCommand(name=cmd_name, help=help_line) if help_line else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Import the command that the first argument names; UsageError names the nearest one."""
        name = args[0]
        if name in self.table:
            return name, self.load(name), args[1:]
        if name.startswith("-"):
            return super().resolve_command(ctx, args)
        raise click.UsageError(f"no command {name!r}{self.suggestion(ctx, name)}", ctx)

    def load(self, name: str) -> click.Command:
        """Import the module of a command."""
        loaded = import_module(f"{self.package}.{name.replace('-', '_')}").command
        assert isinstance(loaded, click.Command)
        return loaded

    def suggestion(self, ctx: click.Context, name: str) -> str:
        """Name the nearest command, or where they are listed."""
        near = difflib.get_close_matches(name, self.table, 1)
        return f": did you mean {near[0]!r}?" if near else f": `{ctx.command_path} --help` lists them"
