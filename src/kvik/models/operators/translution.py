"""Translution (arXiv:2510.10060): query, key and value matrices that depend on the offset between two tokens.

a_ij = (x_i Wq[δ]) · (x_j Wk[δ]) / √D      o_i = Σ_j softmax_j(a)_ij (x_j Wv[δ])      δ = i - j

With all offsets' matrices equal it is self-attention; with weights that don't look at the tokens, the same over a
kernel, it is a convolution (`Convolution`).

Operations of a causal text of n tokens: s · n (n + 1) · d · m for s relative projections, 2 d m for each of its
n (n + 1) / 2 pairs; each matrix is read once (`pairs.py`). The public code gathers a matrix for every pair instead:
n² · d · m numbers a projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.cache.shape import LayerShape
from kvik.models.forms import Form
from kvik.models.operators import decoding
from kvik.models.operators.geometry import Geometry, Line
from kvik.models.operators.operator import Init, Offsets, Operator, flat
from kvik.models.operators.pairs import mixed, scores
from kvik.models.watch import Chunk
from kvik.ops.reads import Rows


class Relative(Operator):
    """What operators with matrices by offset share: q, k and v, some of them relative.

    Attributes:
        relative: which.
        q, k, v: a projection, or a matrix for each set.
    """

    def __init__(
        self, d: int, heads: int, head_dim: int, geometry: Geometry, relative: str = "qkv", init: Init = "linear"
    ) -> None:
        super().__init__(d, heads, head_dim, geometry)
        self.relative = relative
        for name in "qkv":
            part = Offsets(geometry.sets, d, self.m, init) if name in relative else flat(d, self.m)
            self.add_module(name, part)

    def project(self, name: str, x: Tensor) -> Tensor:
        """x as it is where the offset decides, else projected."""
        out: Tensor = x if name in self.relative else self.get_submodule(name)(x)
        return out

    def matrices(self, name: str) -> Tensor | None:
        """[K, d, m]; None where the offset doesn't matter."""
        return self.get_parameter(f"{name}.weight") if name in self.relative else None


class Translution(Relative):
    """Any subset of q, k and v relative.

    What it keeps. A key x_j Wk[i - j] serves one query alone, i: no other is as far away from j. So over n tokens
    there are n (n + 1) / 2 different keys, each used once, and a cache of keys would never be asked twice; what the
    next query needs of token j is x_j, the layer's input, which no later token changes. It is d channels where keys
    and values are 2 m. Keys, or values, that are not relative are kept as ever:

        qkv, kv   x          qv, v   k and x          k, qk   x and v          q   k and v

    A step over n tokens costs 2 s n d m + 4 n m operations beside the plain projections, and reads s n d m weights: it
    is bound by them (a row of x is 3 m times smaller than its three matrices). Up to 16 tokens of a chunk share them.

    One lane a layer: a row is read back whole, so a retention can't choose by heads, nor a policy by queries and keys.
    A window is defined: offsets beyond it are never used. Positions are true ones, and there is nothing to turn.
    """

    def mix(self, x: Tensor) -> Tensor:
        """See `Operator.mix`."""
        pairs = self.pairs(x)
        q, k, v = (self.project(name, x) for name in "qkv")
        a = scores(q, k, self.matrices("q"), self.matrices("k"), pairs, self.heads, self.recompute) * self.scale
        return mixed(a.softmax(-1), v, self.matrices("v"), pairs, self.recompute)

    def shapes(self) -> list[LayerShape]:
        """See the class."""
        self.check_causal()
        return Form("translution", relative=self.relative).layer_shapes(self.d, self.heads, self.m // self.heads, 1)

    def step(self, chunk: Chunk, first: int, x: Tensor) -> Tensor:
        """See `Operator.step`."""
        streams = [name for name, _ in self.shapes()[0].streams]
        chunk.append(first, **{name: (x if name == "x" else self.project(name, x)).unsqueeze(1) for name in streams})
        outs, at = [], 0
        for held in chunk.rows(first):
            outs.append(self._over(x[at : at + len(held.asking)], held))
            at += len(held.asking)
        return torch.cat(outs)

    def _over(self, x: Tensor, held: Rows) -> Tensor:
        """One sequence's queries over its rows."""
        k, v = (held.streams["x" if name in self.relative else name][0] for name in "kv")
        wq, wk, wv = (self.matrices(name) for name in "qkv")
        outs = []
        for block in decoding.blocks(held, self.geometry.sets):
            q = self.project("q", x[block.queries])
            found = [decoding.scores(q, k, wq, wk, run, self.heads) * self.scale for run in block.runs]
            weights = decoding.softmax(found, block.runs)
            parts = [decoding.mixed(w, v, wv, run) for w, run in zip(weights, block.runs, strict=True)]
            outs.append(torch.stack(parts).sum(0))
        return torch.cat(outs)


class Convolution(Operator):
    """Translution with weights of 1 over a kernel, whatever the tokens are: o_i = Σ_δ x_{i - δ} Wv[δ].

    In a causal line `conv1d`, in a grid `conv2d` with zeros around it. The class token, which has no place there, takes
    in the mean of all patches. It keeps x of the kernel's tokens alone: flat in the text's length.
    """

    def __init__(self, d: int, heads: int, head_dim: int, geometry: Geometry, init: Init = "linear") -> None:
        super().__init__(d, heads, head_dim, geometry)
        self.v = Offsets(geometry.sets, d, self.m, init)

    def mix(self, x: Tensor) -> Tensor:
        """See `Operator.mix`."""
        pairs = self.pairs(x)
        fixed = (~pairs.hidden).to(x)
        if not isinstance(self.geometry, Line):
            fixed = torch.cat((fixed[:1] / fixed[:1].sum(), fixed[1:]))
        return mixed(fixed.expand(len(x), self.heads, -1, -1), x, self.v.weight, pairs, self.recompute)

    def shapes(self) -> list[LayerShape]:
        """See the class."""
        self.check_causal()
        return [LayerShape(1, (("x", self.d),), window=self.geometry.sets, use="read")]

    def step(self, chunk: Chunk, first: int, x: Tensor) -> Tensor:
        """See `Operator.step`."""
        chunk.append(first, x=x.unsqueeze(1))
        outs = []
        for held in chunk.rows(first):
            for block in decoding.blocks(held, self.geometry.sets):
                parts = [
                    decoding.mixed(run.there.unsqueeze(-1).to(x), held.streams["x"][0], self.v.weight, run)
                    for run in block.runs
                ]
                outs.append(torch.stack(parts).sum(0))
        return torch.cat(outs)
