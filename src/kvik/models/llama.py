"""Llama (arXiv:2302.13971), and with it Mistral and SmolLM: rotary positions, grouped queries, RMSNorm, SwiGLU.

x = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n)          n = rmsnorm(x)
x = x + W_down (silu(W_gate n) · W_up n)                            n = rmsnorm(x)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvik.cache.spec import LayerShape
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
from kvik.models.fields import Fields
from kvik.models.layer import Layer
from kvik.models.parts import Rotation, Source
from kvik.models.rope import Rope
from kvik.models.watch import Chunk
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
    """

    family: ClassVar[str] = "llama"

    ffn: int
    norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    rope: Rope
    windows: tuple[int | None, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope.head_dim != self.head_dim:
            raise ConfigError(f"{self.name}: rope turns {self.rope.head_dim} of {self.head_dim} dimensions of a head")
        if len(self.windows) != self.layers:
            raise ConfigError(f"{self.name}: {len(self.windows)} windows do not fit {self.layers} layers")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Config.tensor_shapes`; projections are [out, in]."""
        hidden, ffn = self.hidden, self.ffn
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        projections = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            for part, shape in projections.items():
                shapes[f"{layer}.{part}.weight"] = shape
                if self.attention_bias if part.startswith("self_attn") else self.mlp_bias:
                    shapes[f"{layer}.{part}.bias"] = shape[:1]
            shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        return shapes if self.tied_embeddings else shapes | {"lm_head.weight": (self.vocab_size, hidden)}


def read(fields: Fields, generation: Fields, name: str) -> LlamaConfig:
    """From config.json and generation_config.json of transformers' Llama or Mistral. Raises ConfigError."""
    mistral = fields.values["model_type"] == "mistral"
    hidden, heads = fields.integer("hidden_size", most=MOST_WIDTH), fields.integer("num_attention_heads", most=2**16)
    if not fields.has("head_dim") and hidden % heads:
        fields.fail("num_attention_heads", f"hidden_size {hidden} is not a multiple of it")
    head_dim = fields.integer("head_dim", hidden // heads, most=2**16)
    kv_heads = fields.integer("num_key_value_heads", _mistral_default(fields, heads), most=heads)
    if heads % kv_heads:
        fields.fail("num_key_value_heads", f"the {heads} num_attention_heads are not a multiple of it")
    layers, positions = fields.integer("num_hidden_layers", most=MOST_LAYERS), fields.integer("max_position_embeddings")
    window = None
    if mistral and ("sliding_window" not in fields.values or fields.has("sliding_window")):
        window = fields.integer("sliding_window", 4096)
    else:
        fields.refuse_unless("sliding_window", ())
    uniform = "full_attention" if window is None else "sliding_attention"
    fields.refuse_unless("layer_types", ([uniform] * layers,))
    fields.text("hidden_act", "silu", among=("silu",))
    bias = not mistral and fields.flag("attention_bias", False)
    return LlamaConfig(
        vocab_size=fields.integer("vocab_size", most=MOST_ROWS),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=fields.integer("intermediate_size", most=MOST_ROWS),
        max_positions=positions,
        norm_eps=fields.number("rms_norm_eps"),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=bias,
        mlp_bias=not mistral and fields.flag("mlp_bias", False),
        rope=Rope.from_hf(fields, head_dim, positions),
        windows=(window,) * layers,
        eos_ids=end_ids(fields, generation),
        bos_id=first_id(fields, "bos_token_id"),
        name=name,
    )


def _mistral_default(fields: Fields, heads: int) -> int:
    """Key heads where config.json names none: transformers takes 8 for Mistral, and all heads for Llama."""
    absent = "num_key_value_heads" not in fields.values
    return 8 if fields.values["model_type"] == "mistral" and absent else heads


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


def block(config: LlamaConfig, source: Source, layer: int) -> Layer:
    """One layer, from its weights."""
    name, heads = f"model.layers.{layer}", (config.heads, config.kv_heads)
    attention = [f"{name}.self_attn.{p}_proj" for p in "qkv"]
    return Layer(
        attention_norm=RMSNorm(source.vector(f"{name}.input_layernorm.weight"), config.norm_eps),
        qkv=source.linear(*attention, bias=config.attention_bias, turned=heads),
        o=source.linear(f"{name}.self_attn.o_proj", bias=config.attention_bias),
        mlp_norm=RMSNorm(source.vector(f"{name}.post_attention_layernorm.weight"), config.norm_eps),
        up=source.linear(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj", bias=config.mlp_bias),
        activation=SwiGLU(),
        down=source.linear(f"{name}.mlp.down_proj", bias=config.mlp_bias),
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
    )


class Llama:
    """A Llama-style decoder.

    Attributes:
        config: its sizes.
        layers: what each layer keeps of a token.
    """

    def __init__(self, config: LlamaConfig, source: Source) -> None:
        self.config = config
        streams, frequencies = (("k", config.head_dim), ("v", config.head_dim)), config.rope.frequencies()[0]
        turned = tuple(frequencies.tolist())
        self.layers = [LayerShape(config.kv_heads, streams, window, turned) for window in config.windows]
        self.embedding = source.embedding("model.embed_tokens")
        self.blocks = [block(config, source, layer) for layer in range(config.layers)]
        self.norm = RMSNorm(source.vector("model.norm.weight"), config.norm_eps)
        self.head = self.embedding if config.tied_embeddings else source.embedding("lm_head")
        self.rotation = Rotation(config.rope, source.device)

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
            x = layer(step, index, x, angles)
        return self.head(x[rows], after=self.norm)
