"""The bytes: slabs of 256 KiB, each cut into pages of one size, counted by reference.

    arena   | slab 0          | slab 1          | slab 2 (empty) | slab 3          |
            | pages of 8192 B | pages of 4224 B |                | pages of 8192 B |

A page's number is its address divided by its size, so that all pages of one size are rows of one [pages, bytes] view,
and any lane of any layer of any request may take any of them. An empty slab serves any size; its memory goes back to
the system at once. On a CPU the address space is reserved once and never moves; on other devices the budget is
allocated as one tensor.
"""

from __future__ import annotations

import contextlib
import heapq
import mmap
import platform
import sys
from collections import Counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.cache.limits import memory_available
from kvik.errors import BudgetError

SLAB = 256 * 1024  # grows only where a page would fill more than an eighth of it
Pages = NDArray[np.int64]
# Linux's MAP_NORESERVE, which Python names from 3.13 on. Without it neighbouring reservations become one, larger than
# the memory there is, and no process that has two caches can fork.
_GENERIC = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64", "riscv64")
_NORESERVE = 0x4000 if _GENERIC else 0


class PageClass:
    """All pages of one byte size: who is free, how often each is held, and on whose account."""

    def __init__(self, page_bytes: int, slab_bytes: int, view: Tensor) -> None:
        self.page_bytes = page_bytes
        self.slab_bytes = slab_bytes
        self.view = view  # uint8 [pages, page_bytes]
        self.refs = _zeros(view.shape[0])
        self.accounts = _zeros(view.shape[0])  # of pages that are held
        self.free: dict[int, list[int]] = {}  # slab -> its free pages

    def of_slab(self, slab: int) -> range:
        """The pages that lie wholly inside a slab."""
        return range(-(-slab * self.slab_bytes // self.page_bytes), (slab + 1) * self.slab_bytes // self.page_bytes)

    @property
    def free_pages(self) -> int:
        """Pages of this size that nobody holds, in slabs that have others in use."""
        return sum(map(len, self.free.values()))


class Arena:
    """The only owner of bytes. Pages come zeroed and leave when their last reference does."""

    def __init__(self, budget: int, capacity: int, largest_page: int, device: torch.device) -> None:
        """
        Args:
            budget: bytes that may be held at once.
            capacity: bytes of address space to reserve; `budget` can be raised up to it. Elsewhere than on a CPU the
                budget is allocated, and is the capacity.
            largest_page: bytes of the largest page that will be asked for.
            device: where the bytes lie.
        """
        self.slab_bytes = SLAB
        while self.slab_bytes < 8 * largest_page:
            self.slab_bytes *= 2
        self._map: mmap.mmap | None = None
        if device.type == "cpu":
            sizes = [max(size // self.slab_bytes, 1) * self.slab_bytes for size in (max(capacity, budget), budget)]
            self._map = _reserve(sizes)
            self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        else:
            self.bytes = torch.zeros(budget // self.slab_bytes * self.slab_bytes, dtype=torch.uint8, device=device)
        self.device = device
        self.budget = budget
        self.capacity = self.bytes.numel() // self.slab_bytes * self.slab_bytes
        self.classes: dict[int, PageClass] = {}
        self.slabs_used = 0
        self.tables = 0  # bytes of page tables, kept by the cache
        self.accounts: dict[int, int] = {}  # bytes of the pages on each; see `cache/owners.py`
        self._next = 0  # slabs from here on were never used
        self._empty: list[int] = []  # a heap, lowest first

    @property
    def held(self) -> int:
        """Bytes held: whole slabs, and the page tables beside them."""
        return self.slabs_used * self.slab_bytes + self.tables

    def room(self, tables: int = 0) -> int:
        """Bytes of whole slabs that the budget leaves beside page tables, those and `tables` more."""
        return max(self.budget - self.tables - tables, 0) // self.slab_bytes * self.slab_bytes

    def page_class(self, page_bytes: int) -> PageClass:
        """The pages of this size."""
        if page_bytes not in self.classes:
            count = self.capacity // page_bytes
            view = self.bytes[: count * page_bytes].view(count, page_bytes)
            self.classes[page_bytes] = PageClass(page_bytes, self.slab_bytes, view)
        return self.classes[page_bytes]

    def touched(self, page_bytes: int) -> int:
        """Pages of this size below the highest slab that was ever used: what the books need look at."""
        return min(self._next * self.slab_bytes // page_bytes, self.capacity // page_bytes)

    def cost(self, wanted: dict[int, int], tables: int = 0) -> int:
        """Bytes by which `held` would grow, at most, for these pages ({page bytes: count}) and table bytes."""
        slabs = 0
        for page_bytes, count in wanted.items():
            missing = max(count - self.page_class(page_bytes).free_pages, 0)
            certain = self.slab_bytes // page_bytes - (self.slab_bytes % page_bytes != 0)  # pages of any slab
            slabs += -(-missing // certain)
        return slabs * self.slab_bytes + tables

    def fits(self, wanted: dict[int, int], tables: int = 0) -> bool:
        """Whether these pages and table bytes could be had now without passing the budget."""
        cost = self.cost(wanted, tables)
        return self.held + cost <= self.budget and self.slabs_used * self.slab_bytes + cost - tables <= self.capacity

    def take(self, page_bytes: int, count: int, account: int = 0) -> Pages:
        """`count` zeroed pages, each with one reference, on an account. The caller has asked `fits`."""
        pages = self.page_class(page_bytes)
        taken: list[int] = []
        while len(taken) < count:
            slab = next(iter(pages.free), None)
            if slab is None:
                slab = self._new_slab(pages)
            free = pages.free[slab]
            wanted = count - len(taken)
            taken += free[-wanted:]
            del free[-wanted:]
            if not free:
                del pages.free[slab]
        out = np.array(taken, dtype=np.int64)
        pages.refs[out], pages.accounts[out] = 1, account
        self._count(pages, out, 1)
        pages.view.index_fill_(0, torch.from_numpy(out).to(self.device), 0)
        return out

    def retain(self, page_bytes: int, pages: Pages) -> None:
        """One more reference to each."""
        np.add.at(self.classes[page_bytes].refs, pages.reshape(-1), 1)

    def release(self, page_bytes: int, pages: Pages) -> None:
        """One reference less to each; pages that nobody holds are free at once, and empty slabs go back."""
        owner = self.classes[page_bytes]
        pages = pages.reshape(-1)
        np.subtract.at(owner.refs, pages, 1)
        freed = np.unique(pages[owner.refs[pages] == 0])
        self._count(owner, freed, -1)
        self._free(owner, freed)

    def assign(self, page_bytes: int, pages: Pages, account: int) -> None:
        """Puts pages that are held on another account; each is given once."""
        owner = self.classes[page_bytes]
        self._count(owner, pages, -1)
        owner.accounts[pages] = account
        self._count(owner, pages, 1)

    def defragment(self, page_bytes: int) -> Pages | None:
        """Moves pages, bytes verbatim, out of the emptiest slabs into free pages of the fullest ones.

        Returns:
            int64, the new number of every page (the caller rewrites all tables); None if nothing moved.
        """
        owner = self.classes[page_bytes]
        live = np.flatnonzero(owner.refs[: self.touched(page_bytes)])
        home = live * page_bytes // self.slab_bytes
        slabs, counts = np.unique(home, return_counts=True)
        order = slabs[np.argsort(-counts, kind="stable")]
        room = np.cumsum([len(owner.of_slab(slab)) for slab in order.tolist()])
        kept = order[: int(np.searchsorted(room, len(live))) + 1]
        source = live[~np.isin(home, kept)]
        if len(source) == 0:
            return None
        target = np.array(
            [p for slab in kept.tolist() for p in owner.free.get(slab, ())][: len(source)], dtype=np.int64
        )
        index = torch.from_numpy(np.stack((source, target))).to(self.device)
        owner.view[index[1]] = owner.view[index[0]]
        owner.refs[target], owner.refs[source] = owner.refs[source], 0
        owner.accounts[target] = owner.accounts[source]
        gone = set(target.tolist())
        for slab in kept.tolist():
            left = [p for p in owner.free.pop(slab, ()) if p not in gone]
            if left:
                owner.free[slab] = left
        self._free(owner, source)
        moved = np.arange(self.touched(page_bytes), dtype=np.int64)
        moved[source] = target
        return moved

    def _count(self, owner: PageClass, pages: Pages, sign: int) -> None:
        """Pages come to their accounts, or leave them."""
        for account, count in Counter(owner.accounts[pages].tolist()).items():
            left = self.accounts.pop(account, 0) + sign * count * owner.page_bytes
            if left:
                self.accounts[account] = left

    def _free(self, owner: PageClass, freed: Pages) -> None:
        for slab in np.unique(freed * owner.page_bytes // self.slab_bytes).tolist():
            inside = owner.of_slab(slab)
            free = owner.free.setdefault(slab, [])
            free += freed[(freed >= inside.start) & (freed < inside.stop)].tolist()
            if len(free) == len(inside):
                del owner.free[slab]
                self.slabs_used -= 1
                heapq.heappush(self._empty, slab)
                if self._map is not None:
                    self._map.madvise(mmap.MADV_DONTNEED, slab * self.slab_bytes, self.slab_bytes)

    def _new_slab(self, pages: PageClass) -> int:
        assert self.held + self.slab_bytes <= self.budget, "take() without fits()"
        if self._empty:
            slab = heapq.heappop(self._empty)
        else:
            slab, self._next = self._next, self._next + 1
        self.slabs_used += 1
        pages.free[slab] = list(pages.of_slab(slab))
        return slab


def _zeros(count: int) -> NDArray[np.int32]:
    """Zeros that take memory only where they are written: a number for each page that there could be."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    return np.frombuffer(mmap.mmap(-1, max(4 * count, 1), flags=flags), np.int32, count)


def _reserve(sizes: list[int]) -> mmap.mmap:
    """Address space without memory behind it, the first of the sizes that the system grants; pages appear when they
    are first written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    for size in sizes:
        with contextlib.suppress(OSError):
            return mmap.mmap(-1, size, flags=flags)
    raise BudgetError(
        f"the system grants no {sizes[-1]:,} bytes of address space; ask for less, or raise its limit (ulimit -v)",
        needed=sizes[-1], available=0,
    )  # fmt: skip


def device_memory(device: torch.device) -> int:
    """Bytes free on an accelerator."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else memory_available()
