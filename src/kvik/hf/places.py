"""Which places of a batch's new columns are stored, and where what was found for them goes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class Places:
    """Between [B · n] places of a batch and a step's T tokens, row by row.

    Attributes:
        whole: every place is a token, in order: nothing is copied.
    """

    def __init__(self, batch: int, count: int, stored: list[Ints], twins: list[int]) -> None:
        """
        Args:
            stored: for each row, which of its new columns are stored; those of a row with a twin before it are not.
            twins: for each row, the row that stands for it.
        """
        self.batch, self.count = batch, count
        self.whole = twins == list(range(batch)) and all(len(each) == count for each in stored)
        if self.whole:
            return
        taken, targets, sources, first = [], [], [], {}
        total = 0
        for row, columns in enumerate(stored):
            if twins[row] == row:
                first[row] = total
                taken.append(columns + row * count)
                total += len(columns)
            mine = stored[twins[row]]
            targets.append(mine + row * count)
            sources.append(np.arange(len(mine)) + first[twins[row]])
        self._taken = torch.from_numpy(np.concatenate(taken))
        self._targets = torch.from_numpy(np.concatenate(targets))
        self._sources = torch.from_numpy(np.concatenate(sources))

    def taken(self, x: Tensor) -> Tensor:
        """[B · n, …] → [T, …]."""
        return x if self.whole else x[self._taken.to(x.device)]

    def given(self, found: Tensor) -> Tensor:
        """[T, …] → [B, n, …]; 0 where nothing was asked."""
        if not self.whole:
            out = found.new_zeros((self.batch * self.count, *found.shape[1:]))
            out[self._targets.to(found.device)] = found[self._sources.to(found.device)]
            found = out
        return found.view(self.batch, self.count, *found.shape[1:])
