"""Llama (arXiv:2302.13971), and with it Mistral and SmolLM: rotary positions, grouped queries, RMSNorm, SwiGLU.

x = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n)          n = rmsnorm(x)
x = x + W_down (silu(W_gate n) · W_up n)                            n = rmsnorm(x)
"""

from __future__ import annotations

from torch import Tensor

from kvik.cache.spec import LayerShape
from kvik.models.config import Config
from kvik.models.layer import Layer
from kvik.models.parts import Rotation, Source
from kvik.models.watch import Chunk
from kvik.ops.pointwise import RMSNorm, SwiGLU


def block(config: Config, source: Source, layer: int) -> Layer:
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

    def __init__(self, config: Config, source: Source) -> None:
        assert config.rope is not None, "the configuration of a Llama has a rotation"
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
