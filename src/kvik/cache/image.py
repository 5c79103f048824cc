"""Sequences as plain tensors and back: their pages verbatim, and what a policy remembers of them.

    "rows"                   int64 [sequences, 4]: tokens, where the prompt ends, settled, floor
    "tokens.0"               int64 [n], of sequence 0
    "pages.1"                uint8 [P, page bytes], of group 1: each page once, whoever shares it
    "table.1.0.pages"        int32 [lanes, columns], rows of "pages.1"; and "table.1.0.logical", int32 [columns]
    "kept.1.0.…"             pages, counts and positions of rows that a policy kept, or of a source
    "mass.1.0"               what a policy has observed; "queries.1.0.2.2.17" are layer 2's over layer 2's rows, from 17

What is read back may come from anywhere: every number is checked before anything is allocated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.cache.cache import Cache
from kvik.cache.observed import Observed
from kvik.cache.sequence import Sequence
from kvik.cache.table import Table
from kvik.errors import StorageError
from kvik.ops import quest
from kvik.ops.layout import MOST_POSITIONS
from kvik.ops.reads import Kept

Ints = NDArray[np.int64]


def image(sequences: Seq[Sequence]) -> dict[str, Tensor]:
    """What some sequences of one cache hold; each has been settled."""
    cache = sequences[0].cache
    rows = [[len(s), s.prompt, s._settled, s._floor] for s in sequences]
    out = {"rows": torch.tensor(rows, dtype=torch.int64)}
    for number, sequence in enumerate(sequences):
        out[f"tokens.{number}"] = torch.tensor(sequence.tokens, dtype=torch.int64)
    for index, group in enumerate(cache.spec.groups):
        held = [sequence.tables[index].held(0)[0] for sequence in sequences]
        every = np.unique(np.concatenate(held)) if held else np.zeros(0, np.int64)
        out[f"pages.{index}"] = cache.pages(group)[torch.from_numpy(every).to(cache.device)].cpu()
        for number, sequence in enumerate(sequences):
            out |= _table(sequence.tables[index], f"{index}.{number}", every)
            observed = sequence._observed[index]
            if observed is not None:
                out |= _observed(observed, f"{index}.{number}")
    return out


def restored(cache: Cache, tensors: Mapping[str, Tensor]) -> list[Sequence]:
    """Sequences of a cache that has the same spec, as they were when their image was made.

    Raises:
        StorageError: the tensors are no image of this spec's sequences; nothing changed.
        BudgetError: they don't fit; nothing changed.
    """
    reader = _Reader(cache, tensors)
    rows = reader.rows()
    tables = [[reader.table(index, number) for index in range(len(cache.spec.groups))] for number in range(len(rows))]
    tokens = [reader.tokens(number, int(row[0])) for number, row in enumerate(rows)]
    counts = Counter[int]()
    for index, group in enumerate(cache.spec.groups):
        counts[group.page_bytes] += reader.pages(index)
    cache.make_room({"": counts}, sum(t.nbytes for each in tables for t in each))
    sequences = [cache.open(source=None) if not cache.spec.source else _unread(cache) for _ in rows]
    for index, group in enumerate(cache.spec.groups):
        source = tensors[f"pages.{index}"]
        taken = cache.arena.take(group.page_bytes, len(source), 0)
        cache.pages(group)[torch.from_numpy(taken).to(cache.device)] = source.to(cache.device)
        for number, sequence in enumerate(sequences):
            _put(cache, sequence, index, tables[number][index], taken)
            observed = sequence._observed[index]
            if observed is not None:
                reader.observe(observed, index, number)
        if taken.size:
            cache.arena.release(group.page_bytes, taken)  # what tables hold stays
    for sequence, row, text in zip(sequences, rows.tolist(), tokens, strict=True):
        sequence.tokens, sequence.prompt, sequence._settled, sequence._floor = text, row[1], row[2], row[3]
        sequence._publishes = False
    return sequences


def _unread(cache: Cache) -> Sequence:
    """A sequence whose source comes with its tables."""
    sequence = Sequence(cache, cache._opened, b"", [], 0)
    cache._opened += 1
    cache._open[sequence.number] = sequence
    cache.arena.tables += sum(table.nbytes for table in sequence.tables)
    return sequence


def _put(cache: Cache, sequence: Sequence, index: int, found: Table, taken: Ints) -> None:
    """Gives a sequence a table, its pages numbered as they were taken."""
    cache.arena.tables -= sequence.tables[index].nbytes
    found.renumber(taken)
    found.stale = True
    sequence.tables[index] = found
    cache.arena.tables += found.nbytes
    held = found.held(0)[0]
    if held.size:
        cache.arena.retain(found.group.page_bytes, held)


def _table(table: Table, name: str, every: Ints) -> dict[str, Tensor]:
    """A table and its kept rows, pages numbered by their place in `every`."""

    def numbered(pages: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(np.searchsorted(every, pages).astype(np.int32))

    out = {f"table.{name}.pages": numbered(table.pages), f"table.{name}.logical": torch.from_numpy(table.logical)}
    if table.kept is not None:
        size = table.group.page_size
        columns = np.arange(table.kept.pages.shape[1])
        used = columns < -(-table.kept.counts[:, None] // size)  # behind a lane's last row stand numbers of nobody
        out[f"kept.{name}.pages"] = numbered(np.where(used, table.kept.pages, every[0] if len(every) else 0))
        out[f"kept.{name}.counts"] = torch.from_numpy(table.kept.counts)
        out[f"kept.{name}.positions"] = torch.from_numpy(table.kept.positions)
    return out


def _observed(observed: Observed, name: str) -> dict[str, Tensor]:
    out = {}
    if observed.mass is not None:
        out[f"mass.{name}"] = observed.mass
    if observed.scale is not None:
        out[f"scale.{name}"] = torch.tensor([observed.scale], dtype=torch.float64)
    for (owner, layer), seen in observed._queries.items():
        for at, q in seen:
            out[f"queries.{name}.{owner}.{layer}.{at}"] = q
    return {key: x.contiguous() for key, x in out.items()}


class _Reader:
    """Reads an image, and believes nothing of it."""

    def __init__(self, cache: Cache, tensors: Mapping[str, Tensor]) -> None:
        self._cache, self._tensors = cache, tensors

    def rows(self) -> Ints:
        """Tokens, prompt, settled and floor of each sequence."""
        found = self._ints("rows", torch.int64, 2)
        right = found.shape[1] == 4 and len(found) > 0 and (found >= 0).all() and (found <= MOST_POSITIONS).all()
        if not right or (found[:, 2:] > found[:, :1]).any():
            raise _wrong("rows")
        return found

    def tokens(self, number: int, count: int) -> list[int]:
        """Ids."""
        found = self._ints(f"tokens.{number}", torch.int64, 1)
        if len(found) != count or (found < 0).any():
            raise _wrong(f"tokens.{number}")
        return [int(token) for token in found]

    def pages(self, index: int) -> int:
        """How many a group has."""
        found = self._find(f"pages.{index}", torch.uint8, 2)
        if found.shape[1] != self._cache.spec.groups[index].page_bytes:
            raise _wrong(f"pages.{index}")
        return len(found)

    def table(self, index: int, number: int) -> Table:
        """One sequence's table in one group, its pages as the image numbers them."""
        group, name = self._cache.spec.groups[index], f"{index}.{number}"
        lanes, count = len(group.lanes), self.pages(index)
        pages = self._ints(f"table.{name}.pages", torch.int32, 2)
        logical = self._ints(f"table.{name}.logical", torch.int32, 1)
        length = int(self.rows()[number][0])
        right = pages.shape == (lanes, len(logical)) and _within(pages, count) and (np.diff(logical) > 0).all()
        if not right or (len(logical) and (logical[0] < 0 or logical[-1] != (length - 1) // group.page_size)):
            raise _wrong(f"table.{name}")
        if not len(logical) and length and not group.source:
            raise _wrong(f"table.{name}")
        found = Table(group, 0, np.ascontiguousarray(pages, np.int32), np.ascontiguousarray(logical, np.int32))
        found.kept = self._kept(name, lanes, count, group.page_size)
        if group.source != (found.kept is not None) and group.source:
            raise _wrong(f"kept.{name}")
        if found.extremes is not None:
            found.extremes = quest.room(lanes, len(logical), group.key_width)
        return found

    def observe(self, observed: Observed, index: int, number: int) -> None:
        """What a policy had seen."""
        name, lanes = f"{index}.{number}", len(self._cache.spec.groups[index].lanes)
        if observed.mass is not None:
            mass = self._find(f"mass.{name}", torch.float32, 2)
            if len(mass) != lanes or not mass.isfinite().all():
                raise _wrong(f"mass.{name}")
            observed.mass = mass.clone()
        if f"scale.{name}" in self._tensors:
            observed.scale = float(self._find(f"scale.{name}", torch.float64, 1)[0])
        seen = [key.split(".") for key in self._tensors if key.startswith(f"queries.{name}.")]
        for owner, layer, at in sorted((int(a), int(b), int(c)) for *_, a, b, c in seen):
            q = self._find(f"queries.{name}.{owner}.{layer}.{at}", torch.float32, 4)
            observed._queries.setdefault((owner, layer), []).append((at, q.clone()))

    def _kept(self, name: str, lanes: int, count: int, size: int) -> Kept | None:
        if f"kept.{name}.pages" not in self._tensors:
            return None
        pages = self._ints(f"kept.{name}.pages", torch.int32, 2)
        counts = self._ints(f"kept.{name}.counts", torch.int32, 1)
        positions = self._ints(f"kept.{name}.positions", torch.int32, 2)
        right = len(pages) == lanes and counts.shape == (lanes,) and _within(pages, count)
        right = right and positions.shape == (lanes, pages.shape[1] * size)
        if not right or (counts < 0).any() or (counts > positions.shape[1]).any():
            raise _wrong(f"kept.{name}")
        there = np.arange(positions.shape[1]) < counts[:, None]
        if ((positions >= 0) != there).any():
            raise _wrong(f"kept.{name}")
        return Kept(*(np.ascontiguousarray(x, np.int32) for x in (pages, counts, positions)))

    def _ints(self, name: str, dtype: torch.dtype, dims: int) -> Ints:
        return np.asarray(self._find(name, dtype, dims).numpy(), np.int64)

    def _find(self, name: str, dtype: torch.dtype, dims: int) -> Tensor:
        found = self._tensors.get(name)
        if found is None or found.dtype != dtype or found.dim() != dims:
            raise _wrong(name)
        return found


def _within(pages: Ints, count: int) -> bool:
    return not pages.size or bool(pages.min() >= 0 and pages.max() < count)


def _wrong(name: str) -> StorageError:
    return StorageError(f"{name!r} is not what a saved cache of this spec holds there; make the cache again")
