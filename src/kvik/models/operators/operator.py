"""What every operator has: its matrices, a whole text at once, and a step with a cache."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from kvik.cache.shape import LayerShape
from kvik.errors import UsageError
from kvik.models.operators.geometry import Geometry, Line
from kvik.models.operators.pairs import Pairs
from kvik.models.watch import Chunk

Init = Literal["linear", "repo"]


class Offsets(nn.Module):
    """A matrix for each set of offsets, [K, inputs, outputs].

    Attributes:
        weight: drawn as `nn.Linear` draws its own (`linear`), or as the paper's public code does (`repo`): there each
            set of [K, inputs, outputs] is taken for a kernel, which makes it √outputs times smaller.
    """

    def __init__(self, sets: int, inputs: int, outputs: int, init: Init) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs if init == "linear" else inputs * outputs)
        self.weight = nn.Parameter(torch.empty(sets, inputs, outputs).uniform_(-bound, bound))


class Operator(nn.Module):
    """Mixes tokens: f32 (or f64) [B, n, d] → [B, n, d].

    Attributes:
        d, m, heads: widths of the model and of all heads together, and how many those are.
        geometry: where tokens stand to one another.
        o: the projection behind it, with a bias.
        recompute: whether training computes a set's products a second time instead of keeping them.
    """

    def __init__(self, d: int, heads: int, head_dim: int, geometry: Geometry) -> None:
        super().__init__()
        self.d, self.heads, self.m, self.geometry = d, heads, heads * head_dim, geometry
        self.scale, self.recompute = head_dim**-0.5, False
        self.o = nn.Linear(self.m, d)
        self._pairs: dict[tuple[int, torch.device], Pairs] = {}

    def forward(self, x: Tensor) -> Tensor:
        """A whole text, or picture, at once."""
        out: Tensor = self.o(self.mix(x))
        return out

    def mix(self, x: Tensor) -> Tensor:
        """All before `o`: [B, n, d] → [B, n, m]."""
        raise NotImplementedError

    def shapes(self) -> list[LayerShape]:
        """What it keeps of a token: the layers that it has in a cache."""
        raise NotImplementedError

    def step(self, chunk: Chunk, first: int, x: Tensor) -> Tensor:
        """New tokens, all before `o`: [T, d] → [T, m].

        Args:
            chunk: entered.
            first: the number of the first of `shapes` in the cache.
        """
        raise NotImplementedError

    def pairs(self, x: Tensor) -> Pairs:
        """Of a text [B, n, d]."""
        key = x.shape[1], x.device
        if key not in self._pairs:
            self._pairs[key] = Pairs.of(self.geometry, *key)
        return self._pairs[key]

    def check_causal(self) -> None:
        """Raises UsageError where tokens see later ones, so that nothing stays valid to keep."""
        if not isinstance(self.geometry, Line) or not self.geometry.causal:
            raise UsageError("each new token would change all earlier ones here, so there is nothing to cache")


def flat(d: int, m: int) -> nn.Linear:
    """A projection as the paper's code has them: without a bias."""
    return nn.Linear(d, m, bias=False)
