"""Whisper (arXiv:2212.04356): sound to text. An encoder-decoder (arXiv:1706.03762) with a norm before each part.

    frames of a log-mel spectrogram, 100 a second
    x = gelu(conv₂(gelu(conv₁(frames)))) + position              conv₂ takes every second one: 50 rows a second
    x = x + W_o attention(W_q n(x), W_k n(x), W_v n(x))          in the encoder over every row
    x = x + W_o attention(W_q n(x), keys, values)                over the encoder's rows: the decoder alone
    x = x + W_down gelu(W_up n(x))

Keys have no bias. Both stacks end in a norm; the head is the decoder's embedding. Positions are tables in the file,
the encoder's of sines and cosines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from kvik.cache.spec import LayerShape
from kvik.errors import ConfigError
from kvik.models.attention import attend_all
from kvik.models.config import MOST_LAYERS, MOST_ROWS, MOST_WIDTH
from kvik.models.fields import Fields
from kvik.models.hearing import HearingConfig, hearing, without_prompt
from kvik.models.parts import Source
from kvik.models.reading import common, given, layer_shapes
from kvik.models.watch import Chunk
from kvik.ops.pointwise import ACTIVATIONS, LayerNorm, activation

_EPS = 1e-5
_KERNEL = 3  # frames that a row of either convolution sees


@dataclass(frozen=True, kw_only=True)
class WhisperConfig(HearingConfig):
    """A Whisper.

    Attributes:
        ffn, encoder_ffn: channels of the stacks' feed-forward parts.
        activation: theirs, one of `ACTIVATIONS`.
    """

    family: ClassVar[str] = "whisper"

    ffn: int
    encoder_ffn: int
    activation: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % self.heads or self.hidden % self.encoder_heads:
            raise ConfigError(
                f"{self.name}: d_model {self.hidden} can't be cut into {self.heads} and {self.encoder_heads} heads"
            )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Config.tensor_shapes`; projections are [out, in], convolutions [out, in, frames]."""
        hidden, shapes = self.hidden, dict[str, tuple[int, ...]]()

        def add(name: str, *shape: int) -> None:
            shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})

        add("model.encoder.conv1", hidden, self.mels, _KERNEL)
        add("model.encoder.conv2", hidden, hidden, _KERNEL)
        for stack, layers, ffn in (
            ("encoder", self.encoder_layers, self.encoder_ffn),
            ("decoder", self.layers, self.ffn),
        ):
            attentions = ("self_attn", "encoder_attn")[: 1 + (stack == "decoder")]
            for name in (f"model.{stack}.layers.{i}" for i in range(layers)):
                add(f"{name}.fc1", ffn, hidden)
                add(f"{name}.fc2", hidden, ffn)
                add(f"{name}.final_layer_norm", hidden)
                for attention in attentions:
                    add(f"{name}.{attention}_layer_norm", hidden)
                    for part in ("q", "k", "v", "out"):
                        add(f"{name}.{attention}.{part}_proj", hidden, hidden)
            add(f"model.{stack}.layer_norm", hidden)
        shapes["model.encoder.embed_positions.weight"] = (self.frames // 2, hidden)
        shapes["model.decoder.embed_positions.weight"] = (self.max_positions, hidden)
        return shapes | {"model.decoder.embed_tokens.weight": (self.vocab_size, hidden)}

    def other_names(self) -> dict[str, tuple[str, ...]]:
        """Some files leave "model." out; some hold the embedding a second time, as the head."""
        names = {name: (name.removeprefix("model."),) for name in self.tensor_shapes()}
        table = "model.decoder.embed_tokens.weight"
        return names | {table: (*names[table], "proj_out.weight")}

    def optional_tensors(self) -> tuple[str, ...]:
        """Keys have no bias."""
        return tuple(name for name in self.tensor_shapes() if name.endswith("k_proj.bias"))


def read(fields: Fields, generation: Fields, name: str) -> WhisperConfig:
    """From config.json and generation_config.json of transformers' Whisper. Raises ConfigError."""
    fields, generation = without_prompt(fields), without_prompt(generation)
    fields.refuse_unless("scale_embedding", (False,))
    fields.refuse_unless("tie_word_embeddings", (True,))
    heard: dict[str, Any] = hearing(fields, generation)
    hidden, heads = fields.integer("d_model", most=MOST_WIDTH), fields.integer("decoder_attention_heads", most=2**16)
    return WhisperConfig(
        **common(fields, generation),
        **heard,
        name=name,
        vocab_size=fields.integer("vocab_size", most=MOST_ROWS),
        layers=fields.integer("decoder_layers", most=MOST_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=fields.integer("max_target_positions", 448),
        tied_embeddings=True,
        encoder_layers=fields.integer("encoder_layers", most=MOST_LAYERS),
        encoder_heads=fields.integer("encoder_attention_heads", most=2**16),
        source_vocab=0,
        source_positions=2 * fields.integer("max_source_positions", 1500, most=2**30),
        own_tokenizer=True,
        ffn=fields.integer("decoder_ffn_dim", most=MOST_ROWS),
        encoder_ffn=fields.integer("encoder_ffn_dim", most=MOST_ROWS),
        activation=fields.text("activation_function", "gelu", among=ACTIVATIONS),
    )


class Block:
    """One layer of either stack, from its weights."""

    def __init__(self, config: WhisperConfig, source: Source, name: str, decodes: bool) -> None:
        self.heads = config.heads if decodes else config.encoder_heads
        self.scale = (config.hidden // self.heads) ** -0.5
        self.norm = layer_norm(source, f"{name}.self_attn_layer_norm")
        self.qkv = source.linear(*(f"{name}.self_attn.{p}_proj" for p in "qkv"), bias=True)
        self.o = source.linear(f"{name}.self_attn.out_proj", bias=True)
        other = f"{name}.encoder_attn"
        self.cross_norm = layer_norm(source, f"{other}_layer_norm") if decodes else None
        self.cross, self.cross_o = (
            source.linear(f"{other}.{p}_proj", bias=True) if decodes else None for p in ("q", "out")
        )
        self.mlp_norm = layer_norm(source, f"{name}.final_layer_norm")
        self.up, self.down = (source.linear(f"{name}.{p}", bias=True) for p in ("fc1", "fc2"))
        self.activation = activation(config.activation)

    def encode(self, x: Tensor) -> Tensor:
        """The encoder's: every row beside all others, f32 [S, width of the model]."""
        q, k, v = self.qkv(x, after=self.norm).view(len(x), 3, self.heads, -1).unbind(1)
        x = self.o(attend_all(q, k, v, scale=self.scale), onto=x)
        return self.feed(x)

    def decode(self, step: Chunk, index: int, cross: int, x: Tensor) -> Tensor:
        """The decoder's: a step's tokens through layer `index`, whose rows of the source are those of layer `cross`."""
        assert self.cross is not None and self.cross_o is not None and self.cross_norm is not None, "of the decoder"
        q, k, v = self.qkv(x, after=self.norm).view(len(x), 3, self.heads, -1).unbind(1)
        step.append(index, k=k, v=v)
        x = self.o(step.attend(index, q, scale=self.scale).out.flatten(1), onto=x)
        q = self.cross(x, after=self.cross_norm).view(len(x), self.heads, -1)
        return self.feed(self.cross_o(step.attend(cross, q, scale=self.scale).out.flatten(1), onto=x))

    def feed(self, x: Tensor) -> Tensor:
        """The feed-forward part."""
        return self.down(self.up(x, after=self.mlp_norm), after=self.activation, onto=x)


def layer_norm(source: Source, name: str) -> LayerNorm:
    """A norm's weights."""
    return LayerNorm(source.vector(f"{name}.weight"), source.vector(f"{name}.bias"), _EPS)


class Whisper:
    """A Whisper.

    Attributes:
        config: its sizes.
        layers: what each layer keeps: of a token, then of a row of the source.
        norm: before the head.
    """

    def __init__(self, config: WhisperConfig, source: Source) -> None:
        self.config, width = config, config.head_dim
        self.layers = layer_shapes(LayerShape(config.heads, (("k", width), ("v", width))), config.layers)
        convolutions = ("model.encoder.conv1", "model.encoder.conv2")
        self.convolutions = [(source.vector(f"{c}.weight"), source.vector(f"{c}.bias")) for c in convolutions]
        self.activation = activation("gelu")
        self.places, self.text_places = (
            source.vector(f"model.{s}.embed_positions.weight") for s in ("encoder", "decoder")
        )
        self.encoder = [Block(config, source, f"model.encoder.layers.{i}", False) for i in range(config.encoder_layers)]
        self.encoder_norm = layer_norm(source, "model.encoder.layer_norm")
        self.blocks = [Block(config, source, f"model.decoder.layers.{i}", True) for i in range(config.layers)]
        crosses = [f"model.decoder.layers.{i}.encoder_attn" for i in range(config.layers)]
        self.reads = [source.linear(f"{cross}.k_proj", f"{cross}.v_proj", bias=True) for cross in crosses]
        self.norm = layer_norm(source, "model.decoder.layer_norm")
        self.head = source.embedding("model.decoder.embed_tokens")

    def encode(self, source: Tensor) -> Tensor:
        """See `Reader.encode`."""
        x = source
        for stride, (weight, bias) in enumerate(self.convolutions, start=1):
            x = conv1d(x.t()[None], weight, bias, stride=stride, padding=_KERNEL // 2)[0].t().contiguous()
            x = self.activation(x)
        x = x + self.places[: len(x)]
        for layer in self.encoder:
            x = layer.encode(x)
        return self.encoder_norm(x)

    def given(self, states: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """See `Reader.given`."""
        return given(self.reads, states, self.config.heads)

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers; see `Decoder.forward`."""
        x = self.head.rows(tokens) + self.text_places[torch.tensor(step.positions, device=tokens.device)]
        for index, layer in enumerate(self.blocks):
            x = layer.decode(step, index, len(self.blocks) + index, x)
        return self.head(x[rows], after=self.norm)
