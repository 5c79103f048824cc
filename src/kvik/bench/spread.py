"""A figure that was taken several times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Over the rounds, in the unit of the figure."""

    median: float
    least: float
    most: float

    def per(self, amount: float) -> Spread:
        """`amount` over this: a rate of a time, such as tokens a second.

        >>> Spread(2.0, 1.0, 4.0).per(8.0)
        Spread(median=4.0, least=2.0, most=8.0)
        """
        return Spread(amount / self.median, amount / self.most, amount / self.least)


def spread(values: Sequence[float]) -> Spread:
    """The median and both ends of at least one value.

    >>> spread([3.0, 1.0, 2.0])
    Spread(median=2.0, least=1.0, most=3.0)
    """
    return Spread(statistics.median(values), min(values), max(values))
