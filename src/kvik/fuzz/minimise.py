"""The smallest part of a trace that still fails: half of the requests are dropped at once, then fewer, then one by one
(delta debugging, Zeller and Hildebrandt 2002). What fails without haste too is told without it."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvik.fuzz.trace import Trace


def minimise(trace: Trace, fails: Callable[[Trace], bool], *, seconds: float, show: Callable[[int], None]) -> Trace:
    """A part of a trace that fails, of which no single request can be dropped, or as far as the time went.

    Args:
        fails: whether one does. The whole trace was seen to.
        seconds: no try begins after so many.
        show: is told how many requests are left.
    """
    until = time.monotonic() + seconds
    small = _dropped(trace, fails, until, show)
    apart = small.apart()  # each comes when those before it are over
    if len(small.asks) > 1 and time.monotonic() < until and fails(apart):
        return _dropped(apart, fails, until, show)
    return small


def _dropped(trace: Trace, fails: Callable[[Trace], bool], until: float, show: Callable[[int], None]) -> Trace:
    kept, pieces = [ask.number for ask in trace.asks], 2
    while len(kept) > 1:
        size = -(-len(kept) // pieces)
        for start in range(0, len(kept), size):
            if time.monotonic() > until:
                return trace.only(set(kept))
            rest = kept[:start] + kept[start + size :]
            if rest and fails(trace.only(set(rest))):
                kept, pieces = rest, max(pieces - 1, 2)
                show(len(kept))
                break
        else:
            if size == 1:
                break
            pieces = min(pieces * 2, len(kept))
    return trace.only(set(kept))
