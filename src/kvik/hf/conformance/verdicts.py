"""What can come of a case."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class BrokenError(Exception):
    """What must hold does not; the message says what was seen instead."""


class UnfitError(Exception):
    """The case does not apply to this cache; the message says why."""


class Verdict(StrEnum):
    """One word for each end."""

    HOLDS = "holds"
    BROKEN = "broken"
    CRASHED = "crashed"
    UNFIT = "does not apply"

    @property
    def bad(self) -> bool:
        """Whether a user is worse off: wrong results, or an error."""
        return self in (Verdict.BROKEN, Verdict.CRASHED)


@dataclass(frozen=True)
class Finding:
    """What came of one case for one cache.

    Attributes:
        case: its name.
        cache: as it was named.
        verdict: in a word.
        seen: what was measured, why it does not apply, or an error's first line.
        seconds: that it took.
    """

    case: str
    cache: str
    verdict: Verdict
    seen: str
    seconds: float


def demand(holds: bool, seen: str) -> None:
    """Raises BrokenError with what was seen unless it holds."""
    if not holds:
        raise BrokenError(seen)


def first_line(error: BaseException) -> str:
    """An error's class and the first sentence of its first line.

    >>> first_line(ValueError("No such layer. There are others"))
    'ValueError: No such layer'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0].strip()}" if lines else type(error).__name__
