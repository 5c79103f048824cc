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
from torch import Tensor

from kvik import events
from kvik.cache.compaction import compress
from kvik.cache.observed import Observed
from kvik.cache.prefix import Block, block_key
from kvik.cache.reading import read
from kvik.cache.spec import Bytes
from kvik.cache.table import Table
from kvik.errors import SequenceError

if TYPE_CHECKING:
    from kvik.cache.cache import Cache
    from kvik.cache.step import Step


class Sequence:
    """Tokens and the rows that they left. Made by `Cache.open`; use as a context manager, or `close()`.

    Attributes:
        tokens: ids so far. The next position is `len(tokens)`: tokens seen, whatever was dropped.
        cached: how many of them were known when it was opened.
        prompt: position where the prompt ends, by default of the tokens that it was opened with: there a policy may
            choose which rows stay. Another turn has another.
    """

    def __init__(self, cache: Cache, number: int, root: bytes, chain: list[Block], prompt: int) -> None:
        self.cache = cache
        self.number = number
        self.tokens = [token for block in chain for token in block.tokens]
        self.cached = len(self.tokens)
        self.prompt = prompt
        self.closed = False
        self.tables = [Table(group) for group in cache.spec.groups]
        self._root = root
        self._keys = [block.key for block in chain]  # of its full pages that are published
        self._settled = self.cached
        self._floor = 0  # trimming below this would need rows that were dropped
        self._busy = False
        self._publishes = cache.shares and bool(self.tables)
        policies = [table.group.retention.policy for table in self.tables]
        self._observed = [
            None if policy is None else Observed(policy, table.group)
            for policy, table in zip(policies, self.tables, strict=True)
        ]

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
        return read(self.cache, self, layer)

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
        self._check_trim(length)
        size = self.cache.spec.page_size
        for observed in self._observed:
            if observed is not None:
                observed.forget(length)
        for table in self.tables:
            self.cache.release(table, table.logical * size < length)
            table.stale = True
        del self.tokens[length:]
        del self._keys[length // size :]
        self._settled = min(self._settled, length)

    def settle(self, accepted: int | None = None) -> None:
        """Makes what was appended final: publishes full pages, and drops what the retention hides from every later
        token or, at a trigger of its policy, what that does not choose.

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
        self._compress()

    def close(self) -> None:
        """Gives every page back; the one place where that happens. Idempotent."""
        if self.closed:
            return
        self._check()
        self.cache.touch(self._keys)
        for table in self.tables:
            self.cache.release_all(table)
        self.closed = True
        self.cache.forget(self)
        self.cache.emit(events.Closed(self.number, len(self.tokens)))

    @property
    def nbytes(self) -> Bytes:
        """Bytes that this sequence holds, pages shared with others included."""
        payload = held = 0
        for table in self.tables:
            layout = table.group.layout
            pages, rows = table.held(len(self.tokens))
            payload += int(rows.sum()) * layout.payload_bits // 8
            held += pages.size * table.group.page_bytes + table.nbytes
        return Bytes(payload, held - payload)

    def _publish(self) -> None:
        size = self.cache.spec.page_size
        if not self._publishes:
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

    @property
    def next_trigger(self) -> int | None:
        """The position at which a policy chooses next: no chunk may pass it, and the sequence must settle there."""
        found = [
            at
            for table, observed in zip(self.tables, self._observed, strict=True)
            if observed is not None
            and (at := observed.policy.next_trigger(self._settled, self.prompt or None)) is not None
        ]
        return min(found, default=None)

    def _compress(self) -> None:
        gone = 0
        for table, observed in zip(self.tables, self._observed, strict=True):
            if observed is None:
                continue
            observed.settle()
            held = int(table.held(len(self.tokens))[1].sum()) / max(len(table.pages), 1)
            if observed.policy.fires(len(self.tokens), self.prompt or None, held):
                gone += compress(self.cache, self, table, observed)
        if gone:
            self._floor, self._publishes = len(self.tokens), False
            if self.cache.arena.scattered:
                self.cache.defragment()
            self.cache.emit(events.Compressed(self.number, len(self.tokens), gone))

    def _check_trim(self, length: int) -> None:
        for observed in self._observed:
            if observed is not None and observed.mass is not None and length < len(self.tokens):
                raise SequenceError(
                    f"trim to {length}: under {observed.policy} every query has left its mark on the rows before it, "
                    "which can't be taken back; open a new sequence"
                )

    def _check(self) -> None:
        if self.closed:
            raise SequenceError("the sequence is closed; open another, its published pages will be found")
        if self._busy:
            raise SequenceError("the sequence is in the middle of a step; finish or leave the step first")
