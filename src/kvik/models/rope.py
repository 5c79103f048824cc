"""Rotary position embedding: the frequencies of its angles, and every way of stretching them that kvik knows.

| kind    | frequencies                                                                                      |
|---------|--------------------------------------------------------------------------------------------------|
| default | theta^(-2i/d)                                                                                    |
| linear  | all divided by the factor (position interpolation)                                               |
| llama3  | long waves divided by the factor, short ones kept, a ramp between (Llama 3.1)                    |
| yarn    | a ramp over dimensions between kept and divided, and a factor on attention (Peng et al. 2023)    |

Legend: d rotary dimensions of a head, d/2 frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from kvik.errors import ConfigError
from kvik.models.fields import Fields

Kind = Literal["default", "linear", "llama3", "yarn"]

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KNOWN: dict[Kind, set[str]] = {
    "default": _COMMON,
    "linear": _COMMON | {"factor"},
    "llama3": _COMMON | {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": _COMMON
    | {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate", "finetuned"},
}


@dataclass(frozen=True)
class Rope:
    """How a model turns its queries and keys by position.

    Attributes:
        theta: the base of the frequencies.
        head_dim: d, the dimensions of a head that are turned.
        kind: which of the module's table; the fields below are read by the kinds named.
        factor: how far positions are stretched (linear, llama3, yarn).
        original_positions: positions the model was first trained with (llama3, yarn).
        low_freq_factor, high_freq_factor: where llama3's ramp ends and starts, in waves per original context.
        beta_fast, beta_slow: where yarn's ramp starts and ends, in turns per original context.
        attention_factor: yarn's factor on cos and sin; None to derive it from factor, mscale and mscale_all_dim.
        truncate: whether yarn's ramp starts and ends at whole dimensions.
        factors: d/2 divisors of the default frequencies, as GGUF files carry them for Llama 3.1.
    """

    theta: float
    head_dim: int
    kind: Kind = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.head_dim % 2 or self.head_dim < 2:
            raise ConfigError(f"rope turns {self.head_dim} dimensions of a head, but turns them in pairs")
        if self.kind in ("llama3", "yarn") and self.original_positions < 1:
            raise ConfigError(f"rope kind {self.kind} needs the original context length, and the model gives none")
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError("rope kind llama3 needs a high_freq_factor above its low_freq_factor")
        if self.kind == "yarn" and not self.theta > 1:
            raise ConfigError(f"rope kind yarn needs a rope_theta above 1, not {self.theta}")
        if self.factors is not None and len(self.factors) != self.head_dim // 2:
            raise ConfigError(f"rope has {len(self.factors)} frequency factors, but {self.head_dim // 2} frequencies")

    def frequencies(self) -> tuple[Tensor, float]:
        """(radians a position, float64 [head_dim / 2]; the factor on cos and sin)."""
        inverse = self.theta ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        if self.factors is not None:
            inverse = inverse / torch.tensor(self.factors, dtype=torch.float64)
        if self.kind == "linear":
            return inverse / self.factor, 1.0
        if self.kind == "llama3":
            return self._llama3(inverse), 1.0
        if self.kind == "yarn":
            return self._yarn(inverse), self._yarn_attention()
        return inverse, 1.0

    def _llama3(self, inverse: Tensor) -> Tensor:
        """Waves longer than original/low are divided by the factor, shorter than original/high kept."""
        waves = self.original_positions * inverse / (2 * math.pi)  # whole waves in the original context
        smooth = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = smooth.clamp(0, 1)
        return (1 - smooth) * inverse / self.factor + smooth * inverse

    def _yarn(self, inverse: Tensor) -> Tensor:
        """Dimensions that turn more than beta_fast times are kept, fewer than beta_slow divided by the factor."""

        def dimension(turns: float) -> float:
            reach = math.log(self.original_positions / (turns * 2 * math.pi))
            return self.head_dim * reach / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(self.head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
        return inverse / self.factor * ramp + inverse * (1 - ramp)

    def _yarn_attention(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)

    @classmethod
    def from_hf(cls, config: Fields, head_dim: int, max_positions: int) -> Rope:
        """From config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (older).

        Raises:
            ConfigError: the kind is unknown, a parameter is missing, unknown or absurd, or both forms disagree.
        """
        given = [config.values[key] for key in ("rope_parameters", "rope_scaling") if config.values.get(key)]
        if not all(isinstance(values, dict) for values in given) or (len(given) == 2 and given[0] != given[1]):
            config.fail("rope_scaling" if len(given) == 2 else "rope_parameters", "must be one object of settings")
        rope = Fields(cast("dict[str, object]", given[0]) if given else {}, f"{config.where} (rope)")
        kind_key = "rope_type" if rope.has("rope_type") else "type"
        kind = cast(Kind, rope.text(kind_key, "default", among=_KNOWN))
        rope.refuse_unknown(_KNOWN[kind])
        for fields in (rope, config):
            fields.refuse_unless("partial_rotary_factor", (1,))
        theta = rope.number("rope_theta") if rope.has("rope_theta") else config.number("rope_theta", 10_000.0)
        if kind == "default":
            return cls(theta, head_dim)
        if kind == "linear":
            return cls(theta, head_dim, kind, factor=rope.number("factor"))
        source = config if config.has("original_max_position_embeddings") else rope
        original = source.integer("original_max_position_embeddings", max_positions)
        if kind == "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            factor = rope.number("factor")
            return cls(theta, head_dim, kind, factor, original, low_freq_factor=low, high_freq_factor=high)
        return cls(
            theta,
            head_dim,
            kind,
            factor=rope.number("factor", max_positions / original),
            original_positions=original,
            beta_fast=rope.number("beta_fast", 32.0) if rope.values.get("beta_fast") else 32.0,
            beta_slow=rope.number("beta_slow", 1.0) if rope.values.get("beta_slow") else 1.0,
            attention_factor=rope.optional_number("attention_factor"),
            mscale=rope.number("mscale", above=-1.0) if rope.has("mscale") else None,
            mscale_all_dim=rope.number("mscale_all_dim", above=-1.0) if rope.has("mscale_all_dim") else None,
            truncate=rope.flag("truncate", True),
        )

    @classmethod
    def from_gguf(cls, fields: Fields, arch: str, head_dim: int, max_positions: int) -> Rope:
        """From a GGUF file's `<arch>.rope.*` keys and its rope_freqs tensor (as the field "GGUF.rope_freqs")."""
        theta = fields.number(f"{arch}.rope.freq_base", 10_000.0)
        factors = fields.numbers("GGUF.rope_freqs")
        fields.refuse_unless(f"{arch}.rope.dimension_count", (head_dim,))
        scaling = f"{arch}.rope.scaling"
        factor_key = f"{scaling}.factor" if fields.has(f"{scaling}.factor") else f"{arch}.rope.scale_linear"
        unscaled = "linear" if fields.has(factor_key) else "none"
        kind = fields.text(f"{scaling}.type", unscaled, among=("none", "linear", "yarn"))
        if kind == "none":
            return cls(theta, head_dim, factors=factors)
        factor = fields.number(factor_key)
        if kind == "linear":
            return cls(theta, head_dim, "linear", factor, factors=factors)
        attention = fields.optional_number(f"{scaling}.attn_factor")
        if attention is not None and factor > 1:
            attention *= 0.1 * math.log(factor) + 1.0  # GGUF's factor comes on top of yarn's own
        return cls(
            theta,
            head_dim,
            "yarn",
            factor,
            fields.integer(f"{scaling}.original_context_length", max_positions),
            beta_fast=fields.number(f"{scaling}.yarn_beta_fast", 32.0),
            beta_slow=fields.number(f"{scaling}.yarn_beta_slow", 1.0),
            attention_factor=attention,
            factors=factors,
        )
