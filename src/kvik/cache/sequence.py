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
from kvik.cache.methods import Needs
from kvik.cache.observed import Observed
from kvik.cache.policy import Policy
from kvik.cache.prefix import Block, block_key
from kvik.cache.publishing import publish
from kvik.cache.quest import learn
from kvik.cache.reading import read
from kvik.cache.spec import Bytes
from kvik.cache.table import Table
from kvik.cache.tidying import tidy
from kvik.errors import SequenceError
from kvik.ops.layout import MOST_POSITIONS

if TYPE_CHECKING:
    from kvik.cache.cache import Cache
    from kvik.cache.step import Step


class Sequence:
    """Tokens and the rows that they left. Made by `Cache.open`; use as a context manager, or `close()`.

    Attributes:
        tokens: ids so far. The next position is `len(tokens)`: tokens seen, whatever was dropped.
        cached: how many of them were known when it was opened.
        owner: on whose account its pages are; see `cache/owners.py`.
        prompt: position where the prompt ends, by default of the tokens that it was opened with: there a policy may
            choose which rows stay. Another turn has another.
    """

    def __init__(
        self,
        cache: Cache,
        number: int,
        root: bytes,
        chain: list[Block],
        prompt: int,
        part: tuple[Block, int] | None = None,
        owner: str = "",
    ) -> None:
        self.cache = cache
        self.number, self.owner = number, owner
        self.tokens = [token for block in chain for token in block.tokens]
        if part is not None:
            self.tokens += part[0].tokens[: part[1]]
        self.cached = len(self.tokens)
        self.prompt = prompt
        self.closed = False
        self.tables = [Table(group, cache.owners.account(owner)) for group in cache.spec.groups]
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

    def aside(self) -> Sequence:
        """A fork to look from: no policy chooses in it, its queries read everything, and nothing of it is ever
        published. Close it.

        Raises:
            BudgetError: the tables don't fit.
        """
        twin = self.fork()
        twin.prompt, twin._publishes, twin._observed = MOST_POSITIONS, False, [None] * len(self.tables)
        return twin

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
        if length == len(self.tokens):
            return
        size = self.cache.spec.page_size
        for observed in self._observed:
            if observed is not None:
                observed.forget(length)
        for table in self.tables:
            self.cache.release(table, table.logical * size < length)
            table.stale = True
            table.forget(length)
        del self.tokens[length:]
        del self._keys[length // size :]
        self._settled = min(self._settled, length)

    def settle(self, accepted: int | None = None) -> None:
        """Makes what was appended final: publishes full pages, and drops what the retention hides from every later
        token or, at a trigger of its policy, what that does not choose.

        Args:
            accepted: how many of the tokens appended since the last settle stay; the rest leave no trace. None = all.

        Raises:
            SequenceError: a policy chooses here by a pass of the model that nobody has made; nothing changed.
            BudgetError: others hold pages of rows that stay, and there is no room to move those elsewhere.
        """
        self._check()
        if accepted is not None and not 0 <= accepted <= self.pending:
            pending = self.pending
            raise SequenceError(
                f"settle({accepted}): {pending} tokens were appended since the last settle; give 0 to {pending}"
            )
        end = len(self.tokens) if accepted is None else self._settled + accepted
        self._check_shown(end)
        if accepted is not None:
            self.trim(end)
        self._settled = end
        self._publish()
        self._drop()
        self._compress()
        for number, table in enumerate(self.tables):
            if table.group.chooses:
                learn(self.cache, table, number, len(self.tokens))

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
        chooses = len(self.tokens) > self.prompt and any(table.group.chooses for table in self.tables)
        end = min(len(self.tokens), self.prompt) if chooses else len(self.tokens)
        for page in range(len(self._keys), end // size):
            run = tuple(self.tokens[page * size : (page + 1) * size])
            parent = self._keys[-1] if self._keys else self._root
            key = block_key(parent, run)
            self._keys.append(key)
            publish(self.cache, self, Block(key, parent, page * size, run, [], owner=self.owner), page)
        if chooses:  # what comes after the prompt depends on where it ended
            self._publishes = False

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
            tidy(self.cache)

    @property
    def pending(self) -> int:
        """How many tokens were appended since the last settle."""
        return len(self.tokens) - self._settled

    @property
    def next_trigger(self) -> int | None:
        """The position at which a policy chooses next: no chunk may pass it, and the sequence must settle there."""
        found = [
            at
            for table, observed in zip(self.tables, self._observed, strict=True)
            if observed is not None
            and (at := observed.policy.next_trigger(self._settled, self.prompt or None, table.group.page_size))
            is not None
        ]
        return min(found, default=None)

    def asking(self, at: int | None = None) -> dict[int, Policy]:
        """Groups whose policies choose when the sequence settles at position `at`, and must be shown a pass of the
        model over its tokens before that (`remember`).

        Args:
            at: its end, or a later position; None = its end.
        """
        at, found = len(self.tokens) if at is None else at, {}
        for group, (table, observed) in enumerate(zip(self.tables, self._observed, strict=True)):
            if observed is None or observed.repeated is None or observed.repeated.shape[1] >= at:
                continue
            if observed.policy.fires(at, self.prompt or None, self._held(table, at)):
                found[group] = observed.policy
        return found

    def remembered(self, group: int) -> int:
        """Of how many first positions a group's policy has been shown a pass."""
        observed = self._observed[group]
        return 0 if observed is None or observed.repeated is None else observed.repeated.shape[1]

    def remember(self, group: int, received: Tensor, start: int = 0) -> None:
        """Shows a group's policy what a pass of the model over the tokens has found of their rows.

        Args:
            group: index in the spec's groups; one whose policy asks for a pass.
            received: f32 [lanes, positions]: of each row from `start` to the sequence's end, higher stays.
            start: first position; what was remembered before it stands.
        """
        self._check()
        observed, wanted = self._observed[group], (len(self.tables[group].pages), len(self.tokens) - start)
        if observed is None or observed.repeated is None:
            raise SequenceError(f"group {group} has no policy that asks for a pass; remember nothing for it")
        if not 0 <= start <= observed.repeated.shape[1] or tuple(received.shape) != wanted:
            raise SequenceError(
                f"remember: got {tuple(received.shape)} from position {start} on, needs (lanes, positions) = {wanted} "
                f"from a position up to {observed.repeated.shape[1]}"
            )
        observed.remember(received, start)

    def _compress(self) -> None:
        gone = 0
        for table, observed in zip(self.tables, self._observed, strict=True):
            if observed is None:
                continue
            observed.settle()
            held = self._held(table, len(self.tokens))
            if observed.policy.fires(len(self.tokens), self.prompt or None, held):
                gone += compress(self.cache, self, table, observed)
        if gone:
            self._floor, self._publishes = len(self.tokens), False
            self.cache.emit(events.Compressed(self.number, len(self.tokens), gone))
            tidy(self.cache)

    def _held(self, table: Table, at: int) -> float:
        """Rows a lane holds, on average over a group's, at position `at`, its end or later."""
        end = len(self.tokens)
        return int(table.held(min(at, end))[1].sum()) / max(len(table.pages), 1) + max(at - end, 0)

    def _check_shown(self, at: int) -> None:
        for policy in self.asking(at).values():
            what, who = "a pass of the model over the text", "kvik.engine.generation.prefill makes it"
            if Needs.FUTURE in policy.needs:
                what, who = "what comes after", "it is for 'kvik eval' alone"
            raise SequenceError(
                f"settling at position {at}: {policy} chooses by {what}, which it has not been shown; {who}"
            )

    def _check_trim(self, length: int) -> None:
        for observed in self._observed:
            if length in (len(self.tokens), self._settled):  # what is pending goes as a whole
                break
            if observed is not None and observed.mass is not None:
                raise SequenceError(
                    f"trim to {length}: under {observed.policy} every query has left its mark on the rows before it, "
                    "which can't be taken back; open a new sequence"
                )

    def _check(self) -> None:
        if self.closed:
            raise SequenceError("the sequence is closed; open another, its published pages will be found")
        if self._busy:
            raise SequenceError("the sequence is in the middle of a step; finish or leave the step first")
