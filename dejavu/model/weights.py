"""Read a rank's slices of a safetensors checkpoint, and check a checkpoint by its headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dejavu.errors import ModelError
from dejavu.model.parameters import LM_HEAD, NAMES, Parameter, Piece, stage_parameters
from dejavu.model.spec import ModelSpec, Shard

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Weights = dict[str, Tensor]
    Allocate = Callable[[Parameter], Tensor]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a checkpoint tensor lies, and what its file's header says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: fetch the checkpoint again") from error


def checkpoint_files(directory: Path) -> list[Path]:
    """List a checkpoint's safetensors files; ModelError where there are none or the index names a missing one."""
    if (directory / INDEX_FILE).is_file():
        names = sorted(set(_read_json(directory / INDEX_FILE)["weight_map"].values()))
        files = [directory / Path(name).name for name in names]
    else:
        files = [directory / SINGLE_FILE]
    for file in files:
        if not file.is_file():
            pickled = any(directory.glob("pytorch_model*.bin"))
            hint = "convert its pickled weights to safetensors" if pickled else "fetch the checkpoint again"
            raise ModelError(f"checkpoint file {file} is missing: {hint}")
    return files


def _read_header(file: Path) -> dict[str, Any]:
    """Read the JSON header of one safetensors file: 8 bytes of length, then the header, then the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{file} is not a safetensors file: fetch the checkpoint again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError as error:
            raise ModelError(f"{file} has a damaged header: fetch the checkpoint again") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end > size:
        raise ModelError(f"{file} is cut short ({size} of {8 + length + end} bytes): fetch the checkpoint again")
    return header


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Map every tensor of a checkpoint, by its stored name, to its file, data type and shape."""
    return {
        name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]))
        for file in checkpoint_files(directory)
        for name, entry in _read_header(file).items()
    }


def find_prefix(spec: ModelSpec, stored: dict[str, StoredTensor]) -> str:
    """Find what the checkpoint puts before the names of the decoder's tensors; ModelError if it is not this family."""
    names = NAMES[spec.family]
    for prefix in names.prefixes:
        if prefix + names.tokens in stored:
            return prefix
    raise ModelError(
        f"the checkpoint has no tensor {names.prefixes[0]}{names.tokens}: it is not a {spec.family} language model"
    )


def _stored_name(piece: Piece, prefix: str) -> str:
    return piece.name if piece.name == LM_HEAD else prefix + piece.name


def check_checkpoint(directory: Path, spec: ModelSpec) -> None:
    """Check that a checkpoint has every tensor of the model in its right shape, from the headers alone.

    Raises ModelError naming the first file or tensor that is missing, damaged, of another shape or quantised.
    """
    stored = read_headers(directory)
    prefix = find_prefix(spec, stored)
    for parameter in stage_parameters(spec, Shard(0, spec.num_layers, spec.num_layers)):
        for piece in parameter.pieces:
            _check_piece(directory, stored.get(_stored_name(piece, prefix)), piece, prefix)


def _check_piece(directory: Path, tensor: StoredTensor | None, piece: Piece, prefix: str) -> None:
    name = _stored_name(piece, prefix)
    if tensor is None:
        raise ModelError(
            f"checkpoint {directory} has no tensor {name}: its files and config.json do not belong together"
        )
    if tensor.shape != piece.shape:
        raise ModelError(
            f"tensor {name} in {tensor.file} has shape {list(tensor.shape)}, "
            f"but config.json asks for {list(piece.shape)}: they do not belong together"
        )
    if tensor.dtype not in _DTYPES:
        raise ModelError(
            f"tensor {name} in {tensor.file} has type {tensor.dtype}, which is not supported: "
            "use a checkpoint in float32, float16 or bfloat16"
        )


def _allocator(dtype: torch.dtype, device: torch.device | str) -> Allocate:
    import torch

    return lambda parameter: torch.empty(parameter.shape, dtype=dtype, device=device)


def _copy_pieces(parameter: Parameter, target: Tensor, read: Callable[[Piece], Tensor]) -> None:
    row = 0
    for piece in parameter.pieces:
        source = read(piece).t() if piece.transposed else read(piece)
        target[row : row + len(source)].copy_(source)
        row += len(source)
    assert row == len(target), parameter.name


def load_stage(
    directory: Path,
    spec: ModelSpec,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    allocate: Allocate | None = None,
) -> Weights:
    """Read one rank's parameters, and nothing else, from a checkpoint that `check_checkpoint` passed.

    Gives the tensors by the names of `stage_parameters`, in `dtype` on `device`. `allocate`, where given, supplies the
    memory of each instead (its own dtype and device), for example in a region that outlives the process.
    """
    from safetensors import safe_open

    stored = read_headers(directory)
    prefix = find_prefix(spec, stored)
    allocate = allocate or _allocator(dtype, device)
    weights: Weights = {}
    with ExitStack() as stack:
        open_files = {f: stack.enter_context(safe_open(f, framework="pt")) for f in checkpoint_files(directory)}

        def read(piece: Piece) -> Tensor:
            name = _stored_name(piece, prefix)
            window = tuple(slice(*bounds) for bounds in piece.window)
            tensor: Tensor = open_files[stored[name].file].get_slice(name)[window]
            return tensor

        for parameter in stage_parameters(spec, shard):
            weights[parameter.name] = allocate(parameter)
            _copy_pieces(parameter, weights[parameter.name], read)
    return weights


def dummy_stage(
    spec: ModelSpec,
    shard: Shard,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    allocate: Allocate | None = None,
) -> Weights:
    """Make one rank's parameters up, the same numbers in every split over ranks; arguments as `load_stage`."""
    from dejavu.model.dummy import fill_parameter

    allocate = allocate or _allocator(dtype, device)
    weights: Weights = {}
    for parameter in stage_parameters(spec, shard):
        weights[parameter.name] = allocate(parameter)
        fill_parameter(parameter, weights[parameter.name])
    return weights
