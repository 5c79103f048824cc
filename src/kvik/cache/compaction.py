"""Rows leave: a policy chooses lane by lane, and what stays moves together, codes verbatim, into pages of its own.

    before    lane 0   [a b c d][e f g h][i j]          N = 4, 10 tokens; the policy keeps a, f, g of lane 0
              lane 1   [k l m n][o p q r][s t]          and l, m, n, o, q of lane 1
    after     lane 0   kept [a f g .]           [i j]   the open page stays where it is: rows of it are recent
              lane 1   kept [l m n o][q . . .]  [s t]

Where nobody else holds a lane's pages, its rows move within them: nothing is asked of a full arena.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kvik.cache.arena import Pages
from kvik.cache.policy import Policy, apply
from kvik.cache.publishing import withdraw
from kvik.cache.reading import decoded
from kvik.cache.seen import Seen
from kvik.cache.table import Rows, Table
from kvik.errors import BudgetError
from kvik.ops.reads import Kept

if TYPE_CHECKING:
    from kvik.cache.cache import Cache
    from kvik.cache.observed import Observed
    from kvik.cache.sequence import Sequence

Keep = NDArray[np.bool_]


def compress(cache: Cache, sequence: Sequence, table: Table, observed: Observed) -> int:
    """Lets a group's policy choose, and keeps what it chose. Returns how many rows left.

    Raises:
        BudgetError: others hold some of the pages, and there is no room for rows of its own; nothing changed.
    """
    tokens, size = len(sequence), cache.spec.page_size
    policy = table.group.retention.policy
    assert policy is not None, "asked only where there is a policy"
    positions, slots = table.rows(tokens)
    keep = np.concatenate([x.numpy() for x in _chosen(policy, cache, sequence, table, observed, positions, slots)])
    open_from = tokens - tokens % size
    keep = (keep | (positions >= open_from)) & (positions >= 0)
    gone = int((positions >= 0).sum() - keep.sum())
    places = _places(table, positions)
    if gone:
        _compact(cache, sequence, table, keep & (positions < open_from), positions)
        observed.moved(
            lambda lanes, mass: _moved(mass.gather(1, places[lanes]), table, keep[lanes], positions[lanes], open_from)
        )
    observed.done()
    return gone


def _chosen(
    policy: Policy,
    cache: Cache,
    sequence: Sequence,
    table: Table,
    observed: Observed,
    positions: Rows,
    slots: Rows,
) -> list[torch.Tensor]:
    """For each layer of the group, bool [L, n]."""

    def seen() -> Iterator[Seen]:
        for layer, lanes in _layers(table):
            yield _seen(cache, sequence, table, observed, layer, lanes, positions[lanes], slots[lanes])

    # The open page stays as it is, so its rows count: what is chosen beside them keeps to the budget.
    recent = policy.staying(len(sequence), table.group.page_size)
    return apply(replace(policy, recent=recent), seen())


def _layers(table: Table) -> list[tuple[int, slice]]:
    """The group's layers, and where their lanes lie."""
    layers = np.array([layer for layer, _ in table.group.lanes])
    found = [(layer, np.flatnonzero(layers == layer)) for layer in dict.fromkeys(layers.tolist())]
    return [(layer, slice(int(lanes[0]), int(lanes[-1]) + 1)) for layer, lanes in found]


def _seen(
    cache: Cache,
    sequence: Sequence,
    table: Table,
    observed: Observed,
    layer: int,
    lanes: slice,
    positions: Rows,
    slots: Rows,
) -> Seen:
    group = table.group
    streams = {n: x.cpu() for n, x in decoded(cache, sequence.tables.index(table), lanes, slots).items()}
    keys = torch.cat([streams[stream.name] for stream in group.layout.keys], dim=-1)
    values = streams[group.layout.value.name]
    queries, received = observed.queries(layer), observed.mass
    mass = None if received is None else received[lanes].gather(1, _places(table, positions))
    at = torch.from_numpy(positions.copy())
    return Seen(
        keys=keys,
        values=values,
        positions=at,
        tokens=len(sequence),
        scale=observed.scale or keys.shape[-1] ** -0.5,
        queries=None if queries is None else queries[0],
        asking=None if queries is None else queries[1],
        mass=mass,
        frequencies=None if group.frequencies is None else torch.tensor(group.frequencies, dtype=torch.float64),
        seed=observed.policy.seed,
        repeated=None if observed.repeated is None else observed.repeated[lanes].gather(1, at.clamp(min=0)),
    )


def _places(table: Table, positions: Rows) -> torch.Tensor:
    """int64 [L, n]: where each row's mass lies; slots of kept pages, then of the table's."""
    size = table.group.page_size
    kept = 0 if table.kept is None else table.kept.pages.shape[1]
    most = 0 if table.kept is None else int(table.kept.counts.max(initial=0))
    columns = np.searchsorted(table.logical, positions[:, most:] // size)
    after = (kept + columns) * size + positions[:, most:] % size
    before = np.broadcast_to(np.arange(most), (len(positions), most))
    return torch.from_numpy(np.concatenate((before, after), axis=1))


def _moved(mass: torch.Tensor, table: Table, keep: Keep, positions: Rows, open_from: int) -> torch.Tensor:
    """Mass f32 [lanes, n] of rows as they lay, to the places where those that stayed lie now."""
    assert table.kept is not None, "rows have left"
    size = table.group.page_size
    kept = table.kept.pages.shape[1] * size
    out = mass.new_zeros((len(mass), kept + len(table.logical) * size))
    for lane, stays in enumerate(keep):
        closed = torch.from_numpy(stays & (positions[lane] < open_from))
        still = torch.from_numpy(stays & (positions[lane] >= open_from))
        out[lane, : int(closed.sum())] = mass[lane, closed]
        out[lane, kept + torch.from_numpy(positions[lane])[still] - open_from] = mass[lane, still]
    return out


def _compact(cache: Cache, sequence: Sequence, table: Table, keep: Keep, positions: Rows) -> None:
    """Moves the rows in `keep`, bool [lanes, n], from before the open page, together; gives all other pages back."""
    size, group, counts = cache.spec.page_size, table.group, keep.sum(axis=1)
    closed, needed = table.logical < len(sequence) // size, -(-counts // size)
    shared, fresh = _fresh(cache, sequence, table, closed, needed)
    pages_of, (_, slots) = _lane_pages(table, closed), table.rows(len(sequence))  # making room may have moved them
    columns = int(needed.max(initial=0))
    kept = Kept(
        np.zeros((len(keep), columns), np.int32),
        counts.astype(np.int32),
        np.full((len(keep), columns * size), -1, np.int32),
    )
    gone = []
    for lane, pages in enumerate(pages_of):
        count, wanted = int(counts[lane]), int(needed[lane])
        if shared[lane]:
            mine, fresh, left = fresh[:wanted], fresh[wanted:], pages
        else:
            mine, left = pages[:wanted], pages[wanted:]
        gone.append(left)
        kept.pages[lane, :wanted] = mine
        kept.positions[lane, :count] = positions[lane, keep[lane]]
        target = (mine[:, None] * size + np.arange(size)).reshape(-1)[:count]
        where = (torch.from_numpy(x).to(cache.device) for x in (slots[lane, keep[lane]], target))
        cache.ops.compact(cache.pages(group), group.layout, size, *where)
    cache.replace(table, kept, ~closed, np.concatenate(gone))


def _lane_pages(table: Table, closed: Keep) -> list[Pages]:
    """Each lane's pages before the open one, in the order of their rows."""
    pages, kept = table.pages[:, closed].astype(np.int64), table.kept
    if kept is None:
        return list(pages)
    used = -(-kept.counts // table.group.page_size)
    return [np.concatenate((kept.pages[lane, : used[lane]].astype(np.int64), x)) for lane, x in enumerate(pages)]


def _fresh(cache: Cache, sequence: Sequence, table: Table, closed: Keep, needed: Rows) -> tuple[Keep, Pages]:
    """Which lanes' pages are held by others too, and pages for those lanes' rows. Where there is no room for them, what
    this text has published is withdrawn."""
    owner, page_bytes = cache.arena.page_class(table.group.page_bytes), table.group.page_bytes
    while True:
        shared = np.array([bool((owner.refs[pages] > 1).any()) for pages in _lane_pages(table, closed)])
        count = int(needed[shared].sum())
        try:
            cache.make_room({sequence.owner: {page_bytes: count}})
        except BudgetError:
            if not withdraw(cache, sequence):
                raise
            continue
        return shared, cache.arena.take(page_bytes, count, table.account)
