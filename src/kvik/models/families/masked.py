"""An encoder with an operator of choice, for hidden tokens (masked language modelling, arXiv:1810.04805): the layers of
`models/families/gpt.py`, but each token sees both sides. `kvik train lm --masked` makes such models.

As every encoder it keeps nothing: one more token changes all earlier states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvik.cache.spec import LayerShape
from kvik.errors import ContextError, UsageError
from kvik.models.encoding import EncoderConfig
from kvik.models.fields import Fields
from kvik.models.operators.blocks import Block, OperatorConfig, common, layer_norm
from kvik.models.parts import Source

MASK = "[MASK]"  # stands for a hidden token in a text


@dataclass(frozen=True, kw_only=True)
class MaskedConfig(OperatorConfig, EncoderConfig):
    """Such an encoder.

    Attributes:
        mask_id: the token that stands for a hidden one.
    """

    family: ClassVar[str] = "kvik_encoder"
    causal: ClassVar[bool] = False

    activation: str = "gelu_new"
    mask_id: int

    def to_hf(self) -> dict[str, object]:
        """config.json, which `read` reads."""
        return {**super().to_hf(), "mask_token_id": self.mask_id}

    def check_source(self, source: Tensor) -> None:
        """See `EncoderConfig.check_source`."""
        if source.dtype != torch.int64 or source.dim() != 1 or not len(source):
            raise UsageError(f"{self.name} reads token ids, int64 [n], at least one")
        if len(source) > self.max_positions:
            raise ContextError(
                f"{len(source):,} tokens are more than the {self.max_positions:,} positions of {self.name}; shorten "
                "the text or give it in parts"
            )
        if not ((source >= 0) & (source < self.vocab_size)).all():
            raise UsageError(f"token ids must be 0 to {self.vocab_size - 1}")


def read(fields: Fields, generation: Fields, name: str) -> MaskedConfig:
    """From config.json. Raises ConfigError."""
    config = MaskedConfig(**common(fields, generation, name), mask_id=fields.integer("mask_token_id", least=0))
    if config.mask_id >= config.vocab_size:
        fields.fail("mask_token_id", f"there are {config.vocab_size} tokens, from 0 on")
    return config


class Masked:
    """Such an encoder; see `Encoder`."""

    def __init__(self, config: MaskedConfig, source: Source) -> None:
        self.layers: list[LayerShape] = []
        self.embedding = source.embedding("wte")
        self.positions = source.vector("wpe.weight") if config.form.positions == "learned" else None
        self.blocks = [Block(config, source, layer) for layer in range(config.layers)]
        self.norm = layer_norm(config, source, "ln_f")
        self.head = self.embedding if config.tied_embeddings else source.embedding("lm_head")

    def states(self, source: Tensor) -> Iterator[Tensor]:
        """See `Encoder.states`."""
        x = self.embedding.rows(source)
        if self.positions is not None:
            x = x + self.positions[: len(source)]
        yield x
        for block in self.blocks:
            x = block.whole(x.clone())
            yield x

    def encode(self, source: Tensor) -> Tensor:
        """See `Encoder.encode`."""
        *_, last = self.states(source)
        return self.norm(last)

    def logits(self, source: Tensor) -> Tensor:
        """Which token stands at each place: int64 [n] → f32 [n, vocabulary]."""
        return self.head(self.encode(source))
