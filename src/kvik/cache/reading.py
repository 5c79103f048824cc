"""A layer's rows, decoded, for looking at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvik.ops import pages as paged
from kvik.ops.codecs import unrotated

if TYPE_CHECKING:
    from kvik.cache.cache import Cache
    from kvik.cache.sequence import Sequence


def read(cache: Cache, sequence: Sequence, layer: int) -> dict[str, Tensor]:
    """See `Sequence.read`."""
    size, found = cache.spec.page_size, []
    for part in cache.parts[layer]:
        table = sequence.tables[part.group]
        positions, slots = (each[part.lanes] for each in table.rows(len(sequence)))
        layout, where = table.group.layout, torch.from_numpy(slots).to(cache.device)
        stored = paged.rows(cache.pages(table.group), layout, size, where.reshape(-1))
        rows = {name: torch.unflatten(x, 0, where.shape) for name, x in stored.items()}
        found.append((part, positions, layout, rows))
    every = np.unique(np.concatenate([positions.reshape(-1) for _, positions, _, _ in found]))
    every = every[every >= 0]
    out = {"positions": torch.from_numpy(every)}
    heads = sum(part.lanes.stop - part.lanes.start for part, *_ in found)
    for part, positions, layout, rows in found:
        lanes, held = np.nonzero(positions >= 0)
        mine = np.arange(heads) if part.heads is None else np.array(part.heads)
        places = torch.from_numpy(np.searchsorted(every, positions[lanes, held]))
        for name, turned in rows.items():
            values = unrotated(layout, name, turned)
            empty = values.new_full((heads, len(every), values.shape[-1]), torch.nan)
            stream = out.setdefault(name, empty)
            stream[torch.from_numpy(mine[lanes]), places] = values[torch.from_numpy(lanes), torch.from_numpy(held)]
    return out
