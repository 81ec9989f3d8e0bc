"""Make command-line options of a configuration's fields: one source for names, help, defaults and choices."""

from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import click
import rich_click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dejavu.assets import data_names, data_path
from dejavu.config import choices
from dejavu.errors import ConfigError

METAVARS = {"int": "N", "float": "X", "tuple": "N,N,...", "str": "TEXT"}
OWN_METAVARS = {
    "model": "NAME",
    "kv_memory": "BYTES",
    "host_kv_memory": "BYTES",
    "synthetic_link": "BYTES_PER_S",
    "kv_disk": "DIR",
    "synthetic": "MS,MS",
    "workload": "FILE",
    "hostfile": "FILE",
    "out": "DIR",
    "name": "NAME",
    "rate": "PER_S",
    "ttft": "MS",
    "tpot": "MS",
    "stall_timeout": "SECONDS",
    "hang_timeout": "SECONDS",
}


def config_options(model: type[BaseModel]) -> Callable[[Any], Any]:
    """Give a decorator that adds an option per field, in the model's order, each in the panel of its group.

    Values stay text, which the configuration itself checks; an option that was not given is None.
    """
    options = [make_option(name, field) for name, field in model.model_fields.items()]

    def add(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def make_option(name: str, field: FieldInfo) -> Callable[[Any], Any]:
    """Make the option of one field."""
    flag = "--" + name.replace("_", "-")
    extra = field.json_schema_extra
    panel = extra["group"] if isinstance(extra, dict) else None
    settings: dict[str, Any] = {
        "default": None,
        "help": help_text(field),
        "panel": panel,
        "cls": rich_click.RichOption,
    }
    if field.annotation is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **settings)
    words = choices(field.annotation)
    kind = click.Choice(words) if words else str
    return click.option(flag, name, type=kind, metavar=metavar(name, field), **settings)


def help_text(field: FieldInfo) -> str:
    """Give a field's description, its choices, and its default where there is one."""
    words = choices(field.annotation)
    text = f"{field.description} One of {', '.join(words)}." if words else f"{field.description}"
    return text if field.default is None else f"{text} [{as_given(field.default)}]"


def as_given(default: object) -> str:
    """Write a default as one gives it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def metavar(name: str, field: FieldInfo) -> str:
    """Give the word that stands for an option's value."""
    if choices(field.annotation):
        return "CHOICE"
    return OWN_METAVARS.get(name) or METAVARS[plain_type(field.annotation)]


def plain_type(annotation: Any) -> str:
    """Name the type of a field, without `None` and without what it is annotated with."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return plain_type(next(part for part in get_args(annotation) if part is not type(None)))
    plain: type = get_origin(annotation) or annotation
    return plain.__name__


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Keep the options that the command line has."""
    return {name: value for name, value in values.items() if value is not None}


def find_profile(profile: str | None) -> Path | None:
    """Find a profile: a file, or the name of one that is shipped, with or without .yaml."""
    if profile is None or Path(profile).is_file():
        return Path(profile) if profile else None
    shipped = data_names("launch", ".yaml")
    name = profile if profile.endswith(".yaml") else f"{profile}.yaml"
    if name in shipped:
        return data_path("launch", name)
    raise ConfigError(
        f"no profile {profile!r}: give a file, or a shipped one ({', '.join(shipped) or 'there is none'})"
    )
