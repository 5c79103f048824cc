"""Self-attention, causal or over all tokens: Translution with one set of matrices for every offset.

a_ij = q_i k_jᵀ / √D      o_i = Σ_j softmax_j(a)_ij v_j
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.cache.shape import LayerShape
from kvik.models.forms import THETA, Form, Positions
from kvik.models.operators.geometry import Geometry
from kvik.models.operators.operator import Operator, flat
from kvik.models.operators.pairs import by_head, plain
from kvik.models.watch import Chunk


class SelfAttention(Operator):
    """Keeps k and v of every head.

    Attributes:
        positions: `rotary` turns queries and keys by their place; `learned` is the network's to add.
        reads: whether it has no keys and values of its own and reads those of an earlier layer (`cache/sharing.py`).
    """

    def __init__(
        self, d: int, heads: int, head_dim: int, geometry: Geometry, positions: Positions = "none", reads: bool = False
    ) -> None:
        super().__init__(d, heads, head_dim, geometry)
        self.positions, self.reads = positions, reads
        self.q = flat(d, self.m)
        if not reads:
            self.k, self.v = flat(d, self.m), flat(d, self.m)

    def mix(self, x: Tensor) -> Tensor:
        """See `Operator.mix`."""
        return self.mix_with(x, *self.rows(x))

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values [B, n, m]: for itself and for layers that read them."""
        return self.turned(self.k(x), torch.arange(x.shape[1], device=x.device)), self.v(x)

    def mix_with(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Its queries over given rows."""
        hidden = self.geometry.table(x.shape[1]).to(x.device) < 0
        q = self.turned(self.q(x), torch.arange(x.shape[1], device=x.device))
        found = (plain(q, k, self.heads) * self.scale).masked_fill(hidden, -torch.inf)
        values = by_head(v, self.heads).transpose(1, 2)
        out: Tensor = (found.softmax(-1) @ values).transpose(1, 2).flatten(2)
        return out

    def shapes(self) -> list[LayerShape]:
        """See `Operator.shapes`."""
        self.check_causal()
        return Form("attention", self.positions).layer_shapes(self.d, self.heads, self.m // self.heads, 1)

    def step(self, chunk: Chunk, first: int, x: Tensor) -> Tensor:
        """See `Operator.step`."""
        places = torch.tensor(chunk.positions, device=x.device)
        q, k = (by_head(self.turned(each(x), places), self.heads) for each in (self.q, self.k))
        if self.positions == "rotary":  # what is turned together lies together, as a cache takes it; no score changes
            q, k = (each.view(*each.shape[:-1], 2, -1).transpose(-1, -2).flatten(-2) for each in (q, k))
        chunk.append(first, k=k, v=by_head(self.v(x), self.heads))
        return chunk.attend(first, q, scale=self.scale).out.flatten(1)

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """[… n, m] with channels i and i + D/2 of each head turned by position · rate; angles in f64."""
        if self.positions != "rotary":
            return x
        width = self.m // self.heads
        rates = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
        angles = positions[:, None, None].double() * rates
        cos, sin = angles.cos().to(x), angles.sin().to(x)
        low, high = x.view(*x.shape[:-1], self.heads, 2, -1).unbind(-2)
        return torch.stack((low * cos - high * sin, high * cos + low * sin), dim=-2).flatten(-3)
