"""Sinks right before the window, through whole models: by distance, the cut, refusals, and texts far longer than the
model's positions."""

import dataclasses
import itertools
import json
import sys

import pytest
import torch
from torch.nn.functional import rms_norm, silu
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import kvik.cli
from bench_models import check_refused, write_model
from helpers import BACKENDS, pages_held, text
from kvik.cache.retention import Retention
from kvik.cache.spec import Spec
from kvik.engine.generation import Generation, Request
from kvik.errors import ContextError, SpecError
from kvik.models import families
from kvik.models.model import Model
from kvik.ops.layout import MOST_POSITIONS
from kvik.plan import run_plan
from test_laws import Logits, check_cut
from test_relative import LAYERS, apart, dense

# The same through a whole model: its frequencies, its pairing of channels.

SIZES = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 160, "tie_word_embeddings": False}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 40}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 40}


def tiny(family="llama", weights="f32", **options):
    """(transformers' random model, ours)."""
    torch.manual_seed(0)
    if family == "gpt2":
        theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=48, n_layer=2, n_head=4, n_positions=160))
    elif family == "mistral":
        theirs = MistralForCausalLM(MistralConfig(**SIZES | options))
    else:
        theirs = LlamaForCausalLM(LlamaConfig(**SIZES | options))
    for weight in theirs.parameters():
        weight.data *= 3 if weight.dim() > 1 else 1  # attention is far from even
    config = families.from_hf(theirs.config.to_dict(), None, "tiny")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    return theirs, Model(config, {name: tensors[name] for name in config.tensor_shapes()}, weights=weights)


def by_distance(theirs, config, tokens, kept):
    """Logits [T, vocabulary] in f64 of a Llama whose attention is `dense`, from its weights."""
    weights = {name: tensor.double() for name, tensor in theirs.state_dict().items()}
    frequencies, factor = config.rope.frequencies()
    distance, eps = apart(kept, len(tokens)), config.norm_eps
    x = weights["model.embed_tokens.weight"][torch.tensor(tokens)]

    def paired(rows):  # channel i turns with i + D/2
        return rows.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) * factor

    for layer in range(config.layers):
        w = {n.split(f"layers.{layer}.")[1]: t for n, t in weights.items() if f"layers.{layer}." in n}
        n = rms_norm(x, x.shape[-1:], w["input_layernorm.weight"], eps)
        q, k, v = ((n @ w[f"self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, config.head_dim)) for p in "qkv")
        out = dense(paired(q), paired(k), v, distance, frequencies, config.head_dim**-0.5)[0]
        x = x + out.flatten(1) @ w["self_attn.o_proj.weight"].T
        n = rms_norm(x, x.shape[-1:], w["post_attention_layernorm.weight"], eps)
        up = silu(n @ w["mlp.gate_proj.weight"].T) * (n @ w["mlp.up_proj.weight"].T)
        x = x + up @ w["mlp.down_proj.weight"].T
    return rms_norm(x, x.shape[-1:], weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


@pytest.mark.parametrize(
    "rope", [{}, {"rope_parameters": LLAMA3}, {"rope_parameters": YARN}], ids=["", "llama3", "yarn"]
)
def test_a_models_logits_are_those_by_distance(rope, ops):
    theirs, model = tiny(**rope)
    kept, tokens = Retention(37, 5, relative=True), text(200)
    with model.cache(f"f32+{kept}", memory=8 << 20).open() as sequence:
        got = []
        for at in range(0, 120, 40):
            got.append(model.run([(sequence, tokens[at : at + 40])], every=True))
            sequence.settle()
    want = by_distance(theirs, model.config, tokens[:120], kept)
    assert want.std() > 0.1
    torch.testing.assert_close(torch.cat(got).double(), want, atol=1e-4 * float(want.std()), rtol=0)


@pytest.mark.parametrize(("kv", "weights"), [("bf16", "f32"), ("int8", "int4"), ("int4; layers 1: k8v4", "int8")])
def test_the_cut_does_not_show_in_a_models_logits(kv, weights, ops):
    model = tiny(weights=weights, max_position_embeddings=128)[1]
    first, *others = kv.split(";")
    kv = ";".join([f"{first}+window:70,sinks:5,relative", *(f"{rule}+window:37,sinks:9,relative" for rule in others)])
    check_cut(model.cache(kv, memory=8 << 20), Logits(model))


# Far beyond the model's positions.


@pytest.mark.parametrize(("shares", "ops"), [(True, BACKENDS[-1]), (False, "reference")], indirect=["ops"])
def test_three_contexts_run_in_flat_pages(shares, ops):
    model = tiny()[1]
    cache = model.cache("int8+window:64,sinks:4,relative", memory=3 << 20, shares=shares)
    held = []
    with cache.open() as sequence:
        for at, token in enumerate(itertools.chain(text(120), text(360, 1))):
            model.run([(sequence, [token])])
            sequence.settle()
            if at >= 128:
                held.append((pages_held(sequence), cache.books.in_use, sequence.nbytes.allocated))
            assert sequence.nbytes == cache.spec.nbytes(at + 1)
        assert len(sequence) == 480 == 3 * model.config.max_positions
    cache.check()
    assert len(set(held)) <= 2 and max(held)[0] == 4 * 4, "two lanes of two layers: a page of sinks, and three"


def test_longer_than_the_model_only_where_all_is_relative():
    model = tiny()[1]
    kv = "int8+window:64,sinks:4,relative"
    assert model.longest() == model.longest(model.spec("int8+window:64,sinks:4")) == 160
    assert model.longest(model.spec(kv + "; layers 1: int8")) == 160
    assert model.longest(model.spec("int8+window:156,sinks:4,relative")) == model.longest(model.spec(kv)) == 2**31 - 1
    for allowed in ("int8+window:64,sinks:4", kv + "; layers 1: int8"):
        with model.cache(allowed, memory=4 << 20).open() as sequence:
            model.run([(sequence, text(150))])
            with pytest.raises(
                ContextError, match=r"161 tokens .* 160 positions of tiny; .*window:80,sinks:4,relative"
            ):
                model.run([(sequence, text(11))])
            assert len(sequence) == 150
    with pytest.raises(ContextError, match=r"2,147,483,648 tokens .* any sequence can have"):
        model.check_context(2**31, model.spec(kv))


def test_a_window_wider_than_the_model_is_refused():
    model = tiny()[1]
    with pytest.raises(SpecError, match=r"window and sinks are 161 rows, more than the 160 positions"):
        model.spec("int8+window:157,sinks:4,relative")
    with pytest.raises(SpecError, match="more than the 8,192 positions"):
        run_plan("smollm2", kv="int8+window:8192,sinks:4,relative")


def test_learned_positions_are_refused():
    model = tiny("gpt2")[1]
    for parse in (model.spec, lambda kv: run_plan("gpt2", kv=kv), lambda kv: run_plan("t5-small", kv=kv)):
        with pytest.raises(SpecError, match=r"positions don't turn this model's keys .* use 'window:64,sinks:4'"):
            parse("int8; layers 1: int8+window:64,sinks:4,relative")
    with pytest.raises(ContextError, match=r"longer context$"):
        model.check_context(161)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("int8+relative", "'relative' places sinks before a window"),
        ("int8+snapkv:25%,relative", "keep their own positions; write 'window:1024,sinks:4,relative'"),
        ("int8+relative,h2o:64rows", "keep their own positions"),
        ("int8+full,relative", "'relative' places sinks"),
        ("int8+sinks:4,relative", "add a window"),
        ("int8+window:9,relative:3", "'relative:3' is no retention"),
        ("int8+window:9,relative,relative", "'relative' is no retention"),
    ],
)
def test_what_relative_can_not_stand_beside(written, named):
    with pytest.raises(SpecError, match="int8") as refused:
        Spec.parse(written, LAYERS)
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_it_stands_anywhere_among_window_and_sinks():
    for written in ("window:64,sinks:4,relative", "relative,sinks:4,window:64"):
        assert str(Spec.parse(f"int8 + {written}", LAYERS)) == "int8+window:64,sinks:4,relative"


def test_a_models_own_window_keeps_its_meaning(ops):
    theirs, model = tiny("mistral", sliding_window=20)
    spec = model.spec("f32+window:64,sinks:4,relative")
    assert [group.retention for group in spec.groups] == [Retention(20, relative=True)]
    assert model.longest(spec) == MOST_POSITIONS and model.longest(model.spec("f32")) == 160
    tokens = text(155)
    for kv in ("f32", "f32+window:64,sinks:4,relative"):
        with model.cache(kv, memory=4 << 20).open() as sequence:
            got = model.run([(sequence, tokens)], every=True)
        want = theirs(torch.tensor([tokens])).logits[0].detach()
        torch.testing.assert_close(got, want, atol=1e-4 * float(want.std()), rtol=0)


# Generation and the command line.


def test_an_answer_goes_on_past_the_context(monkeypatch):
    model, kv = tiny()[1], "f32+window:64,sinks:4,relative"

    class Numbers:
        encode, decode = None, None

        def stream(self):
            return self

        def step(self, token):
            return f"{token} "

        def finish(self):
            return ""

    model.tokenizer = Numbers()
    model.config = dataclasses.replace(model.config, eos_ids=())
    for prompt, most, new in ((text(10), 400, 400), (text(300), 7, 7), (text(300), None, 160)):
        with model.cache(kv, memory=4 << 20).open() as sequence:
            answer = Generation(model, Request(prompt, most), sequence).run()
        assert (answer.finish_reason, len(answer.token_ids)) == ("length", new)
        assert answer.note == f"stopped after {new} new tokens; raise --max-tokens for more"
    with model.cache("f32", memory=4 << 20).open() as sequence:
        answer = Generation(model, Request(text(10)), sequence).run()
    assert answer.note == (
        "stopped at the model's last position, 160; shorten the prompt or use a model with more, or let a window move "
        "along: --kv int8+window:80,sinks:4,relative"
    )


def test_a_plan_has_the_masks_bytes_and_no_end():
    moved, true = (
        run_plan("smollm2", kv=f"int8+window:1024,sinks:4{word}", context=50_000) for word in (",relative", "")
    )
    assert moved.total == true.total
    assert moved.notes == () and "50,000 tokens are more than the 8,192" in true.notes[0]


def test_the_command_takes_a_prompt_that_is_longer_than_the_model(tmp_path, monkeypatch, capsys):
    model = write_model(tmp_path / "tiny")

    def run(kv):
        words = ["run", "--model", model, "--kv", kv, "--raw", "--max-tokens", 3, "--json", "kvik " * 200]
        monkeypatch.setattr(sys, "argv", ["kvik", *map(str, words)])
        monkeypatch.setenv("KVIK_HOME", str(tmp_path / "home"))
        with pytest.raises(SystemExit) as stopped:
            kvik.cli.main()
        return stopped.value.code

    assert run("int8+window:64,sinks:4,relative") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["prompt_tokens"], facts["new_tokens"], facts["kv_tokens"]) == (1000, 3, 1002)
    assert facts["kv_bytes"] == 68 * 2 * 2 * 24
    check_refused(capsys, run("int8+window:64,sinks:4"), "1,001 tokens", "700 positions", "sinks:4,relative")
    check_refused(capsys, run("int8+window:697,sinks:4,relative"), "701 rows", "700 positions")
