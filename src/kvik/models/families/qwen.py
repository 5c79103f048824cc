"""Qwen2 (arXiv:2407.10671, Qwen2.5 too) and Qwen3 (arXiv:2505.09388): Llama with two differences each.

Qwen2: W_q, W_k and W_v have biases, W_o has none. Qwen3: no biases, and each head's queries and keys are normed before
they are turned, q = turn(rmsnorm(W_q n)). In both, layers from some number on may see a window alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvik.models.config import MOST_ROWS, gguf_common, gguf_tensors, windows_of
from kvik.models.families.llama import Llama, LlamaConfig, parts, read_sizes
from kvik.models.fields import Fields
from kvik.models.layer import Layer
from kvik.models.parts import Source
from kvik.models.rope import Rope
from kvik.ops.pointwise import RMSNorm


@dataclass(frozen=True, kw_only=True)
class QwenConfig(LlamaConfig):
    """A Qwen2- or Qwen3-style decoder.

    Attributes:
        o_bias: whether W_o has a bias too; `attention_bias` speaks of W_q, W_k and W_v.
        head_norms: whether each head's queries and keys are normed.
    """

    family: ClassVar[str] = "qwen"

    o_bias: bool
    head_norms: bool

    def projections(self) -> dict[str, tuple[tuple[int, int], bool]]:
        """See `LlamaConfig.projections`."""
        every = super().projections()
        return every | {"self_attn.o_proj": (every["self_attn.o_proj"][0], self.o_bias)}

    def norms(self) -> dict[str, int]:
        """See `LlamaConfig.norms`."""
        heads = {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim} if self.head_norms else {}
        return super().norms() | heads


def read(fields: Fields, generation: Fields, name: str) -> QwenConfig:
    """From config.json and generation_config.json of transformers' Qwen2 or Qwen3. Raises ConfigError."""
    third = fields.values["model_type"] == "qwen3"
    sizes = read_sizes(fields, generation, name, kv_heads=32, head_dim=128 if third else None)
    fields.text("hidden_act", "silu", among=("silu",))
    windowed = fields.flag("use_sliding_window", False) and fields.values.get("sliding_window", 4096) is not None
    window = fields.integer("sliding_window", 4096) if windowed else None
    first = fields.integer("max_window_layers", 28, least=0)
    bias = fields.flag("attention_bias", False) if third else True
    return QwenConfig(
        **sizes,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=bias,
        o_bias=bias and third,
        mlp_bias=False,
        head_norms=third,
        rope=Rope.from_hf(fields, sizes["head_dim"], sizes["max_positions"]),
        windows=windows_of(fields, sizes["layers"], window, lambda layer: layer >= first),
    )


def read_gguf(fields: Fields) -> QwenConfig:
    """From a GGUF file's fields, of the architectures qwen2 and qwen3. Raises ConfigError."""
    arch = fields.text("general.architecture")
    tensors, common = gguf_tensors(fields), gguf_common(fields, arch)
    fields.refuse_unless(f"{arch}.attention.sliding_window", (0,))
    return QwenConfig(
        **common,
        ffn=fields.integer(f"{arch}.feed_forward_length", most=MOST_ROWS),
        norm_eps=fields.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        attention_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias=False,
        head_norms="blk.0.attn_q_norm.weight" in tensors,
        rope=Rope.from_gguf(fields, arch, common["head_dim"], common["max_positions"]),
        windows=(None,) * common["layers"],
    )


def head_norm(config: LlamaConfig, source: Source, name: str) -> RMSNorm:
    """A norm of one head's channels, in the order in which turned projections have them."""
    return RMSNorm(source.vector(f"{name}.weight", turned=True), config.norm_eps)


class Qwen(Llama):
    """A Qwen2- or Qwen3-style decoder."""

    def block(self, config: LlamaConfig, source: Source, layer: int) -> Layer:
        """See `Llama.block`."""
        made = parts(config, source, layer)
        name = f"model.layers.{layer}.self_attn"
        if "self_attn.q_norm" in config.norms():
            made["q_norm"] = head_norm(config, source, f"{name}.q_norm")
            if config.keeps(layer):
                made["k_norm"] = head_norm(config, source, f"{name}.k_norm")
        return Layer(**made)
