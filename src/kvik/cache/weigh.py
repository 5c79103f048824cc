"""What several scorers share: the attention of observed queries, pooling over rows, rotations.

Legend: L lanes, n rows, G queries that share a lane, w observed queries, b of them in a block, D width of keys.
Everything here takes a packed `Seen`: each lane's rows first, zeros behind them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from kvik.cache.seen import Seen

ROOM = 1 << 24  # numbers that are held at a time, 64 MiB, so that memory doesn't grow with queries times rows


def logits(seen: Seen) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores of the observed queries against every row, a block of queries at a time.

    Yields:
        f32 [L, G, b, n], and bool [L, 1, b, n]: which of them a query doesn't see, by position.
    """
    assert seen.queries is not None and seen.asking is not None, "no queries were observed"
    step = max(1, ROOM // max(1, seen.positions.numel() * seen.queries.shape[2]))
    for queries, asking in zip(torch.split(seen.queries, step), torch.split(seen.asking, step), strict=True):
        hidden = ~seen.held[:, None] | (seen.positions[:, None] > asking[:, None])
        yield torch.einsum("wlgd,lnd->lgwn", queries, seen.keys) * seen.scale, hidden[:, None]


def weights(seen: Seen) -> Iterator[Tensor]:
    """Attention of the observed queries to every row, a block of queries at a time: f32 [L, G, b, n]."""
    for scores, hidden in logits(seen):
        yield softmax(scores, hidden)


def softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    """Over the last dimension, without what is hidden; all 0 where everything is."""
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)


def askers(seen: Seen) -> Tensor:
    """f32 [L, n]: how many of the observed queries see each row, by position; at least 1."""
    assert seen.asking is not None, "no queries were observed"
    before = torch.searchsorted(seen.asking.sort().values, seen.positions)
    return (len(seen.asking) - before).clamp(min=1).float()


def mean_pooled(scores: Tensor, held: Tensor, width: int) -> Tensor:
    """Means over `width` neighbouring rows of a lane, [L, n]; fewer at its ends, where there are no more."""
    sides = (width // 2, width - 1 - width // 2)

    def means(rows: Tensor) -> Tensor:
        return functional.avg_pool1d(functional.pad(rows.masked_fill(~held, 0), sides), width, 1)

    return means(scores) / means(torch.ones_like(scores)).clamp(min=0.5 / width)


def max_pooled(scores: Tensor, held: Tensor, width: int) -> Tensor:
    """Maxima over `width` neighbouring rows of a lane, [L, n]."""
    sides = (width // 2, width - 1 - width // 2)
    padded = functional.pad(scores.masked_fill(~held, -torch.inf), sides, value=-torch.inf)
    return functional.max_pool1d(padded, width, 1)


def by_position(rows: Tensor, seen: Seen, length: int) -> Tensor:
    """f32 [L, length]: each row's number at its position, 0 where a lane holds none.

    No two numbers share a place, so that sums over the result have one order, on any device.
    """
    places = seen.positions.where(seen.held, length)  # rows that aren't held go to one more column, which is cut off
    return rows.new_zeros(len(rows), length + 1).scatter_(1, places, rows)[:, :length]


def turns(frequencies: Tensor, positions: Tensor) -> Tensor:
    """complex128 [positions, D/2]: what position does to a pair, as a number to multiply by. In float64, since in
    float32 angles are off by 8e-4 at position 100,000."""
    angles = positions.double()[:, None] * frequencies.to(positions.device, torch.float64)
    return torch.polar(torch.ones_like(angles), angles)


def turned(rows: Tensor, by: Tensor) -> Tensor:
    """f32 [..., D], its neighbouring pairs multiplied by complex [..., D/2]."""
    pairs = torch.view_as_complex(torch.unflatten(rows, -1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * by.to(pairs.dtype)).flatten(-2)


def redundancy(seen: Seen, alike: float) -> Tensor:
    """How much each row's key repeats others of its lane: f32 [L, n], softmax over a lane's rows (R-KV's second term).

    Of the mean cosine to all rows, with two exceptions: a key is not compared with itself, and each row leaves out the
    latest other row that is closer to it than `alike`, so that of many copies the latest looks least redundant. In
    blocks of rows, so that memory stays bounded; time is n².
    """
    keys = functional.normalize(seen.keys, dim=-1)  # rows that aren't held are zero, so their cosines are too
    lanes, rows = seen.positions.shape
    number = torch.arange(1, rows + 1, dtype=torch.int32, device=keys.device)
    total = keys.new_zeros(lanes, rows)
    step = max(1, (ROOM >> 4) // max(1, lanes * rows))  # small: a block is gone through several times
    for start in range(0, rows, step):
        cosine = keys[:, start : start + step] @ keys.mT
        cosine.diagonal(start, 1, 2).zero_()
        latest = ((cosine > alike) * number).amax(-1, keepdim=True).long() - 1  # -1: none is that close
        place = latest.clamp(min=0)
        cosine.scatter_(2, place, cosine.gather(2, place).masked_fill(latest >= 0, 0))
        total += cosine.sum(1)
    mean = total / seen.lengths.clamp(min=1)[:, None]
    return softmax(mean, ~seen.held)
