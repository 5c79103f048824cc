"""OPT (arXiv:2205.01068): learned positions, LayerNorm before each part, biases, ReLU.

x = x + W_o attention(W_q n, W_k n, W_v n)          n = layernorm(x)
x = x + W_2 relu(W_1 n)                             n = layernorm(x)

Position p lies in row p + 2 of its table. OPT-350m, which norms after each part and has a narrower embedding, is
another model; it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvik.cache.shape import LayerShape
from kvik.models.config import MOST_LAYERS, MOST_ROWS, MOST_WIDTH, Config, end_ids, first_id
from kvik.models.fields import Fields
from kvik.models.layer import Layer
from kvik.models.parts import Source
from kvik.models.watch import Chunk
from kvik.ops.pointwise import LayerNorm, ReLU

OFFSET = 2  # rows of the table before that of position 0


@dataclass(frozen=True, kw_only=True)
class OPTConfig(Config):
    """An OPT-style decoder.

    Attributes:
        ffn: channels of its feed-forward part.
        bias: whether its projections have biases.
    """

    family: ClassVar[str] = "opt"

    ffn: int
    bias: bool

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Config.tensor_shapes`; projections are [out, in]."""
        hidden, ffn = self.hidden, self.ffn
        projections = {f"self_attn.{part}": (hidden, hidden) for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
        projections |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
        shapes: dict[str, tuple[int, ...]] = {
            "model.decoder.embed_tokens.weight": (self.vocab_size, hidden),
            "model.decoder.embed_positions.weight": (self.max_positions + OFFSET, hidden),
        }
        for i in range(self.layers):
            layer = f"model.decoder.layers.{i}"
            for part, shape in projections.items():
                shapes[f"{layer}.{part}.weight"] = shape
                shapes |= {f"{layer}.{part}.bias": shape[:1]} if self.bias else {}
            for part in ("self_attn_layer_norm", "final_layer_norm"):
                shapes |= {f"{layer}.{part}.{kind}": (hidden,) for kind in ("weight", "bias")}
        shapes |= {f"model.decoder.final_layer_norm.{kind}": (hidden,) for kind in ("weight", "bias")}
        return shapes if self.tied_embeddings else shapes | {"lm_head.weight": (self.vocab_size, hidden)}


def read(fields: Fields, generation: Fields, name: str) -> OPTConfig:
    """From config.json and generation_config.json. Raises ConfigError."""
    hidden, heads = fields.integer("hidden_size", most=MOST_WIDTH), fields.integer("num_attention_heads", most=2**16)
    if hidden % heads:
        fields.fail("num_attention_heads", f"hidden_size {hidden} is not a multiple of it")
    fields.refuse_unless("do_layer_norm_before", (True,))
    fields.refuse_unless("word_embed_proj_dim", (hidden,))
    fields.refuse_unless("_remove_final_layer_norm", (False,))
    fields.refuse_unless("layer_norm_elementwise_affine", (True,))
    fields.text("activation_function", "relu", among=("relu",))
    return OPTConfig(
        name=name,
        vocab_size=fields.integer("vocab_size", most=MOST_ROWS),
        layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=fields.integer("ffn_dim", most=MOST_ROWS),
        max_positions=fields.integer("max_position_embeddings"),
        bias=fields.flag("enable_bias", True),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        eos_ids=end_ids(fields, generation),
        bos_id=first_id(fields, "bos_token_id"),
    )


def norm(source: Source, name: str) -> LayerNorm:
    """A LayerNorm's weights; torch's epsilon."""
    return LayerNorm(source.vector(f"{name}.weight"), source.vector(f"{name}.bias"), 1e-5)


def block(config: OPTConfig, source: Source, layer: int) -> Layer:
    """One layer, from its weights."""
    name = f"model.decoder.layers.{layer}"
    return Layer(
        attention_norm=norm(source, f"{name}.self_attn_layer_norm"),
        qkv=source.linear(*(f"{name}.self_attn.{part}_proj" for part in "qkv"), bias=config.bias),
        o=source.linear(f"{name}.self_attn.out_proj", bias=config.bias),
        mlp_norm=norm(source, f"{name}.final_layer_norm"),
        up=source.linear(f"{name}.fc1", bias=config.bias),
        activation=ReLU(),
        down=source.linear(f"{name}.fc2", bias=config.bias),
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.head_dim,
    )


class OPT:
    """An OPT-style decoder.

    Attributes:
        config: its sizes.
        layers: what each layer keeps of a token.
    """

    def __init__(self, config: OPTConfig, source: Source) -> None:
        self.config = config
        self.layers = [LayerShape(config.heads, (("k", config.head_dim), ("v", config.head_dim)))] * config.layers
        self.embedding = source.embedding("model.decoder.embed_tokens")
        self.positions = source.vector("model.decoder.embed_positions.weight")
        self.blocks = [block(config, source, layer) for layer in range(config.layers)]
        self.norm = norm(source, "model.decoder.final_layer_norm")
        self.head = self.embedding if config.tied_embeddings else source.embedding("lm_head")

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers; see `Llama.forward`."""
        positions = torch.tensor(step.positions, device=tokens.device) + OFFSET
        x = self.embedding.rows(tokens) + self.positions[positions]
        for index, layer in enumerate(self.blocks):
            x = layer(step, index, x)
        return self.head(x[rows], after=self.norm)
