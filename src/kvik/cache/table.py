"""Where one group's rows of one sequence lie: pages by place in the text, and before them the rows that were kept."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from kvik.cache.arena import Pages
from kvik.cache.spec import Group
from kvik.ops import quest
from kvik.ops.reads import Kept

Rows = NDArray[np.int64]


class Table:
    """Page numbers of one sequence in one group.

    Attributes:
        pages: int32 [lanes, columns], page numbers.
        logical: int32 [columns], ascending: column c holds positions logical[c]·N … logical[c]·N + N - 1.
        kept: rows from before the first column, lane by lane, once a policy has chosen; never written to again.
        account: of the pages that are taken for it; see `cache/owners.py`.
        stale: rows beyond the sequence's end may have been written, by tokens that were rejected.
        extremes: of the keys of its first `known` pages, uint16 [lanes, B, 2, D, 16] (`ops/quest.py`), where queries
            choose which pages they read; else None.
        known: pages whose extremes were worked out.
    """

    def __init__(
        self,
        group: Group,
        account: int = 0,
        pages: NDArray[np.int32] | None = None,
        logical: NDArray[np.int32] | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.group = group
        self.pages = np.zeros((len(group.lanes), 0), np.int32) if pages is None else pages
        self.logical = np.zeros(0, np.int32) if logical is None else logical
        self.kept, self.account = kept, account
        self.stale = False
        self.extremes: quest.Extremes | None = (
            quest.room(len(group.lanes), 0, group.key_width) if group.chooses else None
        )
        self.known = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the table itself, positions of kept rows and extremes of pages included."""
        kept = 0 if self.kept is None else sum(x.nbytes for x in vars(self.kept).values())
        return self.pages.nbytes + self.logical.nbytes + kept + (0 if self.extremes is None else self.extremes.nbytes)

    def copy(self) -> Table:
        """Another table of the same pages."""
        twin = Table(self.group, self.account, self.pages.copy(), self.logical.copy(), self.kept)
        twin.stale, twin.known = self.stale, self.known
        twin.extremes = None if self.extremes is None else self.extremes.copy()
        return twin

    def extend(self, pages: Pages, logical: Seq[int]) -> None:
        """Adds columns: pages [lanes, len(logical)]."""
        self.pages = np.concatenate((self.pages, pages.astype(np.int32)), axis=1)
        self.logical = np.concatenate((self.logical, np.array(logical, np.int32)))
        self._fit()

    def keep(self, mask: NDArray[np.bool_]) -> Pages:
        """Keeps the columns in `mask`; returns the pages of the others."""
        gone = self.pages[:, ~mask].astype(np.int64)
        self.pages, self.logical = np.ascontiguousarray(self.pages[:, mask]), self.logical[mask]
        self._fit()
        return gone

    def forget(self, length: int) -> None:
        """Rows from position `length` on may change: what was worked out of their pages is not known any more."""
        self.known = min(self.known, length // self.group.page_size)

    def clear(self) -> None:
        """Forgets everything."""
        self.keep(np.zeros(len(self.logical), bool))
        self.kept = None

    def held(self, tokens: int) -> tuple[Pages, Rows]:
        """Every page, and how many rows the retention keeps in it of a text of `tokens` tokens: two int64 [pages]."""
        columns = np.broadcast_to(self.rows_kept(tokens), self.pages.shape)
        pages, rows = self._kept_pages()
        return (
            np.concatenate((pages, self.pages.reshape(-1).astype(np.int64))),
            np.concatenate((rows, columns.reshape(-1))),
        )

    def renumber(self, moved: Pages) -> None:
        """Pages have moved: number p is moved[p] now."""
        self.pages = moved[self.pages].astype(np.int32)
        if self.kept is not None:
            self.kept = Kept(moved[self.kept.pages].astype(np.int32), self.kept.counts, self.kept.positions)

    def rows_kept(self, tokens: int) -> Rows:
        """How many rows of each column the retention keeps of a text of `tokens` tokens."""
        positions = self.logical[:, None].astype(np.int64) * self.group.page_size + np.arange(self.group.page_size)
        kept, window = positions < tokens, self.group.retention.window
        if window is not None:
            kept &= (positions >= tokens - window) | (positions < self.group.retention.sinks)
        return np.asarray(kept.sum(axis=1), np.int64)

    def rows(self, tokens: int) -> tuple[Rows, Rows]:
        """Every row that is held of a text of `tokens` tokens, kept ones first: two int64 [lanes, n].

        Returns:
            Positions, -1 where a lane holds fewer than others; and slots (page · N + place in the page), 0 there.
        """
        size, lanes = self.group.page_size, len(self.group.lanes)
        within = np.arange(size)
        positions = (self.logical[:, None].astype(np.int64) * size + within).reshape(-1)
        slots = (self.pages[:, :, None].astype(np.int64) * size + within).reshape(lanes, -1)
        there = positions < tokens
        parts = [(np.broadcast_to(positions[there], (lanes, int(there.sum()))), slots[:, there])]
        if self.kept is not None:
            most = int(self.kept.counts.max(initial=0))
            mine = (self.kept.pages[:, :, None].astype(np.int64) * size + within).reshape(lanes, -1)[:, :most]
            at = self.kept.positions[:, :most].astype(np.int64)
            parts.insert(0, (at, np.where(at < 0, 0, mine)))
        at, where = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
        return at, where

    def _fit(self) -> None:
        """Extremes have room for as many pages as there are columns. Columns only ever leave at the end there."""
        if self.extremes is None:
            return
        fitting = quest.room(len(self.pages), len(self.logical), self.group.key_width)
        blocks = min(fitting.shape[1], self.extremes.shape[1])
        if fitting.shape[1] != self.extremes.shape[1]:
            fitting[:, :blocks] = self.extremes[:, :blocks]
            self.extremes = fitting
        self.known = min(self.known, len(self.logical))

    def _kept_pages(self) -> tuple[Pages, Rows]:
        """Pages of kept rows, and how many rows each holds."""
        if self.kept is None:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        size = self.group.page_size
        rows = self.kept.counts[:, None].astype(np.int64) - np.arange(self.kept.pages.shape[1]) * size
        used = rows > 0
        return self.kept.pages[used].astype(np.int64), np.minimum(rows[used], size)
