"""Tiny random models, and the command in this process, that the tests of `kvik bench` share."""

import sys

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import kvik.cli
from kvik.cli.common import NO_KERNELS
from kvik.models import families
from kvik.models.model import Model

SIZES = {"vocab_size": 258, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 700}


def tiny(window=None, weights="f32"):
    """A random model, with a window of its own or without."""
    torch.manual_seed(0)
    if window is None:
        theirs = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        theirs = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window))
    return Model(families.from_hf(theirs.config.to_dict(), None, "tiny"), theirs.state_dict(), weights=weights)


def state():
    """The weights of `tiny`, by name."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).state_dict()


def ids(count):
    """Random tokens."""
    return torch.randint(258, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def in_process(monkeypatch, *arguments):
    """`kvik bench` with these arguments; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["kvik", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        kvik.cli.main()
    return stopped.value.code


def told(errors):
    """Lines on stderr, but for the one that is there wherever the kernels were not built."""
    return [line for line in errors.splitlines() if line != NO_KERNELS]


def check_refused(capsys, code, *wanted):
    """One line on stderr, nothing on stdout, exit code 2."""
    out, errors = capsys.readouterr()
    assert (code, out) == (2, "")
    lines = told(errors)
    assert len(lines) == 1 and lines[0].startswith("kvik: "), errors
    for text in wanted:
        assert text in lines[0]


def write_model(path):
    """A tiny model with a tokenizer of bytes, as a folder."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(path)
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.save(str(path / "tokenizer.json"))
    return path
