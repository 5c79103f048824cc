"""What a decoder sees of a cache, and a place to stand between the two."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kvik.ops.fused import Fused
from kvik.ops.reads import Partial, Rows


class Chunk(Protocol):
    """New tokens on their way through the layers: all that a decoder knows of a cache. A `Step` is one."""

    @property
    def positions(self) -> list[int]:
        """Of the T new tokens."""

    def append(self, layer: int, **streams: Tensor) -> None:
        """Takes one layer's new rows: for each stream, f32 [T, heads, width]."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        bias: Tensor | None = None,
        want_lse: bool = False,
        want_mass: bool = False,
    ) -> Partial:
        """Attention of the new tokens over all rows that they may see; see `Step.attend`."""

    def rows(self, layer: int) -> list[Rows]:
        """What each sequence holds of a layer, read back; see `Step.rows`."""

    def through(self, layer: int, fused: Fused, x: Tensor, angles: Tensor | None) -> bool:
        """A whole layer in one call; False: append and attend are to be called. See `Step.through`."""

    def only(self, rows: Sequence[int]) -> Chunk | None:
        """Some of the tokens, for layers that append nothing; None: all are wanted. See `Step.only`."""


class Watch:
    """A chunk seen through: everything passes on to the step. Subclasses look at what passes, or change it.

    class Queries(Watch):
        def attend(self, layer, q, **options):
            print(layer, q.shape)
            return super().attend(layer, q, **options)

    model.run([(sequence, tokens)], watch=Queries)
    """

    def __init__(self, step: Chunk) -> None:
        self.step = step

    @property
    def positions(self) -> list[int]:
        """Of the T new tokens."""
        return self.step.positions

    def append(self, layer: int, **streams: Tensor) -> None:
        """Passes one layer's new rows on."""
        self.step.append(layer, **streams)

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        bias: Tensor | None = None,
        want_lse: bool = False,
        want_mass: bool = False,
    ) -> Partial:
        """Passes the queries on, and the result back."""
        return self.step.attend(
            layer, q, scale=scale, softcap=softcap, bias=bias, want_lse=want_lse, want_mass=want_mass
        )

    def rows(self, layer: int) -> list[Rows]:
        """Passes what is held back."""
        return self.step.rows(layer)

    def through(self, layer: int, fused: Fused, x: Tensor, angles: Tensor | None) -> bool:
        """Never: what is watched passes one by one."""
        return False

    def only(self, rows: Sequence[int]) -> Watch | None:
        """The same watch over some of the tokens."""
        some = self.step.only(rows)
        if some is None:
            return None
        twin = copy.copy(self)
        twin.step = some
        return twin
