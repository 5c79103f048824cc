"""kvik inside transformers' own `generate()`:

    import kvik.hf

    cache = kvik.hf.Cache(model, "k8v4")                  # or budget="512MiB", or just Cache(model)
    out = model.generate(**inputs, past_key_values=cache)

Importing this changes nothing. A cache puts two hooks on its own model and takes them away when it is closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvik.hf.borrowed import Borrowed as Borrowed
    from kvik.hf.front import Cache as Cache
    from kvik.hf.prefix import PrefixCache as PrefixCache

_HOMES = {"Borrowed": "kvik.hf.borrowed", "Cache": "kvik.hf.front", "PrefixCache": "kvik.hf.prefix"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvik.hf' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
