"""Stored rows, decoded: for looking at, and for policies that look at keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvik.cache.table import Rows
from kvik.ops import pages as paged
from kvik.ops.codecs import unrotated
from kvik.ops.reads import Member, Reads
from kvik.ops.reads import Rows as Held

if TYPE_CHECKING:
    from kvik.cache.cache import Cache
    from kvik.cache.parts import Part
    from kvik.cache.sequence import Sequence


def read(cache: Cache, sequence: Sequence, layer: int) -> dict[str, Tensor]:
    """See `Sequence.read`."""
    found = []
    for part in cache.parts[layer]:
        table = sequence.tables[part.group]
        positions, slots = (each[part.lanes] for each in table.rows(len(sequence)))
        found.append((part, positions, decoded(cache, part.group, part.lanes, slots)))
    every = np.unique(np.concatenate([positions.reshape(-1) for _, positions, _ in found]))
    every = every[every >= 0]
    out = {"positions": torch.from_numpy(every)}
    heads = sum(part.lanes.stop - part.lanes.start for part, *_ in found)
    for part, positions, rows in found:
        lanes, held = np.nonzero(positions >= 0)
        mine = np.arange(heads) if part.heads is None else np.array(part.heads)
        places = torch.from_numpy(np.searchsorted(every, positions[lanes, held]))
        for name, values in rows.items():
            empty = values.new_full((heads, len(every), values.shape[-1]), torch.nan)
            stream = out.setdefault(name, empty)
            stream[torch.from_numpy(mine[lanes]), places] = values[torch.from_numpy(lanes), torch.from_numpy(held)]
    return out


def held(cache: Cache, sequence: Sequence, part: Part, reads: Reads, member: Member) -> Held:
    """One sequence's rows of a layer in the middle of a step; see `Step.rows`."""
    table, asking = sequence.tables[part.group], np.arange(member.start, member.start + member.count)
    positions, slots = (each[part.lanes] for each in table.rows(member.start + member.count))
    streams = decoded(cache, part.group, part.lanes, slots)
    arrays = (positions[0], asking, reads.visible(asking[:, None], positions[0]))
    at, new, visible = (torch.from_numpy(np.ascontiguousarray(each)).to(cache.device) for each in arrays)
    return Held(at, new, visible, streams)


def decoded(cache: Cache, group: int, lanes: slice, slots: Rows) -> dict[str, Tensor]:
    """Some lanes' rows as they were appended, but for what their codecs lost.

    Args:
        group: its number.
        lanes: which of the group's.
        slots: int64 [L, n], for each of these lanes.

    Returns:
        f32 [L, n, W] by stream.
    """
    of, where = cache.spec.groups[group], torch.from_numpy(slots).to(cache.device)
    stored = paged.rows(cache.pages(of), of.layout, of.page_size, where.reshape(-1))
    rows = {name: torch.unflatten(unrotated(of.layout, name, x), 0, where.shape) for name, x in stored.items()}
    centre = cache.centres[group]
    return rows if centre is None else {**rows, "k": rows["k"] + centre[lanes].unsqueeze(1)}
