"""Which set of matrices serves a pair of tokens: tables of offsets in a line and in a grid.

A table is int64 [n, n]: for query i and key j the number of the set, -1 where i doesn't see j. In a causal line the
offset is i - j = 0 … n - 1; in a line seen from both sides negative offsets have sets of their own; in a grid the
offset has two parts, and the class token, which has no place in it, three sets of its own:

    (class, class)          the third from the end
    (class, patch)          the second from the end: what the class token takes in
    (patch, class)          the last: what it gives out

Example, a causal line of 4:  0 · · ·      ranges that begin at 0, 1, 2:  0 · · ·
                              1 0 · ·                                     1 0 · ·
                              2 1 0 ·                                     2 1 0 ·
                              3 2 1 0                                     2 2 1 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvik.errors import ContextError


class Geometry(Protocol):
    """Where tokens stand to one another."""

    @property
    def sets(self) -> int:
        """How many sets of matrices there are."""

    @property
    def mirrored(self) -> bool:
        """Whether queries take the set of (j, i) where keys and values take that of (i, j): where both are seen."""

    def table(self, n: int) -> Tensor:
        """See the module. Raises ContextError for more tokens than there are offsets for."""


@dataclass(frozen=True)
class Line:
    """Tokens in a line.

    Attributes:
        length: the most tokens; of a kernel its offsets.
        causal: whether a token sees those before it alone.
        starts: where each range of distances begins, the last without an end; None = a set for each.
        cut: what is further away than `length` is not seen (a kernel), instead of being an error.
    """

    length: int
    causal: bool = True
    starts: tuple[int, ...] | None = None
    cut: bool = False

    @property
    def each(self) -> int:
        """Sets of one side, 0 included."""
        return self.length if self.starts is None else len(self.starts)

    @property
    def sets(self) -> int:
        """See `Geometry`."""
        return self.each if self.causal else 2 * self.each - 1

    @property
    def mirrored(self) -> bool:
        """See `Geometry`."""
        return not self.causal

    def of(self, distance: Tensor) -> Tensor:
        """The set of each distance of 0 or more, int64 → int64."""
        if self.starts is None:
            return distance
        bounds = torch.tensor(self.starts, device=distance.device)
        return torch.searchsorted(bounds, distance, right=True) - 1

    def table(self, n: int) -> Tensor:
        """See `Geometry`."""
        if n > self.length and self.starts is None and not self.cut:
            raise ContextError(f"{n:,} tokens are more than the {self.length:,} offsets that there are matrices for")
        at = torch.arange(n)
        back = at[:, None] - at
        found = self.of(back.abs())
        found = torch.where(back < 0, found + self.each - 1, found)
        unseen = (back < 0) if self.causal else torch.zeros_like(back, dtype=torch.bool)
        if self.cut:
            unseen = unseen | (back.abs() >= self.length)
        return torch.where(unseen, -1, found)


@dataclass(frozen=True)
class Grid:
    """A class token and the patches of a picture, row by row.

    Attributes:
        height, width: patches.
        reach: offsets further than this in either direction share its set; None = each has its own.
        cut: they are not seen instead (a kernel of side 2 · reach + 1), nor is the class token by patches.
    """

    height: int
    width: int
    reach: int | None = None
    cut: bool = False

    @property
    def _reaches(self) -> tuple[int, int]:
        widest = self.height - 1, self.width - 1
        return widest if self.reach is None else (min(self.reach, widest[0]), min(self.reach, widest[1]))

    @property
    def sets(self) -> int:
        """See `Geometry`."""
        down, right = self._reaches
        return (2 * down + 1) * (2 * right + 1) + 3

    @property
    def mirrored(self) -> bool:
        """See `Geometry`."""
        return True

    def table(self, n: int) -> Tensor:
        """See `Geometry`; n is 1 + height · width and nothing else."""
        if n != 1 + self.height * self.width:
            raise ContextError(f"{n:,} rows are not the class token and {self.height} x {self.width} patches")
        down, right = self._reaches
        at = torch.arange(self.height * self.width)
        row, column = at // self.width, at % self.width
        dx, dy = row[:, None] - row, column[:, None] - column
        found = (dx.clamp(-down, down) + down) * (2 * right + 1) + dy.clamp(-right, right) + right
        if self.cut and self.reach is not None:
            found = torch.where((dx.abs() > self.reach) | (dy.abs() > self.reach), -1, found)
        table = torch.empty((n, n), dtype=torch.int64)
        table[1:, 1:] = found
        table[0, 0], table[0, 1:], table[1:, 0] = self.sets - 3, self.sets - 2, -1 if self.cut else self.sets - 1
        return table
