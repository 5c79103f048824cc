"""Tiny random models to trace, and a tokenizer for them."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from kvik.models import families
from kvik.models.model import Model
from kvik.trace import collect

VOCAB = 300


class Bytes:
    """A tokenizer whose tokens are bytes; ids above 255 have no text."""

    def encode(self, text, add_special_tokens=False):
        return list(text.encode())

    def decode(self, ids, skip_special=True):
        return bytes(i for i in ids if i < 256).decode("latin-1")


def tiny(family="llama", layers=2, heads=4, lanes=2):
    """A random model with a byte tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": layers, "max_position_embeddings": 600}
    sizes |= {
        "vocab_size": VOCAB,
        "bos_token_id": None,
        "eos_token_id": None,
        "num_attention_heads": heads,
        "num_key_value_heads": lanes,
    }
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB,
            n_embd=48,
            n_layer=layers,
            n_head=heads,
            n_positions=600,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = GPT2LMHeadModel(config)
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=5))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    config = families.from_hf(model.config.to_dict(), None, "tiny")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    made = Model(config, {name: tensors[name] for name in config.tensor_shapes()}, weights="f32")
    made.tokenizer = Bytes()
    return made


MODELS = {family: tiny(family) for family in ("llama", "gpt2", "mistral")}
TINY = MODELS["llama"]
ALL = (0, 1)
SPECS = ("f32", "bf16", "int8-rot", "k8v4", "int4+window:4,sinks:1; page 16", "bf16; layers 1 heads 0: int8+window:5")
SPECS += ("int8; layers 1: int8+window:4,sinks:2,relative",)
over_families = pytest.mark.parametrize("family", MODELS)
over_specs = pytest.mark.parametrize("kv", SPECS)


def traced(tokens, family="llama", **options):
    return collect(MODELS[family], tokens, **{"layers": ALL} | options)


def rows_of(trace, layer):
    """K and V of a layer, put together from the steps' new rows: [lanes, tokens, width]."""
    looks = [frame.looks[layer] for frame in trace.frames]
    return tuple(torch.cat([getattr(look, name) for look in looks], dim=1) for name in "kv")
