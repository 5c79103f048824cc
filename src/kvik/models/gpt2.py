"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each part, biases everywhere, GELU.

x = x + W_o attention(W_q n, W_k n, W_v n)          n = layernorm(x)
x = x + W_proj gelu(W_fc n)                         n = layernorm(x)
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.cache.spec import LayerShape
from kvik.models.config import Config
from kvik.models.layer import Layer
from kvik.models.parts import Source
from kvik.models.watch import Chunk
from kvik.ops.pointwise import GELU, LayerNorm


def norm(source: Source, name: str, config: Config) -> LayerNorm:
    """A LayerNorm's weights."""
    return LayerNorm(source.vector(f"{name}.weight"), source.vector(f"{name}.bias"), config.norm_eps)


def block(config: Config, source: Source, layer: int) -> Layer:
    """One layer, from its weights."""
    name = f"h.{layer}"
    return Layer(
        attention_norm=norm(source, f"{name}.ln_1", config),
        qkv=source.linear(f"{name}.attn.c_attn", bias=True, flip=True),
        o=source.linear(f"{name}.attn.c_proj", bias=True, flip=True),
        mlp_norm=norm(source, f"{name}.ln_2", config),
        up=source.linear(f"{name}.mlp.c_fc", bias=True, flip=True),
        activation=GELU(),
        down=source.linear(f"{name}.mlp.c_proj", bias=True, flip=True),
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.head_dim,
    )


class GPT2:
    """A GPT-2-style decoder.

    Attributes:
        config: its sizes.
        layers: what each layer keeps of a token.
    """

    def __init__(self, config: Config, source: Source) -> None:
        self.config = config
        self.layers = [LayerShape(config.heads, (("k", config.head_dim), ("v", config.head_dim)))] * config.layers
        self.embedding = source.embedding("wte")
        self.positions = source.vector("wpe.weight")
        self.blocks = [block(config, source, layer) for layer in range(config.layers)]
        self.norm = norm(source, "ln_f", config)
        self.head = self.embedding if config.tied_embeddings else source.embedding("lm_head")

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers; see `Llama.forward`."""
        positions = torch.tensor(step.positions, device=tokens.device)
        x = self.embedding.rows(tokens) + self.positions[positions]
        for index, layer in enumerate(self.blocks):
            x = layer(step, index, x)
        return self.head(x[rows], after=self.norm)
