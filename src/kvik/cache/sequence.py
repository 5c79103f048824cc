"""One stream of tokens: its ids and its page tables. The only mutable thing a user holds.

The life of a token's rows:

    append          settle(accepted)        retention drops        close
    ──┬───────────────┬───────────────────────┬──────────────────────┬──
      written into    kept for good, or       its page goes back,    every page goes back;
      open pages      trimmed away;           if all its rows are    full ones may stay,
                      full pages published    out of sight           to be found again
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvik import events
from kvik.cache.arena import Pages
from kvik.cache.prefix import Block, block_key
from kvik.cache.spec import Bytes, Group
from kvik.errors import SequenceError

if TYPE_CHECKING:
    from kvik.cache.cache import Cache
    from kvik.cache.step import Step


class Table:
    """Where one group's rows of one sequence lie.

    Attributes:
        pages: int32 [lanes, columns], page numbers.
        logical: int32 [columns], ascending: column c holds positions logical[c]·N … logical[c]·N + N - 1.
        stale: rows beyond the sequence's end may have been written, by tokens that were rejected.
    """

    def __init__(self, group: Group, pages: NDArray[np.int32] | None = None, logical: NDArray[np.int32] | None = None):
        self.group = group
        self.pages = np.zeros((len(group.lanes), 0), np.int32) if pages is None else pages
        self.logical = np.zeros(0, np.int32) if logical is None else logical
        self.stale = False

    @property
    def nbytes(self) -> int:
        """Bytes of the table itself."""
        return self.pages.nbytes + self.logical.nbytes

    def copy(self) -> Table:
        """Another table of the same pages."""
        twin = Table(self.group, self.pages.copy(), self.logical.copy())
        twin.stale = self.stale
        return twin

    def extend(self, pages: Pages, logical: Seq[int]) -> None:
        """Adds columns: pages [lanes, len(logical)]."""
        self.pages = np.concatenate((self.pages, pages.astype(np.int32)), axis=1)
        self.logical = np.concatenate((self.logical, np.array(logical, np.int32)))

    def keep(self, mask: NDArray[np.bool_]) -> Pages:
        """Keeps the columns in `mask`; returns the pages of the others."""
        gone = self.pages[:, ~mask].astype(np.int64)
        self.pages, self.logical = np.ascontiguousarray(self.pages[:, mask]), self.logical[mask]
        return gone

    def rows_kept(self, tokens: int) -> NDArray[np.int64]:
        """How many rows of each column the retention keeps of a text of `tokens` tokens."""
        positions = self.logical[:, None].astype(np.int64) * self.group.page_size + np.arange(self.group.page_size)
        kept, window = positions < tokens, self.group.retention.window
        if window is not None:
            kept &= (positions >= tokens - window) | (positions < self.group.retention.sinks)
        return np.asarray(kept.sum(axis=1))


class Sequence:
    """Tokens and the rows that they left. Made by `Cache.open`; use as a context manager, or `close()`.

    Attributes:
        tokens: ids so far. The next position is `len(tokens)`: tokens seen, whatever was dropped.
        cached: how many of them were known when it was opened.
    """

    def __init__(self, cache: Cache, number: int, root: bytes, chain: list[Block]) -> None:
        self.cache = cache
        self.number = number
        self.tokens = [token for block in chain for token in block.tokens]
        self.cached = len(self.tokens)
        self.closed = False
        self.tables = [Table(group) for group in cache.spec.groups]
        self._root = root
        self._keys = [block.key for block in chain]  # of its full pages that are published
        self._settled = self.cached
        self._floor = 0  # trimming below this would need rows that were dropped
        self._busy = False

    def __len__(self) -> int:
        return len(self.tokens)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, tokens: Seq[int]) -> Step:
        """A step of this sequence alone; see `Cache.step`."""
        return self.cache.step([(self, tokens)])

    def read(self, layer: int) -> dict[str, Tensor]:
        """The rows that one layer holds, decoded, for looking at. Modifies nothing.

        Returns:
            `positions` int64 [rows], and for each stream f32 [heads, rows, width], in the order of positions. A row
            that some heads hold and others have dropped is NaN for those others.
        """
        self._check()
        return self.cache.read(self, layer)

    def fork(self) -> Sequence:
        """Another Sequence with the same past: copies tables, not rows. What either does next, the other never sees.

        Raises:
            BudgetError: the tables don't fit.
        """
        self._check()
        return self.cache.fork(self)

    def trim(self, length: int) -> None:
        """Forgets all tokens from position `length` on.

        Raises:
            SequenceError: rows that position `length` could see were dropped when the text was longer.
        """
        self._check()
        if not 0 <= length <= len(self.tokens):
            raise SequenceError(
                f"trim to {length}: the sequence has {len(self.tokens)} tokens; give 0 to {len(self.tokens)}"
            )
        if length < self._floor:
            raise SequenceError(
                f"trim to {length}: rows were dropped when the sequence settled at position {self._floor}; "
                f"trim to {self._floor} or later, or open a new sequence"
            )
        size = self.cache.spec.page_size
        for table in self.tables:
            self.cache.release(table, table.logical * size < length)
            table.stale = True
        del self.tokens[length:]
        del self._keys[length // size :]
        self._settled = min(self._settled, length)

    def settle(self, accepted: int | None = None) -> None:
        """Makes what was appended final: drops what the retention hides from every later token, publishes full pages.

        Args:
            accepted: how many of the tokens appended since the last settle stay; the rest leave no trace. None = all.
        """
        self._check()
        if accepted is not None:
            pending = len(self.tokens) - self._settled
            if not 0 <= accepted <= pending:
                raise SequenceError(
                    f"settle({accepted}): {pending} tokens were appended since the last settle; give 0 to {pending}"
                )
            self.trim(self._settled + accepted)
        self._settled = len(self.tokens)
        self._publish()
        self._drop()

    def close(self) -> None:
        """Gives every page back; the one place where that happens. Idempotent."""
        if self.closed:
            return
        self._check()
        self.cache.touch(self._keys)
        for table in self.tables:
            self.cache.release(table, np.zeros(len(table.logical), bool))
        self.closed = True
        self.cache.forget(self)
        self.cache.emit(events.Closed(self.number, len(self.tokens)))

    @property
    def nbytes(self) -> Bytes:
        """Bytes that this sequence holds, pages shared with others included."""
        payload = held = 0
        for table in self.tables:
            lanes, layout = len(table.group.lanes), table.group.layout
            payload += lanes * int(table.rows_kept(len(self.tokens)).sum()) * layout.payload_bits // 8
            held += table.pages.size * table.group.page_bytes + table.nbytes
        return Bytes(payload, held - payload)

    def _publish(self) -> None:
        size = self.cache.spec.page_size
        if not self.cache.shares or not self.tables:
            return
        for page in range(len(self._keys), len(self.tokens) // size):
            run = tuple(self.tokens[page * size : (page + 1) * size])
            parent = self._keys[-1] if self._keys else self._root
            key = block_key(parent, run)
            self._keys.append(key)
            self.cache.publish(self, Block(key, parent, page * size, run, []), page)

    def _drop(self) -> None:
        dropped = 0
        for table in self.tables:
            if table.group.retention.window is None:
                continue
            live = table.group.retention.live_pages(len(self.tokens), table.group.page_size)
            keep = np.isin(table.logical, live)
            if not keep.all():
                dropped += int((~keep).sum()) * len(table.pages)
                self.cache.release(table, keep)
                self._floor = len(self.tokens)
        if dropped:
            self.cache.emit(events.Dropped(self.number, len(self.tokens), dropped))

    def _check(self) -> None:
        if self.closed:
            raise SequenceError("the sequence is closed; open another, its published pages will be found")
        if self._busy:
            raise SequenceError("the sequence is in the middle of a step; finish or leave the step first")
