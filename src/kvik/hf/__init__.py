"""kvik inside transformers' own `generate()`:

    import kvik.hf

    cache = kvik.hf.Cache(model, "k8v4")                  # or budget="512MiB", or just Cache(model)
    out = model.generate(**inputs, past_key_values=cache)

Importing this changes nothing. A cache puts two hooks on its own model and takes them away when it is closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.lazy import loader

if TYPE_CHECKING:
    from kvik.hf.front import Cache as Cache
    from kvik.hf.model import TransformersModel as TransformersModel
    from kvik.hf.prefix import PrefixCache as PrefixCache

_HOMES = {
    "Cache": "kvik.hf.front",
    "PrefixCache": "kvik.hf.prefix",
    "TransformersModel": "kvik.hf.model",
}
__all__ = sorted(_HOMES)
__getattr__ = loader(__name__, _HOMES)


def __dir__() -> list[str]:
    return list(__all__)
