"""Rows of a source, given once: what a decoder reads beside its own tokens (cross-attention).

    with cache.fill(digest, rows=1500) as filling:          # pages for all of them, or BudgetError
        for layer in ...:                                    # the layers whose shape says `source`
            filling.append(layer, k=k, v=v)                  # f32 [1500, heads, width]
    with cache.open(tokens, source=digest) as sequence:      # its steps read them; so do all other sequences' on it

They are kept as a whole under the source's digest, found as long as nobody needed the room, and never grow. To a step
they are kept rows (`ops.reads.Kept`): every query sees them, whatever its position.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from kvik import events
from kvik.cache.arena import Pages
from kvik.cache.prefix import Block
from kvik.errors import SequenceError
from kvik.ops.reads import Member, Plan, Reads

if TYPE_CHECKING:
    from kvik.cache.cache import Cache


class Filling:
    """See the module's docstring. Made by `Cache.fill`; good for one source."""

    def __init__(self, cache: Cache, key: bytes, rows: int, owner: str) -> None:
        if not cache.spec.source:
            raise SequenceError("the spec keeps no rows of a source; nothing can be filled")
        if rows < 1:
            raise SequenceError(f"a source of {rows} rows: give at least one")
        self.cache, self.key, self.rows, self.owner = cache, key, rows, owner
        self._pages: list[Pages | None] = []
        self._block: Block | None = None  # once it can be found
        self._plans: dict[int, Plan] = {}
        self._missing = {
            layer for group in cache.spec.groups if group.source for layer, _ in group.lanes
        }  # layers that have not appended theirs

    def __enter__(self) -> Filling:
        cache, size = self.cache, self.cache.spec.page_size
        if cache.active is not None:
            raise SequenceError("a step is open on this cache; fill it between steps")
        if cache.index.get(self.key) is not None:
            raise SequenceError("this source is known already; ask the cache whether it knows one before you fill it")
        columns, wanted = -(-self.rows // size), dict[int, int]()
        for group in cache.spec.groups:
            if group.source:
                wanted[group.page_bytes] = wanted.get(group.page_bytes, 0) + len(group.lanes) * columns
        cache.make_room({self.owner: wanted})
        account = cache.owners.account(self.owner)
        for index, group in enumerate(cache.spec.groups):
            if not group.source:
                self._pages.append(None)
                continue
            pages = cache.arena.take(group.page_bytes, len(group.lanes) * columns, account)
            self._pages.append(pages)
            table = np.ascontiguousarray(pages.reshape(len(group.lanes), columns), np.int32)
            member = Member(table, np.arange(columns, dtype=np.int32), 0, self.rows)
            reads = Reads(group.layout, size, None, 0, (member,))
            self._plans[index] = cache.ops.plan(cache.pages(group), reads)
        return self

    def append(self, layer: int, **streams: Tensor) -> None:
        """Encodes and writes all rows of one layer: for each stream f32 [rows, heads, width]."""
        for part in self.cache.parts[layer]:
            group = self.cache.spec.groups[part.group]
            if not group.source:
                raise SequenceError(f"layer {layer} keeps rows of tokens, not of the source; append those in steps")
            rows = streams if part.heads is None else {n: x[:, list(part.heads)] for n, x in streams.items()}
            for stream in group.layout.streams:
                want = (self.rows, part.lanes.stop - part.lanes.start, stream.width)
                if stream.name not in rows or tuple(rows[stream.name].shape) != want:
                    got = tuple(rows[stream.name].shape) if stream.name in rows else "nothing"
                    raise SequenceError(f"layer {layer}, stream {stream.name}: got {got}, needs {want}")
            self._plans[part.group].append(part.lanes, rows)
        self._missing.discard(layer)

    def announce(self) -> None:
        """Lets sequences be opened with the source before its rows are in: for models that compute a layer's rows when
        that layer asks. Whoever attends to a layer has appended to it before. Left by an error, it is not known again.
        """
        self._block = Block(self.key, b"", 0, (), self._pages, self.rows, self.owner)
        self.cache.index.add(self._block)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._missing:
            if self._block is None:
                self.announce()
            self.cache.emit(events.Filled(self.rows, sum(p.size for p in self._pages if p is not None)))
            return
        if self._block is not None:
            self.cache.index.remove(self._block)
        for group, pages in zip(self.cache.spec.groups, self._pages, strict=True):
            if pages is not None:
                self.cache.arena.release(group.page_bytes, pages)
        if kind is None:
            raise SequenceError(f"layers {sorted(self._missing)[:4]} appended no rows of the source; nothing was kept")
