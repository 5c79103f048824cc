"""What a family's network provides to the rest of kvik."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvik.cache.spec import LayerShape
from kvik.models.watch import Chunk
from kvik.ops.linear import Linear
from kvik.ops.pointwise import RowFunction


class Network(Protocol):
    """What every family's network has.

    Attributes:
        layers: what each layer keeps of a token; none of them where nothing that was computed stays valid.
    """

    layers: list[LayerShape]

    @property
    def blocks(self) -> Sequence[object]:
        """The layers' weights."""

    @property
    def norm(self) -> RowFunction | None:
        """What stands before a decoder's head, or an encoder's last states; None = nothing."""


class Decoder(Network, Protocol):
    """A network that takes chunks of text through its layers.

    Attributes:
        head: the output projection.
    """

    head: Linear

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers; logits of the chosen rows."""


class Encoder(Network, Protocol):
    """A network that sees a source whole, every row beside all others: one more row changes every state of the others,
    so that there is nothing to cache. Its `layers` are none."""

    def states(self, source: Tensor) -> Iterator[Tensor]:
        """What enters the first layer, and then what leaves each: f32 [rows, width], new tensors.

        Args:
            source: token ids, int64 [n] (or [n, 2] with their types), or a picture, f32 [channels, height, width].
        """

    def encode(self, source: Tensor) -> Tensor:
        """The last layer's states, behind a norm where there is one: f32 [rows, width]."""


class Reader(Decoder, Protocol):
    """A decoder that also reads a source (cross-attention): its `layers` are those of the text, and after them those
    of the source (`LayerShape.source`)."""

    def encode(self, source: Tensor) -> Tensor:
        """A source as its encoder sees it, every row beside all others: f32 [rows, width].

        Args:
            source: token ids, int64 [n], or features, f32 [frames, channels].
        """

    def given(self, states: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """What the text's tokens will read of a source: for each of its layers the index, and f32 [rows, heads, width]
        for each stream."""


def narrowed(step: Chunk, rows: Tensor, tokens: int) -> tuple[Chunk, Tensor | slice, Tensor]:
    """Who goes on where no layer behind keeps rows: tokens whose logits are wanted; all, if a policy looks on.

    Args:
        rows: int64 [R], which of T tokens are wanted.
        tokens: T.

    Returns:
        The step as those see it, which of the tokens they are, and which of them are wanted.
    """
    some = step.only(rows.tolist()) if len(rows) < tokens else None
    return (step, slice(None), rows) if some is None else (some, rows, torch.arange(len(rows), device=rows.device))
