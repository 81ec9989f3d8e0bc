"""Say which slices of which checkpoint tensors make up each parameter of a shard: names and arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from dejavu.model.spec import ModelSpec, Shard

Range = tuple[int, int]
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Piece:
    """A window, [start, stop) per dimension, of one checkpoint tensor of the given whole `shape`.

    `name` lacks the prefix that the checkpoint may have. `transposed`: stored as [in, out] (GPT-2's Conv1D).
    """

    name: str
    shape: tuple[int, ...]
    window: tuple[Range, ...]
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of a shard: its pieces one after the other along the first dimension; matrices are [out, in]."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_elements(self) -> int:
        """Count the elements."""
        return prod(self.shape)

    @property
    def is_scale(self) -> bool:
        """Tell whether it is the multiplier of a normalisation, 1 in an untrained model."""
        return self.name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """Name a family's tensors, as found in checkpoints; `prefixes` in the order in which they are looked for."""

    prefixes: tuple[str, ...]
    tokens: str
    layer: str
    norm1: str
    qkv: tuple[str, ...]
    out: str
    norm2: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    final_norm: str
    positions: str = ""
    embedding_norm: str = ""
    fused_qkv: Literal["no", "by_kind", "by_head"] = "no"  # order of the rows of one fused matrix
    transposed: bool = False


NAMES: dict[str, CheckpointNames] = {
    "gpt2": CheckpointNames(
        prefixes=("transformer.", ""),
        tokens="wte.weight",
        positions="wpe.weight",
        layer="h",
        norm1="ln_1",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        norm2="ln_2",
        ffn_in=("mlp.c_fc",),
        ffn_out="mlp.c_proj",
        final_norm="ln_f",
        fused_qkv="by_kind",
        transposed=True,
    ),
    "opt": CheckpointNames(
        prefixes=("model.decoder.", "decoder.", ""),
        tokens="embed_tokens.weight",
        positions="embed_positions.weight",
        layer="layers",
        norm1="self_attn_layer_norm",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.out_proj",
        norm2="final_layer_norm",
        ffn_in=("fc1",),
        ffn_out="fc2",
        final_norm="final_layer_norm",
    ),
    "bloom": CheckpointNames(
        prefixes=("transformer.", ""),
        tokens="word_embeddings.weight",
        embedding_norm="word_embeddings_layernorm",
        layer="h",
        norm1="input_layernorm",
        qkv=("self_attention.query_key_value",),
        out="self_attention.dense",
        norm2="post_attention_layernorm",
        ffn_in=("mlp.dense_h_to_4h",),
        ffn_out="mlp.dense_4h_to_h",
        final_norm="ln_f",
        fused_qkv="by_head",
    ),
    "llama": CheckpointNames(
        prefixes=("model.", ""),
        tokens="embed_tokens.weight",
        layer="layers",
        norm1="input_layernorm",
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.o_proj",
        norm2="post_attention_layernorm",
        ffn_in=("mlp.gate_proj", "mlp.up_proj"),
        ffn_out="mlp.down_proj",
        final_norm="norm",
    ),
}


@dataclass(frozen=True, slots=True)
class _Source:
    """Some output channels of one checkpoint matrix of `num_out` channels."""

    name: str
    num_out: int
    ranges: tuple[Range, ...]


def _whole(name: str, target: str, *shape: int) -> Parameter:
    return Parameter(target, shape, (Piece(name, shape, tuple((0, size) for size in shape)),))


def _norm(spec: ModelSpec, name: str, target: str) -> Iterator[Parameter]:
    yield _whole(f"{name}.weight", f"{target}.weight", spec.hidden_size)
    if spec.norm == "layernorm":
        yield _whole(f"{name}.bias", f"{target}.bias", spec.hidden_size)


def _weight(target: str, sources: tuple[_Source, ...], num_in: int, columns: Range, transposed: bool) -> Parameter:
    """Make a matrix of the sources' output channels and the input channels `columns`."""
    pieces = tuple(
        Piece(f"{source.name}.weight", (num_in, source.num_out), (columns, rows), transposed=True)
        if transposed
        else Piece(f"{source.name}.weight", (source.num_out, num_in), (rows, columns))
        for source in sources
        for rows in source.ranges
    )
    num_rows = sum(stop - start for source in sources for start, stop in source.ranges)
    return Parameter(f"{target}.weight", (num_rows, columns[1] - columns[0]), pieces)


def _bias(target: str, sources: tuple[_Source, ...]) -> Parameter:
    pieces = tuple(
        Piece(f"{source.name}.bias", (source.num_out,), (rows,)) for source in sources for rows in source.ranges
    )
    return Parameter(f"{target}.bias", (sum(p.window[0][1] - p.window[0][0] for p in pieces),), pieces)


def _share(count: int, shard: Shard) -> Range:
    each = count // shard.tp_size
    return shard.tp_rank * each, (shard.tp_rank + 1) * each


def _qkv_sources(spec: ModelSpec, shard: Shard, layer: str) -> tuple[_Source, ...]:
    """Select this rank's heads of Q, then of K, then of V, from whichever layout the checkpoint has."""
    names, dim = NAMES[spec.family], spec.head_dim
    counts = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    heads = [_share(count, shard) for count in counts]
    if names.fused_qkv == "no":
        triples = zip(names.qkv, counts, heads, strict=True)
        return tuple(_Source(layer + name, n * dim, ((a * dim, b * dim),)) for name, n, (a, b) in triples)
    if names.fused_qkv == "by_kind":
        starts = (0, counts[0], counts[0] + counts[1])
        ranges = [((s + a) * dim, (s + b) * dim) for s, (a, b) in zip(starts, heads, strict=True)]
    else:
        ranges = [((3 * h + kind) * dim, (3 * h + kind + 1) * dim) for kind in range(3) for h in range(*heads[kind])]
    return (_Source(layer + names.qkv[0], sum(counts) * dim, tuple(ranges)),)


def _column_parallel(
    target: str, sources: tuple[_Source, ...], num_in: int, bias: bool, transposed: bool
) -> Iterator[Parameter]:
    yield _weight(target, sources, num_in, (0, num_in), transposed)
    if bias:
        yield _bias(target, sources)


def _row_parallel(
    spec: ModelSpec, shard: Shard, name: str, target: str, num_in: int, bias: bool
) -> Iterator[Parameter]:
    """Split the input channels; only tensor rank 0 has the bias, so that the sum over the ranks has it once."""
    source = (_Source(name, spec.hidden_size, ((0, spec.hidden_size),)),)
    yield _weight(target, source, num_in, _share(num_in, shard), NAMES[spec.family].transposed)
    if bias and shard.tp_rank == 0:
        yield _bias(target, source)


def _layer(spec: ModelSpec, shard: Shard, index: int) -> Iterator[Parameter]:
    names = NAMES[spec.family]
    source, target = f"{names.layer}.{index}.", f"layers.{index}."
    ffn = tuple(_Source(source + name, spec.ffn_size, (_share(spec.ffn_size, shard),)) for name in names.ffn_in)
    hidden, transposed = spec.hidden_size, names.transposed
    yield from _norm(spec, source + names.norm1, target + "norm1")
    yield from _column_parallel(target + "qkv", _qkv_sources(spec, shard, source), hidden, spec.qkv_bias, transposed)
    attention_size = spec.num_heads * spec.head_dim
    yield from _row_parallel(spec, shard, source + names.out, target + "out", attention_size, spec.out_bias)
    yield from _norm(spec, source + names.norm2, target + "norm2")
    yield from _column_parallel(target + "ffn_in", ffn, hidden, spec.ffn_bias, transposed)
    yield from _row_parallel(spec, shard, source + names.ffn_out, target + "ffn_out", spec.ffn_size, spec.ffn_bias)


def _embedding(spec: ModelSpec) -> Iterator[Parameter]:
    names, width = NAMES[spec.family], spec.embedding_size or spec.hidden_size
    yield _whole(names.tokens, "embed.tokens", spec.vocab_size, width)
    if spec.positions == "learned":
        rows = spec.max_positions + spec.position_offset
        yield _whole(names.positions, "embed.positions", rows, spec.hidden_size)
    if spec.embedding_size:
        yield _whole("project_in.weight", "embed.project_in", spec.hidden_size, width)
    if spec.embedding_norm:
        yield from _norm(spec, names.embedding_norm, "embed.norm")


def _head(spec: ModelSpec, shard: Shard) -> Iterator[Parameter]:
    names, width = NAMES[spec.family], spec.embedding_size or spec.hidden_size
    if spec.final_norm:
        yield from _norm(spec, names.final_norm, "head.norm")
    if spec.embedding_size:
        yield _whole("project_out.weight", "head.project_out", width, spec.hidden_size)
    if not (spec.tied_embeddings and shard.is_first):
        start, stop = shard.vocab_range(spec.vocab_size)
        name = names.tokens if spec.tied_embeddings else LM_HEAD
        piece = Piece(name, (spec.vocab_size, width), ((start, stop), (0, width)))
        yield Parameter("head.logits", (stop - start, width), (piece,))


def stage_parameters(spec: ModelSpec, shard: Shard) -> list[Parameter]:
    """List the parameters that one rank holds, in the order in which the pass uses them.

    Where the first stage is also the last and the embeddings are tied, there is no `head.logits`: the logits use
    the rows `Shard.vocab_range` of `embed.tokens`.
    """
    parameters = list(_embedding(spec)) if shard.is_first else []
    for index in range(shard.first_layer, shard.last_layer):
        parameters += _layer(spec, shard, index)
    if shard.is_last:
        parameters += _head(spec, shard)
    return parameters


def stage_elements(spec: ModelSpec, shard: Shard) -> int:
    """Count the elements of a rank's parameters: times the item size, the bytes of its weights."""
    return sum(parameter.num_elements for parameter in stage_parameters(spec, shard))
