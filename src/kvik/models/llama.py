"""Llama (arXiv:2302.13971), and with it Mistral and SmolLM: rotary positions, grouped queries, RMSNorm, SwiGLU.

x = x + W_o attention(rotate(W_q n), rotate(W_k n), W_v n)          n = rmsnorm(x)
x = x + W_down (silu(W_gate n) · W_up n)                            n = rmsnorm(x)
"""

from __future__ import annotations

from torch import Tensor

from kvik.cache.spec import LayerShape
from kvik.models.config import Config
from kvik.models.parts import Rotation, Source
from kvik.models.watch import Chunk
from kvik.ops.pointwise import RMSNorm, SwiGLU


class Block:
    """One layer's weights."""

    def __init__(self, config: Config, source: Source, layer: int) -> None:
        name, heads = f"model.layers.{layer}", (config.heads, config.kv_heads)
        attention = [f"{name}.self_attn.{p}_proj" for p in "qkv"]
        self.attention_norm = RMSNorm(source.vector(f"{name}.input_layernorm.weight"), config.norm_eps)
        self.qkv = source.linear(*attention, bias=config.attention_bias, turned=heads)
        self.o = source.linear(f"{name}.self_attn.o_proj", bias=config.attention_bias)
        self.mlp_norm = RMSNorm(source.vector(f"{name}.post_attention_layernorm.weight"), config.norm_eps)
        self.gate_up = source.linear(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj", bias=config.mlp_bias)
        self.swiglu = SwiGLU()
        self.down = source.linear(f"{name}.mlp.down_proj", bias=config.mlp_bias)


class Llama:
    """A Llama-style decoder.

    Attributes:
        config: its sizes.
        layers: what each layer keeps of a token.
    """

    def __init__(self, config: Config, source: Source) -> None:
        assert config.rope is not None, "the configuration of a Llama has a rotation"
        self.config = config
        self.layers = [
            LayerShape(config.kv_heads, (("k", config.head_dim), ("v", config.head_dim)), w) for w in config.windows
        ]
        self.embedding = source.embedding("model.embed_tokens")
        self.blocks = [Block(config, source, layer) for layer in range(config.layers)]
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
        config = self.config
        queries, turned = config.heads, config.heads + config.kv_heads
        angles = self.rotation.angles(step.positions)
        scale = config.head_dim**-0.5
        x = self.embedding.rows(tokens)
        for layer, block in enumerate(self.blocks):
            qkv = block.qkv(x, after=block.attention_norm).view(len(tokens), -1, config.head_dim)
            qk = self.rotation.turn(qkv[:, :turned], angles)
            step.append(layer, k=qk[:, queries:], v=qkv[:, turned:])
            attended = step.attend(layer, qk[:, :queries], scale=scale).out.flatten(1)
            x = block.o(attended, onto=x)
            x = block.down(block.gate_up(x, after=block.mlp_norm), after=block.swiglu, onto=x)
        return self.head(x[rows], after=self.norm)
