"""ViT (arXiv:2010.11929): a picture's patches as the tokens of an encoder, norms before each part.

x = [class; W patch] + position
x = x + W_o attention(W_q n, W_k n, W_v n)          n = layernorm(x), over every row
x = x + W_down f(W_up n)                            n = layernorm(x)

One word of the configuration puts another operator (`models/operators`) in attention's place, as `kvik train images`
does; what it multiplies by itself is held in f32.

The first product is the paper's convolution: its steps are as wide as its kernel, so that no two patches overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvik.cache.spec import LayerShape
from kvik.errors import ConfigError, UsageError
from kvik.models.attention import attend_all
from kvik.models.encoding import EncoderConfig, common
from kvik.models.fields import Fields
from kvik.models.operators import Form, Operator, grid, make
from kvik.models.operators.blocks import held
from kvik.models.parts import Source
from kvik.ops.grouped import dense
from kvik.ops.linear import Linear
from kvik.ops.pointwise import ACTIVATIONS, LayerNorm, activation

_PREFIX = "vit."  # of files that hold a head as well
_PATCHES = "embeddings.patch_embeddings.projection"
_PARTS = {  # of a layer: name in files → in transformers 5's modules
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_NORMS = ("layernorm_before", "layernorm_after")


@dataclass(frozen=True, kw_only=True)
class ViTConfig(EncoderConfig):
    """A ViT. `max_positions` is its number of rows: the class token's and one a patch.

    Attributes:
        channels, size, patch: of a picture, and the sides of both in pixels.
        qkv_bias: whether the projections to queries, keys and values have one.
        operator: `Form`'s word; "" = attention with learned positions, as transformers has it.
    """

    family: ClassVar[str] = "vit"

    channels: int
    size: int
    patch: int
    qkv_bias: bool
    operator: str = ""

    def mixer(self) -> Operator:
        """A layer's operator, with newly drawn weights."""
        form, side = Form.parse(self.operator), self.size // self.patch
        if form.positions == "rotary":
            raise ConfigError(
                f"{self.name}: patches have two positions, which rotary attention does not know; use attention:learned"
            )
        return make(form, self.hidden, self.heads, self.head_dim, grid(form, side, side))

    @property
    def places(self) -> bool:
        """Whether each row has a learned vector."""
        return not self.operator or Form.parse(self.operator).positions == "learned"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Config.tensor_shapes`; names have no "vit." prefix."""
        hidden, ffn = self.hidden, self.ffn
        shapes: dict[str, tuple[int, ...]] = {
            "embeddings.cls_token": (1, 1, hidden),
            f"{_PATCHES}.weight": (hidden, self.channels, self.patch, self.patch),
            f"{_PATCHES}.bias": (hidden,),
        }
        if self.places:
            shapes["embeddings.position_embeddings"] = (1, self.max_positions, hidden)
        sizes = {} if self.operator else dict.fromkeys(_PARTS, (hidden, hidden))
        sizes |= {"intermediate.dense": (ffn, hidden), "output.dense": (hidden, ffn)}
        with torch.device("meta"):
            mixer = self.mixer().state_dict() if self.operator else {}
        norms = ["layernorm"]
        for i in range(self.layers):
            for part, shape in sizes.items():
                shapes[f"encoder.layer.{i}.{part}.weight"] = shape
                if self.qkv_bias or not part.startswith("attention.attention"):
                    shapes[f"encoder.layer.{i}.{part}.bias"] = shape[:1]
            shapes |= {f"encoder.layer.{i}.mixer.{part}": tuple(tensor.shape) for part, tensor in mixer.items()}
            norms += [f"encoder.layer.{i}.{norm}" for norm in _NORMS]
        return shapes | {f"{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}

    def to_hf(self) -> dict[str, object]:
        """config.json, which `read` reads."""
        return {
            "model_type": self.family, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "intermediate_size": self.ffn, "hidden_act": self.activation,
            "layer_norm_eps": self.norm_eps, "image_size": self.size, "patch_size": self.patch,
            "num_channels": self.channels, "qkv_bias": self.qkv_bias, "operator": self.operator,
        }  # fmt: skip

    def other_names(self) -> dict[str, tuple[str, ...]]:
        """Files with a head have a prefix; transformers 5's modules have names of their own."""
        found: dict[str, tuple[str, ...]] = {}
        for name in self.tensor_shapes():
            own = name.replace("encoder.layer.", "layers.")
            for part, module in _PARTS.items():
                own = own.replace(f".{part}.", f".{module}.")
            found[name] = tuple(each for each in {_PREFIX + name: 0, own: 0, _PREFIX + own: 0} if each != name)
        return found

    def spare(self, name: str) -> bool:
        """The pooler and the head."""
        return name.rpartition(".")[0] in ("pooler.dense", f"{_PREFIX}pooler.dense", "classifier")

    def check_source(self, source: Tensor) -> None:
        """See `EncoderConfig.check_source`."""
        wanted = (self.channels, self.size, self.size)
        if source.dtype != torch.float32 or tuple(source.shape) != wanted:
            raise UsageError(
                f"{self.name} reads a picture, f32 {list(wanted)} (channels, height, width), normalised as its makers "
                f"say; got {str(source.dtype).removeprefix('torch.')} {list(source.shape)}"
            )


def read(fields: Fields, generation: Fields, name: str) -> ViTConfig:
    """From config.json of transformers' ViT. Raises ConfigError."""
    size, patch = fields.integer("image_size", 224, most=2**16), fields.integer("patch_size", 16, most=2**12)
    if size % patch:
        fields.fail("patch_size", f"image_size {size} is not a multiple of it")
    return ViTConfig(
        **common(fields, name, tuple(ACTIVATIONS)),
        vocab_size=0,
        max_positions=(size // patch) ** 2 + 1,
        channels=fields.integer("num_channels", 3, most=2**10),
        size=size,
        patch=patch,
        qkv_bias=fields.flag("qkv_bias", True),
        operator=fields.text("operator", ""),
    )


class Block:
    """One layer, from its weights."""

    def __init__(self, config: ViTConfig, source: Source, name: str) -> None:
        q, k, v, o, up, down = (f"{name}.{part}" for part in _PARTS)
        self.heads, self.scale, self.mixer = config.heads, config.head_dim**-0.5, None
        if config.operator:
            self.mixer, o = held(config.mixer, source, f"{name}.mixer"), f"{name}.mixer.o"
        else:
            self.qkv = source.linear(q, k, v, bias=config.qkv_bias)
        self.o, self.up, self.down = (source.linear(part, bias=True) for part in (o, up, down))
        self.norm, self.mlp_norm = (layer_norm(config, source, f"{name}.{norm}") for norm in _NORMS)
        self.activation = activation(config.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """f32 [S, width]: every row beside all others. `x` may be overwritten."""
        if self.mixer is not None:
            x = self.o(self.mixer.mix(self.norm(x).unsqueeze(0)).squeeze(0), onto=x)
        else:
            q, k, v = self.qkv(x, after=self.norm).view(len(x), 3, self.heads, -1).unbind(1)
            x = self.o(attend_all(q, k, v, scale=self.scale), onto=x)
        return self.down(self.up(x, after=self.mlp_norm), after=self.activation, onto=x)


def layer_norm(config: ViTConfig, source: Source, name: str) -> LayerNorm:
    """A norm's weights."""
    return LayerNorm(source.vector(f"{name}.weight"), source.vector(f"{name}.bias"), config.norm_eps)


class ViT:
    """A ViT; see `Encoder`. `encode` ends in a norm that no layer's state has."""

    def __init__(self, config: ViTConfig, source: Source) -> None:
        self.layers: list[LayerShape] = []
        self.patch, kernel = config.patch, dense(source.tensors[f"{_PATCHES}.weight"]).flatten(1)
        self.patches = Linear(kernel, source.vector(f"{_PATCHES}.bias"), source.format, source.device)
        self.first = source.vector("embeddings.cls_token")[0]
        self.positions = source.vector("embeddings.position_embeddings")[0] if config.places else torch.zeros(1)
        self.blocks = [Block(config, source, f"encoder.layer.{i}") for i in range(config.layers)]
        self.norm = layer_norm(config, source, "layernorm")

    def states(self, source: Tensor) -> Iterator[Tensor]:
        """See `Encoder.states`."""
        cut = source.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)  # [C, down, right, p, p]
        x = torch.cat((self.first, self.patches(cut.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)))) + self.positions
        yield x
        for block in self.blocks:
            x = block(x.clone())
            yield x

    def encode(self, source: Tensor) -> Tensor:
        """See `Encoder.encode`."""
        *_, last = self.states(source)
        return self.norm(last)
