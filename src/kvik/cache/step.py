"""One chunk of many sequences, through all layers: where rows are written and what each query reads, worked out once.

with cache.step([(a, [5, 9]), (b, [7])]) as step:      # pages are reserved, or BudgetError and nothing changed
    for layer in ...:
        step.append(layer, k=k, v=v)                    # T = 3 rows: a's two, then b's one
        out = step.attend(layer, q, scale=...)
                                                        # left normally: the tokens are part of a and b
                                                        # left by an error: as if it had never been
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from kvik.cache import reading, relative
from kvik.cache.parts import Part, heads_of, joined
from kvik.cache.quest import select_of
from kvik.cache.sequence import Sequence
from kvik.cache.some import Some
from kvik.cache.spec import Group
from kvik.errors import SequenceError
from kvik.ops.fused import Fused
from kvik.ops.reads import Member, Partial, Plan, Reads, Rows

if TYPE_CHECKING:
    from kvik.cache.cache import Cache


class Step:
    """See the module's docstring. Made by `Cache.step`; good for one pass through the layers."""

    def __init__(self, cache: Cache, chunks: Seq[tuple[Sequence, Seq[int]]]) -> None:
        self.cache = cache
        self.sequences = [sequence for sequence, _ in chunks]
        self.chunks = [list(map(int, tokens)) for _, tokens in chunks]
        self.starts = [len(sequence) for sequence in self.sequences]
        self._count = sum(map(len, self.chunks))
        self._columns: list[list[int]] = []
        self._observers: dict[int, bool] = {}  # groups whose policies look on; whether they need attention mass
        self._done: set[int] = set()
        self._shown: set[tuple[int, int]] = set()  # (layer, group) whose queries a policy has seen
        self._used = False
        self._check()

    @property
    def tokens(self) -> list[int]:
        """All new token ids, sequence by sequence."""
        return [token for chunk in self.chunks for token in chunk]

    @property
    def positions(self) -> list[int]:
        """Their positions."""
        return [s + i for s, chunk in zip(self.starts, self.chunks, strict=True) for i in range(len(chunk))]

    @property
    def last(self) -> list[int]:
        """The row of each sequence's last new token."""
        return [int(end) - 1 for end in np.cumsum([len(chunk) for chunk in self.chunks])]

    def __enter__(self) -> Step:
        self._check()
        if self._used:
            raise SequenceError("the step was used already; ask the cache for another")
        self.starts = [len(sequence) for sequence in self.sequences]
        self._columns = self.cache.reserve(self)
        self._used = True
        self._observers = self._who_looks_on()
        for sequence in self.sequences:
            sequence._busy = True
        try:
            self._plans = [self.plan_of(index, group) for index, group in enumerate(self.cache.spec.groups)]
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sequence in self.sequences:
            sequence._busy = False
        missing = [layer for layer in self.cache.writing if layer not in self._done]
        if kind is not None or missing:
            self._undo()
        else:
            for sequence, chunk in zip(self.sequences, self.chunks, strict=True):
                sequence.tokens += chunk
        self.cache.active = None
        if kind is None and missing:
            raise SequenceError(f"the step ended before layers {missing[:4]} appended their rows; nothing was kept")

    def append(self, layer: int, **streams: Tensor) -> None:
        """Encodes and writes the new rows of one layer.

        Args:
            layer: which.
            streams: for each stream, f32 [T, heads, width], keys already rotated.
        """
        self._check_open(layer)
        if layer not in self.cache.writing:
            raise SequenceError(f"layer {layer} writes no rows: it reads those of a source or of another layer")
        for part in self.cache.parts[layer]:
            group = self.cache.spec.groups[part.group]
            rows = streams if part.heads is None else {n: x[:, list(part.heads)] for n, x in streams.items()}
            self._check_rows(layer, group, part.lanes.stop - part.lanes.start, rows)
            self._plans[part.group].append(part.lanes, rows)
        self._done.add(layer)

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        bias: Tensor | None = None,
        want_lse: bool = False,
        want_mass: bool = False,
    ) -> Partial:
        """Every new token's attention over all rows that it may see, its own included.

        Args:
            layer: which; its rows have been appended.
            q: f32 [T, H, width]; query heads in the order of the lanes that they share.

        The other arguments, and the result: `ops.reads.Plan.attend`; masses part by part.
        """
        owner = self.check_reading(layer)
        results = []
        for part, mine in heads_of(self.cache.parts[layer], q.shape[1]):
            asked = q if mine is None else q[:, mine]
            ask = partial(
                self._plans[part.group].attend, part.lanes, asked, scale=scale, softcap=softcap,
                bias=bias if mine is None or bias is None else bias[mine], want_lse=want_lse,
            )  # fmt: skip
            if part.group not in self._observers or (layer, part.group) in self._shown:
                results.append((mine, ask(want_mass=want_mass)))
                continue
            masses = self._so_far(layer, part, q) if self._observers[part.group] else None
            found = ask(masses=masses)
            self._show(owner, layer, part, asked, scale, found)
            own = ask(want_mass=True).mass if want_mass else None  # of this step alone
            results.append((mine, Partial(found.out, found.lse, own)))
        return joined(results, q.shape[1])

    def rows(self, layer: int) -> list[Rows]:
        """What each sequence holds of a layer, its new rows included, decoded: for an operator that does more with them
        than attention. All its lanes hold the same: of a layer whose rows no policy chooses (`LayerShape.use`).
        """
        self.check_reading(layer)
        (part,) = self.cache.parts[layer]
        reads, found = self._reads_of(part.group, self.cache.spec.groups[part.group]), []
        for sequence, member in zip(self.sequences, reads.members, strict=True):
            found.append(reading.held(self.cache, sequence, part, reads, member))
        return found

    def only(self, rows: Seq[int]) -> Some | None:
        """Some of the step's tokens, by their place among all: their queries alone go through layers that append
        nothing. None where a policy looks on, which must see every query.

        Nothing that any token's queries find depends on the others' (law 8), so no bit changes.
        """
        return None if self._observers else Some(self, rows)

    def through(self, layer: int, fused: Fused, x: Tensor, angles: Tensor | None) -> bool:
        """Append, attend and all around them in one call, where the cache's device and the layer's lanes allow it.

        Arguments and result: `ops.reads.Plan.through`.
        """
        self._check_open(layer)
        part, *others = self.cache.parts[layer]
        if others or part.heads is not None or part.group in self._observers or layer not in self.cache.writing:
            return False
        done = self._plans[part.group].through(part.lanes, fused, x, angles)
        if done:
            self._done.add(layer)
        return done

    def _check(self) -> None:
        for sequence in self.sequences:
            sequence._check()
        if len({id(s) for s in self.sequences}) < len(self.sequences):
            raise SequenceError("a sequence is twice in one step; give it one longer chunk")
        if not all(self.chunks) or not self.chunks:
            raise SequenceError("a step needs at least one sequence, and at least one token for each")
        if not all(0 <= token < 1 << 63 for token in self.tokens):
            raise SequenceError("a token id must be 0 or more and fit 63 bits")
        for sequence, chunk in zip(self.sequences, self.chunks, strict=True):
            self._check_trigger(sequence, len(chunk))

    def _check_trigger(self, sequence: Sequence, count: int) -> None:
        at, start = sequence.next_trigger, len(sequence)
        if at is not None and start + count > at:
            raise SequenceError(
                f"a chunk of {count} tokens from position {start} on passes position {at}, where the policy chooses "
                f"which rows stay; give {at - start} tokens and settle there"
            )

    def _who_looks_on(self) -> dict[int, bool]:
        found = {}
        for sequence, chunk in zip(self.sequences, self.chunks, strict=True):
            for group, observed in enumerate(sequence._observed):
                if observed is not None and observed.wants(len(sequence) + len(chunk), sequence.next_trigger):
                    found[group] = observed.adds
        return found

    def _so_far(self, layer: int, part: Part, q: Tensor) -> tuple[Tensor, ...]:
        """What each sequence's slots have received from a layer until this step, to be added to."""
        found, size = list[Tensor](), self.cache.spec.page_size
        for sequence in self.sequences:
            table, observed = sequence.tables[part.group], sequence._observed[part.group]
            columns = len(table.logical) + (0 if table.kept is None else table.kept.pages.shape[1])
            mass = q.new_zeros((part.lanes.stop - part.lanes.start, columns * size))
            if observed is not None:
                mass = observed.so_far(layer, part.lanes, columns * size).to(q.device)
            found.append(mass)
        return tuple(found)

    def _show(self, owner: int, layer: int, part: Part, q: Tensor, scale: float, found: Partial) -> None:
        """Lets the policies of a group see their sequences' queries, and what these gave to rows: the first time that a
        layer attends. Whoever asks again only looks (`bench/counting.py`)."""
        self._shown.add((layer, part.group))
        first = 0
        for index, (sequence, chunk) in enumerate(zip(self.sequences, self.chunks, strict=True)):
            observed = sequence._observed[part.group]
            if observed is not None:
                mass = None if found.mass is None else found.mass[index]
                asked = q[first : first + len(chunk)]
                observed.see(owner, layer, part.lanes, len(sequence), asked, scale, mass)
            first += len(chunk)

    def check_reading(self, layer: int) -> int:
        """The layer whose rows this one reads. Raises SequenceError where they are not there yet."""
        self._check_open(layer)
        owner = self.cache.spec.readers[layer]
        if owner in self.cache.writing and owner not in self._done:
            raise SequenceError(f"layer {layer} attends before it appended its rows; a token sees itself")
        return owner

    def _check_open(self, layer: int) -> None:
        if self.cache.active is not self:
            raise SequenceError("the step is not open; use it inside its own 'with'")
        if not 0 <= layer < len(self.cache.parts):
            raise SequenceError(f"layer {layer}: the spec has layers 0 to {len(self.cache.parts) - 1}")

    def _check_rows(self, layer: int, group: Group, lanes: int, rows: dict[str, Tensor]) -> None:
        known = [stream.name for stream in group.layout.streams]
        if len(rows) > len(known):
            raise SequenceError(f"layer {layer} keeps {' and '.join(known)}; got {' and '.join(rows)}")
        for stream in group.layout.streams:
            want = (self._count, lanes, stream.width)
            if stream.name not in rows or rows[stream.name].shape != want:
                got = tuple(rows[stream.name].shape) if stream.name in rows else "nothing"
                raise SequenceError(
                    f"layer {layer}, stream {stream.name}: got {got}, needs (tokens, heads, width) = {want}"
                )

    def _undo(self) -> None:
        """Gives back what was reserved. Rows in old pages lie beyond the sequence's end: blanked before use."""
        for sequence, before in zip(self.sequences, self._columns, strict=True):
            for observed in sequence._observed:
                if observed is not None:
                    observed.forget(len(sequence))
            for table, columns in zip(sequence.tables, before, strict=True):
                self.cache.release(table, np.arange(len(table.logical)) < columns)
                table.stale = True

    def plan_of(self, index: int, group: Group, rows: Seq[int] | None = None) -> Plan:
        """How a group's rows are written and read; `rows`: by these of the tokens."""
        ops, pages, reads = self.cache.ops, self.cache.pages(group), self._reads_of(index, group)
        if rows is not None:
            reads = reads.only(rows)
        if group.retention.relative:
            return relative.plan(ops, pages, reads, group.frequencies)
        return ops.plan(pages, reads)

    def _reads_of(self, index: int, group: Group) -> Reads:
        members = []
        for sequence, start, chunk in zip(self.sequences, self.starts, self.chunks, strict=True):
            table = sequence.tables[index]
            if group.source:  # all that it sees are kept rows, at any position
                members.append(Member(table.pages, table.logical, 0, len(chunk), table.kept))
                continue
            extremes = table.extremes if start >= sequence.prompt else None  # a prompt's queries read everything
            members.append(Member(table.pages, table.logical, start, len(chunk), table.kept, extremes))
        retention = group.retention
        return Reads(
            group.layout,
            group.page_size,
            retention.window,
            retention.sinks,
            tuple(members),
            centre=self.cache.centres[index],
            select=select_of(group),
        )
