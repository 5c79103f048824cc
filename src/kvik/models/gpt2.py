"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each part, biases everywhere, GELU.

x = x + W_o attention(W_q n, W_k n, W_v n)          n = layernorm(x)
x = x + W_proj gelu(W_fc n)                         n = layernorm(x)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kvik.cache.spec import LayerShape
from kvik.models.config import Config
from kvik.models.parts import Source
from kvik.models.watch import Chunk
from kvik.ops.pointwise import gelu_tanh


class Norm:
    """A LayerNorm's weights."""

    def __init__(self, source: Source, name: str, eps: float) -> None:
        self.weight, self.bias, self.eps = source.vector(f"{name}.weight"), source.vector(f"{name}.bias"), eps

    def __call__(self, x: Tensor) -> Tensor:
        """f32 [T, hidden], each row by itself."""
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Block:
    """One layer's weights."""

    def __init__(self, config: Config, source: Source, layer: int) -> None:
        name = f"h.{layer}"
        self.attention_norm = Norm(source, f"{name}.ln_1", config.norm_eps)
        self.qkv = source.linear(f"{name}.attn.c_attn", bias=True, flip=True)
        self.o = source.linear(f"{name}.attn.c_proj", bias=True, flip=True)
        self.mlp_norm = Norm(source, f"{name}.ln_2", config.norm_eps)
        self.fc = source.linear(f"{name}.mlp.c_fc", bias=True, flip=True)
        self.proj = source.linear(f"{name}.mlp.c_proj", bias=True, flip=True)


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
        self.blocks = [Block(config, source, layer) for layer in range(config.layers)]
        self.norm = Norm(source, "ln_f", config.norm_eps)
        self.head = self.embedding if config.tied_embeddings else source.embedding("lm_head")

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers; see `Llama.forward`."""
        config = self.config
        positions = torch.tensor(step.positions, device=tokens.device)
        x = self.embedding.rows(tokens) + self.positions[positions]
        for layer, block in enumerate(self.blocks):
            q, k, v = block.qkv(block.attention_norm(x)).view(len(tokens), 3, config.heads, config.head_dim).unbind(1)
            step.append(layer, k=k, v=v)
            x = x + block.o(step.attend(layer, q, scale=config.head_dim**-0.5).out.flatten(1))
            x = x + block.proj(gelu_tanh(block.fc(block.mlp_norm(x))))
        return self.head(self.norm(x[rows]))
