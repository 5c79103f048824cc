"""kvik keeps what attention needs: a KV cache for transformers in which precision, retention, sharing and place are
independent choices.

    import kvik

    model = kvik.load("smollm2")
    for piece in kvik.generate(model, "Why is the sky blue?", kv="k8v4"):
        print(piece, end="", flush=True)

Names are loaded when they are first used, so that `import kvik` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik.lazy import loader

if TYPE_CHECKING:
    from kvik.cache.cache import Cache as Cache
    from kvik.cache.sequence import Sequence as Sequence
    from kvik.cache.spec import Bytes as Bytes
    from kvik.cache.spec import LayerShape as LayerShape
    from kvik.cache.spec import Spec as Spec
    from kvik.engine.generation import Generation as Generation
    from kvik.engine.generation import generate as generate
    from kvik.engine.request import Request as Request
    from kvik.engine.sampling import Sampling as Sampling
    from kvik.errors import KvikError as KvikError
    from kvik.models.model import Model as Model
    from kvik.models.model import load as load

__version__ = "0.1.0"

_HOMES = {
    "Bytes": "kvik.cache.spec",
    "Cache": "kvik.cache.cache",
    "Generation": "kvik.engine.generation",
    "KvikError": "kvik.errors",
    "LayerShape": "kvik.cache.spec",
    "Model": "kvik.models.model",
    "Request": "kvik.engine.request",
    "Sampling": "kvik.engine.sampling",
    "Sequence": "kvik.cache.sequence",
    "Spec": "kvik.cache.spec",
    "generate": "kvik.engine.generation",
    "load": "kvik.models.model",
}
__all__ = sorted(_HOMES)
__getattr__ = loader(__name__, _HOMES)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
