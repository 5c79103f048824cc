"""Stored rows as the rectangle that a model expects: decoded, and 0 where padding was."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.cache.sequence import Sequence
from kvik.errors import SequenceError
from kvik.ops import pages as paged
from kvik.ops.codecs import unrotated


def spread_rows(rows: Seq[Sequence], layer: int, real: NDArray[np.bool_], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One layer's keys and values of a batch.

    Args:
        rows: a sequence for each row, which may be in the middle of a step.
        real: bool [B, columns]: where tokens stand.
        dtype: of the result.

    Returns:
        Two tensors [B, heads, columns, width]; 0 where no row is held.

    Raises:
        SequenceError: a policy has moved rows, so that they stand in no rectangle.
    """
    cache = rows[0].cache
    parts = cache.parts[layer]
    heads = sum(part.lanes.stop - part.lanes.start for part in parts)
    widths = {s.name: s.width for s in cache.spec.groups[parts[0].group].layout.streams}
    shape = (len(rows), heads, real.shape[1])
    out = {name: torch.zeros((*shape, width), dtype=dtype, device=cache.device) for name, width in widths.items()}
    for row, sequence in enumerate(rows):
        columns = np.flatnonzero(real[row])
        for part in parts:
            mine = slice(None) if part.heads is None else list(part.heads)
            positions, found = _decoded(sequence, part.group, part.lanes)
            there = positions < len(columns)
            at = torch.from_numpy(columns[positions[there]])
            for name, values in found.items():
                out[name][row, mine] = out[name][row, mine].index_copy(1, at, values[:, there].to(dtype))
    return out["k"], out["v"]


def _decoded(sequence: Sequence, number: int, lanes: slice) -> tuple[NDArray[np.int64], dict[str, Tensor]]:
    """Positions int64 [n] of some lanes' rows, and f32 [L, n, W] by stream."""
    cache, table = sequence.cache, sequence.tables[number]
    group = table.group
    if table.kept is not None:
        raise SequenceError(
            f"rows of {group.retention} stand lane by lane, and are needed side by side here; use a spec that keeps all"
        )
    size = group.page_size
    positions = (table.logical[:, None].astype(np.int64) * size + np.arange(size)).reshape(-1)
    pages = torch.from_numpy(table.pages[lanes].astype(np.int64)).to(cache.device)
    stored = paged.decoded(cache.pages(group)[pages.flatten()], group.layout, size)
    rows = {name: unrotated(group.layout, name, x.view(len(pages), len(positions), -1)) for name, x in stored.items()}
    centre = cache.centres[number]
    return positions, rows if centre is None else {**rows, "k": rows["k"] + centre[lanes].unsqueeze(1)}


def source_length(sequence: Sequence) -> int:
    """Rows of the source that a sequence reads."""
    kept = next(table.kept for table in sequence.tables if table.group.source)
    return 0 if kept is None else int(kept.counts[0])


def source_rows(rows: Seq[Sequence], layer: int, real: NDArray[np.bool_], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One layer's keys and values of the sources that a batch reads.

    Args:
        real: bool [B, columns of the encoder].

    Returns:
        Two tensors [B, heads, columns, width]; 0 where padding stood. Rows that read one source share its decoding.
    """
    cache = rows[0].cache
    (part,) = cache.parts[layer]
    group, size = cache.spec.groups[part.group], cache.spec.page_size
    outs: dict[str, list[Tensor]] = {stream.name: [] for stream in group.layout.streams}
    known: dict[int, dict[str, Tensor]] = {}
    for row, sequence in enumerate(rows):
        kept = sequence.tables[part.group].kept
        assert kept is not None, "a sequence was opened with its source"
        if int(kept.pages[part.lanes][0, 0]) not in known:
            pages = torch.from_numpy(kept.pages[part.lanes].astype(np.int64)).to(cache.device)
            stored = paged.decoded(cache.pages(group)[pages.flatten()], group.layout, size)
            at = torch.from_numpy(np.flatnonzero(real[row]))
            mine = {}
            for name, values in stored.items():
                x = unrotated(group.layout, name, values.view(len(pages), pages.shape[1] * size, -1))
                mine[name] = x.new_zeros((len(pages), real.shape[1], x.shape[-1]), dtype=dtype)
                mine[name][:, at] = x[:, : len(at)].to(dtype)
            known[int(kept.pages[part.lanes][0, 0])] = mine
        for name, values in known[int(kept.pages[part.lanes][0, 0])].items():
            outs[name].append(values)
    return torch.stack(outs["k"]), torch.stack(outs["v"])
