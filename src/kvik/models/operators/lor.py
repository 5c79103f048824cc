"""Translution in low rank (LoR-Translution, first called α-Translution; arXiv:2510.10060) beside ordinary attention.

a_ij = ½ (q_i · k_j + (q~_i Wq[δ]) · (k~_j Wk[δ])) / √D          q~, k~, v~ = x Wq~, x Wk~, x Wv~: R channels
o_i  = ½ (Σ_j α_ij v_j + (Σ_j α_ij v~_j Wv[δ]) W_up)              R = rank · heads; each W[δ] is R x R

A side that is not relative uses q~ or k~ as they are; without a relative query or key the scores are ordinary, without
relative values the output is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.cache.shape import LayerShape
from kvik.models.forms import Form
from kvik.models.operators import decoding
from kvik.models.operators.geometry import Geometry
from kvik.models.operators.operator import Init, Offsets, Operator, flat
from kvik.models.operators.pairs import mixed, plain, scores
from kvik.models.watch import Chunk
from kvik.ops.reads import Rows


class LoRTranslution(Operator):
    """Keeps k, v and k~, v~ (`k_low`, `v_low`): 2 m + 2 R channels. x is not needed: what the offset changes is of R
    channels, and R² weights an offset are read instead of d m: a step reads 3 n R² of them.

    One lane a layer, as W[δ] mixes the heads of the low rank; see `Translution` for what follows.
    """

    def __init__(
        self,
        d: int,
        heads: int,
        head_dim: int,
        geometry: Geometry,
        relative: str = "qkv",
        rank: int = 8,
        init: Init = "linear",
    ) -> None:
        super().__init__(d, heads, head_dim, geometry)
        self.relative, self.rank = relative, rank * heads
        self.scoring, self.valuing = bool(set(relative) & {"q", "k"}), "v" in relative
        self.q, self.k, self.v = (flat(d, self.m) for _ in range(3))
        if self.scoring:
            self.q_low, self.k_low = flat(d, self.rank), flat(d, self.rank)
        if self.valuing:
            self.v_low, self.v_up = flat(d, self.rank), flat(self.rank, self.m)
        for name in relative:
            self.add_module(f"{name}_rel", Offsets(geometry.sets, self.rank, self.rank, init))

    def matrices(self, name: str) -> Tensor | None:
        """[K, R, R]; None where the offset doesn't matter."""
        return self.get_parameter(f"{name}_rel.weight") if name in self.relative else None

    def mix(self, x: Tensor) -> Tensor:
        """See `Operator.mix`."""
        pairs, a = self.pairs(x), plain(self.q(x), self.k(x), self.heads)
        if self.scoring:
            low, wq, wk = self.recompute, self.matrices("q"), self.matrices("k")
            a = (a + scores(self.q_low(x), self.k_low(x), wq, wk, pairs, self.heads, low)) / 2
        weights = (a * self.scale).masked_fill(pairs.hidden, -torch.inf).softmax(-1)
        out = mixed(weights, self.v(x), None, pairs)
        if not self.valuing:
            return out
        far: Tensor = self.v_up(mixed(weights, self.v_low(x), self.matrices("v"), pairs, self.recompute))
        return (out + far) / 2

    def shapes(self) -> list[LayerShape]:
        """See the class."""
        self.check_causal()
        form = Form("lor", relative=self.relative, number=self.rank // self.heads)
        return form.layer_shapes(self.d, self.heads, self.m // self.heads, 1)

    def step(self, chunk: Chunk, first: int, x: Tensor) -> Tensor:
        """See `Operator.step`."""
        streams = [name for name, _ in self.shapes()[0].streams]
        chunk.append(first, **{name: self.get_submodule(name)(x).unsqueeze(1) for name in streams})
        outs, at = [], 0
        for held in chunk.rows(first):
            outs.append(self._over(x[at : at + len(held.asking)], held))
            at += len(held.asking)
        return torch.cat(outs)

    def _over(self, x: Tensor, held: Rows) -> Tensor:
        rows, outs = {name: rows[0] for name, rows in held.streams.items()}, []
        for block in decoding.blocks(held, self.geometry.sets):
            mine = x[block.queries]
            q, low = self.q(mine), self.q_low(mine) if self.scoring else None
            found = [decoding.scores(q, rows["k"], None, None, run, self.heads) for run in block.runs]
            if low is not None:
                wq, wk = self.matrices("q"), self.matrices("k")
                for index, run in enumerate(block.runs):
                    extra = decoding.scores(low, rows["k_low"], wq, wk, run, self.heads)
                    found[index] = (found[index] + extra) / 2
            weights = decoding.softmax([each * self.scale for each in found], block.runs)
            both = list(zip(weights, block.runs, strict=True))
            out = torch.stack([decoding.mixed(w, rows["v"], None, run) for w, run in both]).sum(0)
            if self.valuing:
                wv = self.matrices("v")
                far = torch.stack([decoding.mixed(w, rows["v_low"], wv, run) for w, run in both]).sum(0)
                out = (out + self.v_up(far)) / 2
            outs.append(out)
        return torch.cat(outs)
