"""T5 (arXiv:1910.10683), its v1.1 and Flan kin, and mT5: encoder and decoder know positions by distance alone.

    x = x + W_o attention(W_q n, W_k n, W_v n; bias)       n = rmsnorm(x); in the encoder over every row
    x = x + W_o attention(W_q n, keys, values)             n = rmsnorm(x); over the source's rows: the decoder alone
    x = x + W_down f(W_up n)                               n = rmsnorm(x); or f(W_gate n) · W_up n

Scores are not scaled. The bias is a number for each head and bucket of distances: near ones have a bucket each, further
ones share buckets that grow with the logarithm, and all from `max_distance` on share the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvik.cache.spec import LayerShape
from kvik.models.attention import attend_all
from kvik.models.config import MOST_LAYERS, MOST_ROWS, MOST_WIDTH
from kvik.models.fields import Fields
from kvik.models.parts import Source
from kvik.models.reading import ReaderConfig, common, given, layer_shapes
from kvik.models.watch import Chunk
from kvik.ops.layout import MOST_POSITIONS
from kvik.ops.pointwise import ACTIVATIONS, RMSNorm, activation


@dataclass(frozen=True, kw_only=True)
class T5Config(ReaderConfig):
    """A T5. Its head is the embedding where `tied_embeddings`, and sees its rows scaled by hidden^-0.5 then.

    Attributes:
        ffn: channels of its feed-forward parts.
        activation: theirs, one of `ACTIVATIONS`; gated: whether a second projection multiplies it.
        norm_eps: the epsilon of its norms.
        buckets, max_distance: of the bias.
    """

    family: ClassVar[str] = "t5"

    ffn: int
    activation: str
    gated: bool
    norm_eps: float
    buckets: int
    max_distance: int

    @property
    def most_positions(self) -> int:
        """Distances from `max_distance` on are all alike: no position is the last."""
        return MOST_POSITIONS

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Config.tensor_shapes`; projections are [out, in]."""
        hidden, inner = self.hidden, self.heads * self.head_dim
        attention = {"q": (inner, hidden), "k": (inner, hidden), "v": (inner, hidden), "o": (hidden, inner)}
        up = ("wi_0", "wi_1") if self.gated else ("wi",)
        ffn = dict.fromkeys(up, (self.ffn, hidden)) | {"wo": (hidden, self.ffn)}
        shapes: dict[str, tuple[int, ...]] = {"shared.weight": (self.vocab_size, hidden)}
        for stack, layers in (("encoder", self.encoder_layers), ("decoder", self.layers)):
            parts = [("SelfAttention", attention), ("EncDecAttention", attention), ("DenseReluDense", ffn)]
            parts = parts if stack == "decoder" else [parts[0], parts[2]]
            for i in range(layers):
                for j, (part, projections) in enumerate(parts):
                    name = f"{stack}.block.{i}.layer.{j}"
                    shapes |= {f"{name}.{part}.{p}.weight": shape for p, shape in projections.items()}
                    shapes[f"{name}.layer_norm.weight"] = (hidden,)
            shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (self.buckets, self.heads)
            shapes[f"{stack}.final_layer_norm.weight"] = (hidden,)
        return shapes if self.tied_embeddings else shapes | {"lm_head.weight": (self.vocab_size, hidden)}

    def other_names(self) -> dict[str, tuple[str, ...]]:
        """Some files hold the embedding several times; some have one for both ends though theirs is not the scaled
        head."""
        copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        if self.tied_embeddings:
            return {"shared.weight": (*copies, "lm_head.weight")}
        return {"shared.weight": copies, "lm_head.weight": ("shared.weight",)}

    def spare(self, name: str) -> bool:
        """Cross-attention has no bias; the first files hold one all the same."""
        return name == "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def read(fields: Fields, generation: Fields, name: str) -> T5Config:
    """From config.json and generation_config.json of transformers' T5 or mT5. Raises ConfigError."""
    layers, heads = fields.integer("num_layers", most=MOST_LAYERS), fields.integer("num_heads", most=2**16)
    multilingual = fields.values["model_type"] == "mt5"
    kind = fields.text("feed_forward_proj", "gated-gelu" if multilingual else "relu").split("-")
    gated = len(kind) == 2 and kind[0] == "gated"
    used = "gelu_new" if gated and kind[1] == "gelu" else kind[-1]
    if (len(kind) > 1 and not gated) or used not in ACTIVATIONS:
        fields.fail(
            "feed_forward_proj", f"must be one of {', '.join(sorted(ACTIVATIONS))}, or one with 'gated-' before it"
        )
    tied = fields.flag("tie_word_embeddings", True)
    buckets = fields.integer("relative_attention_num_buckets", 32, least=4, most=2**16)
    return T5Config(
        **common(fields, generation),
        name=name,
        vocab_size=fields.integer("vocab_size", most=MOST_ROWS),
        layers=fields.integer("num_decoder_layers", layers, most=MOST_LAYERS),
        hidden=fields.integer("d_model", most=MOST_WIDTH),
        heads=heads,
        kv_heads=heads,
        head_dim=fields.integer("d_kv", most=2**16),
        max_positions=fields.integer("n_positions", 512),
        # transformers says "tied" of every T5 since its version 5, and in `scale_decoder_outputs` what it meant before
        tied_embeddings=not multilingual and fields.flag("scale_decoder_outputs", tied),
        encoder_layers=layers,
        encoder_heads=heads,
        source_vocab=fields.integer("vocab_size", most=MOST_ROWS),
        source_positions=None,
        own_tokenizer=False,
        ffn=fields.integer("d_ff", most=MOST_ROWS),
        activation=used,
        gated=gated,
        norm_eps=fields.number("layer_norm_epsilon", 1e-6),
        buckets=buckets,
        max_distance=fields.integer("relative_attention_max_distance", 128, least=buckets // 2 + 1, most=2**20),
    )


def bucket(away: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance back, int64, 0 or more: half of them for one distance each, the rest logarithmic."""
    exact = buckets // 2
    large = torch.log(away.clamp_min(1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    return torch.where(away < exact, away, (exact + large.to(torch.int64)).clamp_max(buckets - 1))


def backward_bias(weight: Tensor, max_distance: int) -> Tensor:
    """The decoder's bias by distance back, f32 [H, R], as `Step.attend` takes it; from weight [buckets, H]."""
    away = torch.arange(max_distance + 1, device=weight.device)
    return weight[bucket(away, len(weight), max_distance)].t().contiguous()


def bias_both_ways(weight: Tensor, max_distance: int) -> Tensor:
    """The encoder's, f32 [H, 2 R + 1], as `attend_all` takes it: half of the buckets are for rows behind the query."""
    away, half = torch.arange(-max_distance, max_distance + 1, device=weight.device), len(weight) // 2
    return weight[bucket(away.abs(), half, max_distance) + (away > 0) * half].t().contiguous()


class Block:
    """One layer of either stack, from its weights.

    Attributes:
        cross: to queries of the source's rows; None in the encoder.
    """

    def __init__(self, config: T5Config, source: Source, name: str, decodes: bool) -> None:
        self.width = config.head_dim

        def norm(part: int) -> RMSNorm:
            return RMSNorm(source.vector(f"{name}.layer.{part}.layer_norm.weight"), config.norm_eps)

        own, last = f"{name}.layer.0.SelfAttention", 1 + decodes
        ffn, up = f"{name}.layer.{last}.DenseReluDense", ("wi_0", "wi_1") if config.gated else ("wi",)
        self.norm, self.cross_norm, self.mlp_norm = norm(0), norm(1) if decodes else None, norm(last)
        self.qkv, self.o = source.linear(*(f"{own}.{p}" for p in "qkv")), source.linear(f"{own}.o")
        other = f"{name}.layer.1.EncDecAttention"
        self.cross, self.cross_o = (source.linear(f"{other}.{p}") if decodes else None for p in "qo")
        self.up, self.down = source.linear(*(f"{ffn}.{p}" for p in up)), source.linear(f"{ffn}.wo")
        self.activation = activation(config.activation, config.gated)

    def encode(self, x: Tensor, bias: Tensor) -> Tensor:
        """The encoder's: every row beside all others, f32 [S, width of the model]."""
        q, k, v = self.qkv(x, after=self.norm).view(len(x), 3, -1, self.width).unbind(1)
        x = self.o(attend_all(q, k, v, scale=1.0, bias=bias), onto=x)
        return self.down(self.up(x, after=self.mlp_norm), after=self.activation, onto=x)

    def decode(self, step: Chunk, index: int, cross: int, x: Tensor, bias: Tensor) -> Tensor:
        """The decoder's: a step's tokens through layer `index`, whose rows of the source are those of layer `cross`."""
        assert self.cross is not None and self.cross_o is not None, "a layer of the decoder"
        q, k, v = self.qkv(x, after=self.norm).view(len(x), 3, -1, self.width).unbind(1)
        step.append(index, k=k, v=v)
        x = self.o(step.attend(index, q, scale=1.0, bias=bias).out.flatten(1), onto=x)
        q = self.cross(x, after=self.cross_norm).view(len(x), -1, self.width)
        x = self.cross_o(step.attend(cross, q, scale=1.0).out.flatten(1), onto=x)
        return self.down(self.up(x, after=self.mlp_norm), after=self.activation, onto=x)


class T5:
    """A T5.

    Attributes:
        config: its sizes.
        layers: what each layer keeps: of a token, then of a row of the source.
    """

    def __init__(self, config: T5Config, source: Source) -> None:
        self.config, width = config, config.head_dim
        own = LayerShape(config.heads, (("k", width), ("v", width)), biased=True)
        self.layers = layer_shapes(own, config.layers)
        self.embedding = source.embedding("shared")
        self.encoder = [Block(config, source, f"encoder.block.{i}", False) for i in range(config.encoder_layers)]
        self.blocks = [Block(config, source, f"decoder.block.{i}", True) for i in range(config.layers)]
        crosses = [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(config.layers)]
        self.reads = [source.linear(f"{cross}.k", f"{cross}.v") for cross in crosses]
        bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        self.encoder_bias = bias_both_ways(source.vector(f"encoder.{bias}"), config.max_distance)
        self.bias = backward_bias(source.vector(f"decoder.{bias}"), config.max_distance)
        self.encoder_norm = RMSNorm(source.vector("encoder.final_layer_norm.weight"), config.norm_eps)
        scale = config.hidden**-0.5 if config.tied_embeddings else 1.0
        self.norm = RMSNorm(source.vector("decoder.final_layer_norm.weight") * scale, config.norm_eps)
        self.head = self.embedding if config.tied_embeddings else source.embedding("lm_head")

    def encode(self, source: Tensor) -> Tensor:
        """See `Reader.encode`."""
        x = self.embedding.rows(source)
        for layer in self.encoder:
            x = layer.encode(x, self.encoder_bias)
        return self.encoder_norm(x)

    def given(self, states: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """See `Reader.given`."""
        return given(self.reads, states, self.config.heads)

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers; see `Decoder.forward`."""
        x = self.embedding.rows(tokens)
        for index, layer in enumerate(self.blocks):
            x = layer.decode(step, index, len(self.blocks) + index, x, self.bias)
        return self.head(x[rows], after=self.norm)
