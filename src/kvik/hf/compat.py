"""Where transformers' minor versions differ: all that knows of it stands here. 5.13, 5.18 and 5.23 were tried."""

from __future__ import annotations

import inspect

from transformers import Cache, DynamicCache, PretrainedConfig, cache_utils
from transformers.cache_utils import DynamicLayer

# Until 5.17 or so a crop's number was the length to keep, and only a negative one a number of columns to remove.
CROP_KEEPS = "max_length" in inspect.signature(DynamicLayer.crop).parameters
# And nobody said beforehand that a crop would follow each forward.
CROP_UNTOLD = "activate_past_recording" not in vars(Cache)


# What stands for a layer that keeps nothing; before it there was none.
_NOTHING = vars(cache_utils).get("DummyLayer")


def to_remove(number: int, columns: int) -> int:
    """How many last columns a crop removes.

    Args:
        number: what `crop` was given.
        columns: that are there.

    Raises:
        ValueError: it is above 0 where that means nothing any more.
    """
    if CROP_KEEPS and number >= 0:
        return max(columns - number, 0)
    if number > 0:
        raise ValueError(
            f"crop({number}): a positive number was the length to keep in older transformers, and means nothing now; "
            f"give -{number} to remove so many columns"
        )
    return -number


def layer_kinds(config: PretrainedConfig) -> list[tuple[str, int | None]]:
    """What transformers calls each layer's attention, and the columns that its queries see; None = all.

    Layers whose columns are cut into chunks see no window: `chunked_attention` says so by its name.
    """
    config = config.get_text_config(decoder=True)
    values = config.to_dict()
    named = values.get("layer_types")
    chunked = values.get("attention_chunk_size") is not None and values.get("sliding_window") is None
    found: list[tuple[str, int | None]] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        window = vars(layer).get("sliding_window")
        usual = "full_attention" if window is None else "chunked_attention" if chunked else "sliding_attention"
        kind = named[index] if named else usual
        if _NOTHING is not None and isinstance(layer, _NOTHING):
            kind = "dummy"
        found.append((kind, None if kind == "chunked_attention" else window))
    return found
