"""Tiny encoders with random weights: transformers' and ours."""

import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from kvik.models import families
from kvik.models.files.weights import check
from kvik.models.model import Model

VOCAB = 150
SIZES = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, initializer_range=0.1
)  # fmt: skip
ENCODERS = {
    "bert": lambda **changes: BertModel(
        BertConfig(**{"vocab_size": VOCAB, "max_position_embeddings": 300, **SIZES, **changes})
    ),
    "vit": lambda **changes: ViTModel(ViTConfig(**{"image_size": 24, "patch_size": 4, **SIZES, **changes})),
}


def drawn(name, **changes):
    """transformers' model; biases and norms are drawn too."""
    torch.manual_seed(0)
    theirs = ENCODERS[name](**changes).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return theirs


def ours(theirs, weights="f32", **options):
    config = families.from_hf(theirs.config.to_dict(), None, "tiny")
    return Model(config, check(theirs.state_dict(), config), weights=weights, **options)


def encoder(name, weights="f32", **options):
    return ours(drawn(name), weights, **options)


def source(name, length=280, seed=0, **changes):
    """Token ids, or a picture."""
    generator = torch.Generator().manual_seed(seed)
    if name == "bert":
        return torch.randint(VOCAB, (length,), generator=generator)
    side = changes.get("image_size", 24)
    return torch.randn(changes.get("num_channels", 3), side, side, generator=generator)
