"""A decoder in which one word of the configuration says what mixes tokens: attention or another operator.

GPT-2's blocks (`models/operators/blocks.py`), but q, k and v have no biases and the head is its own, as in
Translution's experiments (arXiv:2510.10060). `kvik train lm` makes such models. What an operator multiplies by itself
is held in f32, whatever format the other weights have: there are no packed products over offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from kvik.cache import sharing
from kvik.cache.spec import LayerShape
from kvik.errors import ConfigError
from kvik.models.decoder import narrowed
from kvik.models.fields import Fields
from kvik.models.forms import THETA
from kvik.models.layer import Layer
from kvik.models.operators.blocks import Block, OperatorConfig, common, layer_norm
from kvik.models.parts import Rotation, Source
from kvik.models.rope import Rope
from kvik.models.watch import Chunk
from kvik.ops.pointwise import GELU


@dataclass(frozen=True, kw_only=True)
class GPTConfig(OperatorConfig):
    """A decoder with an operator of choice.

    Attributes:
        owners: for each layer, the layer whose rows it reads (attention alone); empty = its own, all of them.
    """

    family: ClassVar[str] = "kvik_gpt"
    causal: ClassVar[bool] = True

    owners: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.owners and self.form.kind != "attention":
            raise ConfigError(f"{self.name}: layers share keys and values of attention, not rows of {self.operator}")
        if self.owners and len(self.owners) != self.layers:
            raise ConfigError(f"{self.name}: {len(self.owners)} owners do not fit {self.layers} layers")

    @property
    def rope(self) -> Rope:
        """How positions turn queries and keys, where they do."""
        return Rope(head_dim=self.head_dim, theta=THETA)

    def keeps(self, layer: int) -> bool:
        """Whether a layer has rows of its own."""
        return not self.owners or self.owners[layer] == layer

    def layer_shapes(self) -> list[LayerShape]:
        """What is kept of a token: an operator may have several layers in a cache, or read those of another."""
        shapes = self.form.layer_shapes(self.hidden, self.heads, self.head_dim, self.max_positions)
        every = shapes * self.layers
        return list(sharing.shared(every, self.owners)) if self.owners else every

    def sharing(self, rule: str) -> Self:
        """See `Config.sharing`."""
        if self.form.kind != "attention":
            return super().sharing(rule)
        owners = sharing.readers(replace(self, owners=()).layer_shapes(), rule)
        return replace(self, owners=owners, name=f"{self.name} (share {rule})")

    def to_hf(self) -> dict[str, object]:
        """config.json, which `read` reads."""
        return {**super().to_hf(), "owners": list(self.owners)}


def read(fields: Fields, generation: Fields, name: str) -> GPTConfig:
    """From config.json and generation_config.json. Raises ConfigError."""
    owners = fields.ids("owners")
    if any(owner > layer or owners[owner] != owner for layer, owner in enumerate(owners)):
        fields.fail("owners", "a layer reads its own rows, or those of an earlier layer that keeps some")
    return GPTConfig(**common(fields, generation, name), owners=owners)


def _attention(config: GPTConfig, source: Source, layer: int) -> Layer:
    """A layer of ordinary attention: kvik's own, with its fast ways."""
    name, keeps = f"h.{layer}", config.keeps(layer)
    heads = (config.heads,) * (1 + keeps) if config.form.positions == "rotary" else ()
    return Layer(
        attention_norm=layer_norm(config, source, f"{name}.ln_1"),
        qkv=source.linear(*(f"{name}.mixer.{part}" for part in ("qkv" if keeps else "q")), turned=heads),
        o=source.linear(f"{name}.mixer.o", bias=True),
        mlp_norm=layer_norm(config, source, f"{name}.ln_2"),
        up=source.linear(f"{name}.up", bias=True),
        activation=GELU(),
        down=source.linear(f"{name}.down", bias=True),
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.head_dim,
        reads=not keeps,
    )


class GPT:
    """A decoder with an operator of choice.

    Attributes:
        config: its sizes.
        layers: what is kept of a token.
    """

    def __init__(self, config: GPTConfig, source: Source) -> None:
        self.config, self.layers = config, config.layer_shapes()
        self.late = sharing.first_late(self.layers)
        self.embedding = source.embedding("wte")
        self.positions = source.vector("wpe.weight") if config.form.positions == "learned" else None
        self.blocks = list(self._blocks(config, source))
        self.norm = layer_norm(config, source, "ln_f")
        self.head = self.embedding if config.tied_embeddings else source.embedding("lm_head")
        self.rotation = Rotation(config.rope, source.device) if config.form.positions == "rotary" else None

    def _blocks(self, config: GPTConfig, source: Source) -> Iterator[Block | Layer]:
        each = len(self.layers) // config.layers
        for layer in range(config.layers):
            if config.form.kind == "attention":
                yield _attention(config, source, layer)
            else:
                yield Block(config, source, layer, layer * each)

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers; see `Llama.forward`."""
        x = self.embedding.rows(tokens)
        if self.positions is not None:
            x = x + self.positions[torch.tensor(step.positions, device=tokens.device)]
        angles = None if self.rotation is None else self.rotation.angles(step.positions)
        for index, layer in enumerate(self.blocks):
            if index == self.late and self.config.owners:
                step, going, rows = narrowed(step, rows, len(x))
                x, angles = x[going], None if angles is None else angles[going]
            x = layer(step, index, x, angles)
        return self.head(x[rows], after=self.norm)
