"""All pages of one model: opens Sequences, finds known prefixes, evicts, keeps the books. The only owner of bytes."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik import events
from kvik.cache import pressure
from kvik.cache.arena import Arena, Pages, device_memory
from kvik.cache.books import Books, books, check, nbytes
from kvik.cache.centres import Centres, centres_of
from kvik.cache.limits import check_budget, memory_available, memory_total
from kvik.cache.observed import may_know
from kvik.cache.owners import Owners, Wanted, claim
from kvik.cache.parts import parts_of
from kvik.cache.prefix import Block, PrefixIndex, page_keys, root_key, source_key
from kvik.cache.sequence import Sequence
from kvik.cache.source import Filling
from kvik.cache.spec import Bytes, Group, Spec
from kvik.cache.step import Step
from kvik.cache.table import Table
from kvik.cache.tidying import defragment
from kvik.errors import BudgetError, SequenceError, UsageError
from kvik.ops import pages as paged
from kvik.ops.backend import backend
from kvik.ops.reads import Kept


class Cache:
    """Keeps rows under a byte budget.

    >>> from kvik.cache.spec import LayerShape
    >>> layers = [LayerShape(heads=1, streams=(("k", 4), ("v", 4)))]
    >>> cache = Cache(Spec.parse("f32", layers), memory=1 << 20)
    >>> rows = torch.ones(2, 1, 4)
    >>> with cache.open() as sequence:
    ...     with sequence.append([7, 8]) as step:
    ...         step.append(0, k=rows, v=rows)
    ...         out = step.attend(0, rows, scale=0.5).out
    ...     len(sequence), out.shape, sequence.nbytes.payload
    (2, torch.Size([2, 1, 4]), 64)
    """

    def __init__(
        self,
        spec: Spec,
        *,
        memory: int | None = None,
        weights: str = "",
        shares: bool = True,
        device: str | torch.device = "cpu",
        centres: Centres | None = None,
    ) -> None:
        """
        Args:
            spec: what is kept.
            memory: budget in bytes, never exceeded; None = half of what the machine and its container leave.
            weights: names the weights as they are held, for the keys of what is shared.
            shares: whether full pages are published, to be found by later sequences.
            device: where the rows lie.
            centres: subtracted from keys where these are quantised; not for attention with a softcap.

        Raises:
            BudgetError: more than the machine, or the limit of its container, has.
            UsageError: the device is not there, or the centres are for other layers.
        """
        self.spec = spec
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError("device 'cuda': torch sees no CUDA device here; use cpu")
        self.ops = backend(self.device)
        self.shares = shares
        available = memory_available() if self.device.type == "cpu" else device_memory(self.device)
        budget = available // 2 if memory is None else memory
        check_budget(budget, available)
        largest = max((group.page_bytes for group in spec.groups), default=1)
        capacity = memory_total() if self.device.type == "cpu" else budget
        self.arena = Arena(budget, capacity, largest, self.device)
        for group in spec.groups:
            self.arena.page_class(group.page_bytes)
        self.index, self.owners = PrefixIndex(spec), Owners(self.arena)
        self.parts = parts_of(spec)
        self.writing = frozenset(layer for group in spec.groups if not group.source for layer, _ in group.lanes)
        self._policies = [g.retention.policy for g in spec.groups if g.retention.policy is not None]
        self.active: Step | None = None
        self._weights = weights
        self.centres, self._centred = centres_of(centres, spec, self.device)  # by group
        self._open: dict[int, Sequence] = {}
        self._opened = 0
        self._listeners: list[Callable[[events.Event], None]] = []

    def open(self, tokens: Seq[int] = (), salt: str = "", source: bytes | None = None, owner: str = "") -> Sequence:
        """A new Sequence that starts with whatever is known of `tokens`; append the rest, from `len(sequence)` on.

        Full pages are shared, and one that has more than the text does is copied as far as they agree. At most
        `len(tokens) - 1` are taken as known: the last is always computed, for its logits. A policy that must
        see the last queries leaves those to be computed too, and one that must see all takes nothing as known.

        Args:
            tokens: what is going to be appended first: the prompt. A policy may choose at its end.
            salt: only sequences opened with the same salt share rows.
            source: digest of what the model reads beside the tokens (cross-attention), given by `fill` before.
            owner: on whose account its pages are when room is short; see `cache/owners.py`.

        Raises:
            SequenceError: the source is not known here, or there is one where the spec keeps no rows of any.
            BudgetError: the tables don't fit.
        """
        root, given = self._root(salt, source), self._source(salt, source)
        known = min((may_know(policy, len(tokens)) for policy in self._policies), default=len(tokens) - 1)
        text = list(tokens[: max(known, 0)]) if self.shares else []
        chain = self.index.find(root, text)
        part = None if self._policies else self.index.find_part(root, chain, text)
        sequence = Sequence(self, self._opened, root, chain, len(tokens), part, owner)
        claim(self, chain if given is None else [given, *chain], owner)
        chain = chain if part is None else [*chain, part[0]]
        self._opened += 1
        for index, table in enumerate(sequence.tables):
            if table.group.source and given is not None:
                table.kept = given.kept(index, table.group)
                self.arena.retain(table.group.page_bytes, table.held(0)[0])
                continue
            live = table.group.retention.live_pages(len(sequence), self.spec.page_size)
            found = [pages for page in live if (pages := chain[page].pages[index]) is not None]
            assert len(found) == len(live), "the index gives complete chains"
            if found:
                table.extend(np.stack(found, axis=1), live)
                self.arena.retain(table.group.page_bytes, np.stack(found))
                table.stale = part is not None  # behind what is shared of it
        self.arena.tables += sum(table.nbytes for table in sequence.tables)
        self._open[sequence.number] = sequence
        self.emit(events.Opened(sequence.number, len(tokens), sequence.cached))
        if not self.arena.fits({}):
            try:
                self.make_room({}, 0)
            except BudgetError:
                sequence.close()
                raise
        sequence._floor = len(sequence) if self._hides(len(sequence)) else 0
        return sequence

    def keys(self, tokens: Seq[int], salt: str = "") -> list[bytes]:
        """What a text's full pages can be found under, its last token aside; none where nothing is shared."""
        shared = self.shares and not self._policies
        return page_keys(self._root(salt, None), tokens[:-1], self.spec.page_size) if shared else []

    def knows(self, source: bytes, salt: str = "") -> bool:
        """Whether a source's rows are here, so that nobody needs to compute them. They are used just now, if so."""
        key = source_key(self._root(salt, None), source)
        self.index.touch([key])
        return self.index.get(key) is not None

    def fill(self, source: bytes, rows: int, salt: str = "", owner: str = "") -> Filling:
        """Takes a source's rows, for all sequences that are opened with it; a context manager.

        Args:
            source: a digest that names the source in full: two sources with one digest would be one.
            rows: how many it has.
            salt, owner: see `open`.

        Raises, when entered:
            BudgetError: the pages don't fit; nothing changed.
        """
        return Filling(self, source_key(self._root(salt, None), source), rows, owner)

    def step(self, chunks: Seq[tuple[Sequence, Seq[int]]]) -> Step:
        """One chunk of tokens for each of some sequences, to be taken through all layers: a context manager.

        Raises, when entered:
            BudgetError: the new pages don't fit, even after every unreferenced block was dropped; nothing changed.
            SequenceError: a sequence is closed, in another step, of another cache, or twice in this one.
        """
        for sequence, _ in chunks:
            if sequence.cache is not self:
                raise SequenceError("the sequence belongs to another cache; open one here")
        return Step(self, chunks)

    def resize(self, memory: int) -> None:
        """Sets the budget, at run time. Shrinking drops unused blocks, moves pages together and gives memory back.

        Raises:
            BudgetError: the machine does not have that much, or open sequences hold more; the budget stays as it was.
        """
        if self.active is not None:
            raise SequenceError("the cache is in the middle of a step; resize between steps")
        available = memory_available() + self.arena.held if self.device.type == "cpu" else self.arena.capacity
        check_budget(memory, available)
        if self.arena.held > memory:
            defragment(self)
        while self.arena.held > memory:
            evicted = [pressure.evict(self) for _ in range(16)]
            defragment(self)
            if not any(evicted) and self.arena.held > memory:
                held = self.arena.held
                raise BudgetError(
                    f"the cache can't shrink to {memory:,} bytes: open sequences hold {held:,}; close some",
                    needed=held, available=memory,
                )  # fmt: skip
        self.arena.budget = memory
        self.emit(events.Resized(memory))

    @property
    def budget(self) -> int:
        """Bytes that may be held at once."""
        return self.arena.budget

    @property
    def nbytes(self) -> Bytes:
        """Bytes held, each page once: rows that some sequence or block keeps, and everything else."""
        return nbytes(self)

    @property
    def books(self) -> Books:
        """Pages by state."""
        return books(self)

    def check(self) -> None:
        """Conservation (law 5): every page is free or held exactly as often as tables and blocks say.

        Raises:
            AssertionError: names what does not add up. It would be a bug of kvik.
        """
        check(self)

    def listen(self, listener: Callable[[events.Event], None]) -> None:
        """Calls `listener` with every event from now on, in the thread that caused it. It must not raise."""
        self._listeners.append(listener)

    def pages(self, group: Group) -> Tensor:
        """The view that a group's page numbers index: uint8 [pages, page bytes]."""
        return self.arena.page_class(group.page_bytes).view

    # What Sequence and Step ask for.

    def reserve(self, step: Step) -> list[list[int]]:
        """Pages for a step's rows, all or none. Returns how many columns each table had before."""
        if self.active is not None:
            raise SequenceError("another step is open on this cache; steps follow one another")
        size = self.spec.page_size
        plan: list[tuple[Table, range, bool, int]] = []
        wanted: dict[str, dict[int, int]] = {}
        tables = 0
        for sequence, chunk in zip(step.sequences, step.chunks, strict=True):
            start, stop = len(sequence), len(sequence) + len(chunk)
            mine = wanted.setdefault(sequence.owner, {})
            for table in sequence.tables:
                if table.group.source:
                    continue
                fresh = range(-(-start // size), -(-stop // size))
                refs = self.arena.page_class(table.group.page_bytes).refs
                shared = start % size != 0 and bool((refs[table.pages[:, -1]] > 1).any())
                plan.append((table, fresh, shared, start % size))
                count = len(table.group.lanes) * (len(fresh) + shared)
                mine[table.group.page_bytes] = mine.get(table.group.page_bytes, 0) + count
                columns = len(table.logical)
                tables += table.group.table_bytes(columns + len(fresh)) - table.group.table_bytes(columns)
        self.make_room(wanted, tables)
        before = [[len(table.logical) for table in sequence.tables] for sequence in step.sequences]
        for table, fresh, shared, used in plan:
            lanes, page_bytes = len(table.group.lanes), table.group.page_bytes
            if shared:
                self._unshare(table)
            if table.stale and used:
                last = torch.from_numpy(table.pages[:, -1].astype(np.int64)).to(self.device)
                paged.blank(self.pages(table.group), table.group.layout, size, last, used)  # 0 · NaN is NaN
            table.stale = False
            if fresh:
                pages = self.arena.take(page_bytes, lanes * len(fresh), table.account).reshape(lanes, len(fresh))
                self.arena.tables -= table.nbytes
                table.extend(pages, fresh)
                self.arena.tables += table.nbytes
        self.active = step
        return before

    def release(self, table: Table, keep: NDArray[np.bool_]) -> None:
        """Gives back the columns that are not in `keep`."""
        self.arena.tables -= table.nbytes
        gone = table.keep(keep)
        self.arena.tables += table.nbytes
        if gone.size:
            self.arena.release(table.group.page_bytes, gone)

    def release_all(self, table: Table) -> None:
        """Gives back every page of a table."""
        pages, _ = table.held(0)
        self.arena.tables -= table.nbytes
        table.clear()
        if pages.size:
            self.arena.release(table.group.page_bytes, pages)

    def replace(self, table: Table, kept: Kept, columns: NDArray[np.bool_], gone: Pages) -> None:
        """A table has other kept rows and fewer columns now; `gone` are the pages that are not in it any more."""
        self.arena.tables -= table.nbytes
        table.keep(columns)
        table.kept = kept
        self.arena.tables += table.nbytes
        if gone.size:
            self.arena.release(table.group.page_bytes, gone)

    @property
    def sequences(self) -> list[Sequence]:
        """Those that are open."""
        return list(self._open.values())

    def fork(self, sequence: Sequence) -> Sequence:
        """See `Sequence.fork`."""
        self.make_room({}, sum(table.nbytes for table in sequence.tables))
        twin = Sequence(self, self._opened, sequence._root, [], 0, owner=sequence.owner)
        self._opened += 1
        twin.tokens, twin.cached = list(sequence.tokens), sequence.cached
        twin._keys, twin._settled, twin._floor = list(sequence._keys), sequence._settled, sequence._floor
        twin.tables = [table.copy() for table in sequence.tables]
        twin.prompt, twin._publishes = sequence.prompt, sequence._publishes
        twin._observed = [o and o.copy(t.group) for o, t in zip(sequence._observed, twin.tables, strict=True)]
        for table in twin.tables:
            self.arena.retain(table.group.page_bytes, table.held(0)[0])
            self.arena.tables += table.nbytes
        self._open[twin.number] = twin
        return twin

    def touch(self, keys: list[bytes]) -> None:
        """Marks blocks as used just now."""
        self.index.touch(keys)

    def forget(self, sequence: Sequence) -> None:
        """A sequence was closed."""
        self._open.pop(sequence.number, None)

    def emit(self, event: events.Event) -> None:
        """Tells the listeners."""
        for listener in self._listeners:
            listener(event)

    def _hides(self, tokens: int) -> bool:
        size = self.spec.page_size
        growing = (group for group in self.spec.groups if not group.source)
        return any(len(group.retention.live_pages(tokens, size)) < -(-tokens // size) for group in growing)

    def _root(self, salt: str, source: bytes | None) -> bytes:
        """What all keys of a text start from: rows depend on the source as well."""
        root = root_key(self._weights, self.spec, salt, self._centred)
        return root if source is None else source_key(root, source)

    def _source(self, salt: str, source: bytes | None) -> Block | None:
        """Where a source's rows are."""
        if (source is not None) != self.spec.source:
            raise SequenceError(
                "this model reads a source: fill the cache with its rows, and open with its digest"
                if self.spec.source
                else "a source was given, but the spec keeps no rows of any; open without one"
            )
        if source is None:
            return None
        found = self.index.get(source_key(self._root(salt, None), source))
        if found is None:
            raise SequenceError("the source is not known here, or was evicted; fill the cache with its rows first")
        self.index.touch([found.key])
        return found

    def make_room(self, wanted: Wanted, tables: int = 0) -> None:
        """See `pressure.make_room`."""
        pressure.make_room(self, wanted, tables)

    def _unshare(self, table: Table) -> None:
        """Copies the last column's pages, verbatim, before they are written to: others hold them too."""
        old = table.pages[:, -1].astype(np.int64)
        new = self.arena.take(table.group.page_bytes, len(old), table.account)
        view = self.pages(table.group)
        index = torch.from_numpy(np.stack((old, new))).to(self.device)
        view[index[1]] = view[index[0]]
        table.pages[:, -1] = new
        self.arena.release(table.group.page_bytes, old)


__all__ = ["Books", "Cache", "Pages"]
