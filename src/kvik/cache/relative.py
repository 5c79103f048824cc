"""Sinks right before the window: how one text runs far past the positions that a model was trained with.

StreamingLLM (arXiv:2309.17453): a query sees its window at true distances, and the sinks as if they lay right before
it. Window 6, 4 sinks, a query at position 14:

    position   0 1 2 3 | 4 … 8 | 9 10 11 12 13 14
    seen        sinks  | gone  |      window
    distance   9 8 7 6 |       | 5  4  3  2  1  0      the window's from 14, the sinks' from 9 = window + sinks - 1

No distance reaches window + sinks, however long the text is. Nothing that is stored is touched: keys lie turned by
their own positions, and for the sinks it is the *query* that is turned back, here by 14 - 9 positions. Attention over
sinks and attention over the window merge (law 3).

*Far* tokens, from position window + sinks on, read so. Before it nothing lies between sinks and window, and it is the
plain mask, bit for bit. A token's position alone says which, and neither part knows of the other: the cut can't show.

Legend: T tokens of a step, t of them far, H query heads, L lanes, G = H / L queries that share a lane, D width of keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kvik.cache import weigh
from kvik.errors import SpecError
from kvik.ops import pointwise
from kvik.ops.fused import Fused
from kvik.ops.layout import MOST_POSITIONS
from kvik.ops.reads import Backend, Partial, Plan, Reads, merge


def plan(ops: Backend, pages: Tensor, reads: Reads, frequencies: Sequence[float] | None) -> Plan:
    """A step's reads with its sinks right before the window.

    Args:
        reads: with a window; where it has no sinks, or none of its tokens is far, the plan is the ordinary one.
        frequencies: radians a position by which neighbouring pairs of a key's channels are turned.
    """
    if reads.sinks == 0 or all(member.start + member.count <= _edge(reads) for member in reads.members):
        return ops.plan(pages, reads)
    assert frequencies, "a spec is relative only where positions turn keys"
    return Relative(ops, pages, reads, frequencies)


def turned_back(q: Tensor, positions: Tensor, edge: int, frequencies: Sequence[float]) -> Tensor:
    """Queries f32 [t, H, D] at int64 [t] positions, as they ask sinks: as if none stood behind position `edge` - 1."""
    return pointwise.turn(q.clone(), _angles(positions, edge, frequencies))


@dataclass(frozen=True)
class _Some:
    """Some of a step's tokens.

    Attributes:
        rows: int64 [t], which of the step's they are; None = all.
        owners: which of the step's members each of `reads` is.
        reads: theirs.
    """

    rows: Tensor | None
    owners: tuple[int, ...]
    reads: Reads

    @classmethod
    def between(cls, reads: Reads, first: int, end: int, device: torch.device) -> _Some:
        """The tokens at positions first … end - 1."""
        members, owners, rows, before = [], [], [np.zeros(0, np.int64)], 0
        for number, member in enumerate(reads.members):
            start, stop = max(member.start, first), min(member.start + member.count, end)
            if start < stop:
                members.append(replace(member, start=start, count=stop - start))
                owners.append(number)
                rows.append(before - member.start + np.arange(start, stop))
            before += member.count
        every = np.concatenate(rows)
        which = None if len(every) == before else torch.from_numpy(every).to(device)
        return cls(which, tuple(owners), replace(reads, members=tuple(members)))

    def of(self, x: Tensor) -> Tensor:
        """Their rows of [T, …]."""
        return x if self.rows is None else x[self.rows]

    def positions(self) -> Tensor:
        """int64 [t]."""
        return torch.cat([torch.arange(m.start, m.start + m.count) for m in self.reads.members])

    def one_by_one(self) -> tuple[Reads, list[int]]:
        """The same as members of one token each, and whose each is."""
        members, owners = [], []
        for owner, member in zip(self.owners, self.reads.members, strict=True):
            members += [replace(member, start=member.start + i, count=1) for i in range(member.count)]
            owners += [owner] * member.count
        return replace(self.reads, members=tuple(members)), owners


class Relative:
    """See `ops.reads.Plan`, which it is one of; made of others."""

    def __init__(self, ops: Backend, pages: Tensor, reads: Reads, frequencies: Sequence[float]) -> None:
        edge = _edge(reads)
        self._ops, self._pages, self._reads = ops, pages, reads
        self._far = _Some.between(reads, edge, MOST_POSITIONS, pages.device)
        self._window, self._sinks = (ops.plan(pages, part) for part in _parts(self._far.reads))
        self._back = _angles(self._far.positions(), edge, frequencies).to(pages.device)
        self._near: tuple[_Some, Plan] | None = None
        if self._far.rows is not None:
            near = _Some.between(reads, 0, edge, pages.device)
            self._near = near, ops.plan(pages, near.reads)

    def append(self, lanes: slice, rows: Mapping[str, Tensor]) -> None:
        """See `ops.reads.Plan.append`."""
        for some, plan in ((self._far, self._window), *((self._near,) if self._near else ())):
            plan.append(lanes, {name: some.of(x) for name, x in rows.items()})

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
        """See `ops.reads.Plan.attend`.

        Raises:
            SpecError: there is a bias: it goes by distance, and sinks would get that of their true one.
        """
        assert masses is None, "no policy looks on beside a mask"
        if bias is not None:
            raise SpecError(
                "relative positions can't be had beside a bias by distance: sinks would get that of their true one; "
                "leave ',relative' out of the spec"
            )
        found = self._over_far(lanes, self._far.of(q), scale, softcap, want_mass)
        if self._near is None:
            return found if want_lse else Partial(found.out, None, found.mass)
        near, plan = self._near
        before = plan.attend(lanes, near.of(q), scale=scale, softcap=softcap, want_lse=want_lse, want_mass=want_mass)
        return self._joined(len(q), before, found, want_lse)

    def through(self, lanes: slice, layer: Fused, x: Tensor, angles: Tensor | None) -> bool:
        """See `ops.reads.Plan.through`: the query is turned on its way, so there is no shorter one."""
        return False

    def _over_far(self, lanes: slice, q: Tensor, scale: float, softcap: float | None, want_mass: bool) -> Partial:
        """Attention of the far tokens, masses member by member of the step."""
        back = pointwise.turn(q.clone(), self._back)
        window = self._window.attend(lanes, q, scale=scale, softcap=softcap, want_lse=True)
        sinks = self._sinks.attend(lanes, back, scale=scale, softcap=softcap, want_lse=True)
        found = merge(window, sinks)
        if not want_mass or found.lse is None:
            return found
        return Partial(found.out, found.lse, self._masses(lanes, (q, back), found.lse, scale, softcap))

    def _masses(
        self, lanes: slice, asks: tuple[Tensor, Tensor], lse: Tensor, scale: float, softcap: float | None
    ) -> tuple[Tensor, ...]:
        """What rows received: of each part by its own sum of weights, hence token by token and one of G at a time, each
        weighed by what share of all weights (their log-sum-exp: lse [t, H]) the part has."""
        singles, owners = self._far.one_by_one()
        masses = self._no_masses(lanes, lse)
        shared = lse.shape[1] // (lanes.stop - lanes.start)
        for reads, q in zip(_parts(singles), asks, strict=True):
            plan = self._ops.plan(self._pages, reads)
            for head in range(shared):
                mine = slice(head, None, shared)
                part = plan.attend(lanes, q[:, mine], scale=scale, softcap=softcap, want_lse=True, want_mass=True)
                assert part.lse is not None and part.mass is not None, "both were asked for"
                shares = (part.lse - lse[:, mine]).exp().unsqueeze(-1)  # [t, L, 1]
                for owner, share, mass in zip(owners, shares, part.mass, strict=True):
                    masses[owner].add_(share * mass)
        return masses

    def _no_masses(self, lanes: slice, like: Tensor) -> tuple[Tensor, ...]:
        size, count = self._reads.page_size, lanes.stop - lanes.start
        return tuple(like.new_zeros((count, member.columns * size)) for member in self._reads.members)

    def _joined(self, tokens: int, near: Partial, far: Partial, want_lse: bool) -> Partial:
        """Both kinds of tokens, in the step's order."""
        assert self._near is not None, "there are both"
        out = far.out.new_empty((tokens, *far.out.shape[1:]))
        lse = out.new_empty(out.shape[:2]) if want_lse else None
        for some, part in ((self._near[0], near), (self._far, far)):
            out[some.rows] = part.out
            if lse is not None and part.lse is not None:
                lse[some.rows] = part.lse
        if near.mass is not None and far.mass is not None:
            for owner, mass in zip(self._near[0].owners, near.mass, strict=True):
                far.mass[owner].add_(mass)
        return Partial(out, lse, far.mass)


def _edge(reads: Reads) -> int:
    """The first far position."""
    assert reads.window is not None, "positions are relative to a window"
    return reads.window + reads.sinks


def _parts(reads: Reads) -> tuple[Reads, Reads]:
    """The window alone, and the sinks alone."""
    return replace(reads, sinks=0), replace(reads, window=0)


def _angles(positions: Tensor, edge: int, frequencies: Sequence[float]) -> Tensor:
    """What turns queries back to position `edge` - 1 where they stand behind it: complex64 [t, 1, D/2]."""
    back = (edge - 1 - positions).clamp(max=0)
    return weigh.turns(torch.tensor(frequencies, dtype=torch.float64), back).to(torch.complex64).unsqueeze(1)
