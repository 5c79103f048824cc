"""What networks with an operator of choice share, be they causal (`families/gpt.py`) or not (`families/masked.py`):
their sizes, and a layer from its weights.

x = x + W_o operator(n)                             n = layernorm(x)
x = x + W_down gelu(W_up n)                         n = layernorm(x)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvik.errors import ConfigError
from kvik.models.config import MOST_LAYERS, MOST_ROWS, MOST_WIDTH, Config, end_ids, first_id
from kvik.models.fields import Fields
from kvik.models.forms import Cost, Form
from kvik.models.operators import geometry, make
from kvik.models.operators.operator import Operator
from kvik.models.parts import Source
from kvik.models.watch import Chunk
from kvik.ops.grouped import dense
from kvik.ops.pointwise import GELU, LayerNorm

NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class OperatorConfig(Config):
    """Sizes of such a network.

    Attributes:
        causal: whether a token sees those before it alone.
        ffn: channels of its feed-forward part.
        norm_eps: the epsilon of its norms.
        operator: `Form`'s word; `max_positions` is a hard limit where it has a matrix or a vector for each.
    """

    causal: ClassVar[bool]

    ffn: int
    norm_eps: float = NORM_EPS
    operator: str = "attention:learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads != self.kv_heads or (self.form.positions == "rotary" and self.head_dim % 2):
            raise ConfigError(f"{self.name}: operators have a key head for each query head, of an even width to turn")

    @property
    def form(self) -> Form:
        """What mixes tokens."""
        return Form.parse(self.operator)

    @property
    def cost(self) -> Cost:
        """Of a layer's operator."""
        sets = self.form.sets(self.max_positions, self.causal)
        return Cost(self.hidden, self.heads * self.head_dim, self.heads, sets, self.form)

    def keeps(self, layer: int) -> bool:
        """Whether a layer has keys and values of its own."""
        return True

    def mixer(self, layer: int) -> Operator:
        """One layer's operator, with newly drawn weights."""
        where = geometry(self.form, self.max_positions, self.causal)
        return make(self.form, self.hidden, self.heads, self.head_dim, where, reads=not self.keeps(layer))

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
        """config.json, which `common` reads."""
        return {
            "model_type": self.family, "vocab_size": self.vocab_size, "hidden_size": self.hidden,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "intermediate_size": self.ffn,
            "max_position_embeddings": self.max_positions, "layer_norm_eps": self.norm_eps, "operator": self.operator,
            "tie_word_embeddings": self.tied_embeddings, "eos_token_id": list(self.eos_ids),
            "bos_token_id": self.bos_id, "torch_dtype": "float32",
        }  # fmt: skip


def common(fields: Fields, generation: Fields, name: str) -> dict[str, Any]:
    """What every such network's config.json says, as `OperatorConfig`'s fields. Raises ConfigError."""
    hidden, heads = fields.integer("hidden_size", most=MOST_WIDTH), fields.integer("num_attention_heads", most=2**16)
    if hidden % heads:
        fields.fail("num_attention_heads", f"hidden_size {hidden} is not a multiple of it")
    return dict(
        name=name,
        vocab_size=fields.integer("vocab_size", most=MOST_ROWS),
        layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
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
    )


def held(draw: Callable[[], Operator], source: Source, name: str) -> Operator:
    """An operator with a model's weights, in f32, without its last projection: that is held in the format of the
    others.

    Args:
        draw: one with weights of no matter.
        name: of its module.
    """
    with torch.device("meta"):
        mixer = draw().requires_grad_(False)
    found = {part: dense(source.tensors[f"{name}.{part}"]).float() for part in mixer.state_dict()}
    mixer.load_state_dict({part: x.to(source.device) for part, x in found.items()}, assign=True)
    del mixer.o
    return mixer


def layer_norm(config: OperatorConfig, source: Source, name: str) -> LayerNorm:
    """A norm's weights."""
    return LayerNorm(source.vector(f"{name}.weight"), source.vector(f"{name}.bias"), config.norm_eps)


class Block:
    """One layer.

    Attributes:
        first: the number of its first layer in the cache.
        mixer: the operator; its products are torch's own, so that a row's last bits depend on how a text was cut.
    """

    def __init__(self, config: OperatorConfig, source: Source, layer: int, first: int = 0) -> None:
        name, self.first = f"h.{layer}", first
        self.mixer = held(lambda: config.mixer(layer), source, f"{name}.mixer")
        self.norm, self.mlp_norm = (layer_norm(config, source, f"{name}.{each}") for each in ("ln_1", "ln_2"))
        self.o = source.linear(f"{name}.mixer.o", bias=True)
        self.up, self.down = (source.linear(f"{name}.{each}", bias=True) for each in ("up", "down"))
        self.activation = GELU()

    def __call__(self, step: Chunk, index: int, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """Takes a step's T tokens through the layer; see `Layer`."""
        return self._fed(self.o(self.mixer.step(step, self.first, self.norm(x)), onto=x))

    def whole(self, x: Tensor) -> Tensor:
        """A text at once: f32 [n, d] → [n, d]. `x` may be overwritten."""
        return self._fed(self.o(self.mixer.mix(self.norm(x).unsqueeze(0)).squeeze(0), onto=x))

    def _fed(self, x: Tensor) -> Tensor:
        return self.down(self.up(x, after=self.mlp_norm), after=self.activation, onto=x)
