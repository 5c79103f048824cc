"""Llama (arXiv:2302.13971), and with it Mistral and SmolLM: rotary positions, grouped queries, RMSNorm, SwiGLU.

x = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n)          n = rmsnorm(x)
x = x + W_down (silu(W_gate n) · W_up n)                            n = rmsnorm(x)

Layers may read the rows of another instead of their own (`cache/sharing.py`): those have no W_k and W_v, and where none
behind them keeps rows, only tokens whose logits are wanted pass them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from kvik.cache import sharing
from kvik.cache.shape import LayerShape
from kvik.errors import ConfigError
from kvik.models.config import (
    MOST_LAYERS,
    MOST_ROWS,
    MOST_WIDTH,
    Config,
    end_ids,
    first_id,
    gguf_common,
    gguf_tensors,
)
from kvik.models.decoder import narrowed
from kvik.models.fields import Fields
from kvik.models.layer import Layer
from kvik.models.parts import Rotation, Source
from kvik.models.rope import Rope
from kvik.models.watch import Chunk
from kvik.ops.linear import Linear
from kvik.ops.pointwise import RMSNorm, SwiGLU


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Config):
    """A Llama-style decoder.

    Attributes:
        ffn: channels of its feed-forward part.
        norm_eps: the epsilon of its norms.
        attention_bias, mlp_bias: whether those projections have biases.
        rope: how positions turn queries and keys.
        windows: for each layer, how many positions back it sees (itself included); None for all.
        owners: for each layer, the layer whose rows it reads; empty = its own, all of them.
    """

    family: ClassVar[str] = "llama"

    ffn: int
    norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    rope: Rope
    windows: tuple[int | None, ...]
    owners: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope.head_dim != self.head_dim:
            raise ConfigError(f"{self.name}: rope turns {self.rope.head_dim} of {self.head_dim} dimensions of a head")
        if len(self.windows) != self.layers:
            raise ConfigError(f"{self.name}: {len(self.windows)} windows do not fit {self.layers} layers")

    def ropes(self) -> tuple[Rope, ...]:
        """For each layer, how positions turn its queries and keys."""
        return (self.rope,) * self.layers

    def layer_shapes(self) -> list[LayerShape]:
        """What each layer keeps of a token."""
        turned = {rope: tuple(rope.frequencies()[0].tolist()) for rope in set(self.ropes())}
        streams = (("k", self.head_dim), ("v", self.head_dim))
        each = [
            LayerShape(self.kv_heads, streams, window, turned[rope])
            for window, rope in zip(self.windows, self.ropes(), strict=True)
        ]
        return list(sharing.shared(each, self.owners)) if self.owners else each

    def sharing(self, rule: str) -> Self:
        """See `Config.sharing`."""
        owners = sharing.readers(replace(self, owners=()).layer_shapes(), rule)
        return replace(self, owners=owners, name=f"{self.name} (share {rule})")

    def keeps(self, layer: int) -> bool:
        """Whether a layer has rows of its own."""
        return not self.owners or self.owners[layer] == layer

    def projections(self) -> dict[str, tuple[tuple[int, int], bool]]:
        """A layer's products: [out, in], and whether they have a bias."""
        hidden, ffn, attention, mlp = self.hidden, self.ffn, self.attention_bias, self.mlp_bias
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": ((q, hidden), attention),
            "self_attn.k_proj": ((kv, hidden), attention),
            "self_attn.v_proj": ((kv, hidden), attention),
            "self_attn.o_proj": ((hidden, q), attention),
            "mlp.gate_proj": ((ffn, hidden), mlp),
            "mlp.up_proj": ((ffn, hidden), mlp),
            "mlp.down_proj": ((hidden, ffn), mlp),
        }

    def norms(self) -> dict[str, int]:
        """A layer's norms, and how wide they are."""
        return {"input_layernorm": self.hidden, "post_attention_layernorm": self.hidden}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Config.tensor_shapes`; projections are [out, in]."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden)}
        for i in range(self.layers):
            absent = () if self.keeps(i) else ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm")
            for part, (shape, bias) in self.projections().items():
                if part not in absent:
                    shapes[f"model.layers.{i}.{part}.weight"] = shape
                    shapes |= {f"model.layers.{i}.{part}.bias": shape[:1]} if bias else {}
            for part, width in self.norms().items():
                if part not in absent:
                    shapes[f"model.layers.{i}.{part}.weight"] = (width,)
        shapes["model.norm.weight"] = (self.hidden,)
        return shapes if self.tied_embeddings else shapes | {"lm_head.weight": (self.vocab_size, self.hidden)}


def read(fields: Fields, generation: Fields, name: str) -> LlamaConfig:
    """From config.json and generation_config.json of transformers' Llama or Mistral. Raises ConfigError."""
    mistral = fields.values["model_type"] == "mistral"
    sizes = read_sizes(fields, generation, name, kv_heads=8 if mistral else None)
    window = None
    if mistral and ("sliding_window" not in fields.values or fields.has("sliding_window")):
        window = fields.integer("sliding_window", 4096)
    else:
        fields.refuse_unless("sliding_window", ())
    uniform = "full_attention" if window is None else "sliding_attention"
    fields.refuse_unless("layer_types", ([uniform] * sizes["layers"],))
    fields.text("hidden_act", "silu", among=("silu",))
    return LlamaConfig(
        **sizes,
        norm_eps=fields.number("rms_norm_eps"),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=not mistral and fields.flag("attention_bias", False),
        mlp_bias=not mistral and fields.flag("mlp_bias", False),
        rope=Rope.from_hf(fields, sizes["head_dim"], sizes["max_positions"]),
        windows=(window,) * sizes["layers"],
    )


def read_sizes(
    fields: Fields, generation: Fields, name: str, *, kv_heads: int | None = None, head_dim: int | None = None
) -> dict[str, Any]:
    """What Llama's kin say in the same words, as `LlamaConfig`'s fields.

    Args:
        kv_heads, head_dim: what transformers takes where config.json does not name them; None = all heads, and the
            model's width divided among them.

    Raises:
        ConfigError: a key is missing or its value can't be used.
    """
    hidden, heads = fields.integer("hidden_size", most=MOST_WIDTH), fields.integer("num_attention_heads", most=2**16)
    if head_dim is None and not fields.has("head_dim") and hidden % heads:
        fields.fail("num_attention_heads", f"hidden_size {hidden} is not a multiple of it")
    absent = "num_key_value_heads" not in fields.values
    kv = fields.integer("num_key_value_heads", kv_heads if kv_heads and absent else heads, most=heads)
    if heads % kv:
        fields.fail("num_key_value_heads", f"the {heads} num_attention_heads are not a multiple of it")
    return dict(
        name=name,
        vocab_size=fields.integer("vocab_size", most=MOST_ROWS),
        layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv,
        head_dim=fields.integer("head_dim", head_dim or hidden // heads, most=2**16),
        ffn=fields.integer("intermediate_size", most=MOST_ROWS),
        max_positions=fields.integer("max_position_embeddings"),
        eos_ids=end_ids(fields, generation),
        bos_id=first_id(fields, "bos_token_id"),
    )


def read_gguf(fields: Fields) -> LlamaConfig:
    """From a GGUF file's fields. Raises ConfigError."""
    tensors, common, window = gguf_tensors(fields), gguf_common(fields, "llama"), "llama.attention.sliding_window"
    seen = fields.integer(window) if fields.has(window) and fields.values[window] != 0 else None
    return LlamaConfig(
        **common,
        ffn=fields.integer("llama.feed_forward_length", most=MOST_ROWS),
        norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        rope=Rope.from_gguf(fields, "llama", common["head_dim"], common["max_positions"]),
        windows=(seen,) * common["layers"],
    )


def norm(config: LlamaConfig, source: Source, name: str) -> RMSNorm:
    """A norm's weights."""
    return RMSNorm(source.vector(f"{name}.weight"), config.norm_eps)


def parts(config: LlamaConfig, source: Source, layer: int) -> dict[str, Any]:
    """What a `Layer` is made of, from one layer's weights."""
    name, keeps, products = f"model.layers.{layer}", config.keeps(layer), config.projections()

    def linear(part: str, *kinds: str, turned: tuple[int, ...] = ()) -> Linear:
        names = [f"{part}.{kind}_proj" for kind in kinds]
        return source.linear(*(f"{name}.{each}" for each in names), bias=products[names[0]][1], turned=turned)

    return dict(
        attention_norm=norm(config, source, f"{name}.input_layernorm"),
        qkv=linear("self_attn", *("qkv" if keeps else "q"), turned=(config.heads, config.kv_heads)[: 1 + keeps]),
        o=linear("self_attn", "o"),
        mlp_norm=norm(config, source, f"{name}.post_attention_layernorm"),
        up=linear("mlp", "gate", "up"),
        activation=SwiGLU(),
        down=linear("mlp", "down"),
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        reads=not keeps,
    )


class Llama:
    """A Llama-style decoder.

    Attributes:
        config: its sizes.
        layers: what each layer keeps of a token.
    """

    def __init__(self, config: LlamaConfig, source: Source) -> None:
        self.config = config
        self.layers = config.layer_shapes()
        self.late = sharing.first_late(self.layers)
        self.embedding = source.embedding("model.embed_tokens")
        self.blocks = [self.block(config, source, layer) for layer in range(config.layers)]
        self.norm = norm(config, source, "model.norm")
        self.head = self.embedding if config.tied_embeddings else source.embedding("lm_head")
        self.rotation = Rotation(config.rope, source.device)

    def block(self, config: LlamaConfig, source: Source, layer: int) -> Layer:
        """One layer, from its weights."""
        return Layer(**parts(config, source, layer))

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers.

        Args:
            step: entered; its T tokens.
            tokens: int64 [T], their ids.
            rows: int64 [R], which of the T are wanted.

        Returns:
            Logits, f32 [R, vocabulary].
        """
        angles = self.rotation.angles(step.positions)
        x = self.embedding.rows(tokens)
        for index, layer in enumerate(self.blocks):
            if index == self.late:
                step, going, rows = narrowed(step, rows, len(x))
                x, angles = x[going], angles[going]
            x = layer(step, index, x, angles)
        return self.head(x[rows], after=self.norm)
