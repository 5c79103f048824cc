"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each part, biases everywhere, GELU.

x = x + W_o attention(W_q n, W_k n, W_v n)          n = layernorm(x)
x = x + W_proj gelu(W_fc n)                         n = layernorm(x)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvik.cache.spec import LayerShape
from kvik.models.config import MOST_LAYERS, MOST_ROWS, MOST_WIDTH, Config, end_ids, first_id, gguf_common
from kvik.models.fields import Fields
from kvik.models.layer import Layer
from kvik.models.parts import Source
from kvik.models.watch import Chunk
from kvik.ops.pointwise import GELU, LayerNorm


@dataclass(frozen=True, kw_only=True)
class GPT2Config(Config):
    """A GPT-2-style decoder.

    Attributes:
        ffn: channels of its feed-forward part.
        norm_eps: the epsilon of its norms.
    """

    family: ClassVar[str] = "gpt2"

    ffn: int
    norm_eps: float

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Config.tensor_shapes`; projections are Conv1D, [in, out], and names have no "transformer." prefix."""
        hidden, ffn = self.hidden, self.ffn
        projections = {
            "attn.c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, ffn),
            "mlp.c_proj": (ffn, hidden),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocab_size, hidden),
            "wpe.weight": (self.max_positions, hidden),
        }
        for i in range(self.layers):
            for part, shape in projections.items():
                shapes |= {f"h.{i}.{part}.weight": shape, f"h.{i}.{part}.bias": shape[1:]}
            shapes |= {f"h.{i}.{norm}.{part}": (hidden,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        shapes |= {"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)}
        return shapes if self.tied_embeddings else shapes | {"lm_head.weight": (self.vocab_size, hidden)}


def read(fields: Fields, generation: Fields, name: str) -> GPT2Config:
    """From config.json and generation_config.json. Raises ConfigError."""
    hidden, heads = fields.integer("n_embd", most=MOST_WIDTH), fields.integer("n_head", most=2**16)
    if hidden % heads:
        fields.fail("n_head", f"n_embd {hidden} is not a multiple of it")
    fields.refuse_unless("scale_attn_weights", (True,))
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        fields.refuse_unless(key, (False,))
    fields.text("activation_function", "gelu_new", among=("gelu_new",))
    return GPT2Config(
        name=name,
        vocab_size=fields.integer("vocab_size", most=MOST_ROWS),
        layers=fields.integer("n_layer", most=MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=fields.integer("n_inner", 4 * hidden, most=MOST_ROWS),
        max_positions=fields.integer("n_positions"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        eos_ids=end_ids(fields, generation),
        bos_id=first_id(fields, "bos_token_id"),
    )


def read_gguf(fields: Fields) -> GPT2Config:
    """From a GGUF file's fields. Raises ConfigError."""
    common = gguf_common(fields, "gpt2")
    if common["kv_heads"] != common["heads"]:
        fields.fail("gpt2.attention.head_count_kv", f"the {common['heads']} heads can't share that many key heads")
    fields.refuse_unless("gpt2.attention.sliding_window", (0,))
    return GPT2Config(
        **common,
        ffn=fields.integer("gpt2.feed_forward_length", most=MOST_ROWS),
        norm_eps=fields.number("gpt2.attention.layer_norm_epsilon"),
    )


def norm(source: Source, name: str, config: GPT2Config) -> LayerNorm:
    """A LayerNorm's weights."""
    return LayerNorm(source.vector(f"{name}.weight"), source.vector(f"{name}.bias"), config.norm_eps)


def block(config: GPT2Config, source: Source, layer: int) -> Layer:
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

    def __init__(self, config: GPT2Config, source: Source) -> None:
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
