"""New tokens over rows read back from a cache: the pairs of a chunk, one set of matrices an offset.

A block of T consecutive queries over rows at consecutive positions has offsets low … high - 1, and its pairs are a
table of (offset, query). One batched product an offset serves all its queries; each matrix is read once a block:

    rows at 3 4 5, queries at 5 6            query 5   query 6
                                 offset 0    row 5     -
                                 offset 1    row 4     row 5
                                 offset 2    row 3     row 4
                                 offset 3    -         row 3

Rows that a retention dropped are gaps between runs. Offsets are differences of positions, never of slots.

Legend: T queries of a block, E offsets of a run, H heads, n rows held, d inputs, m outputs, K sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvik.errors import ContextError
from kvik.models.operators.pairs import by_head
from kvik.ops.reads import Rows

BLOCK = 16  # queries at once: bounds what is held to BLOCK · n · (d + m) numbers


@dataclass(frozen=True)
class Run:
    """Pairs of a block's queries with rows at consecutive positions.

    Attributes:
        low, high: the offsets.
        index: int64 [E, T], which row; 0 where there is none.
        there: bool [E, T], whether there is one that the query sees.
    """

    low: int
    high: int
    index: Tensor
    there: Tensor


@dataclass(frozen=True)
class Block:
    """Consecutive queries, which of the sequence's they are, and all that they see."""

    queries: slice
    runs: tuple[Run, ...]


def blocks(held: Rows, sets: int) -> Iterator[Block]:
    """A chunk's queries, block by block.

    Raises:
        ContextError: a query sees a row further back than there are matrices for.
    """
    for start in range(0, len(held.asking), BLOCK):
        queries = slice(start, min(start + BLOCK, len(held.asking)))
        yield Block(queries, tuple(_runs(held, queries, sets)))


def _runs(held: Rows, queries: slice, sets: int) -> Iterator[Run]:
    asking, visible = held.asking[queries], held.visible[queries]
    seen = visible.any(0).nonzero().squeeze(1)
    positions = held.positions[seen]
    furthest = int((asking[:, None] - held.positions)[visible].max())
    if furthest >= sets:
        raise ContextError(
            f"a token sees another {furthest:,} positions before it, and there are matrices for {sets:,} offsets; "
            "shorten the text, or let a window hide what is further away"
        )
    ends = (positions.diff() != 1).nonzero().squeeze(1) + 1
    for rows in torch.tensor_split(seen, ends):
        first, last = int(held.positions[rows[0]]), int(held.positions[rows[-1]])
        low, high = max(int(asking[0]) - last, 0), min(int(asking[-1]) - first + 1, sets)
        place = asking - torch.arange(low, high, device=asking.device)[:, None] - first
        inside = (place >= 0) & (place <= last - first)
        index = torch.where(inside, place, 0) + int(rows[0])
        there = inside & visible.gather(1, index.t()).t()
        yield Run(low, high, torch.where(there, index, 0), there)


def products(rows: Tensor, weight: Tensor | None, run: Run) -> Tensor:
    """Rows [E, T, d] through their offsets' matrices [K, d, m]: [E, T, m]; None = they are projected already."""
    return rows if weight is None else torch.bmm(rows, weight[run.low : run.high])


def scores(q: Tensor, k: Tensor, wq: Tensor | None, wk: Tensor | None, run: Run, heads: int) -> Tensor:
    """Products of queries [T, d] and rows read back [n, d]: [E, T, H], not scaled, hidden ones included."""
    a = products(q.expand(len(run.index), *q.shape), wq, run)
    b = products(k[run.index], wk, run)
    return by_head(a * b, heads).sum(-1)


def softmax(parts: list[Tensor], runs: tuple[Run, ...]) -> list[Tensor]:
    """Weights over all of a block's pairs, from scores [E, T, H] run by run."""
    there = torch.cat([run.there for run in runs])
    joined = torch.cat(parts).masked_fill(~there.unsqueeze(-1), -torch.inf)
    return list(torch.split(joined.softmax(0), [len(part) for part in parts]))


def mixed(weights: Tensor, v: Tensor, wv: Tensor | None, run: Run) -> Tensor:
    """Σ weights · values of one run: weights [E, T, H], rows read back [n, d] → [T, m]."""
    values = by_head(products(v[run.index], wv, run), weights.shape[-1])
    return (values * weights.unsqueeze(-1)).sum(0).flatten(1)
