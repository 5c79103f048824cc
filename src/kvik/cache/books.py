"""The books: what every page is, how many bytes are held, and whether it all adds up (law 5)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvik.cache.arena import Pages
from kvik.cache.spec import Bytes, Group
from kvik.cache.table import Rows

if TYPE_CHECKING:
    from kvik.cache.cache import Cache


@dataclass(frozen=True)
class Books:
    """Pages of all sizes: free + in use + kept for reuse = all."""

    free: int
    in_use: int
    kept: int

    @property
    def all(self) -> int:
        """Pages of every slab that is held."""
        return self.free + self.in_use + self.kept


def in_use(cache: Cache) -> Counter[str]:
    """Bytes of the pages that open sequences hold, each once, by the owner on whose account they are."""
    found = Counter[str]()
    for size, held in _used(cache).items():
        for account, count in enumerate(np.bincount(cache.arena.classes[size].accounts[: len(held)][held]).tolist()):
            if count:
                found[cache.owners.owner(account)] += size * count
    return found


def bytes_in_use(cache: Cache) -> int:
    """Bytes of the pages that open sequences hold, each once, and of their tables: what no eviction can free."""
    return cache.arena.tables + sum(size * int(held.sum()) for size, held in _used(cache).items())


def nbytes(cache: Cache) -> Bytes:
    """See `Cache.nbytes`."""
    arena = cache.arena
    bits = {size: np.zeros(arena.touched(size), np.int64) for size in arena.classes}
    for group, pages, rows in _holdings(cache):
        np.maximum.at(bits[group.page_bytes], pages, rows * group.layout.payload_bits)
    payload = sum(int(each.sum()) for each in bits.values()) // 8
    return Bytes(payload, arena.held - payload)


def books(cache: Cache) -> Books:
    """See `Cache.books`."""
    arena = cache.arena
    free = sum(owner.free_pages for owner in arena.classes.values())
    used = sum(int(mask.sum()) for mask in _used(cache).values())
    held = sum(int(np.count_nonzero(owner.refs[: arena.touched(size)])) for size, owner in arena.classes.items())
    return Books(free, used, held - used)


def check(cache: Cache) -> None:
    """See `Cache.check`."""
    arena = cache.arena
    refs = {size: np.zeros(arena.touched(size), np.int32) for size in arena.classes}
    for group, pages, _ in _holdings(cache):
        np.add.at(refs[group.page_bytes], pages, 1)
    slabs = 0
    for size, owner in arena.classes.items():
        assert (refs[size] == owner.refs[: len(refs[size])]).all(), f"references to pages of {size} B do not add up"
        free = [page for pages in owner.free.values() for page in pages]
        assert len(set(free)) == len(free) and not owner.refs[free].any(), f"a free page of {size} B is held"
        held = np.flatnonzero(refs[size])
        used = set((held * size // arena.slab_bytes).tolist()) | set(owner.free)
        slabs += len(used)
        assert len(free) + len(held) == sum(len(owner.of_slab(s)) for s in used), f"pages of {size} B are lost"
    assert slabs == arena.slabs_used, "slabs do not add up"
    _check_accounts(cache)
    tables = sum(t.nbytes for s in cache.sequences for t in s.tables)
    assert tables == arena.tables, "table bytes do not add up"
    assert arena.held <= arena.budget, "the budget is exceeded"


def _check_accounts(cache: Cache) -> None:
    arena, sizes = cache.arena, Counter[int]()
    for size, pages in arena.classes.items():
        held = np.flatnonzero(pages.refs[: arena.touched(size)])
        for account, count in enumerate(np.bincount(pages.accounts[held]).tolist()):
            sizes[account] += size * count
    assert dict(+sizes) == arena.accounts, "accounts do not add up"
    for block in cache.index:
        mine = cache.owners.account(block.owner)
        for group, found in zip(cache.spec.groups, block.pages, strict=True):
            theirs = arena.classes[group.page_bytes].accounts
            assert found is None or (theirs[found] == mine).all(), "a block's pages are not on its owner's account"


def _used(cache: Cache) -> dict[int, NDArray[np.bool_]]:
    """For each page size, which pages open sequences hold."""
    used = {size: np.zeros(cache.arena.touched(size), bool) for size in cache.arena.classes}
    for sequence in cache.sequences:
        for table in sequence.tables:
            used[table.group.page_bytes][table.held(0)[0]] = True
    return used


def _holdings(cache: Cache) -> list[tuple[Group, Pages, Rows]]:
    """Pages of every table and every block, with the rows that each keeps."""
    out = [(t.group, *t.held(len(s))) for s in cache.sequences for t in s.tables]
    for block in cache.index:
        for group, pages in zip(cache.spec.groups, block.pages, strict=True):
            if pages is not None:
                out.append((group, pages, block.rows_in(pages, cache.spec.page_size)))
    return out
