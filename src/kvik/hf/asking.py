"""The attention function and the mask function that a model uses while its cache is kvik's.

Nothing here keeps a state: what attention needs comes with the handles that `Cache.update` gave, and what a mask says
comes in place of the mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from kvik.errors import UsageError
from kvik.hf.chunk import Query, Reading
from kvik.hf.handle import Handle

# What models hand to attention that changes nothing, or that rows and masks say already.
_IDLE = frozenset({"position_ids", "use_cache", "cache_position", "position_embeddings", "output_hidden_states",
    "output_router_logits", "logits_to_keep", "num_items_in_batch", "return_dict", "past_key_values", "is_training",
    "deterministic", "target_dtype", "layer_idx", "attention_type"})  # fmt: skip


@dataclass
class Causal:
    """A mask that positions and padding say: nothing but causal, and a window where there is one.

    Attributes:
        window: columns that a query sees; None = all.
        make: makes the mask as the model's own attention would have it, if anybody needs it after all.
    """

    window: int | None
    make: Callable[[], Tensor | None] = field(repr=False)


def name_for(original: str) -> str:
    """The name of both functions in a model whose own attention is `original`; registers them."""
    name = f"kvik-over-{original}"
    AttentionInterface.register(name, partial(_attention, original))
    AttentionMaskInterface.register(name, partial(_mask, original))
    return name


def _attention(
    original: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Handle | Tensor,
    value: Handle | Tensor,
    attention_mask: Tensor | Causal | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """See transformers' AttentionInterface. Handles are read as they are stored, tensors as the model itself would."""
    if not isinstance(key, Handle) or not isinstance(value, Handle):
        return _own(original, module, query, key, value, attention_mask, scaling, kwargs)
    if kwargs.get("output_attentions"):
        raise UsageError("attention over pages has no weights to return; leave out output_attentions")
    reading, layer = key.reading, key.layer
    if isinstance(attention_mask, Tensor) and reading.causal:  # one of its own, such as images have
        k, v = reading.dense(layer)
        return _own(original, module, query, k, v, attention_mask, scaling, kwargs)
    _check(module, reading, layer, attention_mask, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    asked = Query(
        query, value.shape[-1], float(scale), kwargs.get("softcap"), kwargs.get("s_aux"), kwargs.get("position_bias")
    )
    out = reading.attend(layer, asked)
    if reading.tried:
        k, v = reading.dense(layer)
        theirs, _ = _own(original, module, query, k, v, attention_mask, scaling, kwargs)
        reading.compare(out, theirs)
    return out, None


def _check(
    module: torch.nn.Module, reading: Reading, layer: int, mask: Causal | Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Raises UsageError where attention was asked for that would not be given."""
    known = _IDLE | {"softcap", "s_aux", "position_bias", "sliding_window", "is_causal", "dropout", "output_attentions"}
    for name, value in kwargs.items():
        if name not in known and value is not None:
            raise UsageError(f"its attention is given {name!r}, which attention over pages does not know")
    if reading.causal:
        seen = mask.window if isinstance(mask, Causal) else None
        reading.check(layer, seen)
        asked = kwargs.get("sliding_window", seen)
        if asked is not None and asked != seen:
            raise UsageError(f"a layer's mask has a window of {seen}, and its attention asks for {asked}")
        if kwargs.get("is_causal") is False:
            raise UsageError("its attention over its own tokens is not causal")
    if kwargs.get("dropout") and module.training:
        raise UsageError("dropout of attention weights can't be had over pages; call model.eval()")


def _own(
    original: str,
    module: torch.nn.Module,
    query: Tensor,
    key: object,
    value: object,
    mask: Tensor | Causal | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model has without kvik."""
    if original == "eager":
        function = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    else:
        function = AttentionInterface()[original]
    mask = mask.make() if isinstance(mask, Causal) else mask
    found: tuple[Tensor, Tensor | None] = function(module, query, key, value, mask, scaling=scaling, **kwargs)
    return found


def _mask(original: str, **kwargs: Any) -> Tensor | Causal | None:
    """See transformers' AttentionMaskInterface. Padding needs no mask, since it is never stored; a window is known from
    the layer, and told so that this can be checked."""
    functions = AttentionMaskInterface()
    make: Callable[[], Tensor | None] = partial(functions[original], **kwargs)
    plain = kwargs.get("allow_is_causal_skip", True) and not kwargs.get("use_vmap", False)
    if not plain or "allow_is_bidirectional_skip" in kwargs:
        return make()
    window = kwargs.get("local_size")
    padded = kwargs.get("attention_mask") is not None
    if window is None and not padded and original != "eager":
        return None
    return Causal(window, make)
