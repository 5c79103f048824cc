"""The formulas of `plan.work` against sums that go through every query and every row."""

import itertools
from dataclasses import replace

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


POLICIES = [
    "int8+knorm:25%,sinks:1,recent:2", "int4+keydiff:9rows,sinks:1,recent:3,every:5; page 16",
    "k8v4+h2o:40%,recent:2,every:4", "int8+window:5; layers 1 heads 0: bf16+knorm:50%,recent:2,sinks:0",
]  # fmt: skip


def walked(group, tokens, prompt):
    """Rows that a lane holds before each token, one after the other, as a policy or a window lets them go."""
    policy, held, found = group.retention.policy, 0, []
    for seen in range(1, tokens + 1):
        found.append(held)
        held = group.rows(seen) if policy is None else held + 1
        if policy is not None and policy.fires(seen, prompt, held):
            least = policy.sinks + max(policy.recent, seen % group.page_size)
            held = min(held, max(policy.budget_at(seen), least))
    return found


@pytest.mark.parametrize("prompt", [7, 20, 40])
@pytest.mark.parametrize("kv", POLICIES)
def test_steps_under_a_policy_are_sums_over_what_it_left(kv, prompt):
    model = replace(arithmetic(kv), prompt=prompt)
    groups = [(group, walked(group, 60, prompt)) for group in model.spec.groups]
    for tokens in range(1, 61):
        pairs = read = 0
        for group, before in groups:
            held = min(before[tokens - 1] + 1, group.rows(tokens)) if group.retention.window else before[tokens - 1] + 1
            pairs += model.shared * len(group.lanes) * held
            read += len(group.lanes) * held * group.layout.row_bytes
        found = model.step(tokens)
        assert (found.pairs, found.rows_read) == (pairs, read), tokens
    assert model.text(60).pairs == sum(model.step(n).pairs for n in range(1, 61))
    assert arithmetic(kv).step(41) == replace(model, prompt=40).step(41), "by default all before a step is its prompt"


def test_a_prompt_goes_in_cut_where_a_policy_chooses():
    assert arithmetic("bf16").cuts(10, 4) == [(4, 4), (8, 4), (10, 2)]
    assert arithmetic("int8+knorm:25%").cuts(10, 4) == [(4, 4), (8, 4), (10, 2)]
    kv = "int8+keydiff:40rows,every:5; layers 1: int8+keydiff:40rows,every:7"
    assert arithmetic(kv).cuts(17, 4) == [(4, 4), (5, 1), (7, 2), (10, 3), (14, 4), (15, 1), (17, 2)]
    chunks = arithmetic("int8+keydiff:9rows,sinks:1,recent:3,every:5; page 16").cuts(23, 64)
    whole = [arithmetic("int8+keydiff:9rows,sinks:1,recent:3,every:5; page 16").step(end, chunk=n) for end, n in chunks]
    assert sum(work.pairs for work in whole) == replace(arithmetic(POLICIES[1]), prompt=23).text(23).pairs


@pytest.mark.parametrize(("kv", "prompt"), [(POLICIES[0], 30), (POLICIES[0], 200), ("bf16+knorm:10%,recent:2", 150)])
@pytest.mark.parametrize("width", [8, 40])
def test_equal_bytes_hold_from_there_on_though_rows_leave_in_between(kv, prompt, width):
    model = replace(arithmetic(kv, width=width), prompt=prompt)
    steps = [model.step(tokens) for tokens in range(1, 900)]
    reached = [work.rows_read >= work.weights_read for work in steps]
    last = max((at for at, enough in enumerate(reached) if not enough), default=-1)
    assert model.equal_bytes == last + 2 and last < 800


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
