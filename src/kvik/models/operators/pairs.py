"""Scores and mixtures over pairs of tokens, some sets of matrices at a time: no tensor [n, n, d, m] ever exists.

The pairs (i, j) that a set of matrices serves are gathered, multiplied by its one matrix, and reduced to a score a
head, or added to their token's output; `SETS` sets go through one batched product, those with as many pairs together.
All sets' pairs are the n² pairs (half of them in a causal line), each multiplied once: 2 · pairs · d · m operations a
projection, each matrix read once. At once are held the rows of `SETS` sets, SETS · n · (d + m) numbers a text at the
most; where gradients are wanted, all pairs' rows, pairs · (d + m), or again those of `SETS` sets where `recompute` says
so (they are computed a second time on the way back).

Legend: B texts, n tokens, H heads, D width of a head, d inputs, m = H · D outputs, K sets, c sets of a chunk, P pairs
of the largest of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvik.models.operators.geometry import Geometry

SETS = 8  # in one product: more hold more, fewer cost more calls


@dataclass(frozen=True)
class Chunk:
    """The pairs of some sets, padded to as many for each.

    Attributes:
        count: c.
        i, j: int64 [c · P], queries and keys; 0 where a set has fewer pairs.
        places: int64 [c · P], i · n + j; n² where a set has fewer pairs.
    """

    count: int
    i: Tensor
    j: Tensor
    places: Tensor


@dataclass(frozen=True)
class Pairs:
    """All pairs of n tokens.

    Attributes:
        n: tokens.
        chunks: that they are taken in.
        order: int64 [sets that have pairs], the chunks' sets of keys and values; None = all, as they come.
        mirrored: the same of queries.
        hidden: bool [n, n], what isn't seen.
        table: see `Geometry.table`.
        sets: those that have pairs, each with that of its queries.
    """

    n: int
    chunks: tuple[Chunk, ...]
    order: Tensor | None
    mirrored: Tensor | None
    hidden: Tensor
    table: Tensor
    sets: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, geometry: Geometry, n: int, device: torch.device) -> Pairs:
        """Sorts a table by its sets, those with most pairs first."""
        table = geometry.table(n)
        counts = torch.bincount(table[table >= 0], minlength=geometry.sets)
        order = counts.argsort(descending=True, stable=True)
        order = order[counts[order] > 0]
        found = [(table == number).nonzero() for number in order.tolist()]
        mirrored = torch.stack([table[j, i] for (i, j), *_ in found]) if geometry.mirrored else order
        chunks = [_chunk(found[at : at + SETS], n) for at in range(0, len(found), SETS)]
        chunks = [Chunk(c.count, *(x.to(device) for x in (c.i, c.j, c.places))) for c in chunks]
        sets = tuple(zip(order.tolist(), mirrored.tolist(), strict=True))
        plain = torch.arange(geometry.sets)
        keys, queries = (None if torch.equal(each, plain) else each.to(device) for each in (order, mirrored))
        return cls(n, tuple(chunks), keys, queries, (table < 0).to(device), table.to(device), sets)

    def cut(self, weight: Tensor | None, order: Tensor | None) -> list[Tensor] | list[None]:
        """Matrices [K, d, m] chunk by chunk, [c, d, m]; their gradients are put together once."""
        if weight is None:
            return [None] * len(self.chunks)
        counts = [chunk.count for chunk in self.chunks]
        used = weight[: sum(counts)] if order is None else weight.index_select(0, order)
        return list(torch.split(used, counts))


def _chunk(found: list[Tensor], n: int) -> Chunk:
    longest = max(map(len, found))
    i, j, places = [], [], []
    for pairs in found:
        missing = (0, longest - len(pairs))
        i.append(torch.nn.functional.pad(pairs[:, 0], missing))
        j.append(torch.nn.functional.pad(pairs[:, 1], missing))
        places.append(torch.nn.functional.pad(pairs[:, 0] * n + pairs[:, 1], missing, value=n * n))
    return Chunk(len(found), torch.cat(i), torch.cat(j), torch.cat(places))


def scores(
    q: Tensor, k: Tensor, wq: Tensor | None, wk: Tensor | None, pairs: Pairs, heads: int, recompute: bool = False
) -> Tensor:
    """Products of queries and keys, not scaled; -inf where nothing is seen.

    Args:
        q, k: [B, n, d], or [B, n, m] where they are projected already.
        wq, wk: [K, d, m]; None = projected already.

    Returns:
        [B, H, n, n].
    """
    if wq is None and wk is None:
        return plain(q, k, heads).masked_fill(pairs.hidden, -torch.inf)
    n, batch = pairs.n, len(q)
    first, second = (x.transpose(0, 1).contiguous() for x in (q, k))
    parts = [
        _run(_score, recompute, first, second, a, b, chunk, heads)
        for chunk, a, b in zip(pairs.chunks, pairs.cut(wq, pairs.mirrored), pairs.cut(wk, pairs.order), strict=True)
    ]
    flat, places = torch.cat(parts), torch.cat([chunk.places for chunk in pairs.chunks])
    out = flat.new_full((n * n + 1, batch, heads), -torch.inf).index_copy(0, places, flat)
    return out[:-1].view(n, n, batch, heads).permute(2, 3, 0, 1)


def mixed(weights: Tensor, v: Tensor, wv: Tensor | None, pairs: Pairs, recompute: bool = False) -> Tensor:
    """Σ_j weights_ij v_ij.

    Args:
        weights: [B, H, n, n]; 0 where nothing is seen.
        v: [B, n, d], or [B, n, m] where it is projected already.
        wv: [K, d, m]; None = projected already.

    Returns:
        [B, n, m].
    """
    batch, heads, n, _ = weights.shape
    if wv is None:
        return (weights @ by_head(v, heads).transpose(1, 2)).transpose(1, 2).flatten(2)
    flat = weights.permute(2, 3, 0, 1).reshape(n * n, batch, heads)
    flat = torch.cat((flat, flat.new_zeros((1, batch, heads))))  # what pads a chunk weighs nothing
    rows, out = v.transpose(0, 1).contiguous(), v.new_zeros((n, batch, wv.shape[-1]))
    for chunk, matrices in zip(pairs.chunks, pairs.cut(wv, pairs.order), strict=True):
        out.index_add_(0, chunk.i, _run(_value, recompute, rows, matrices, flat, chunk, heads))
    return out.transpose(0, 1)


def plain(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """q kᵀ for every head: [B, n, m] → [B, H, n, n]."""
    a, b = (by_head(x, heads).transpose(1, 2) for x in (q, k))
    return a @ b.transpose(2, 3)


def by_head(x: Tensor, heads: int) -> Tensor:
    """[… m] → [… heads, width]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def _run(function: Callable[..., Tensor], recompute: bool, *arguments: object) -> Tensor:
    if recompute and torch.is_grad_enabled():
        found: Tensor = checkpoint(function, *arguments, use_reentrant=False)
        return found
    return function(*arguments)


def _product(rows: Tensor, index: Tensor, matrices: Tensor | None, count: int) -> Tensor:
    """Rows [n, B, d] by index [c · P], through their sets' matrices [c, d, m]: [c · P, B, m]."""
    found = rows.index_select(0, index)
    if matrices is None:
        return found
    return torch.bmm(found.view(count, -1, found.shape[-1]), matrices).view(*found.shape[:2], -1)


def _score(q: Tensor, k: Tensor, a: Tensor | None, b: Tensor | None, chunk: Chunk, heads: int) -> Tensor:
    """One chunk: [c · P, B, H]."""
    return by_head(_product(q, chunk.i, a, chunk.count) * _product(k, chunk.j, b, chunk.count), heads).sum(-1)


def _value(v: Tensor, matrices: Tensor, weights: Tensor, chunk: Chunk, heads: int) -> Tensor:
    """One chunk: [c · P, B, m]."""
    values = by_head(_product(v, chunk.j, matrices, chunk.count), heads)
    return (values * weights.index_select(0, chunk.places).unsqueeze(-1)).flatten(2)
