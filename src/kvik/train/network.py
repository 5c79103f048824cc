"""The networks that `kvik train` trains: plain torch, with the names that kvik's families read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvik.models.families.gpt import GPTConfig
from kvik.models.families.masked import MaskedConfig
from kvik.models.families.vit import ViTConfig
from kvik.models.operators import Operator, SelfAttention
from kvik.ops.pointwise import gelu_tanh

SPREAD = 0.02  # of newly drawn embeddings, as in GPT-2


class GPT(nn.Module):
    """The decoder of `models/families/gpt.py`, or the encoder of `masked.py` beside it: the same blocks over texts that
    are seen from both sides.

    Attributes:
        config: its sizes.
        owners: see `GPTConfig`.
    """

    def __init__(self, config: GPTConfig | MaskedConfig) -> None:
        super().__init__()
        self.config, self.owners = config, config.owners if isinstance(config, GPTConfig) else ()
        self.wte = _embedding(config.vocab_size, config.hidden)
        if config.form.positions == "learned":
            self.wpe = _embedding(config.max_positions, config.hidden)
        self.h = nn.ModuleList(
            Block(config.mixer(layer), config.hidden, config.ffn, config.norm_eps) for layer in range(config.layers)
        )
        self.ln_f = nn.LayerNorm(config.hidden, config.norm_eps)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, n] → logits [B, n, vocabulary]."""
        x = self.wte(tokens)
        if self.config.form.positions == "learned":
            x = x + self.wpe.weight[: tokens.shape[1]]
        x = self.through(x)
        head = self.wte if self.config.tied_embeddings else self.lm_head
        return nn.functional.linear(self.ln_f(x), head.weight)

    def through(self, x: Tensor) -> Tensor:
        """All layers: [B, n, d] → [B, n, d]."""
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, block in enumerate(self.h):
            x = block(x, kept, layer, self.owners[layer]) if self.owners else block(x)
        return x


class Block(nn.Module):
    """One layer: an operator, and a feed-forward part."""

    def __init__(self, mixer: Operator, hidden: int, ffn: int, eps: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden, eps), nn.LayerNorm(hidden, eps)
        self.mixer, self.up, self.down = mixer, nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(
        self, x: Tensor, kept: dict[int, tuple[Tensor, Tensor]] | None = None, layer: int = 0, owner: int = 0
    ) -> Tensor:
        """[B, n, d] → [B, n, d].

        Args:
            kept: keys and values of earlier layers, where some read those of others; its own are added.
            layer, owner: which this is, and whose it reads.
        """
        n = self.ln_1(x)
        if kept is None:
            x = x + self.mixer(n)
        else:
            assert isinstance(self.mixer, SelfAttention), "only attention shares rows"
            if owner == layer:
                kept[layer] = self.mixer.rows(n)
            x = x + self.mixer.o(self.mixer.mix_with(n, *kept[owner]))
        return self._fed(x)

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the layer, where its operator's `step` has given `mixed`: [T, d] → [T, d]."""
        return self._fed(x + self.mixer.o(mixed))

    def _fed(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(gelu_tanh(self.up(self.ln_2(x))))
        return out


class ViT(nn.Module):
    """`models/families/vit.py`'s encoder with an operator of choice, and a head over the class token's last state."""

    def __init__(self, config: ViTConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.ParameterDict({"cls_token": torch.randn(1, 1, config.hidden) * SPREAD})
        if config.places:
            self.embeddings["position_embeddings"] = torch.randn(1, config.max_positions, config.hidden) * SPREAD
        self.patches = nn.Conv2d(config.channels, config.hidden, config.patch, config.patch)
        self.blocks = nn.ModuleList(
            Block(config.mixer(), config.hidden, config.ffn, config.norm_eps) for _ in range(config.layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden, config.norm_eps)
        self.classifier = nn.Linear(config.hidden, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """f32 [B, channels, height, width] → logits [B, classes]."""
        rows = self.patches(pictures).flatten(2).transpose(1, 2)
        x = torch.cat((self.embeddings["cls_token"].expand(len(rows), -1, -1), rows), dim=1)
        if "position_embeddings" in self.embeddings:
            x = x + self.embeddings["position_embeddings"]
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.classifier(self.layernorm(x[:, 0]))
        return found

    def named(self) -> dict[str, Tensor]:
        """Its tensors by the names that kvik's family reads, and the head's."""
        places = {"patches.": "embeddings.patch_embeddings.projection."}
        places |= {f"blocks.{i}.": f"encoder.layer.{i}." for i in range(len(self.blocks))}
        parts = {"ln_1.": "layernorm_before.", "ln_2.": "layernorm_after.", "up.": "intermediate.dense.",
                 "down.": "output.dense."}  # fmt: skip
        found = {}
        for name, tensor in self.state_dict().items():
            start = next((each for each in places if name.startswith(each)), "")
            rest = name.removeprefix(start)
            if start.startswith("blocks."):
                part = next((each for each in parts if rest.startswith(each)), "")
                rest = parts.get(part, "") + rest.removeprefix(part)
            found[places.get(start, "") + rest] = tensor.detach()
        return found


def parameters(network: nn.Module) -> int:
    """How many there are."""
    return sum(each.numel() for each in network.parameters())


def _embedding(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=SPREAD)
    return table
