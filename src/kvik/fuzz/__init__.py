"""`kvik fuzz`: timed traces through the engine, and an oracle that says what each request should have heard. Names are
loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.lazy import loader

if TYPE_CHECKING:
    from kvik.fuzz.files import read as read
    from kvik.fuzz.files import write as write
    from kvik.fuzz.making import Sizes as Sizes
    from kvik.fuzz.making import make as make
    from kvik.fuzz.run import Report as Report
    from kvik.fuzz.run import fuzz as fuzz
    from kvik.fuzz.trace import Trace as Trace
    from kvik.fuzz.view import facts as facts
    from kvik.fuzz.view import render as render

_HOMES = {
    "Report": "kvik.fuzz.run",
    "Sizes": "kvik.fuzz.making",
    "Trace": "kvik.fuzz.trace",
    "facts": "kvik.fuzz.view",
    "fuzz": "kvik.fuzz.run",
    "make": "kvik.fuzz.making",
    "read": "kvik.fuzz.files",
    "render": "kvik.fuzz.view",
    "write": "kvik.fuzz.files",
}
__all__ = sorted(_HOMES)
__getattr__ = loader(__name__, _HOMES)


def __dir__() -> list[str]:
    return list(__all__)
