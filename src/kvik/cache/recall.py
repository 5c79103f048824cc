"""What rows receive from queries that come after them: the figures that a pass of the model is made for.

    repeated    a fork repeats a chunk of the text; of its attention to the chunk, the most that each row received from
                any query of any head. Over the sinks, the chunk and the repetition alone, as if nothing else were there
                (KVzip, arXiv:2505.23416), so that a row is weighed against its neighbours, not against a whole book
    weighed     a fork goes on as the text does; all attention that each row received, over every row

Both look at a fork, whose rows leave with it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from kvik.cache.parts import Part
from kvik.cache.scorers import recalled
from kvik.cache.seen import Seen
from kvik.cache.sequence import Sequence
from kvik.cache.table import Rows, Table
from kvik.ops import pages as paged
from kvik.ops.codecs import unrotated
from kvik.ops.reads import Partial


class Repeated:
    """Of one chunk of the text, while a fork repeats it.

    Attributes:
        chunk: positions.
        best: for each group that is listened to, f32 [lanes, positions of the chunk].
    """

    def __init__(self, fork: Sequence, groups: Iterable[int], chunk: range) -> None:
        """
        Args:
            fork: an `aside`; all that it appends from here on belongs to the repetition.
            groups: indices in the spec; of groups with a policy.
            chunk: positions below the fork's end.
        """
        self.fork, self.chunk, self._end = fork, chunk, len(fork)
        self.best = {group: torch.zeros(len(fork.tables[group].pages), len(chunk)) for group in groups}
        self._rows: dict[int, tuple[int, Rows, Rows]] = {}  # group -> (end of the step, positions, slots)

    def hear(self, layer: int, q: Tensor, scale: float) -> None:
        """Takes one layer's queries f32 [t, H, D] of the step that is open on the fork; its rows were appended."""
        start, stop = len(self.fork), len(self.fork) + len(q)
        parts = self.fork.cache.parts[layer]
        shared = q.shape[1] // sum(part.lanes.stop - part.lanes.start for part in parts)
        for part in parts:
            if part.group not in self.best:
                continue
            positions, slots = (each[part.lanes] for each in self._taking_part(part.group, stop))
            keys = _keys(self.fork, self.fork.tables[part.group], slots)
            asked = torch.unflatten(q.cpu(), 1, (-1, shared))[:, _heads(part)]
            at = torch.from_numpy(positions)
            seen = Seen(
                keys, keys[..., :0], at, stop, scale, asked, torch.arange(start, stop), None, None, 0
            )  # fmt: skip
            self._take(part, at, recalled(seen))

    def _taking_part(self, group: int, stop: int) -> tuple[Rows, Rows]:
        """Positions and slots, int64 [lanes, m], of sinks, chunk and repetition; -1 where a lane has none."""
        known = self._rows.get(group)
        if known is not None and known[0] == stop:
            return known[1:]
        table = self.fork.tables[group]
        policy = table.group.retention.policy
        assert policy is not None, "a policy asked for this"
        positions, slots = table.rows(stop)
        part = (positions >= self.chunk.start) & (positions < self.chunk.stop) | (positions >= self._end)
        part |= (positions >= 0) & (positions < policy.sinks)
        columns = part.any(axis=0)
        found = np.where(part, positions, -1)[:, columns], np.where(part, slots, 0)[:, columns]
        self._rows[group] = (stop, *found)
        return found

    def _take(self, part: Part, positions: Tensor, received: Tensor) -> None:
        inside = (positions >= self.chunk.start) & (positions < self.chunk.stop)
        mine = self.best[part.group][part.lanes]
        torch.maximum(mine, _placed(received, inside, positions - self.chunk.start, len(self.chunk)).float(), out=mine)


class Weighed:
    """Of all rows of a text, while a fork goes on with it.

    Attributes:
        mass: for each group, f64 [lanes, positions]: attention, summed over queries and over the heads of a lane.
    """

    def __init__(self, fork: Sequence) -> None:
        """
        Args:
            fork: an `aside`; the rows before its end are weighed.
        """
        self.fork, self._end = fork, len(fork)
        self.mass = [torch.zeros(len(table.pages), self._end, dtype=torch.float64) for table in fork.tables]

    def hear(self, layer: int, found: Partial) -> None:
        """Takes one layer's result of the step that is open on the fork, attended with `want_mass`."""
        assert found.mass is not None, "attended with want_mass"
        for part, received in zip(self.fork.cache.parts[layer], found.mass, strict=True):
            at = _columns(self.fork.tables[part.group])[part.lanes]
            inside = (at >= 0) & (at < self._end)
            self.mass[part.group][part.lanes] += _placed(received.cpu().double(), inside, at, self._end)


def _placed(received: Tensor, inside: Tensor, places: Tensor, length: int) -> Tensor:
    """[L, length]: what rows received, each at its place; what is not `inside` is left out."""
    out = received.new_zeros(len(received), length + 1)  # the others go to one more column, which is cut off
    return out.scatter_(1, places.where(inside, length), received)[:, :length]


def _columns(table: Table) -> Tensor:
    """int64 [lanes, columns · N]: positions of a table's slots as masses lie: kept rows, then the table's; -1: none."""
    size = table.group.page_size
    slots = (table.logical[:, None].astype(np.int64) * size + np.arange(size)).reshape(1, -1)
    parts = [np.broadcast_to(slots, (len(table.pages), slots.shape[1]))]
    if table.kept is not None:
        parts.insert(0, table.kept.positions.astype(np.int64))
    return torch.from_numpy(np.concatenate(parts, axis=1))


def _keys(fork: Sequence, table: Table, slots: Rows) -> Tensor:
    """f32 [L, m, D] as attention sees them, decoded, int64 [L, m] slots."""
    cache, group = fork.cache, table.group
    where = torch.from_numpy(np.ascontiguousarray(slots)).to(cache.device)
    rows = paged.rows(cache.pages(group), group.layout, group.page_size, where.reshape(-1))
    parts = [unrotated(group.layout, stream.name, rows[stream.name]) for stream in group.layout.keys]
    return torch.unflatten(torch.cat(parts, dim=-1), 0, where.shape).cpu()


def _heads(part: Part) -> list[int] | slice:
    """Which of a layer's lanes are a part's."""
    return slice(None) if part.heads is None else list(part.heads)
