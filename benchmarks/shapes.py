"""Which bytes the transfers of a benchmark move: the three patterns of a KV cache, and plain sizes. Pure arithmetic."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from dejavu.device.pieces import Pieces, make_pieces
from dejavu.errors import UsageError
from dejavu.kv.layout import PoolLayout
from dejavu.model.spec import ModelSpec
from dejavu.model.table import MODELS

UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
MANY_PIECES, MANY_PIECE_BYTES = 20_000, 1024
STEPS = 16  # token steps for which a cache has room behind the prompt


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Name the cache of one microbatch on one rank of a pipeline."""

    model: str
    batch: int
    prompt_len: int
    tp: int
    pp: int
    block_size: int

    @property
    def spec(self) -> ModelSpec:
        """Give the model; raises UsageError where it is not of the table."""
        if self.model not in MODELS:
            raise UsageError(f"no model {self.model!r} in the table: use one of {', '.join(MODELS)}")
        return MODELS[self.model]

    @property
    def row_blocks(self) -> int:
        """Count the blocks of one row: its prompt and some steps."""
        return -(-(self.prompt_len + STEPS) // self.block_size)

    @property
    def layout(self) -> PoolLayout:
        """Give the pool of the first stage's first tensor rank, with room for the microbatch."""
        spec = self.spec
        spec.check_tensor_parallel(self.tp)
        if self.pp > spec.num_layers:
            raise UsageError(
                f"{self.pp} stages cannot share {spec.num_layers} layers: use --pp {spec.num_layers} at most"
            )
        return PoolLayout(
            num_blocks=self.batch * self.row_blocks,
            first_layer=0,
            num_layers=spec.num_layers // self.pp,
            block_size=self.block_size,
            first_head=0,
            num_heads=spec.num_kv_heads // self.tp,
            head_dim=spec.head_dim,
            itemsize=2,
        )

    def row_table(self, seed: int) -> list[list[int]]:
        """Give every row's blocks, in a random order of the pool's."""
        order = np.random.default_rng(seed).permutation(self.batch * self.row_blocks)
        return [row.tolist() for row in order.reshape(self.batch, self.row_blocks)]


@dataclass(frozen=True, slots=True)
class Exchange:
    """Be one message: how it is cut out of the source's memory, and how it lies in the target's."""

    source: Pieces
    target: Pieces
    source_bytes: int
    target_bytes: int

    @property
    def nbytes(self) -> int:
        """Count the bytes that move."""
        return self.source.total_bytes

    @property
    def pairs(self) -> Pieces:
        """Give the pieces from memory to memory; both lists name the message's parts in one order."""
        return Pieces(self.source.source, self.target.source, self.source.nbytes)


def contiguous(nbytes: int) -> Exchange:
    """Make a message of one piece."""
    whole = make_pieces([0], [0], [nbytes])
    return Exchange(whole, whole, nbytes, nbytes)


def shuffled(num_pieces: int, piece_bytes: int, seed: int) -> Exchange:
    """Make a message of equal pieces that fill both memories in random orders."""
    rng = np.random.default_rng(seed)
    place = np.arange(num_pieces) * piece_bytes
    source, target = rng.permutation(place), rng.permutation(place)
    nbytes = num_pieces * piece_bytes
    lists = [make_pieces(side, place, piece_bytes) for side in (source, target)]
    return Exchange(lists[0], lists[1], nbytes, nbytes)


def microbatch(shape: CacheShape) -> Exchange:
    """Make the message of a whole microbatch: its blocks, wherever they lie on either side."""
    return shuffled(shape.layout.num_blocks, shape.layout.block_bytes, seed=3)


def many_pieces() -> Exchange:
    """Make a message of so many pieces that posting it is what counts."""
    return shuffled(MANY_PIECES, MANY_PIECE_BYTES, seed=5)


def parse_sizes(text: str) -> list[int]:
    """Read sizes such as 4KiB,20MiB,1GiB. Raises UsageError."""
    return [_parse_size(part.strip()) for part in text.split(",")]


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)\s*([A-Za-z]*)", text)
    factor = UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None or int(match[1]) == 0:
        raise UsageError(f"size {text!r} is not one: write 4KiB, 20MiB or 1GiB")
    return int(match[1]) * factor


def format_size(nbytes: int) -> str:
    """Write a size as `parse_sizes` reads it."""
    for unit in ("GiB", "MiB", "KiB"):
        if nbytes % UNITS[unit.upper()] == 0:
            return f"{nbytes // UNITS[unit.upper()]}{unit}"
    return f"{nbytes}B"


@dataclass(frozen=True, slots=True)
class Case:
    """Name one row of the benchmark."""

    operation: str
    transport: str
    optimization: str = "any"  # a level; "any" where it makes no difference
    direction: str = "link"  # between two ranks; "out", "in" or "both" of a store
    size: int = 0  # bytes of a plain message; 0 where the model gives them

    @property
    def name(self) -> str:
        """Give what --list prints and --filter matches."""
        parts = [self.operation, self.transport, self.optimization]
        parts += [] if self.direction == "link" else [self.direction]
        parts += [format_size(self.size)] if self.size else []
        return "/".join(parts)

    @property
    def is_naive(self) -> bool:
        """Tell whether each piece is a copy of its own."""
        return self.optimization == "naive"


STORES, LINKS = ("local", "disk"), ("ipc", "nccl", "mpi", "rma", "tcp")
LEVELS = {
    "prompt": ("naive", "buffered", "layered"),  # full adds nothing to a prompt
    "token_step": ("naive", "buffered", "full"),  # and layered nothing to a step
    "microbatch": ("naive", "buffered"),
}
SIGNAL_BYTES = 4096


def list_cases(transports: Iterable[str], sizes: Iterable[int]) -> list[Case]:
    """List all rows, carrier after carrier."""
    sizes = list(sizes)
    return [case for transport in transports for case in _cases_of(transport, sizes)]


def _cases_of(transport: str, sizes: list[int]) -> list[Case]:
    directions = ("out", "in") if transport in STORES else ("link",)
    cases = [Case("contiguous", transport, "any", way, size) for size in sizes for way in directions]
    if transport == "nccl":
        cases += [Case("plain", transport, size=size) for size in sizes]
    if transport == "local":
        cases += [Case("both_ways", transport, "any", "both", size) for size in sizes]
    for operation, levels in LEVELS.items():
        cases += [Case(operation, transport, level, way) for level in levels for way in directions]
    cases += [Case("many_pieces", transport, "buffered", way) for way in directions]
    if transport == "ipc":
        cases.append(Case("put_flag", transport, "any", "link", SIGNAL_BYTES))
    return cases


def choose_cases(cases: Iterable[Case], pattern: str | None) -> list[Case]:
    """Keep the cases whose name holds `pattern`, or matches it where it has * or ?. Raises UsageError for none."""
    if not pattern:
        return list(cases)
    glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    chosen = [case for case in cases if fnmatchcase(case.name, glob)]
    if not chosen:
        raise UsageError(f"--filter {pattern!r} matches no case: see --list")
    return chosen
