"""`kvik bench`: what a cache saves and costs, measured on a real model. Names are loaded when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvik.bench.growth import Growth as Growth
    from kvik.bench.picture import curves as curves
    from kvik.bench.picture import slope as slope
    from kvik.bench.runs import measure as measure
    from kvik.bench.view import render as render

_HOMES = {
    "Growth": "kvik.bench.growth",
    "curves": "kvik.bench.picture",
    "measure": "kvik.bench.runs",
    "render": "kvik.bench.view",
    "slope": "kvik.bench.picture",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvik.bench' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
