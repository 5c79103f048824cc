"""BART (arXiv:1910.13461) and Marian (arXiv:1804.00344): the first encoder-decoder (arXiv:1706.03762), a norm behind
each part instead of before it, biases everywhere.

    x = norm(x + W_o attention(W_q x, W_k x, W_v x))     in the encoder over every row
    x = norm(x + W_o attention(W_q x, keys, values))     over the source's rows: the decoder alone
    x = norm(x + W_down f(W_up x))

Both stacks begin with scale · embedding + position: BART's positions are learned, two rows further down in their
tables, and a norm follows; Marian's are sines and cosines. The head's logits get a bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvik.cache.spec import LayerShape
from kvik.errors import ConfigError
from kvik.models.attention import attend_all
from kvik.models.config import MOST_LAYERS, MOST_ROWS, MOST_WIDTH
from kvik.models.fields import Fields
from kvik.models.parts import Source
from kvik.models.reading import ReaderConfig, common, given, layer_shapes
from kvik.models.watch import Chunk
from kvik.ops.pointwise import ACTIVATIONS, LayerNorm, activation

_EPS = 1e-5
_OFFSET = 2  # of BART's learned positions


@dataclass(frozen=True, kw_only=True)
class BartConfig(ReaderConfig):
    """A BART or Marian.

    Attributes:
        ffn, encoder_ffn: channels of the stacks' feed-forward parts.
        activation: theirs, one of `ACTIVATIONS`.
        scaled: embeddings are multiplied by √hidden.
        learned: positions are BART's, with the norm that follows; else Marian's.
    """

    family: ClassVar[str] = "bart"

    ffn: int
    encoder_ffn: int
    activation: str
    scaled: bool
    learned: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % self.heads or self.hidden % self.encoder_heads:
            raise ConfigError(
                f"{self.name}: d_model {self.hidden} can't be cut into {self.heads} and {self.encoder_heads} heads"
            )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Config.tensor_shapes`; projections are [out, in]."""
        hidden, shapes = self.hidden, dict[str, tuple[int, ...]]()
        stacks = ("encoder", self.encoder_layers, self.encoder_ffn), ("decoder", self.layers, self.ffn)
        for stack, layers, ffn in stacks:
            sizes = {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
            norms = ["self_attn_layer_norm", "final_layer_norm"]
            for attention in ("self_attn", "encoder_attn")[: 1 + (stack == "decoder")]:
                sizes |= {f"{attention}.{p}_proj": (hidden, hidden) for p in ("q", "k", "v", "out")}
            norms += ["encoder_attn_layer_norm"] if stack == "decoder" else []
            for i in range(layers):
                name = f"model.{stack}.layers.{i}"
                for part, shape in sizes.items():
                    shapes |= {f"{name}.{part}.weight": shape, f"{name}.{part}.bias": shape[:1]}
                shapes |= {f"{name}.{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}
            if self.learned:
                shapes[f"model.{stack}.embed_positions.weight"] = (self.max_positions + _OFFSET, hidden)
                shapes |= {f"model.{stack}.layernorm_embedding.{part}": (hidden,) for part in ("weight", "bias")}
        shapes |= {f"{name}.weight": shape for name, shape in self._tables().items()}
        return shapes | {"final_logits_bias": (1, self.vocab_size)}

    def _tables(self) -> dict[str, tuple[int, ...]]:
        """Embeddings, and the head where it is none of them."""
        text = (self.vocab_size, self.hidden)
        tables: dict[str, tuple[int, ...]] = {"model.shared": text}
        if self.own_tokenizer:
            source = (self.source_vocab, self.hidden)
            tables = {"model.encoder.embed_tokens": source, "model.decoder.embed_tokens": text}
        return tables if self.tied_embeddings else tables | {"lm_head": text}

    @property
    def embeddings(self) -> tuple[str, str]:
        """Names of the encoder's and the decoder's."""
        first, *others = [name for name in self._tables() if name != "lm_head"]
        return first, others[0] if others else first

    def other_names(self) -> dict[str, tuple[str, ...]]:
        """Some files leave "model." out; some hold a shared embedding several times."""
        names = {name: (name.removeprefix("model."),) for name in self.tensor_shapes() if name.startswith("model.")}
        copies = ["lm_head.weight"] if self.tied_embeddings else []
        if not self.own_tokenizer:
            copies += [f"{m}{stack}.embed_tokens.weight" for m in ("model.", "") for stack in ("encoder", "decoder")]
        table = f"{self.embeddings[1]}.weight"
        return names | {table: (*names[table], *copies)}

    def spare(self, name: str) -> bool:
        """Marian's positions follow from their number."""
        return not self.learned and name.removeprefix("model.") in (
            "encoder.embed_positions.weight", "decoder.embed_positions.weight",
        )  # fmt: skip

    def optional_tensors(self) -> tuple[str, ...]:
        """Files of a model without its head have no bias."""
        return ("final_logits_bias",)


def read(fields: Fields, generation: Fields, name: str) -> BartConfig:
    """From config.json and generation_config.json of transformers' BART or Marian. Raises ConfigError."""
    learned = fields.values["model_type"] == "bart"
    for key in ("normalize_before", "add_final_layer_norm", "add_bias_logits"):  # of files from before transformers 4
        fields.refuse_unless(key, (False,))
    fields.refuse_unless("normalize_embedding", (learned,))
    fields.refuse_unless("static_position_embeddings", (not learned,))
    hidden, heads = fields.integer("d_model", most=MOST_WIDTH), fields.integer("decoder_attention_heads", most=2**16)
    source_vocab, positions = fields.integer("vocab_size", most=MOST_ROWS), fields.integer("max_position_embeddings")
    shared = learned or fields.flag("share_encoder_decoder_embeddings", True)
    vocab = source_vocab if shared else fields.integer("decoder_vocab_size", source_vocab, most=MOST_ROWS)
    return BartConfig(
        **common(fields, generation, last=2 if learned else 0),
        name=name,
        vocab_size=vocab,
        layers=fields.integer("decoder_layers", most=MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=positions,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        encoder_layers=fields.integer("encoder_layers", most=MOST_LAYERS),
        encoder_heads=fields.integer("encoder_attention_heads", most=2**16),
        source_vocab=source_vocab,
        source_positions=positions,
        own_tokenizer=not shared,
        ffn=fields.integer("decoder_ffn_dim", most=MOST_ROWS),
        encoder_ffn=fields.integer("encoder_ffn_dim", most=MOST_ROWS),
        activation=fields.text("activation_function", "gelu", among=ACTIVATIONS),
        scaled=fields.flag("scale_embedding", False),
        learned=learned,
    )


def waves(positions: int, width: int) -> Tensor:
    """Marian's positions, f32 [positions, width]: sines of falling frequencies, and behind them their cosines."""
    turns = torch.arange(positions, dtype=torch.float64).unsqueeze(1)
    turns = turns / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.cat((turns.sin(), turns.cos()[:, : width // 2]), 1).float()


class Block:
    """One layer of either stack, from its weights."""

    def __init__(self, config: BartConfig, source: Source, name: str, decodes: bool) -> None:
        def norm(part: str) -> LayerNorm:
            return layer_norm(source, f"{name}.{part}_layer_norm")

        self.heads = config.heads if decodes else config.encoder_heads
        self.scale = (config.hidden // self.heads) ** -0.5
        self.qkv = source.linear(*(f"{name}.self_attn.{p}_proj" for p in "qkv"), bias=True)
        self.o, self.norm = source.linear(f"{name}.self_attn.out_proj", bias=True), norm("self_attn")
        other = f"{name}.encoder_attn"
        self.cross, self.cross_o = (
            source.linear(f"{other}.{p}_proj", bias=True) if decodes else None for p in ("q", "out")
        )
        self.cross_norm = norm("encoder_attn") if decodes else None
        self.up, self.down = (source.linear(f"{name}.{p}", bias=True) for p in ("fc1", "fc2"))
        self.activation, self.mlp_norm = activation(config.activation), norm("final")

    def encode(self, x: Tensor) -> Tensor:
        """The encoder's: every row beside all others, f32 [S, width of the model]."""
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        x = self.norm(self.o(attend_all(q, k, v, scale=self.scale), onto=x))
        return self.mlp_norm(self.down(self.up(x), after=self.activation, onto=x))

    def decode(self, step: Chunk, index: int, cross: int, x: Tensor) -> Tensor:
        """The decoder's: a step's tokens through layer `index`, whose rows of the source are those of layer `cross`."""
        assert self.cross is not None and self.cross_o is not None and self.cross_norm is not None, "of the decoder"
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        step.append(index, k=k, v=v)
        x = self.norm(self.o(step.attend(index, q, scale=self.scale).out.flatten(1), onto=x))
        q = self.cross(x).view(len(x), self.heads, -1)
        x = self.cross_norm(self.cross_o(step.attend(cross, q, scale=self.scale).out.flatten(1), onto=x))
        return self.mlp_norm(self.down(self.up(x), after=self.activation, onto=x))


def layer_norm(source: Source, name: str) -> LayerNorm:
    """A norm's weights."""
    return LayerNorm(source.vector(f"{name}.weight"), source.vector(f"{name}.bias"), _EPS)


class Bart:
    """A BART or Marian.

    Attributes:
        config: its sizes.
        layers: what each layer keeps: of a token, then of a row of the source.
        norm: none before the head, as each part ends in its own.
    """

    norm = None

    def __init__(self, config: BartConfig, source: Source) -> None:
        self.config, width = config, config.head_dim
        self.layers = layer_shapes(LayerShape(config.heads, (("k", width), ("v", width))), config.layers)
        theirs, ours = config.embeddings
        self.embedding = source.embedding(ours)
        self.source_embedding = self.embedding if theirs == ours else source.embedding(theirs)
        self.scale = math.sqrt(config.hidden) if config.scaled else 1.0
        if config.learned:
            tables = [source.vector(f"model.{s}.embed_positions.weight")[_OFFSET:] for s in ("encoder", "decoder")]
            norms = [layer_norm(source, f"model.{s}.layernorm_embedding") for s in ("encoder", "decoder")]
            self.places, self.norms = tables, norms
        else:
            self.places, self.norms = [waves(config.max_positions, config.hidden).to(source.device)] * 2, []
        self.encoder = [Block(config, source, f"model.encoder.layers.{i}", False) for i in range(config.encoder_layers)]
        self.blocks = [Block(config, source, f"model.decoder.layers.{i}", True) for i in range(config.layers)]
        crosses = [f"model.decoder.layers.{i}.encoder_attn" for i in range(config.layers)]
        self.reads = [source.linear(f"{cross}.k_proj", f"{cross}.v_proj", bias=True) for cross in crosses]
        self.head = self.embedding if config.tied_embeddings else source.embedding("lm_head")
        self.bias = source.vector("final_logits_bias")

    def encode(self, source: Tensor) -> Tensor:
        """See `Reader.encode`."""
        x = self._first(0, self.source_embedding.rows(source), torch.arange(len(source), device=source.device))
        for layer in self.encoder:
            x = layer.encode(x)
        return x

    def given(self, states: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """See `Reader.given`."""
        return given(self.reads, states, self.config.heads)

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers; see `Decoder.forward`."""
        x = self._first(1, self.embedding.rows(tokens), torch.tensor(step.positions, device=tokens.device))
        for index, layer in enumerate(self.blocks):
            x = layer.decode(step, index, len(self.blocks) + index, x)
        return self.head(x[rows]) + self.bias

    def _first(self, stack: int, embedded: Tensor, positions: Tensor) -> Tensor:
        """What the encoder (0) or the decoder (1) starts from."""
        x = embedded * self.scale + self.places[stack][positions]
        return self.norms[stack](x) if self.norms else x
