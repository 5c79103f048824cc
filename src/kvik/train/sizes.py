"""Sizes of networks by the name of a well-known one: `kvik train lm --like gpt2`."""

from __future__ import annotations

from dataclasses import dataclass

from kvik.errors import UsageError
from kvik.models.shapes.wellknown import ALIASES, CONFIGS

_KEYS = {  # of config.json: layers, channels, heads, tokens
    "gpt2": ("n_layer", "n_embd", "n_head", "n_positions"),
    "kvik_gpt": ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"),
    "bert": ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"),
}


@dataclass(frozen=True)
class Sizes:
    """Of a network that reads text.

    Attributes:
        layers, width, heads, length: length is tokens of a text.
        operator: `Form`'s word.
        masked: whether it is an encoder for hidden tokens.
    """

    layers: int = 2
    width: int = 64
    heads: int = 2
    length: int = 64
    operator: str = "attention:rotary"
    masked: bool = False


def like(name: str) -> Sizes:
    """A well-known model's, with feed-forward parts of four times its width. Raises UsageError."""
    config = CONFIGS.get(ALIASES.get(name.lower(), name.lower()), {})
    kind = config.get("model_type")
    if kind not in _KEYS:
        names = [each for each, other in CONFIGS.items() if other["model_type"] in _KEYS]
        raise UsageError(f"--like {name!r}: sizes are known of {', '.join(names)}; or give --layers, --width, --heads")
    layers, width, heads, length = (int(config[key]) for key in _KEYS[kind])
    return Sizes(layers, width, heads, length, config.get("operator", "attention:learned"), kind == "bert")
