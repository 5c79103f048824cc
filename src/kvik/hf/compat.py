"""Where transformers' minor versions differ: everything that knows of it stands here. 5.13 to 5.23 are tried."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs


def layer_kinds(config: PretrainedConfig) -> list[tuple[str, int | None]]:
    """What transformers calls each layer's attention, and the columns that its queries see; None = all.

    Layers whose columns are cut into chunks see no window: `chunked_attention` says so by its name.
    """
    kinds, settings = get_layer_types_and_kwargs(config)
    return [
        (kind, setting.get("sliding_window") if kind != "chunked_attention" else None)
        for kind, setting in zip(kinds, settings, strict=True)
    ]
