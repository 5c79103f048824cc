"""Translution with one matrix for each range of offsets: its keys can be cached.

W[δ] = W_b for all offsets δ of range b, from start s_b up to the next range's start. Then token j's key changes only
when j passes from one range to the next, and at every step exactly one token does that at each boundary: the one s_b
places back. Its new key and value are computed once and serve until it passes the next boundary.

Nothing that was stored is written again. Range b has lanes of its own, and the row that step t leaves there is the key
and value, under W_b, of token t - s_b. To a query at t the tokens of range b are then the last rows of those lanes, as
many as the range is wide: a sliding window of rows, whose pages leave as any window's do. So a text's prefix, a fork
and a trim mean what they mean elsewhere, and attention is kvik's own: one call a range, merged by log-sum-exp
(arXiv:2501.01005).

    starts 0 1 2, the step of token 5:  range 0   window 1    row 5 = token 5 under W_0
                                        range 1   window 1    row 5 = token 4 under W_1
                                        range 2   no window   row 5 = token 3 under W_2; rows 2 3 4: tokens 0 1 2

Ranges of one offset need no rows: that token's key is used at this step alone. Rows of the first s_b steps stand for no
token; a channel more in the keys, -30,000 there and 0 elsewhere, hides them from every query.

A step costs 2 d m for each range and relative projection, however long the text is, and 4 n m for attention. Each token
is in one range at a time, so that k and v are kept once for each; x is kept of those that have a boundary before them.
The last range's lanes also hold its first s_b rows, those of no token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.cache.shape import LayerShape
from kvik.models.forms import ranges, wide
from kvik.models.operators.geometry import Line
from kvik.models.operators.pairs import by_head, plain
from kvik.models.operators.translution import Relative
from kvik.models.watch import Chunk
from kvik.ops.reads import Partial, merge

HIDDEN = -30_000.0  # fits f16, and scaled by any 1/√D still gives a weight of exactly 0


class BucketedTranslution(Relative):
    """See the module. The first of its layers in a cache holds x, if any range begins after 0; then one for each range
    that is wider than one offset. Rows there stand for earlier tokens, so windows and policies of the user's are
    refused (`LayerShape.use`); codecs are not."""

    def mix(self, x: Tensor) -> Tensor:
        """See `Operator.mix`: a band a set, each an ordinary attention of its own."""
        pairs, table = self.pairs(x), self.pairs(x).table
        q, k, v = (self.project(name, x) for name in "qkv")
        wq, wk, wv = (self._each(name) for name in "qkv")
        a = x.new_full((len(x), self.heads, *table.shape), -torch.inf)
        for number, mirror in pairs.sets:
            mine = q if wq is None else q @ wq[mirror]
            theirs = k if wk is None else k @ wk[number]
            a = torch.where(table == number, plain(mine, theirs, self.heads) * self.scale, a)
        weights, out = a.softmax(-1), x.new_zeros((*x.shape[:2], self.m))
        for number, _ in pairs.sets:
            values = by_head(v if wv is None else v @ wv[number], self.heads).transpose(1, 2)
            out = out + ((weights * (table == number)) @ values).transpose(1, 2).flatten(2)
        return out

    def _each(self, name: str) -> tuple[Tensor, ...] | None:
        every = self.matrices(name)
        return None if every is None else every.unbind(0)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each range of a causal line begins."""
        self.check_causal()
        assert isinstance(self.geometry, Line) and self.geometry.starts is not None, "ranges begin somewhere"
        return self.geometry.starts

    def shapes(self) -> list[LayerShape]:
        """See the class."""
        return ranges(self.starts, self.d, self.heads, self.m // self.heads)

    def step(self, chunk: Chunk, first: int, x: Tensor) -> Tensor:
        """See `Operator.step`."""
        layers = {number: first + bool(self.starts[-1]) + at for at, (number, _) in enumerate(wide(self.starts))}
        earlier = self._earlier(chunk, first, x)
        found: Partial | None = None
        for number in range(len(self.starts)):
            part = self._range(chunk, layers.get(number), number, x, *earlier(self.starts[number]))
            found = part if found is None else merge(found, part)
        assert found is not None, "there is a range at the least"
        return found.out.flatten(1)

    def _range(self, chunk: Chunk, layer: int | None, number: int, x: Tensor, then: Tensor, there: Tensor) -> Partial:
        """Attention over one range's tokens, of which `then` [T, d] is the one that entered it just now."""
        q, k, v = (self._under(name, number, rows) for name, rows in (("q", x), ("k", then), ("v", then)))
        hidden = torch.where(there, 0.0, HIDDEN).to(x)[:, None, None].expand(-1, self.heads, 1)
        if layer is None:
            lse = (q * k).sum(-1) * self.scale + hidden.squeeze(-1)
            return Partial(v, lse)
        spare = torch.zeros_like(hidden)
        chunk.append(layer, k=torch.cat((k, hidden, spare), dim=-1), v=v)
        asked = torch.cat((q, torch.ones_like(hidden), spare), dim=-1)
        return chunk.attend(layer, asked, scale=self.scale, want_lse=True)

    def _under(self, name: str, number: int, x: Tensor) -> Tensor:
        """x [T, d] through a range's matrix: [T, heads, width]."""
        every = self.matrices(name)
        return by_head(self.project(name, x) if every is None else x @ every[number], self.heads)

    def _earlier(self, chunk: Chunk, first: int, x: Tensor) -> _Earlier:
        """Keeps x, and gives that of tokens some places back."""
        if not self.starts[-1]:
            return _Earlier(x, torch.arange(len(x), device=x.device)[None], torch.tensor(chunk.positions))
        chunk.append(first, x=x.unsqueeze(1))
        rows, index, at = [], [], 0
        for held in chunk.rows(first):
            back = torch.arange(self.starts[-1] + 1, device=x.device)[:, None]
            place = torch.searchsorted(held.positions, (held.asking - back).clamp_min(int(held.positions[0])))
            rows.append(held.streams["x"][0])
            index.append(place + at)
            at += len(held.positions)
        return _Earlier(torch.cat(rows), torch.cat(index, dim=1), torch.tensor(chunk.positions, device=x.device))


class _Earlier:
    """x of tokens some places back: rows f32 [n, d], index int64 [places, T], positions of the T."""

    def __init__(self, rows: Tensor, index: Tensor, positions: Tensor) -> None:
        self.rows, self.index, self.positions = rows, index, positions

    def __call__(self, back: int) -> tuple[Tensor, Tensor]:
        """[T, d], and whether there is such a token: bool [T]."""
        return self.rows[self.index[back]], self.positions >= back
