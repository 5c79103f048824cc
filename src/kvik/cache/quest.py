"""Which pages a query reads, where no row is dropped (Quest, arXiv:2406.10774).

    page      0 .. 31   32 .. 63   64 .. 95   96 .. 127        a query at 101, 3 pages, 4 sinks, 16 recent
    bound       3.1        0.7        2.9        (not asked)
    read      sinks        -          best       its own, and the recent 86 .. 101: also page 64 .. 95

What a query reads depends on its own position and on pages that were full before it, so that the cut can't show: its
own page is always read, and of a page before it every row counts, whoever stands in the same step.

Legend: T queries' tokens, L lanes, G queries that share a lane, P pages, N rows a page, D width of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kvik.cache.seen import Seen


@dataclass(frozen=True)
class PageBounds:
    """What is known of a layer's pages without reading them.

    Attributes:
        low: f32 [L, P, D], the least of each channel of a page's keys; 0 for a page that a lane doesn't hold.
        high: f32 [L, P, D], the most.
        first: int64 [L, P], the position of a page's first row; -1 for a page that a lane doesn't hold.
        last: int64 [L, P], of its last row.
    """

    low: Tensor
    high: Tensor
    first: Tensor
    last: Tensor

    @classmethod
    def of(cls, seen: Seen, page_size: int) -> PageBounds:
        """The bounds of pages of `page_size` rows: columns p·N … p·N+N-1 are page p; the last may be short."""
        short = -seen.positions.shape[1] % page_size
        positions = torch.unflatten(functional.pad(seen.positions, (0, short), value=-1), 1, (-1, page_size))
        keys = torch.unflatten(functional.pad(seen.keys, (0, 0, 0, short)), 1, (-1, page_size))
        missing, nobody = positions < 0, (positions < 0).all(-1)
        low = keys.masked_fill(missing[..., None], torch.inf).amin(2).masked_fill(nobody[..., None], 0)
        high = keys.masked_fill(missing[..., None], -torch.inf).amax(2).masked_fill(nobody[..., None], 0)
        far = torch.iinfo(torch.int64).max
        first = positions.masked_fill(missing, far).amin(2).masked_fill(nobody, -1)
        return cls(low, high, first, positions.amax(2))


def upper_bounds(queries: Tensor, bounds: PageBounds) -> Tensor:
    """No key of a page has a larger product with the query than Σ_d max(q_d · low_d, q_d · high_d).

    Args:
        queries: f32 [T, L, G, D], turned.
        bounds: of P pages.

    Returns:
        f32 [T, L, P]: the largest over the G queries that share a lane, since they share what is read.
    """
    up = torch.einsum("tlgd,lpd->tlgp", queries.clamp(min=0), bounds.high)
    down = torch.einsum("tlgd,lpd->tlgp", queries.clamp(max=0), bounds.low)
    return (up + down).amax(2)


def choose_pages(
    queries: Tensor, asking: Tensor, bounds: PageBounds, pages: int, *, sinks: int = 0, recent: int = 1
) -> Tensor:
    """The pages that each query token reads: bool [T, L, P].

    Pages of the first `sinks` positions and of the last `recent` ones are always read and count; the rest of `pages` go
    to the pages of largest bound, the later one where two are equal. A lane that holds no more pages than that reads
    all. Pages whose rows all come after the query are never read. Layers below the policy's `dense` read everything:
    don't call this for them.

    Args:
        queries: f32 [T, L, G, D], turned.
        asking: int64 [T], their positions.
        bounds: of P pages.
        pages: how many a lane reads for a query.
        sinks: first positions that are always read.
        recent: last positions that are always read, the query's own included; at least 1.
    """
    assert recent >= 1, "a query reads its own page"
    at = asking[:, None, None]
    visible = (bounds.first >= 0) & (bounds.first <= at)
    always = visible & ((bounds.first < sinks) | (bounds.last > at - recent))
    score = upper_bounds(queries, bounds).nan_to_num(-torch.inf, torch.inf, -torch.inf).double().clamp(-1e300, 1e300)
    score = score.masked_fill(always, torch.inf).masked_fill(~visible, -torch.inf)
    order = torch.sort(score.flip(-1), dim=-1, descending=True, stable=True).indices
    order = score.shape[-1] - 1 - order  # flipped back: of equals the later page came first
    rank = torch.sort(order, dim=-1).indices
    return visible & (always | (rank < pages))
