"""Convert a GGUF file, once, into a cached checkpoint directory in the Hugging Face layout."""

import fcntl
import hashlib
import json
import math
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dejavu import assets
from dejavu.errors import ModelError
from dejavu.model import gguf_config
from dejavu.model.gguf_reader import GGUFSource, GGUFTensor, open_gguf

CONVERTER_VERSION = 1  # part of the cache key: raise it with any change of what is written
Dtype = Literal["bfloat16", "float32"]
_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float32": "F32"}


def convert_gguf(path: Path, dtype: Dtype = "bfloat16") -> Path:
    """Give the checkpoint directory converted from the GGUF file `path`, converting it where that is not cached yet.

    The directory holds `config.json`, `generation_config.json`, `model.safetensors` (every tensor dequantised in
    float32, then rounded to `dtype`), `tokenizer.json` and `tokenizer_config.json`. It appears whole or not at all, and
    several processes may ask for it at once. Raises ModelError for a file that cannot be read or is not supported.
    """
    target = cached_directory(path, dtype)
    if not target.is_dir():
        with _exclusive(target):
            if not target.is_dir():
                _convert_atomically(path, target, dtype)
    return target


def cached_directory(path: Path, dtype: Dtype = "bfloat16") -> Path:
    """Name the directory for `path` as it is now: its place, size and time of change are part of the name."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"cannot read {path} ({error.strerror}): give the path of a GGUF file") from error
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns, dtype, CONVERTER_VERSION)
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return assets.cache_dir() / "models" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', path.stem)}-{digest}"


@contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Let one process at a time convert into `target`, and clear what an interrupted one has left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in target.parent.glob(f".{target.name}.partial-*"):
            shutil.rmtree(leftover)
        yield


def _convert_atomically(path: Path, target: Path, dtype: Dtype) -> None:
    """Write the checkpoint beside `target`, then rename it."""
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        _write_checkpoint(open_gguf(path), partial, dtype)
        partial.rename(target)
    except OSError as error:
        raise ModelError(
            f"cannot write the converted model to {target.parent} ({error.strerror}): "
            f"free space there or set DEJAVU_CACHE to another directory"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_checkpoint(source: GGUFSource, directory: Path, dtype: Dtype) -> None:
    """Write every file of the checkpoint; the configuration first, as it refuses what is not supported."""
    from dejavu.model.gguf_tokenizer import build_tokenizer

    if "token_embd.weight" not in source.tensors:
        raise ModelError("the GGUF file has no tensor 'token_embd.weight': give a whole language model")
    vocab_size = int(source.tensors["token_embd.weight"].shape[0])
    config = gguf_config.build_config(source.metadata, list(source.tensors), vocab_size)
    if gguf_config.ROPE_FACTORS in source.tensors:
        factors = source.tensors[gguf_config.ROPE_FACTORS].dequantize().tolist()
        config["rope_scaling"] = gguf_config.llama3_scaling(factors, config["rope_theta"], config["head_dim"])
    config["torch_dtype"] = dtype
    tokenizer, tokenizer_config = build_tokenizer(source.metadata)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", gguf_config.build_generation_config(source.metadata))
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    with (directory / "model.safetensors").open("wb") as file:
        _write_tensors(file, source, config, dtype)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tensors(file: BinaryIO, source: GGUFSource, config: dict[str, Any], dtype: Dtype) -> None:
    """Write a safetensors file tensor by tensor, so that memory holds one of them at a time.

    Source: the format's description (8 bytes of header length, a JSON header padded to 8 bytes, the data).
    """
    tensors = {name: tensor for name, tensor in source.tensors.items() if name != gguf_config.ROPE_FACTORS}
    header = json.dumps(_safetensors_header(tensors, dtype)).encode()
    header += b" " * (-len(header) % 8)
    file.write(struct.pack("<Q", len(header)) + header)
    for name, tensor in tensors.items():
        values = tensor.dequantize()
        if config["model_type"] == "llama":
            values = _unpermute(name, values, config)
        file.write((_round_to_bfloat16(values) if dtype == "bfloat16" else values).tobytes())


def _safetensors_header(tensors: dict[str, GGUFTensor], dtype: Dtype) -> dict[str, Any]:
    """Build the header: each tensor's type, shape and place in the data, in the order of `tensors`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    itemsize, start = {"bfloat16": 2, "float32": 4}[dtype], 0
    for name, tensor in tensors.items():
        stop = start + math.prod(tensor.shape) * itemsize
        entry = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": tensor.shape, "data_offsets": [start, stop]}
        header[gguf_config.checkpoint_name(name)] = entry
        start = stop
    return header


def _unpermute(name: str, values: Any, config: dict[str, Any]) -> Any:
    """Put the rows of q and k back from llama.cpp's order (rotary pairs side by side) to halves, head by head."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    part = name.split(".")[-2]
    if part not in heads:
        return values
    pairs = values.reshape(heads[part], -1, 2, *values.shape[1:])  # [head, pair, half, ...]
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _round_to_bfloat16(values: Any) -> Any:
    """Round float32 to the nearest bfloat16, ties to even; gives the bit patterns as uint16."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded
