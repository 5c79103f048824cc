"""Figures as people read them: times, speed-ups, lengths."""

from __future__ import annotations

import math

_UNITS = ((1e-3, 1e-6, "µs"), (1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min"), (math.inf, 3600.0, "h"))


def time_text(seconds: float) -> str:
    """Three figures and a unit.

    >>> [time_text(each) for each in (0.0000123, 0.01543, 0.9996, 2.2584, 754.0, 86400.0)]
    ['12.3 µs', '15.4 ms', '1.00 s', '2.26 s', '12.6 min', '24.0 h']
    """
    for below, unit, name in _UNITS:
        if float(f"{seconds:.3g}") < below:
            return f"{three(seconds / unit)} {name}"
    raise AssertionError("every time is less than infinity")


def times_text(ratio: float) -> str:
    """A speed-up.

    >>> times_text(91.84), times_text(1834.2)
    ('91.8×', '1,834×')
    """
    return f"{three(ratio)}×"


def three(value: float) -> str:
    """Three figures, no exponent.

    >>> three(0.01234), three(9.999), three(45.67), three(123456.0), three(0.0)
    ('0.0123', '10.0', '45.7', '123,456', '0')
    """
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(float(f"{value:.3g}"))))
    return f"{value:,.{max(digits, 0)}f}"


def reached_text(length: float | None, longest: int) -> str:
    """From which length on something holds.

    >>> reached_text(8.3, 1024), reached_text(1.0, 1024), reached_text(None, 1024)
    ('from 9 tokens', 'from the first token', 'not within 1,024 tokens')
    """
    if length is None:
        return f"not within {longest:,} tokens"
    return "from the first token" if length <= 1 else f"from {math.ceil(length):,} tokens"


def percent(share: float) -> str:
    """A signed error.

    >>> percent(0.0251), percent(-0.1), percent(-1e-9)
    ('+2.5 %', '-10.0 %', '+0.0 %')
    """
    return f"{round(100 * share, 1) + 0.0:+.1f} %"
