"""What models that only encode have in common: every row sees every other, so nothing stays valid to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvik.models.config import MOST_LAYERS, MOST_ROWS, MOST_WIDTH, Config
from kvik.models.fields import Fields


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """An encoder. `max_positions` are the most rows that it can see at once; `vocab_size` 0 = it reads no tokens.

    Attributes:
        ffn: channels of its feed-forward parts.
        activation: theirs, one of `ACTIVATIONS`.
        norm_eps: the epsilon of its norms.
    """

    ffn: int
    activation: str
    norm_eps: float

    def check_source(self, source: Tensor) -> None:
        """Raises UsageError for what is no source of this model, ContextError for one that is too long."""
        raise NotImplementedError


def common(fields: Fields, name: str, activations: tuple[str, ...]) -> dict[str, Any]:
    """What every such model's config.json says, as `EncoderConfig`'s fields. Raises ConfigError."""
    hidden, heads = fields.integer("hidden_size", most=MOST_WIDTH), fields.integer("num_attention_heads", most=2**16)
    if hidden % heads:
        fields.fail("num_attention_heads", f"hidden_size {hidden} is not a multiple of it")
    for key in ("is_decoder", "add_cross_attention", "is_encoder_decoder"):
        fields.refuse_unless(key, (False,))
    return dict(
        name=name,
        layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        tied_embeddings=False,
        eos_ids=(),
        bos_id=None,
        ffn=fields.integer("intermediate_size", most=MOST_ROWS),
        activation=fields.text("hidden_act", "gelu", among=activations),
        norm_eps=fields.number("layer_norm_eps", 1e-12),
    )
