"""A decoder in which one word of the configuration says what mixes tokens: attention or another operator.

x = x + W_o operator(n)                             n = layernorm(x); `models/operators`
x = x + W_down gelu(W_up n)                         n = layernorm(x)

GPT-2's blocks, but q, k and v have no biases and the head is its own, as in Translution's experiments
(arXiv:2510.10060). `kvik train lm` makes such models. What an operator multiplies by itself is held in f32, whatever
format the other weights have: there are no packed products over offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from kvik.cache import sharing
from kvik.cache.spec import LayerShape
from kvik.errors import ConfigError
from kvik.models.config import MOST_LAYERS, MOST_ROWS, MOST_WIDTH, Config, end_ids, first_id
from kvik.models.decoder import narrowed
from kvik.models.fields import Fields
from kvik.models.forms import THETA, Cost, Form
from kvik.models.layer import Layer
from kvik.models.operators import Operator, geometry, make
from kvik.models.parts import Rotation, Source
from kvik.models.rope import Rope
from kvik.models.watch import Chunk
from kvik.ops.grouped import dense
from kvik.ops.pointwise import GELU, LayerNorm

NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class GPTConfig(Config):
    """A decoder with an operator of choice.

    Attributes:
        ffn: channels of its feed-forward part.
        norm_eps: the epsilon of its norms.
        operator: `Form`'s word; `max_positions` is a hard limit where it has a matrix or a vector for each.
        owners: for each layer, the layer whose rows it reads (attention alone); empty = its own, all of them.
    """

    family: ClassVar[str] = "kvik_gpt"

    ffn: int
    norm_eps: float = NORM_EPS
    operator: str = "attention:learned"
    owners: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads != self.kv_heads or (self.form.positions == "rotary" and self.head_dim % 2):
            raise ConfigError(f"{self.name}: operators have a key head for each query head, of an even width to turn")
        if self.owners and self.form.kind != "attention":
            raise ConfigError(f"{self.name}: layers share keys and values of attention, not rows of {self.operator}")
        if self.owners and len(self.owners) != self.layers:
            raise ConfigError(f"{self.name}: {len(self.owners)} owners do not fit {self.layers} layers")

    @property
    def form(self) -> Form:
        """What mixes tokens."""
        return Form.parse(self.operator)

    @property
    def cost(self) -> Cost:
        """Of a layer's operator."""
        sets = self.form.sets(self.max_positions)
        return Cost(self.hidden, self.heads * self.head_dim, self.heads, sets, self.form)

    @property
    def rope(self) -> Rope:
        """How positions turn queries and keys, where they do."""
        return Rope(head_dim=self.head_dim, theta=THETA)

    def keeps(self, layer: int) -> bool:
        """Whether a layer has rows of its own."""
        return not self.owners or self.owners[layer] == layer

    def mixer(self, layer: int) -> Operator:
        """One layer's operator, with newly drawn weights."""
        where = geometry(self.form, self.max_positions)
        return make(self.form, self.hidden, self.heads, self.head_dim, where, reads=not self.keeps(layer))

    def layer_shapes(self) -> list[LayerShape]:
        """What is kept of a token: an operator may have several layers in a cache, or read those of another."""
        shapes = self.form.layer_shapes(self.hidden, self.heads, self.head_dim, self.max_positions)
        every = shapes * self.layers
        return list(sharing.shared(every, self.owners)) if self.owners else every

    def sharing(self, rule: str) -> Self:
        """See `Config.sharing`."""
        if self.form.kind != "attention":
            return super().sharing(rule)
        owners = sharing.readers(replace(self, owners=()).layer_shapes(), rule)
        return replace(self, owners=owners, name=f"{self.name} (share {rule})")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Config.tensor_shapes`: those of `train.network.GPT`."""
        hidden, ffn = self.hidden, self.ffn
        shapes: dict[str, tuple[int, ...]] = {"wte.weight": (self.vocab_size, hidden)}
        if self.form.positions == "learned":
            shapes["wpe.weight"] = (self.max_positions, hidden)
        with torch.device("meta"):
            mixers = {keeps: self.mixer(next(i for i in range(self.layers) if self.keeps(i) == keeps)).state_dict()
                      for keeps in {self.keeps(i) for i in range(self.layers)}}  # fmt: skip
        for i in range(self.layers):
            shapes |= {f"h.{i}.mixer.{name}": tuple(x.shape) for name, x in mixers[self.keeps(i)].items()}
            shapes |= {f"h.{i}.{norm}.{part}": (hidden,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
            shapes |= {f"h.{i}.up.weight": (ffn, hidden), f"h.{i}.up.bias": (ffn,)}
            shapes |= {f"h.{i}.down.weight": (hidden, ffn), f"h.{i}.down.bias": (hidden,)}
        shapes |= {"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)}
        return shapes if self.tied_embeddings else shapes | {"lm_head.weight": (self.vocab_size, hidden)}

    def to_hf(self) -> dict[str, object]:
        """config.json, which `read` reads."""
        return {
            "model_type": self.family, "vocab_size": self.vocab_size, "hidden_size": self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "intermediate_size": self.ffn,
            "max_position_embeddings": self.max_positions, "layer_norm_eps": self.norm_eps, "operator": self.operator,
            "owners": list(self.owners), "tie_word_embeddings": self.tied_embeddings,
            "eos_token_id": list(self.eos_ids), "bos_token_id": self.bos_id,
        }  # fmt: skip


def read(fields: Fields, generation: Fields, name: str) -> GPTConfig:
    """From config.json and generation_config.json. Raises ConfigError."""
    hidden, heads = fields.integer("hidden_size", most=MOST_WIDTH), fields.integer("num_attention_heads", most=2**16)
    if hidden % heads:
        fields.fail("num_attention_heads", f"hidden_size {hidden} is not a multiple of it")
    layers, owners = fields.integer("num_hidden_layers", most=MOST_LAYERS), fields.ids("owners")
    if any(owner > layer or owners[owner] != owner for layer, owner in enumerate(owners)):
        fields.fail("owners", "a layer reads its own rows, or those of an earlier layer that keeps some")
    return GPTConfig(
        name=name,
        vocab_size=fields.integer("vocab_size", most=MOST_ROWS),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=fields.integer("intermediate_size", 4 * hidden, most=MOST_ROWS),
        max_positions=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("layer_norm_eps", NORM_EPS),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        eos_ids=end_ids(fields, generation),
        bos_id=first_id(fields, "bos_token_id"),
        operator=fields.text("operator"),
        owners=owners,
    )


class Block:
    """One layer with an operator that isn't attention.

    Attributes:
        first: the number of its first layer in the cache.
        mixer: the operator; its products are torch's own, so that a row's last bits depend on how a text was cut.
    """

    def __init__(self, config: GPTConfig, source: Source, layer: int, first: int) -> None:
        name, self.first = f"h.{layer}", first
        with torch.device("meta"):
            self.mixer = config.mixer(layer).requires_grad_(False)
        held = {part: dense(source.tensors[f"{name}.mixer.{part}"]).float() for part in self.mixer.state_dict()}
        self.mixer.load_state_dict({part: x.to(source.device) for part, x in held.items()}, assign=True)
        del self.mixer.o  # held in the format of the others
        self.norm, self.mlp_norm = (_norm(config, source, f"{name}.{each}") for each in ("ln_1", "ln_2"))
        self.o = source.linear(f"{name}.mixer.o", bias=True)
        self.up, self.down = (source.linear(f"{name}.{each}", bias=True) for each in ("up", "down"))
        self.activation = GELU()

    def __call__(self, step: Chunk, index: int, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """Takes a step's T tokens through the layer; see `Layer`."""
        x = self.o(self.mixer.step(step, self.first, self.norm(x)), onto=x)
        return self.down(self.up(x, after=self.mlp_norm), after=self.activation, onto=x)


def _norm(config: GPTConfig, source: Source, name: str) -> LayerNorm:
    return LayerNorm(source.vector(f"{name}.weight"), source.vector(f"{name}.bias"), config.norm_eps)


def _attention(config: GPTConfig, source: Source, layer: int) -> Layer:
    """A layer of ordinary attention: kvik's own, with its fast ways."""
    name, keeps = f"h.{layer}", config.keeps(layer)
    heads = (config.heads,) * (1 + keeps) if config.form.positions == "rotary" else ()
    return Layer(
        attention_norm=_norm(config, source, f"{name}.ln_1"),
        qkv=source.linear(*(f"{name}.mixer.{part}" for part in ("qkv" if keeps else "q")), turned=heads),
        o=source.linear(f"{name}.mixer.o", bias=True),
        mlp_norm=_norm(config, source, f"{name}.ln_2"),
        up=source.linear(f"{name}.up", bias=True),
        activation=GELU(),
        down=source.linear(f"{name}.down", bias=True),
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.head_dim,
        reads=not keeps,
    )


class GPT:
    """A decoder with an operator of choice.

    Attributes:
        config: its sizes.
        layers: what is kept of a token.
    """

    def __init__(self, config: GPTConfig, source: Source) -> None:
        self.config, self.layers = config, config.layer_shapes()
        self.late = sharing.first_late(self.layers)
        self.embedding = source.embedding("wte")
        self.positions = source.vector("wpe.weight") if config.form.positions == "learned" else None
        self.blocks = list(self._blocks(config, source))
        self.norm = _norm(config, source, "ln_f")
        self.head = self.embedding if config.tied_embeddings else source.embedding("lm_head")
        self.rotation = Rotation(config.rope, source.device) if config.form.positions == "rotary" else None

    def _blocks(self, config: GPTConfig, source: Source) -> Iterator[Block | Layer]:
        each = len(self.layers) // config.layers
        for layer in range(config.layers):
            if config.form.kind == "attention":
                yield _attention(config, source, layer)
            else:
                yield Block(config, source, layer, layer * each)

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers; see `Llama.forward`."""
        x = self.embedding.rows(tokens)
        if self.positions is not None:
            x = x + self.positions[torch.tensor(step.positions, device=tokens.device)]
        angles = None if self.rotation is None else self.rotation.angles(step.positions)
        for index, layer in enumerate(self.blocks):
            if index == self.late and self.config.owners:
                step, going, rows = narrowed(step, rows, len(x))
                x, angles = x[going], None if angles is None else angles[going]
            x = layer(step, index, x, angles)
        return self.head(x[rows], after=self.norm)
