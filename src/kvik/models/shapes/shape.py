"""A model, as far as planning needs it, and the settings of a `config.json`, each checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvik.cache.spec import LayerShape
from kvik.errors import ConfigError

_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_LARGEST = 10**9  # no width, vocabulary or context of any model comes near it; nor do its layers and heads to 10,000

ENCODER_ONLY = (
    "it reads the whole source at once; every row sees later ones, so nothing computed for a prefix stays valid"
)


@dataclass(frozen=True)
class ModelShape:
    """A model, as far as planning needs it.

    Attributes:
        name: for people.
        family: its `model_type`.
        parameters: exact count, None = unknown.
        layers: what each self-attention layer keeps of a token; empty for encoder-only models.
        cross: what each cross-attention layer keeps of a source row; filled once, it does not grow.
        source: source rows that `cross` is filled with (T5: tokens, Whisper: frames).
        d_model: width of the residual stream.
        query_heads: heads that read, the KV heads of `layers` being those that are read.
        head_dim: width of a query head.
        context: positions that the model was made for, None = not said.
        weights: number format that the weights come in (`f32`, `f16`, `bf16`).
        stored: bytes of the weights as a file holds them, where a file was read.
        notes: what the reader should know about the numbers.
        kv_parameters: of a layer's projections to k and v, which a layer that reads another's rows lacks; None = no
            layer of the family can (`plan/share.py`).
    """

    name: str
    family: str
    parameters: int | None
    layers: tuple[LayerShape, ...]
    d_model: int
    query_heads: int
    head_dim: int
    context: int | None
    cross: tuple[LayerShape, ...] = ()
    source: int = 0
    weights: str = "f16"
    stored: int | None = None
    notes: tuple[str, ...] = ()
    kv_parameters: int | None = None


class Config:
    """A config with whole numbers taken by name. The family's defaults stand in for absent keys; null is none."""

    def __init__(self, raw: Mapping[str, Any], **defaults: Any) -> None:
        self.raw = {**defaults, **raw}

    def __call__(self, *names: str, least: int = 1) -> int:
        """The first of the keys `names` that is there, as a whole number."""
        name = next((n for n in names if self.raw.get(n) is not None), None)
        if name is None:
            raise ConfigError(f"config has no {' or '.join(names)}: the cache can't be sized without it")
        value = self.raw[name]
        most = 10_000 if "layer" in name or "head" in name else _LARGEST
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(
                f"config: {name} is {str(value)[:40]!r}, but must be a whole number from {least} to {most}"
            )
        return value

    def maybe(self, *names: str) -> int | None:
        """The same, or None where none of the keys is there."""
        return self(*names) if any(self.raw.get(n) is not None for n in names) else None

    def flag(self, name: str, default: bool = False) -> bool:
        """A true or false."""
        value = self.raw.get(name)
        return default if value is None else bool(value)

    def heads(self) -> tuple[int, int, int]:
        """(query heads, KV heads, width of a head)."""
        heads = self("num_attention_heads", "n_head", "num_heads")
        kv = self.maybe("num_key_value_heads") or heads
        if heads % kv:
            raise ConfigError(f"config: {heads} query heads can't share {kv} KV heads evenly")
        return heads, kv, self.maybe("head_dim") or self("hidden_size", "n_embd", "d_model") // heads

    @property
    def weights(self) -> str:
        """The number format of the weights, f16 where the config does not say."""
        return _DTYPES.get(str(self.raw.get("torch_dtype") or self.raw.get("dtype")).removeprefix("torch."), "f16")


def kv(heads: int, width: int, window: int | None = None, turned: bool = False) -> LayerShape:
    """A layer of ordinary attention: k and v of each KV head; `turned`: positions turn k, by whatever angles."""
    return LayerShape(heads, (("k", width), ("v", width)), window, () if turned else None)


def latent(width: int, rope: int) -> LayerShape:
    """A layer of latent attention (MLA, arXiv:2405.04434): one latent and one rotated key for all heads."""
    return LayerShape(1, (("latent", width), ("rope", rope)), frequencies=())
