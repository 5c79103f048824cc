"""Queries that read few pages: those whose keys can have the largest products with them (Quest, arXiv:2406.10774).

    page      0 .. 31   32 .. 63   64 .. 95   96 .. 127       a query at 101, 3 pages, 4 sinks, 16 recent
    bound        -         0.7        2.9        -
    read      sinks        no         best       its own, and the recent 86 .. 101

What a query reads depends on its own position, its lane's query heads and pages that were full before it, so that the
cut can't show. Of each page its channels' extremes are known: no key in it has a larger product with the query than

    Σ_d max(q_d · low_d, q_d · high_d)          added up channel by channel, in f32

The extremes lie sixteen pages side by side, in bf16 rounded outwards: 4 bytes a channel and page.

Legend: T queries' tokens, L lanes, G queries that share a lane, C pages, N rows a page, D width of keys, B = ⌈C / 16⌉.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.ops.layout import TOGETHER
from kvik.ops.reads import Kept, Member, Reads, Select, Span

Extremes = NDArray[np.uint16]  # [L, B, 2, D, 16]: low, then high


def room(lanes: int, pages: int, width: int) -> Extremes:
    """For the extremes of so many pages: zeros, uint16 [L, ⌈pages / 16⌉, 2, D, 16]."""
    return np.zeros((lanes, -(-pages // TOGETHER), 2, width, TOGETHER), np.uint16)


def extremes(keys: Tensor) -> Extremes:
    """Each channel's least and largest value in each page, outwards to bf16.

    Args:
        keys: f32 [L, C, N, D].

    Returns:
        Bits of bf16, uint16 [L, C, 2, D]. Never infinite; a page with a NaN spans everything.
    """
    far = torch.finfo(torch.bfloat16).max
    low = keys.amin(2).nan_to_num(-far).clamp(-far, far)
    high = keys.amax(2).nan_to_num(far).clamp(-far, far)
    bits = torch.stack((low, high), dim=2).cpu().contiguous().numpy().view(np.uint32)
    cut = (bits & 0xFFFF) != 0
    outwards = np.stack((bits[:, :, 0] >> 31 == 1, bits[:, :, 1] >> 31 == 0), axis=2)
    return np.asarray((bits >> 16) + (cut & outwards), np.uint16)


def put(into: Extremes, first: int, pages: Extremes) -> None:
    """Writes the extremes of pages [L, C', 2, D] from page `first` on; modifies `into`."""
    at = np.arange(first, first + pages.shape[1])
    into[:, at // TOGETHER, :, :, at % TOGETHER] = pages.transpose(1, 0, 2, 3)


def bounds(queries: Tensor, extremes: Extremes) -> Tensor:
    """No key of a page has a larger product with the query: f32 [T, L, 16·B], the largest over G, which share what is
    read; -inf where the sum is no number.

    Args:
        queries: f32 [T, L, G, D], turned.
        extremes: [L, B, 2, D, 16].
    """
    ends = torch.from_numpy(extremes.astype(np.int32) << 16).view(torch.float32).to(queries.device)
    low, high = (end.permute(2, 0, 1, 3).flatten(2) for end in ends.unbind(2))  # [D, L, pages]
    q = queries[..., None]
    total = queries.new_zeros((*queries.shape[:3], low.shape[-1]))
    for d in range(queries.shape[-1]):  # one by one: any other order of additions could show the cut
        x = q[..., d, :]
        total = total + torch.where(x >= 0, x * high[d][:, None], x * low[d][:, None])
    return total.masked_fill(total.isnan(), -torch.inf).amax(2)


def chosen(select: Select, span: Span, queries: Tensor, extremes: Extremes) -> NDArray[np.int64]:
    """The pages before the recent ones that each query reads, in order: int64 [T, L, count].

    The first `span.sinks`, and of the others those of largest bound; the later one where two are equal.

    Args:
        select: how many.
        span: which of them are open to choice, by the queries' position.
        queries, extremes: see `bounds`.
    """
    scores = bounds(queries, extremes)[..., span.sinks : span.recent]
    order = torch.sort(scores.flip(-1), dim=-1, descending=True, stable=True).indices
    best = span.recent - 1 - order[..., : span.free]  # flipped back: of equals the later page came first
    always = torch.arange(span.sinks, device=best.device).expand(*best.shape[:2], -1)
    return torch.cat((always, best.sort(dim=-1).values), dim=-1).cpu().numpy()


def narrowed(reads: Reads, lanes: slice, q: Tensor) -> tuple[Reads, list[tuple[int, NDArray[np.int64]]]]:
    """The same step in some lanes, in which each query that chooses is a member of its own.

    Args:
        reads: some of whose members choose.
        lanes: which of the group's.
        q: f32 [T, H, D].

    Returns:
        What is read; and for each of its members whose of `reads` it is, with int64 [L, columns]: the column there of
        each of its own pages, chosen ones first.
    """
    select, size = reads.select, reads.page_size
    assert select is not None, "some members choose"
    members, origins, first = [], [], 0
    count = lanes.stop - lanes.start
    for index, member in enumerate(reads.members):
        pages, every = np.ascontiguousarray(member.pages[lanes]), np.arange(member.columns)
        asked = torch.unflatten(q[first : first + member.count], 1, (count, -1))
        first += member.count
        whole = np.broadcast_to(every, (count, member.columns))
        if member.extremes is None:
            kept = None if member.kept is None else _lanes_of(member.kept, lanes)
            members.append(Member(pages, member.logical, member.start, member.count, kept))
            origins.append((index, whole))
            continue
        for token in range(member.count):
            at = member.start + token
            span = select.span(at, size)
            if span is None:
                members.append(Member(pages, member.logical, at, 1))
                origins.append((index, whole))
                continue
            (best,) = chosen(select, span, asked[token : token + 1], member.extremes[lanes])
            held = np.take_along_axis(pages, best, axis=1)
            rows = (best[:, :, None] * size + np.arange(size)).reshape(count, -1).astype(np.int32)
            kept = Kept(held, np.full(count, rows.shape[1], np.int32), rows)
            recent = slice(span.recent, at // size + 1)
            members.append(Member(np.ascontiguousarray(pages[:, recent]), member.logical[recent], at, 1, kept))
            origins.append((index, np.concatenate((best, whole[:, recent]), axis=1)))
    centre = None if reads.centre is None else reads.centre[lanes]
    return Reads(reads.layout, size, reads.window, reads.sinks, tuple(members), centre), origins


def gathered(
    masses: tuple[Tensor, ...], origins: list[tuple[int, NDArray[np.int64]]], reads: Reads
) -> tuple[Tensor, ...]:
    """Masses of `narrowed` members as masses of `reads`' own: [L, columns · N] each."""
    size, lanes = reads.page_size, masses[0].shape[0]
    out = tuple(masses[0].new_zeros((lanes, member.columns * size)) for member in reads.members)
    for mass, (index, columns) in zip(masses, origins, strict=True):
        places = (columns[:, :, None] * size + np.arange(size)).reshape(lanes, -1)
        out[index].scatter_add_(1, torch.from_numpy(places).to(mass.device), mass)
    return out


def _lanes_of(kept: Kept, lanes: slice) -> Kept:
    return Kept(*(np.ascontiguousarray(each[lanes]) for each in (kept.pages, kept.counts, kept.positions)))
