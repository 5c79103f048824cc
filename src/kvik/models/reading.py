"""What models that read a source (encoder-decoders) have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvik.cache.shape import LayerShape
from kvik.errors import ConfigError, ContextError, UsageError
from kvik.models.config import Config, end_ids, first_id
from kvik.models.constraints import Constraints
from kvik.models.fields import Fields
from kvik.ops.linear import Linear


@dataclass(frozen=True, kw_only=True)
class ReaderConfig(Config):
    """A decoder that reads a source beside its text. `layers`, `heads` and the like are the decoder's.

    Attributes:
        start_id: the token that every text begins with.
        encoder_layers, encoder_heads: of what reads the source whole.
        source_vocab: ids that a source may have.
        source_positions: rows that a source may have; None = any number.
        own_tokenizer: the source has token ids of its own, unlike the text's.
        constraints: which tokens may come where.
    """

    start_id: int
    encoder_layers: int
    encoder_heads: int
    source_vocab: int
    source_positions: int | None
    own_tokenizer: bool
    constraints: Constraints

    def __post_init__(self) -> None:
        super().__post_init__()
        named = {"start_id": (self.start_id,), "eos_ids": self.eos_ids, "constraints": self.constraints.tokens}
        for key, ids in named.items():
            if beyond := [token for token in ids if token >= self.vocab_size]:
                raise ConfigError(
                    f"{self.name}: {key} has token {beyond[0]}, but its vocabulary ends at {self.vocab_size - 1}; "
                    "use a file that kvik supports"
                )

    def check_source(self, source: Tensor) -> None:
        """Token ids, int64 [n].

        Raises:
            UsageError: there are none, or some are out of range.
            ContextError: they are more than the encoder has positions for.
        """
        if source.dtype != torch.int64 or source.dim() != 1:
            raise UsageError(f"{self.name} reads token ids; give a list of them")
        if not len(source):
            raise UsageError("the source is empty; give at least one token")
        if not ((source >= 0) & (source < self.source_vocab)).all():
            raise UsageError(
                f"token ids must be 0 to {self.source_vocab - 1}; got {int(source.min())} to {int(source.max())}"
            )
        if self.source_positions is not None and len(source) > self.source_positions:
            raise ContextError(
                f"a source of {len(source):,} tokens is longer than the {self.source_positions:,} positions of "
                f"{self.name}'s encoder; shorten it or give it in parts"
            )


def common(fields: Fields, generation: Fields, last: int | None = None) -> dict[str, Any]:
    """What every such model's files say about where texts begin and end, as `ReaderConfig`'s fields.

    Args:
        last: the token that ends texts at the limit of their length, where there is no generation_config.json and
            config.json leaves it out.

    Raises:
        ConfigError: a value can't be used, or nothing says what texts begin with.
    """
    fields.refuse_unless("is_encoder_decoder", (True,))
    fields.refuse_unless("tie_encoder_decoder", (False,))
    says = generation if generation.values else fields
    start = first_id(generation, "decoder_start_token_id")
    start = first_id(fields, "decoder_start_token_id") if start is None else start
    start = first_id(fields, "bos_token_id") if start is None else start
    if start is None:
        fields.fail("decoder_start_token_id", "texts must begin with some token")
    ends = end_ids(fields, generation)
    return dict(
        start_id=start,
        eos_ids=ends,
        bos_id=first_id(fields, "bos_token_id"),
        constraints=Constraints.read(says, ends, last if says is fields else None),
    )


def layer_shapes(own: LayerShape, layers: int) -> list[LayerShape]:
    """What the layers keep: first each layer's rows of the text, then each one's of the source."""
    return [own] * layers + [LayerShape(own.heads, own.streams, source=True)] * layers


def given(products: Sequence[Linear], states: Tensor, heads: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """See `Reader.given`: keys and values of a source in the layers of `layer_shapes`.

    Args:
        products: of each layer, to keys and values side by side.
        states: f32 [rows, width], the encoder's.
    """
    for layer, product in enumerate(products):
        rows = product(states).view(len(states), 2, heads, -1)
        yield len(products) + layer, {"k": rows[:, 0], "v": rows[:, 1]}
