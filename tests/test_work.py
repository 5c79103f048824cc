"""The formulas of `plan.work` against sums that go through every query and every row."""

import itertools

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kvik.cache.spec import LayerShape, Spec
from kvik.models import families
from kvik.models.model import Model
from kvik.ops import reads
from kvik.plan.work import Arithmetic, Work

ROW, HEAD, HELD, READ = 1000, 300, 6000, 5000  # weights of all layers, of the head; bytes of all, and of those read


def arithmetic(kv="bf16", windows=(None, None), heads=2, width=8, shared=3):
    """A model of a layer for each of its own windows."""
    layers = [LayerShape(heads, (("k", width), ("v", width)), window) for window in windows]
    return Arithmetic(Spec.parse(kv, layers), Spec.parse("f32", layers), shared, ROW, HEAD, HELD, READ)


SMOLLM2 = Arithmetic(
    *(Spec.parse(kv, [LayerShape(3, (("k", 64), ("v", 64)))] * 30) for kv in ("bf16", "f32")),
    3, 106_168_320, 28_311_552, 94_906_100, 94_906_100,
)  # fmt: skip

SPECS = [
    ("bf16", (None, None)),
    ("int8+window:5", (None, None)),
    ("int4+window:4,sinks:3", (None, None)),
    ("bf16", (6, None)),
    ("k8v4+window:9,sinks:2", (6, None, 20)),
    ("f32; layers 0: int8+window:3; layers 1 heads 0: int4", (None, None)),
]
over_specs = pytest.mark.parametrize(("kv", "windows"), SPECS)


def visible_rows(query, tokens, kept):
    return reads.visible(np.array(query), np.arange(tokens), kept.window, kept.sinks)


def brute(model, tokens, cached, chunk, batch):
    """The same step, query by query and row by row."""
    spec, rows, pairs, attention, read = model.spec if cached else model.plain, 0, 0, 0, 0
    first = tokens - chunk if cached else 0
    for group in spec.groups:
        for _ in range(batch * len(group.lanes)):
            rows += tokens - first
            seen = set()
            for query in range(first, tokens):
                visible = visible_rows(query, tokens, group.retention).nonzero()[0].tolist()
                seen |= set(visible)
                pairs += model.shared * len(visible)
                widths = [stream.width for stream in group.layout.streams]  # a score, and a value mixed: 2 a channel
                attention += model.shared * len(visible) * sum(2 * width for width in widths)
            read += len(seen) * group.layout.row_bytes
    products = sum(2 * ROW for _ in range(batch * (tokens - first))) + batch * 2 * HEAD
    return Work(rows, pairs, products, attention, READ, read)


@over_specs
@pytest.mark.parametrize("cached", [True, False])
def test_a_step_is_the_sum_over_its_queries_and_rows(kv, windows, cached):
    model = arithmetic(kv, windows)
    for tokens, chunk, batch in itertools.product((1, 2, 5, 7, 13, 30), (1, 2, 6), (1, 3)):
        if chunk <= tokens:
            want = brute(model, tokens, cached, chunk, batch)
            assert model.step(tokens, cached=cached, chunk=chunk, batch=batch) == want, (tokens, chunk, batch)


@over_specs
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("prefill", [1, 4])
def test_a_text_is_the_sum_over_its_steps(kv, windows, cached, prefill):
    model = arithmetic(kv, windows)
    want = brute(model, prefill, cached, prefill, 1)
    for tokens in range(prefill + 1, 16):
        want += brute(model, tokens, cached, 1, 1)
    assert model.text(15, cached=cached, prefill=prefill) == want


def test_a_text_shorter_than_its_first_step_is_that_step_alone():
    model = arithmetic()
    assert model.text(3, prefill=10) == model.step(3, chunk=3)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 57])
def test_the_closed_forms_of_full_attention(n):
    model = arithmetic("f32", heads=1, windows=(None,), shared=1)
    cached, without = model.text(n), model.text(n, cached=False)
    assert (cached.rows, without.rows) == (n, n * (n + 1) // 2)
    assert (cached.pairs, without.pairs) == (n * (n + 1) // 2, n * (n + 1) * (n + 2) // 6)
    assert cached.rows_read == without.rows_read == n * (n + 1) // 2 * 64
    assert cached.weights_read == without.weights_read == n * READ


def test_a_batch_reads_the_weights_once_and_everything_else_for_each():
    one, eight = SMOLLM2.step(100), SMOLLM2.step(100, batch=8)
    assert eight.weights_read == one.weights_read
    assert (eight.rows, eight.pairs, eight.rows_read) == (8 * one.rows, 8 * one.pairs, 8 * one.rows_read)
    assert eight.operations == 8 * one.operations
    assert eight.bytes_read == one.bytes_read + 7 * one.rows_read


def search(reached):
    """The first length, one after the other."""
    return next((tokens for tokens in range(1, 400) if reached(tokens)), None)


@over_specs
@pytest.mark.parametrize("width", [2, 8, 40])
def test_equal_work_and_bytes_are_what_a_linear_search_finds(kv, windows, width):
    model = arithmetic(kv, windows, width=width)
    steps = {tokens: model.step(tokens) for tokens in range(1, 400)}
    assert model.equal_work == search(lambda n: steps[n].attention >= steps[n].products)
    assert model.equal_bytes == search(lambda n: steps[n].rows_read >= steps[n].weights_read)
    assert model.equal_held == search(lambda n: model.spec.nbytes(n).payload >= HELD)


def test_equal_lengths_are_found_and_not_found_among_these():
    found = {(arithmetic(kv, windows).equal_work, arithmetic(kv, windows).equal_bytes) for kv, windows in SPECS}
    assert (None, None) in found, "a window that is narrow enough never lets them be equal"
    assert any(None not in each for each in found)


def test_smollm2s_lengths_follow_from_its_sizes():
    assert SMOLLM2.equal_work == -(-2 * (106_168_320 + 28_311_552) // (30 * 9 * 4 * 64)) == 3892
    assert SMOLLM2.equal_bytes == -(-94_906_100 // (30 * 3 * 256)) == 4120


def tiny(family, tied):
    if family == "gpt2":
        sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
        theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, **sizes, tie_word_embeddings=tied))
    else:
        sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "max_position_embeddings": 64}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
        theirs = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    config = families.from_hf(theirs.config.to_dict(), None, "tiny")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    return theirs, Model(config, {name: tensors[name] for name in config.tensor_shapes()}, weights="f32")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_models_weights_are_counted_as_it_multiplies_with_them_and_reads_them(family, tied):
    """Against what torch counts while transformers runs the same model."""
    from torch.utils.flop_counter import FlopCounterMode

    theirs, model = tiny(family, tied)
    found = Arithmetic.of(model, "bf16")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        theirs(torch.zeros((1, 7), dtype=torch.long))
    projections = {
        str(op): flops
        for op, flops in counter.get_flop_counts()["Global"].items()
        if str(op) in ("aten.mm", "aten.addmm")
    }
    assert sum(projections.values()) == 2 * 7 * (found.row_weights + found.head_weights)
    assert found.head_weights == 50 * 48
    assert found.shared == (1 if family == "gpt2" else 2)
    tables = 50 * 48 * (not tied) + 64 * 48 * (family == "gpt2")  # of which a step takes the rows of its tokens
    turns = 0 if family == "gpt2" else 6 * 8  # frequencies, in 64 bits
    assert found.weight_bytes == model.nbytes == found.read_bytes + 4 * tables + turns
    skipped = ("wpe.weight",) if tied else ("wpe.weight", "wte.weight", "embed_tokens.weight")
    read = sum(each.numel() for name, each in theirs.named_parameters() if not name.endswith(skipped))
    assert found.step(7).weights_read == found.read_bytes == pytest.approx(4 * read, rel=1e-3), "and norms' epsilons"
    assert (str(found.spec), str(found.plain)) == ("bf16", "f32")
