"""Find the model that a name means: a directory or GGUF file, a built-in shape, or a Hugging Face repository."""

import difflib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dejavu import assets
from dejavu.errors import ModelError
from dejavu.model.spec import ModelSpec

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]

DEMO_NAME = "smollm2-135m"
ALIASES = {"demo": DEMO_NAME, "smollm2-135m-instruct": DEMO_NAME}

HUB_TIMEOUT_S = 4.0  # to find out that the hub is out of reach; a download itself may take long
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]  # never pickles
_HUB_IGNORED = ["*/*", "consolidated*"]  # other frameworks' copies, and a second copy of the weights


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Hold what a model's name stands for; `directory` has its weights and tokenizer, None for a dummy by name."""

    name: str
    spec: ModelSpec
    directory: Path | None


def resolve_model(name: str, load_format: LoadFormat = "auto") -> ResolvedModel:
    """Find the model that `name` means: a path, a name of the built-in table, or a Hugging Face id, in this order.

    A path is a directory with `config.json`, a `.gguf` file, or a directory with one such file. GGUF is converted once,
    into the cache. `dummy` takes the shape and needs no weights; a table's name then has no directory. Raises
    ModelError, with what to do, for a name that means nothing and for a model that cannot be had.
    """
    path = Path(name).expanduser()
    if _holds_model(path):
        return _from_directory(name, _checkpoint_directory(path, load_format))
    table_name = ALIASES.get(name.lower(), name.lower())
    spec = _table().get(table_name)
    if spec is not None:
        return _from_table(name, table_name, spec, load_format)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return _from_directory(name, _download(name, load_format))
    raise ModelError(_unknown(name, path))


def _from_directory(name: str, directory: Path) -> ResolvedModel:
    """Read the shape of the model in `directory`, and which tokens end its sequences."""
    from dejavu.model.families import spec_from_config

    spec = spec_from_config(_read_config(directory / "config.json"))
    stops = eos_token_ids(directory)
    return ResolvedModel(name, replace(spec, eos_token_ids=stops) if stops else spec, directory)


def _from_table(name: str, table_name: str, spec: ModelSpec, load_format: LoadFormat) -> ResolvedModel:
    """Give the built-in shape alone, or the model itself: of the installed demonstration package, else of the hub."""
    if load_format == "dummy":
        return ResolvedModel(name, spec, None)
    if table_name == DEMO_NAME and load_format != "safetensors":
        from dejavu.model.gguf import convert_gguf

        return _from_directory(name, convert_gguf(assets.demo_model_file()))
    published = hub_id(table_name)
    if published is None:
        raise ModelError(f"the weights of {name!r} are not published: use --load-format dummy, or give a directory")
    return _from_directory(name, _download(published, load_format))


def eos_token_ids(directory: Path) -> tuple[int, ...]:
    """Give the tokens that end a sequence: of generation_config.json, else of config.json; () where neither says."""
    for file in ("generation_config.json", "config.json"):
        value = _read_config(directory / file).get("eos_token_id") if (directory / file).is_file() else None
        if value is not None and value != []:
            return tuple(value) if isinstance(value, list) else (int(value),)
    return ()


def _holds_model(path: Path) -> bool:
    """Tell whether `path` is a GGUF file, or a directory with a configuration or a GGUF file."""
    if path.is_dir():
        return (path / "config.json").is_file() or any(path.glob("*.gguf"))
    return path.is_file()


def _checkpoint_directory(path: Path, load_format: LoadFormat) -> Path:
    """Give the checkpoint directory for an existing path, converting GGUF; raises ModelError for other files."""
    from dejavu.model.gguf import convert_gguf

    if path.is_dir() and load_format != "gguf" and (path / "config.json").is_file():
        return path.absolute()
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if not files:
        raise ModelError(f"{path} has no .gguf file: leave out --load-format gguf, or name a .gguf file")
    if len(files) > 1:
        raise ModelError(f"{path} has {len(files)} GGUF files: name the one to load")
    if files[0].suffix != ".gguf":
        raise ModelError(f"{path} is no GGUF file: give a .gguf file or a directory with config.json")
    if load_format == "safetensors":
        raise ModelError(f"{path} holds GGUF, not safetensors: use --load-format gguf, or leave it out")
    return convert_gguf(files[0])


def _download(repository: str, load_format: LoadFormat) -> Path:
    """Give the local snapshot of a Hugging Face repository: configuration, tokenizer and, unless dummy, weights."""
    if load_format == "gguf":
        raise ModelError(f"GGUF is not fetched from the hub: download a .gguf file of {repository!r} and give it")
    wanted = [pattern for pattern in _HUB_FILES if load_format != "dummy" or pattern != "*.safetensors"]
    directory = _snapshot(repository, wanted)
    if not (directory / "config.json").is_file():
        raise ModelError(f"the hub's {repository!r} has no config.json: give a language model's repository")
    if load_format != "dummy" and not any(directory.glob("*.safetensors")):
        raise ModelError(
            f"the hub's {repository!r} has no safetensors (pickled weights are never loaded): "
            f"convert it and give the directory, or use --load-format dummy"
        )
    return directory


def _snapshot(repository: str, patterns: list[str]) -> Path:
    """Download the top-level files of a repository that match `patterns`, or find them in the local hub cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    failure: Exception | None = None
    try:
        failure = _unreachable(repository)
        offline = failure is not None
        kept = {"allow_patterns": patterns, "ignore_patterns": _HUB_IGNORED}
        return Path(snapshot_download(repository, local_files_only=offline, etag_timeout=HUB_TIMEOUT_S, **kept))
    except GatedRepoError as error:
        raise ModelError(f"{repository!r} is gated: accept its licence on the hub and run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {repository!r} that you may read: check its name, or run `hf auth login`"
        ) from error
    except Exception as error:  # the network's own errors, of whichever HTTP client the library uses
        reason = type(failure or error).__name__
        raise ModelError(
            f"{repository!r} is not on this machine and the hub cannot be reached ({reason}): "
            f"download it elsewhere and give the directory, set HF_HOME, or use --load-format dummy"
        ) from error


def _unreachable(repository: str) -> Exception | None:
    """Ask the hub for a repository, once and with a time limit: `snapshot_download` by itself waits for ever.

    Gives why the hub cannot be asked, or None; raises the hub's own refusals.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().model_info(repository, timeout=HUB_TIMEOUT_S)
    except RepositoryNotFoundError:
        raise
    except Exception as error:  # as above: any other failure means that only local copies are left
        return error
    return None


_HUB_OWNERS = {"gpt2": "openai-community", "opt": "facebook", "bloom": "bigscience"}
_HUB_IDS = {
    DEMO_NAME: "HuggingFaceTB/SmolLM2-135M-Instruct",
    "bloom-176b": "bigscience/bloom",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
}


def hub_id(table_name: str) -> str | None:
    """Give the Hugging Face id under which a model of the built-in table is published; None for one that is not."""
    owner = _HUB_OWNERS.get(table_name.split("-")[0])
    if owner is None or table_name in ("opt-175b", *_HUB_IDS):
        return _HUB_IDS.get(table_name)
    return f"{owner}/{table_name}"


def _table() -> dict[str, ModelSpec]:
    """Give the built-in shapes by name."""
    from dejavu.model.table import MODELS

    return MODELS


def _read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises ModelError where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path} ({error}): download the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object: download the model again")
    return value


def _unknown(name: str, path: Path) -> str:
    """Say why `name` means nothing, and what was perhaps meant."""
    if path.is_dir():
        return f"the directory {name!r} has neither config.json nor a .gguf file: give a model's directory"
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")):
        return f"there is no file or directory {name!r}: check the path"
    names = sorted({*_table(), *ALIASES})
    near = difflib.get_close_matches(name.lower(), names, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known names are {', '.join(names)}"
    return f"unknown model {name!r}: {hint} (a directory, a .gguf file or a Hugging Face id owner/name work too)"
