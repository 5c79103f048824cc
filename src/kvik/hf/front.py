"""The two lines of transformers.

cache = kvik.hf.Cache(model, "k8v4")
out = model.generate(**inputs, past_key_values=cache)
print(cache.describe())
cache.close()                                   # or `with kvik.hf.Cache(model) as cache:`
"""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel

from kvik.errors import StorageError
from kvik.hf import files
from kvik.hf.cache import TextCache
from kvik.hf.fingerprint import fingerprint
from kvik.hf.opening import made, opened


class Cache(TextCache):
    """Keys and values of one batch, as a kvik spec keeps them; give it to `generate(past_key_values=…)`.

    Of a model that reads a source (T5, BART, Whisper) it is a `kvik.hf.source.ReaderCache`, which transformers expects
    there.
    """

    def __new__(cls, model: PreTrainedModel, spec: str | None = None, **settings: Any) -> Any:
        """See `__init__`."""
        if not model.config.is_encoder_decoder:
            return object.__new__(cls)
        return made(*opened(model, spec, **settings))

    def __init__(
        self,
        model: PreTrainedModel,
        spec: str | None = None,
        *,
        budget: int | str | None = None,
        memory: int | str | None = None,
        tokens: int | None = None,
        batch: int = 1,
    ) -> None:
        """
        Args:
            model: the one that will be run with it.
            spec: what is kept, as in `kvik.Spec.parse`; None = every row in the model's own precision.
            budget: bytes to live within, as a number or "512MiB": the most exact spec that fits is taken.
            memory: the most bytes that are ever held; None = the budget, or half of what the machine has left.
            tokens, batch: for a budget: columns and rows to expect; None = as many tokens as the model has positions.

        Raises:
            SpecError: the spec can't be read, or doesn't fit this model; or spec and budget were both given.
            BudgetError: there is less memory, or nothing fits the budget.
            ModelError: the model keeps no keys and values, or its attention can't be served.
        """
        super().__init__(*opened(model, spec, budget=budget, memory=memory, tokens=tokens, batch=batch))

    @classmethod
    def load(cls, model: PreTrainedModel, path: str | os.PathLike[str], *, memory: int | str | None = None) -> Any:
        """A cache as it was saved, for the model that it was saved with.

        Raises:
            StorageError: the file is no saved cache, damaged, or was saved with another model or another kvik.
            BudgetError: its rows don't fit.
        """
        tensors, told = files.read(path, fingerprint(model))
        cache = cls(model, told["spec"], memory=memory)
        try:
            if cache.spec.fingerprint != told["fingerprint"]:
                raise StorageError(
                    f"{path} was saved by a kvik that stores {told['spec']!r} in another way; save the cache again"
                )
            cache.take(tensors)
        except BaseException:
            cache.close()
            raise
        return cache
