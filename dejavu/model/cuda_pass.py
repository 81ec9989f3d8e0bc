"""Take a pass through a stage's layers on CUDA: what token steps and prompts have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from dejavu.model.cuda_operations import Operations
from dejavu.model.cuda_products import Product
from dejavu.model.layers import Norm
from dejavu.model.spec import ModelSpec, Shard

if TYPE_CHECKING:
    from dejavu.model.decoder import DecoderLayer, Embedding, Head

AllReduce = Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class LayerParts:
    """Hold one layer: its normalisations and its products."""

    index: int  # in the stage
    norm1: Norm
    norm2: Norm
    qkv: Product
    out: Product
    ffn_in: Product
    ffn_out: Product


@dataclass(frozen=True, slots=True)
class StageParts:
    """Hold what a stage is made of, and the kernels that run it."""

    spec: ModelSpec
    shard: Shard
    operations: Operations
    embedding: Embedding | None
    head: Head | None
    layers: list[LayerParts]
    all_reduce: AllReduce | None

    @property
    def project_in(self) -> Product | None:
        """Give the product from the embedding's width to the hidden size, where there is one."""
        project = self.embedding.project if self.embedding else None
        return None if project is None else Product("project_in", project)

    @property
    def project_out(self) -> Product | None:
        """Give the product from the hidden size to the embedding's width, where there is one."""
        project = self.head.project if self.head else None
        return None if project is None else Product("project_out", project)

    @property
    def logits(self) -> Product | None:
        """Give the product that makes logits, on the last stage."""
        return None if self.head is None else Product("logits", self.head.logits)

    @property
    def alike(self) -> list[list[Product]]:
        """List the stage's products, those that differ by the layer only together."""
        groups = [[getattr(layer, name) for layer in self.layers] for name in ("qkv", "out", "ffn_in", "ffn_out")]
        others = [self.project_in, self.project_out, self.logits]
        return [group for group in groups if group] + [[product] for product in others if product is not None]


def layer_parts(spec: ModelSpec, layer: DecoderLayer, activation: int) -> LayerParts:
    """Take a layer's parts, with the FFN's activation behind its first product."""
    norms = (layer.norm1, layer.norm2) if spec.norm_first else (None, None)
    ffn_in = Product("ffn_in", layer.ffn_in, activation, spec.gated_ffn, norms[1])
    return LayerParts(
        layer.index,
        layer.norm1,
        layer.norm2,
        Product("qkv", layer.qkv, norm=norms[0]),
        Product("out", layer.out),
        ffn_in,
        Product("ffn_out", layer.ffn_out),
    )


class StagePass(ABC):
    """Run layers over `hidden` [tokens, hidden_size], which changes in place; what is to be added may be pending.

    A sum that no product could take along waits in `pending` for the next normalisation, which adds it.
    """

    def __init__(self, parts: StageParts, hidden: Tensor) -> None:
        self.parts, self.operations, self.hidden = parts, parts.operations, hidden
        self.pending: Tensor | None = None
        self._overlaps = True  # whether the next kernel may begin before the one in front of it has ended

    @abstractmethod
    def enter(self, product: Product) -> Tensor:
        """Give `hidden`, normalised where the product says so, times a matrix: [tokens, channels]."""

    @abstractmethod
    def feed(self, product: Product) -> Tensor:
        """Give what `enter` does, activated: [tokens, ffn]."""

    @abstractmethod
    def add(self, product: Product, x: Tensor) -> None:
        """Add x times a matrix, summed over the tensor group, to `hidden`, or leave it pending."""

    @abstractmethod
    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Append K and V to the pool and attend: [tokens, heads * head_dim]."""

    @abstractmethod
    def normalised(self, name: str) -> Tensor:
        """Give memory for normalised tokens, like `hidden`."""

    def run_layers(self, layer_done: Callable[[int], None] | None = None) -> None:
        """Run all layers; `layer_done` is called with a layer's number in the model when its K and V are queued."""
        for layer in self.parts.layers:
            attended = self.attend(layer.index, self.enter(layer.qkv))
            if layer_done is not None:
                layer_done(self.parts.shard.first_layer + layer.index)
            self.add(layer.out, attended)
            self._after(layer.norm1)
            self.add(layer.ffn_out, self.feed(layer.ffn_in))
            self._after(layer.norm2)

    def settle(self) -> None:
        """Add what is pending."""
        if self.pending is not None:
            self._add_norm(None, None)

    def norm(self, norm: Norm) -> Tensor:
        """Add what is pending, and give the normalisation."""
        out = self.normalised("normalised")
        self._add_norm(out, norm)
        return out

    def entered(self, product: Product) -> Tensor:
        """Give the input of a product, normalised by a kernel of its own."""
        return self.hidden if product.norm is None else self.norm(product.norm)

    def reduced(self, partial: Tensor) -> None:
        """Sum over the tensor group, and leave the sum pending."""
        if self.parts.all_reduce is not None:
            self.parts.all_reduce(partial)
            self._overlaps = False  # it may end with a copy, behind which no kernel can begin early
        self.pending = partial

    def _after(self, norm: Norm) -> None:
        if not self.parts.spec.norm_first:
            self._add_norm(self.hidden, norm)

    def _add_norm(self, out: Tensor | None, norm: Norm | None) -> None:
        self.operations.add_norm(out, self.hidden, self.pending, norm, self._overlaps)
        self.pending, self._overlaps = None, True
