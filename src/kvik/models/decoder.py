"""What a family's network provides to the rest of kvik."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kvik.cache.spec import LayerShape
from kvik.models.watch import Chunk
from kvik.ops.linear import Linear


class Decoder(Protocol):
    """A network that takes chunks of text through its layers.

    Attributes:
        layers: what each layer keeps of a token.
        head: the output projection.
    """

    layers: list[LayerShape]
    head: Linear

    @property
    def blocks(self) -> Sequence[object]:
        """The layers' weights."""

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers; logits of the chosen rows."""
