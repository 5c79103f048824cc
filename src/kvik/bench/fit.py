"""From measured times: sums over a text, lengths at which a speed-up is reached, and constants that predict.

The time models, one step each:

    with a cache    step + row · rows                                          rows that a lane's query sees (counted)
    without         chunk · chunks + product · products + pair · pairs         products, pairs: by `plan.work`;
                                                                               chunks: ceil(n / 512), each reads all
                                                                               weights: no step is shorter than one

Constants are seconds and never negative. They are fitted to the lengths up to half of the longest, so that the lengths
above test what they predict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TimeModel:
    """Constants, and the times that they give.

    Attributes:
        terms: what each constant is the time of.
        constants: seconds, one a term; 0 where the measurements show nothing of it.
        predicted: seconds of a step at each length.
        tested: for each length, whether it was kept out of the fit.
        errors: predicted over measured, less 1, at each length.
    """

    terms: tuple[str, ...]
    constants: tuple[float, ...]
    predicted: tuple[float, ...]
    tested: tuple[bool, ...]
    errors: tuple[float, ...]

    @property
    def constant(self) -> dict[str, float]:
        """Constants by term."""
        return dict(zip(self.terms, self.constants, strict=True))


def fit(terms: Mapping[str, Sequence[float]], seconds: Sequence[float], lengths: Sequence[int]) -> TimeModel:
    """Fits one constant a term to the lengths up to half of the longest.

    Args:
        terms: by name, how much of it each length's step has.
        seconds: measured.
        lengths: ascending.
    """
    tested = tuple(2 * length > lengths[-1] for length in lengths)
    known = np.array([not each for each in tested])
    columns, measured = np.array(list(terms.values()), float).T, np.array(seconds, float)
    constants = smallest_errors(columns[known], measured[known])
    predicted = columns @ constants
    return TimeModel(
        tuple(terms), tuple(constants.tolist()), tuple(predicted.tolist()), tested,
        tuple((predicted / measured - 1).tolist()),
    )  # fmt: skip


def smallest_errors(columns: Floats, seconds: Floats) -> Floats:
    """Constants c ≥ 0 with the smallest relative errors of columns · c, squared and added up.

    The best of all choices of terms: with three there are seven. Terms that the lengths can't tell apart are not
    chosen together, so that the first of them stands for all.

    >>> smallest_errors(np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]]), np.array([5.0, 7.0, 11.0])).round(9).tolist()
    [3.0, 2.0]
    """
    scaled, best, least = columns / seconds[:, None], np.zeros(columns.shape[1]), np.inf
    sizes = np.abs(scaled).max(axis=0)
    sizes[sizes == 0] = 1.0
    for count in range(1, columns.shape[1] + 1):
        for chosen in map(list, combinations(range(columns.shape[1]), count)):
            part = scaled[:, chosen] / sizes[chosen]
            constants, _, rank, _ = np.linalg.lstsq(part, np.ones(len(seconds)), rcond=1e-9)
            error = float(((part @ constants - 1) ** 2).sum())
            if rank == count and (constants >= 0).all() and error < least * (1 - 1e-9) - 1e-15:
                best, least = np.zeros(columns.shape[1]), error
                best[chosen] = constants / sizes[chosen]
    return best


def whole_text(lengths: Sequence[int], seconds: Sequence[float]) -> tuple[float, ...]:
    """Seconds of all steps of a text of each length: step times added up, on straight lines between the lengths.

    >>> whole_text([1, 2, 4], [1.0, 2.0, 4.0])
    (1.0, 3.0, 10.0)
    """
    each = np.interp(np.arange(1, lengths[-1] + 1), lengths, seconds)
    return tuple(float(np.cumsum(each)[length - 1]) for length in lengths)


def reached(lengths: Sequence[int], ratio: Sequence[float], factor: float) -> float | None:
    """The length from which on the ratio is at least `factor`, on straight lines between the lengths.

    Returns:
        The first length if it was never less; None if it is less at the last.

    >>> reached([1, 10, 20], [1.0, 1.5, 2.5], 2.0)
    15.0
    """
    below = [index for index, each in enumerate(ratio) if each < factor]
    if not below:
        return float(lengths[0])
    last = below[-1]
    if last == len(lengths) - 1:
        return None
    share = (factor - ratio[last]) / (ratio[last + 1] - ratio[last])
    return lengths[last] + share * (lengths[last + 1] - lengths[last])


def grid(longest: int) -> tuple[int, ...]:
    """Lengths from 1 to `longest`: three an octave, below 64 one.

    >>> grid(256)
    (1, 2, 4, 8, 16, 32, 64, 81, 102, 128, 161, 203, 256)
    """
    lengths = {1, longest}
    for thirds in range(3 * longest.bit_length()):
        length = longest / 2 ** (thirds / 3)
        if length >= 64 or thirds % 3 == 0:
            lengths.add(max(round(length), 1))
    return tuple(sorted(lengths))
