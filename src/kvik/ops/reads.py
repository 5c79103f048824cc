"""What one step writes and reads in one group of lanes, for every backend alike: tables, positions and a mask.

A page table is opened at a logical page, the one that holds its positions:

    logical   0    5    6           page size 32: column 1 holds positions 160 … 191
    pages    [17,  3,  12]          of lane 0; a row for each lane

Positions between are holes: nothing is there, and no query sees it.

Rows that stayed when others left lie apart, in pages of their own, lane by lane, without gaps, each with its position:

    kept.pages      [40, 41]      of lane 0, whose count is 45: all of page 40 and 13 slots of page 41
    kept.positions  0, 1, 7, …    ascending, and all before the table's first
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.errors import UsageError
from kvik.ops.codecs import halved_sum
from kvik.ops.layout import RowLayout

if TYPE_CHECKING:
    from kvik.ops.fused import Fused


@dataclass(frozen=True)
class Kept:
    """Rows that stayed when others left. Every later query sees them, before all others.

    Attributes:
        pages: int32 [lanes, columns], contiguous; of a lane, the first ⌈count / N⌉ are its own.
        counts: int32 [lanes].
        positions: int32 [lanes, columns · N]; -1 behind a lane's last row.
    """

    pages: NDArray[np.int32]
    counts: NDArray[np.int32]
    positions: NDArray[np.int32]


@dataclass(frozen=True)
class Span:
    """Which pages stand open to a query's choice.

    Attributes:
        sinks: the first pages, which are always read.
        recent: the first of the last pages, which are always read.
        free: how many of those between are read.
    """

    sinks: int
    recent: int
    free: int


@dataclass(frozen=True)
class Select:
    """Queries read few pages, chosen by each (`ops/quest.py`).

    Attributes:
        pages: that a lane reads for a query. Those that are always read count, and are read even where they are more.
        sinks: first positions whose pages are always read.
        recent: last positions whose pages are always read, the query's own included; at least 1.
        dense: the group's first lanes, which read everything.
    """

    pages: int
    sinks: int
    recent: int
    dense: int

    def span(self, position: int, page_size: int) -> Span | None:
        """What a query at this position chooses from; None: it reads everything, as there are no more pages.

        >>> Select(3, 4, 16, 0).span(101, 32)
        Span(sinks=1, recent=2, free=0)
        """
        pages = position // page_size + 1
        if pages <= self.pages:
            return None
        recent = max(position - self.recent + 1, 0) // page_size
        sinks = min(-(-self.sinks // page_size), recent)
        return Span(sinks, recent, min(max(self.pages - sinks - (pages - recent), 0), recent - sinks))


@dataclass(frozen=True)
class Member:
    """One sequence of a step.

    Attributes:
        pages: int32 [lanes, columns], contiguous.
        logical: int32 [columns], ascending: column c holds positions logical[c]·N … logical[c]·N + N - 1.
        start: position of its first new token; there are columns for all new tokens.
        count: new tokens.
        kept: rows from before the table's first position; None = none.
        extremes: of the keys of every page that is full before the first new token, uint16 [lanes, B, 2, D, 16], see
            `ops/quest.py`: its queries choose which pages they read, all lie in one page, and the table starts at
            page 0. None: they read everything.
    """

    pages: NDArray[np.int32]
    logical: NDArray[np.int32]
    start: int
    count: int
    kept: Kept | None = None
    extremes: NDArray[np.uint16] | None = None

    @property
    def columns(self) -> int:
        """Pages a lane, kept ones first, as masses count them."""
        return len(self.logical) + (0 if self.kept is None else self.kept.pages.shape[1])


@dataclass(frozen=True)
class Reads:
    """A step's sequences, in one group.

    Attributes:
        layout: of a row: its key streams, and the one that is mixed.
        page_size: N.
        window: positions that a query sees, its own included; None = all; 0 = the sinks alone.
        sinks: first positions that stay visible though a window has passed them.
        members: in the order of the step's T tokens.
        centre: f32 [lanes of the group, D], subtracted from keys before they are encoded; None = nothing is.
        select: how queries choose which pages they read; None = they read all that they see.
    """

    layout: RowLayout
    page_size: int
    window: int | None
    sinks: int
    members: tuple[Member, ...]
    centre: Tensor | None = None
    select: Select | None = None

    def chooses(self, lanes: slice) -> bool:
        """Whether some queries of these lanes choose what they read."""
        select = self.select
        return select is not None and lanes.start >= select.dense and any(m.extremes is not None for m in self.members)

    @property
    def tokens(self) -> int:
        """T."""
        return sum(member.count for member in self.members)

    def only(self, rows: Sequence[int]) -> Reads:
        """The same of some of the T tokens, each a member of its own."""
        ends = np.cumsum([member.count for member in self.members])
        members = []
        for row in rows:
            owner = int(np.searchsorted(ends, row, side="right"))
            member = self.members[owner]
            start = member.start + row - int(ends[owner]) + member.count
            members.append(replace(member, start=start, count=1))
        return replace(self, members=tuple(members))

    def visible(self, asking: NDArray[np.int64], held: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The mask, made of positions alone: which held rows each asking query sees; the two broadcast."""
        return visible(asking, held, self.window, self.sinks)

    def centred(self, lanes: slice, rows: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """New rows as they are encoded: keys f32 [T, L, D] less their lane's centre."""
        return rows if self.centre is None else {**rows, "k": rows["k"] - self.centre[lanes]}

    def whole(self, lanes: slice, q: Tensor, scale: float, lse: Tensor) -> Tensor:
        """Log Σ exp(score) over keys, [T, H], from that over keys less their centre: scale · q·c more. Summed in one
        order, so that the cut cannot show."""
        if self.centre is None:
            return lse
        grouped = torch.unflatten(q, 1, (lanes.stop - lanes.start, -1))
        return lse + scale * halved_sum(grouped * self.centre[lanes].unsqueeze(1)).flatten(1)

    def check(self, softcap: float | None) -> None:
        """Raises UsageError where keys have a centre that softmax would not ignore."""
        if self.centre is not None and softcap is not None:
            raise UsageError(
                "softcap bends scores, so that a centre of the keys would change the result; make the cache without "
                "centres"
            )

    def slots(self) -> NDArray[np.int64]:
        """int64 [lanes, T]: page · N + slot of every new row."""
        size, parts = self.page_size, []
        for member in self.members:
            positions = np.arange(member.start, member.start + member.count)
            columns = np.searchsorted(member.logical, positions // size)
            parts.append(member.pages[:, columns].astype(np.int64) * size + positions % size)
        return np.concatenate(parts, axis=1)


def visible(asking: NDArray[np.int64], held: NDArray[np.int64], window: int | None, sinks: int) -> NDArray[np.bool_]:
    """Which held rows each asking query sees, by position alone; the two broadcast."""
    back = asking - held
    seen = back >= 0
    if window is not None:
        seen &= (back < window) | (held < sinks)
    return np.asarray(seen)


@dataclass(frozen=True)
class Rows:
    """One sequence's rows of a layer, decoded, its new ones included: what an operator reads back that does more with
    them than attention.

    Attributes:
        positions: int64 [n], ascending.
        asking: int64 [T], those of the step's new tokens.
        visible: bool [T, n], which rows each of them sees.
        streams: f32 [lanes, n, width] by name.
    """

    positions: Tensor
    asking: Tensor
    visible: Tensor
    streams: Mapping[str, Tensor]


@dataclass(frozen=True)
class Partial:
    """Attention over some of the rows, ready to be merged with attention over others.

    Attributes:
        out: [T, H, E].
        lse: log Σ exp(score), [T, H]; None unless asked for.
        mass: for each member, the weight that each slot of its kept pages and then of its table received from the
            step's tokens, summed over them and over the queries that share a lane: [L, columns · N]; None unless asked
            for.
    """

    out: Tensor
    lse: Tensor | None = None
    mass: tuple[Tensor, ...] | None = None


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over both parts' rows, from attention over each (flashinfer's cascade; arXiv:2501.01005).

    Both need their `lse`. A part in which a query saw nothing has a very low lse and weighs nothing.
    """
    assert a.lse is not None and b.lse is not None, "merge needs log-sum-exp: attend(..., want_lse=True)"
    top = torch.maximum(a.lse, b.lse)
    x, y = (a.lse - top).exp(), (b.lse - top).exp()  # logaddexp would give a value other bits at a tensor's end
    total = x + y
    out = (a.out * x.unsqueeze(-1) + b.out * y.unsqueeze(-1)) / total.unsqueeze(-1)
    return Partial(out, top + total.log())


class Plan(Protocol):
    """A step's reads and writes in one group, worked out once; good until its tables change."""

    def append(self, lanes: slice, rows: Mapping[str, Tensor]) -> None:
        """Encodes the step's new rows, each by itself, and writes them where they belong.

        Args:
            lanes: which of the group's.
            rows: f32 [T, L, W] for each stream.
        """

    def attend(
        self,
        lanes: slice,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        bias: Tensor | None = None,
        want_lse: bool = False,
        want_mass: bool = False,
        masses: tuple[Tensor, ...] | None = None,
    ) -> Partial:
        """Attention of every query over the stored form of the rows that it sees, its own included.

        Args:
            lanes: which of the group's lanes q's heads read.
            q: f32 [T, H, D]; head h reads lane h // G. D is the width of all key streams together, in their order.
            scale: of the scores.
            softcap: scores become softcap · tanh(score / softcap) (Gemma 2, arXiv:2408.00118).
            bias: f32 [H, R], added to the score of a row that lies r positions back; the last column serves all
                further ones (ALiBi, arXiv:2108.12409; T5, arXiv:1910.10683).
            want_lse: also return the log-sum-exp.
            want_mass: also return the attention mass.
            masses: return it too, added to these, f32 [L, columns · N] of each member, contiguous: query by query, one
                of G after the other, so that many chunks add up to the same however they are cut. They are modified.
        """

    def through(self, lanes: slice, layer: Fused, x: Tensor, angles: Tensor | None) -> bool:
        """Takes the step's tokens through a whole layer, where the backend can: append and attend included.

        Args:
            lanes: which of the group's lanes are the layer's.
            layer: its weights and functions.
            x: f32 [T, width of the model]; changed in place.
            angles: complex64 [T, 1, D / 2], by which queries and keys are turned; None = not.

        Returns:
            False where nothing happened, and the caller goes operation by operation.
        """


class Backend(Protocol):
    """A module that implements the operations over pages."""

    def plan(self, pages: Tensor, reads: Reads) -> Plan:
        """Works out a step: pages uint8 [P, page bytes]."""

    def compact(self, pages: Tensor, layout: RowLayout, size: int, source: Tensor, target: Tensor) -> None:
        """Moves rows, codes verbatim, from slots int64 [S] to slots int64 [S], as if all were read before any is
        written; target slots differ. A slot is page · size + place in the page; modifies pages."""
