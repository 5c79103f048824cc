"""Scores and mixtures over pairs of tokens, set by set: no tensor [n, n, d, m] ever exists.

For each set s of matrices, the P_s pairs (i, j) that it serves are gathered, multiplied by the set's one matrix, and
reduced to a score a head, or added to their token's output. All sets' pairs together are the n² pairs (half of them in
a causal line), each multiplied once: 2 · pairs · d · m operations a projection, each matrix read once. What is held at
once is one set's rows, at most n · (d + m) numbers; where gradients are wanted, all pairs' rows: pairs · (d + m), or
again one set's where `recompute` says so (they are computed a second time on the way back).

Legend: B texts, n tokens, H heads, D width of a head, d inputs, m = H · D outputs, K sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvik.models.operators.geometry import Geometry


@dataclass(frozen=True)
class Group:
    """The pairs that one set of matrices serves.

    Attributes:
        set, mirror: the set of keys and values, and that of queries.
        i, j: int64 [P], queries and keys.
    """

    set: int
    mirror: int
    i: Tensor
    j: Tensor


@dataclass(frozen=True)
class Pairs:
    """All pairs of n tokens.

    Attributes:
        n: tokens.
        groups: set by set.
        places: int64 [all pairs], i · n + j in the groups' order.
        hidden: bool [n, n], what isn't seen.
    """

    n: int
    groups: tuple[Group, ...]
    places: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, geometry: Geometry, n: int, device: torch.device) -> Pairs:
        """Sorts a table by its sets."""
        table = geometry.table(n)
        groups = []
        for number in range(geometry.sets):
            i, j = (table == number).nonzero(as_tuple=True)
            if len(i):
                mirror = int(table[j[0], i[0]]) if geometry.mirrored else number
                groups.append(Group(number, mirror, i.to(device), j.to(device)))
        places = torch.cat([group.i * n + group.j for group in groups])
        return cls(n, tuple(groups), places, (table < 0).to(device))


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
    queries, keys = _sets(wq), _sets(wk)
    parts = []
    for group in pairs.groups:
        a, b = _of(queries, group.mirror), _of(keys, group.set)
        parts.append(_run(_score, recompute, q, k, a, b, group.i, group.j, heads))
    flat = torch.cat(parts, dim=1)
    out = flat.new_full((len(q), pairs.n * pairs.n, heads), -torch.inf).index_copy(1, pairs.places, flat)
    return out.view(len(q), pairs.n, pairs.n, heads).permute(0, 3, 1, 2)


def mixed(weights: Tensor, v: Tensor, wv: Tensor | None, pairs: Pairs, recompute: bool = False) -> Tensor:
    """Σ_j weights_ij v_ij.

    Args:
        weights: [B, H, n, n]; 0 where nothing is seen.
        v: [B, n, d], or [B, n, m] where it is projected already.
        wv: [K, d, m]; None = projected already.

    Returns:
        [B, n, m].
    """
    heads = weights.shape[1]
    if wv is None:
        return (weights @ by_head(v, heads).transpose(1, 2)).transpose(1, 2).flatten(2)
    flat = weights.permute(0, 2, 3, 1).flatten(1, 2).index_select(1, pairs.places)
    out, at = v.new_zeros((len(v), pairs.n, wv.shape[-1])), 0
    for group, matrix in ((group, wv_s) for group, wv_s in zip(pairs.groups, _chosen(wv, pairs), strict=True)):
        part = _run(_value, recompute, v, matrix, flat[:, at : at + len(group.i)], group.j, heads)
        out.index_add_(1, group.i, part)
        at += len(group.i)
    return out


def plain(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """q kᵀ for every head: [B, n, m] → [B, H, n, n]."""
    a, b = (by_head(x, heads).transpose(1, 2) for x in (q, k))
    return a @ b.transpose(2, 3)


def by_head(x: Tensor, heads: int) -> Tensor:
    """[… m] → [… heads, width]."""
    return x.reshape(*x.shape[:-1], heads, -1)


def _sets(weight: Tensor | None) -> tuple[Tensor, ...] | None:
    """Matrices one by one: their gradients are then put together once, not added K times."""
    return None if weight is None else weight.unbind(0)


def _chosen(weight: Tensor, pairs: Pairs) -> list[Tensor]:
    every = weight.unbind(0)
    return [every[group.set] for group in pairs.groups]


def _of(weights: tuple[Tensor, ...] | None, number: int) -> Tensor | None:
    return None if weights is None else weights[number]


def _run(function: Callable[..., Tensor], recompute: bool, *arguments: object) -> Tensor:
    if recompute and torch.is_grad_enabled():
        found: Tensor = checkpoint(function, *arguments, use_reentrant=False)
        return found
    return function(*arguments)


def _score(q: Tensor, k: Tensor, a: Tensor | None, b: Tensor | None, i: Tensor, j: Tensor, heads: int) -> Tensor:
    """One set: [B, P, H]."""
    q, k = q.index_select(1, i), k.index_select(1, j)
    q, k = q if a is None else q @ a, k if b is None else k @ b
    return by_head(q * k, heads).sum(-1)


def _value(v: Tensor, w: Tensor, weights: Tensor, j: Tensor, heads: int) -> Tensor:
    """One set: [B, P, m]."""
    return (by_head(v.index_select(1, j) @ w, heads) * weights.unsqueeze(-1)).flatten(2)
