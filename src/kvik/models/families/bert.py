"""BERT (arXiv:1810.04805): the encoder of arXiv:1706.03762 alone, with learned positions and types of tokens.

x = norm(token + type + position)
x = norm(x + W_o attention(W_q x, W_k x, W_v x))     over every row, those behind as well
x = norm(x + W_down f(W_up x))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvik.cache.spec import LayerShape
from kvik.errors import ContextError, UsageError
from kvik.models.attention import attend_all
from kvik.models.config import MOST_ROWS
from kvik.models.encoding import EncoderConfig, common
from kvik.models.fields import Fields
from kvik.models.parts import Source
from kvik.ops.pointwise import ACTIVATIONS, LayerNorm, activation

_PREFIX = "bert."  # of files that hold a head as well
_HEADS = (  # of what BERT was trained with; nothing here depends on them
    *(f"{prefix}pooler.dense.{part}" for prefix in ("", _PREFIX) for part in ("weight", "bias")),
    *(f"cls.predictions.{part}" for part in ("bias", "decoder.weight", "decoder.bias")),
    *(f"cls.predictions.transform.{m}.{part}" for m in ("dense", "LayerNorm") for part in ("weight", "bias")),
    *(f"cls.predictions.transform.LayerNorm.{part}" for part in ("gamma", "beta")),
    *(f"cls.seq_relationship.{part}" for part in ("weight", "bias")),
)


@dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """A BERT.

    Attributes:
        types: of tokens: which of two texts they are of.
    """

    family: ClassVar[str] = "bert"

    types: int

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Config.tensor_shapes`; projections are [out, in], and names have no "bert." prefix."""
        hidden, ffn = self.hidden, self.ffn
        tables = {"word": self.vocab_size, "position": self.max_positions, "token_type": self.types}
        shapes: dict[str, tuple[int, ...]] = {
            f"embeddings.{name}_embeddings.weight": (rows, hidden) for name, rows in tables.items()
        }
        norms, projections = ["embeddings"], dict[str, tuple[int, ...]]()
        for i in range(self.layers):
            layer = f"encoder.layer.{i}"
            projections |= {f"{layer}.attention.self.{p}": (hidden, hidden) for p in ("query", "key", "value")}
            projections |= {f"{layer}.attention.output.dense": (hidden, hidden)}
            projections |= {f"{layer}.intermediate.dense": (ffn, hidden), f"{layer}.output.dense": (hidden, ffn)}
            norms += [f"{layer}.attention.output", f"{layer}.output"]
        for name, shape in projections.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return shapes | {f"{norm}.LayerNorm.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}

    def other_names(self) -> dict[str, tuple[str, ...]]:
        """Files with a head have a prefix; files from before transformers 1 call a norm's parts gamma and beta."""
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        found: dict[str, tuple[str, ...]] = {}
        for name in self.tensor_shapes():
            names = [name] + [name.replace(new, before) for new, before in old.items() if name.endswith(new)]
            found[name] = tuple(prefix + each for each in names for prefix in ("", _PREFIX) if prefix + each != name)
        return found

    def spare(self, name: str) -> bool:
        """The pooler and the heads of training."""
        return name in _HEADS

    def check_source(self, source: Tensor) -> None:
        """See `EncoderConfig.check_source`."""
        if source.dtype != torch.int64 or source.dim() not in (1, 2) or (source.dim() == 2 and source.shape[1] != 2):
            raise UsageError(f"{self.name} reads token ids, int64 [n], or [n, 2] with their types beside them")
        if not len(source):
            raise UsageError("the source is empty; give at least one token")
        if len(source) > self.max_positions:
            raise ContextError(
                f"{len(source):,} tokens are more than the {self.max_positions:,} positions of {self.name}; shorten "
                "the text or give it in parts"
            )
        known = {"ids": self.vocab_size, "types": self.types}
        for (what, most), given in zip(known.items(), source.view(len(source), -1).unbind(1), strict=False):
            if not ((given >= 0) & (given < most)).all():
                raise UsageError(f"token {what} must be 0 to {most - 1}; got {int(given.min())} to {int(given.max())}")


def read(fields: Fields, generation: Fields, name: str) -> BertConfig:
    """From config.json of transformers' BERT. Raises ConfigError."""
    fields.refuse_unless("position_embedding_type", ("absolute",))
    return BertConfig(
        **common(fields, name, tuple(ACTIVATIONS)),
        vocab_size=fields.integer("vocab_size", most=MOST_ROWS),
        max_positions=fields.integer("max_position_embeddings", most=MOST_ROWS),
        types=fields.integer("type_vocab_size", 2, most=MOST_ROWS),
    )


class Block:
    """One layer, from its weights."""

    def __init__(self, config: BertConfig, source: Source, name: str) -> None:
        self.heads, self.scale = config.heads, config.head_dim**-0.5
        self.qkv = source.linear(*(f"{name}.attention.self.{p}" for p in ("query", "key", "value")), bias=True)
        self.o = source.linear(f"{name}.attention.output.dense", bias=True)
        self.norm = layer_norm(config, source, f"{name}.attention.output")
        self.up, self.down = (source.linear(f"{name}.{part}.dense", bias=True) for part in ("intermediate", "output"))
        self.activation, self.mlp_norm = activation(config.activation), layer_norm(config, source, f"{name}.output")

    def __call__(self, x: Tensor) -> Tensor:
        """f32 [S, width]: every row beside all others. `x` may be overwritten."""
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        x = self.norm(self.o(attend_all(q, k, v, scale=self.scale), onto=x))
        return self.mlp_norm(self.down(self.up(x), after=self.activation, onto=x))


def layer_norm(config: BertConfig, source: Source, name: str) -> LayerNorm:
    """A norm's weights."""
    weight, bias = (source.vector(f"{name}.LayerNorm.{part}") for part in ("weight", "bias"))
    return LayerNorm(weight, bias, config.norm_eps)


class Bert:
    """A BERT; see `Encoder`. Each layer ends in its own norm, so that none comes last."""

    norm = None

    def __init__(self, config: BertConfig, source: Source) -> None:
        self.layers: list[LayerShape] = []
        self.embedding = source.embedding("embeddings.word_embeddings")
        self.positions, self.types = (
            source.vector(f"embeddings.{name}_embeddings.weight") for name in ("position", "token_type")
        )
        self.first_norm = layer_norm(config, source, "embeddings")
        self.blocks = [Block(config, source, f"encoder.layer.{i}") for i in range(config.layers)]

    def states(self, source: Tensor) -> Iterator[Tensor]:
        """See `Encoder.states`."""
        ids, types = (source, torch.zeros_like(source)) if source.dim() == 1 else source.unbind(1)
        x = self.first_norm(self.embedding.rows(ids) + self.types[types] + self.positions[: len(ids)])
        yield x
        for block in self.blocks:
            x = block(x.clone())
            yield x

    def encode(self, source: Tensor) -> Tensor:
        """See `Encoder.encode`."""
        *_, last = self.states(source)
        return last
