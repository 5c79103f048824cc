"""Sinks right before the window (`cache/relative.py`): against a dense computation by distance, the cut, refusals, and
texts far longer than the model's positions."""

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
from helpers import KV, PAGES, Toy, make_cache, pages_held, sees, text
from kvik.cache import relative, weigh
from kvik.cache.prefix import root_key
from kvik.cache.retention import Retention
from kvik.cache.spec import LayerShape, Spec
from kvik.engine.generation import Generation, Request
from kvik.errors import ContextError, SpecError
from kvik.models import families
from kvik.models.model import Model
from kvik.models.parts import Rotation
from kvik.models.rope import Rope
from kvik.ops import loader
from kvik.ops.layout import MOST_POSITIONS
from kvik.ops.pointwise import turn
from kvik.plan import run_plan
from test_laws import Logits, check_cut
from test_native import bound

ROPE = Rope(10_000.0, 16)
FREQUENCIES = ROPE.frequencies()[0]
LAYERS = [LayerShape(2, (("k", 16), ("v", 16)), frequencies=tuple(FREQUENCIES.tolist()))]
EVERY = [Retention(w, k, relative=True) for w, k in ((40, 5), (16, 33), (1, 1), (70, 4), (128, 64))]

over_retentions = pytest.mark.parametrize("kept", EVERY, ids=str)


class Turning(Toy):
    """Queries and keys are functions of the token alone, turned by position."""

    def content(self, name, tokens):
        """f64 [T, heads, width], not turned."""
        return self.tables[0][name][torch.tensor(tokens)].double()

    def row(self, name, layer, tokens, positions):
        rows = self.content(name, tokens)
        if name != "v":
            angles = weigh.turns(FREQUENCIES, torch.tensor(positions))[:, None]
            rows = torch.view_as_real(torch.view_as_complex(rows.unflatten(-1, (-1, 2))) * angles).flatten(-2)
        return rows.float()


TOY = Turning(LAYERS)


def cache_of(kv, kept=EVERY[0], page=32, **options):
    return make_cache(f"{kv}+{kept}", LAYERS, page=page, **options)


def apart(kept, tokens):
    """int64 [T, T]: the distance at which each position sees each other, as the paper says it; -1 where it doesn't.

    The cache of a query holds the sinks and then the window; what counts is the places of rows in that list.
    """
    out = torch.full((tokens, tokens), -1)
    for asking in range(tokens):
        held = sorted({*range(min(kept.sinks, asking + 1)), *range(max(asking - kept.window + 1, 0), asking + 1)})
        out[asking, held] = len(held) - 1 - torch.arange(len(held))
    return out


def dense(q, k, v, distance, frequencies, scale):
    """Attention by distance alone, in f64: q [T, H, D], k [T, L, D], not turned → out [T, H, E], lse, weights."""
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    pairs = [torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k)]
    turns = torch.exp(1j * torch.arange(len(distance)).double()[:, None] * frequencies)
    turned = torch.einsum("qhd,qkd->qkhd", pairs[0], turns[distance.clamp(min=0)])
    scores = torch.einsum("qkhd,khd->hqk", turned, pairs[1].conj()).real * scale
    scores = scores.masked_fill(distance < 0, -torch.inf)
    weights = scores.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v), scores.logsumexp(-1).T, weights


# Against the definition.


def check_dense(cache, kept, length=330, piece=30):
    """What every position gets, its log-sum-exp and what rows receive are those of the definition."""
    tokens, sequence, at = text(length), cache.open(), 0
    q, k, v = (TOY.content(name, tokens) for name in "qkv")
    out, lse, weights = dense(q, k, v, apart(kept, length), FREQUENCIES, 0.25)
    received = torch.zeros(2, length, dtype=torch.float64)
    for at in range(0, length, piece):
        with sequence.append(tokens[at : at + piece]) as step:
            TOY.append(step, 0)
            asked = TOY.row("q", 0, step.tokens, step.positions)
            found = step.attend(0, asked, scale=0.25, want_lse=True, want_mass=True)
        mine = slice(at, at + piece)
        torch.testing.assert_close(found.out.double(), out[mine], atol=3e-6, rtol=1e-6)
        torch.testing.assert_close(found.lse.double(), lse[mine], atol=3e-6, rtol=1e-6)
        table = sequence.tables[0]
        places = (table.logical[:, None] * table.group.page_size + range(table.group.page_size)).reshape(-1)
        there = places < length
        received.zero_()[:, places[there]] = found.mass[0][:, torch.from_numpy(there)].double()
        want = weights[:, mine].unflatten(0, (2, 2)).sum((1, 2))
        torch.testing.assert_close(received, want, atol=1e-5, rtol=1e-5)
        sequence.settle()
    sequence.close()


@pytest.mark.parametrize("page", PAGES)
@over_retentions
def test_every_position_sees_its_sinks_right_before_its_window(kept, page, ops):
    check_dense(cache_of("f32", kept, page), kept)


@pytest.mark.parametrize("kv", KV)
def test_rows_are_read_as_they_are_stored(kv, ops):
    """The definition over keys and values as they were decoded, keys turned back to position 0."""
    kept, tokens = EVERY[3], text(200)
    with cache_of(kv, kept).open() as sequence:
        got = TOY.run([(sequence, tokens)])[0][:, 0]
        k, v = (sequence.read(0)[name].transpose(0, 1).double() for name in "kv")
    back = weigh.turns(FREQUENCIES, -torch.arange(200))[:, None]
    k = torch.view_as_real(torch.view_as_complex(k.unflatten(-1, (-1, 2)).contiguous()) * back).flatten(-2)
    want = dense(TOY.content("q", tokens), k, v, apart(kept, 200), FREQUENCIES, 0.25)[0]
    assert (got.double() - want).abs().max() <= bound(kv, loader.chosen() and loader.built().isa())


def test_softcap_is_of_the_turned_scores(ops):
    kept, tokens = EVERY[0], text(130)
    q, k, v = (TOY.content(name, tokens) for name in "qkv")
    at, turns = apart(kept, 130), {}
    with cache_of("f32").open() as sequence:
        turns["capped"] = TOY.run([(sequence, tokens)], softcap=0.5)[0][:, 0]
    scores = dense(q, k, v, at, FREQUENCIES, 0.25)[2].log()  # up to a constant a query
    shift = dense(q, k, v, at, FREQUENCIES, 0.25)[1].T.unsqueeze(-1)
    weights = (0.5 * ((scores + shift) / 0.5).tanh()).masked_fill(at < 0, -torch.inf).softmax(-1)
    want = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, dim=1))
    torch.testing.assert_close(turns["capped"].double(), want, atol=3e-6, rtol=1e-6)


def test_queries_that_are_not_turned_are_seen(monkeypatch, ops):
    honest = relative._angles
    monkeypatch.setattr(relative, "_angles", lambda positions, *rest: honest(torch.zeros_like(positions), *rest))
    with sees():
        check_dense(cache_of("f32"), EVERY[0])


def test_sinks_one_position_too_far_are_seen(monkeypatch, ops):
    honest = relative._angles
    monkeypatch.setattr(relative, "_angles", lambda at, edge, *rest: honest(at, edge + 1, *rest))
    with sees():
        check_dense(cache_of("f32"), EVERY[0])


def test_sinks_that_the_window_counts_again_are_seen(monkeypatch, ops):
    monkeypatch.setattr(relative, "_edge", lambda reads: reads.window)
    with sees():
        check_dense(cache_of("f32"), EVERY[0])


def test_masses_of_parts_that_are_not_weighed_are_seen(monkeypatch, ops):
    honest = relative.Relative._masses
    monkeypatch.setattr(
        relative.Relative, "_masses", lambda self, a, b, lse, *rest: honest(self, a, b, lse + 0.1, *rest)
    )
    with sees():
        check_dense(cache_of("f32"), EVERY[0])


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


# Laws.


@pytest.mark.parametrize(("kept", "page"), [(EVERY[0], 16), (EVERY[3], 128)], ids=str)
@pytest.mark.parametrize("kv", KV)
def test_the_cut_does_not_show(kv, kept, page, ops):
    check_cut(cache_of(kv, kept, page), TOY)


def test_the_cut_is_seen_where_a_chunk_turns_by_its_first_position(monkeypatch, ops):
    honest = relative._angles
    monkeypatch.setattr(relative, "_angles", lambda at, *rest: honest(at[:1].expand(len(at)), *rest))
    with sees():
        check_cut(cache_of("f32"), TOY)


def test_the_cut_is_seen_where_near_tokens_take_the_far_ones_way(monkeypatch, ops):
    honest = relative._Some.between
    whole = classmethod(lambda cls, reads, first, end, device: honest(reads, 0, MOST_POSITIONS, device))
    monkeypatch.setattr(relative._Some, "between", whole)
    with sees():
        check_cut(cache_of("f32"), TOY)


@pytest.mark.parametrize(("kv", "weights"), [("bf16", "f32"), ("int8", "int4"), ("int4; layers 1: k8v4", "int8")])
def test_the_cut_does_not_show_in_a_models_logits(kv, weights, ops):
    model = tiny(weights=weights, max_position_embeddings=128)[1]
    first, *others = kv.split(";")
    kv = ";".join([f"{first}+window:70,sinks:5,relative", *(f"{rule}+window:37,sinks:9,relative" for rule in others)])
    check_cut(model.cache(kv, memory=8 << 20), Logits(model))


@pytest.mark.parametrize("kv", ["f32", "int8", "int4"])
@pytest.mark.parametrize("full", ["", "+window:70,sinks:5"])
def test_until_window_and_sinks_are_full_no_bit_differs_from_true_positions(kv, full, ops):
    found = []
    for kept in ("+window:70,sinks:5,relative", full):
        cache = make_cache(kv + kept, LAYERS)
        found.append(TOY.cut(cache, text(110), [50, 25, 35]))
    assert torch.equal(found[0][:75], found[1][:75])
    assert not torch.isclose(found[0][75:], found[1][75:], atol=1e-4).all()


def test_forks_trims_and_known_prefixes_change_no_bit(ops):
    tokens, cache = text(400), cache_of("int8", EVERY[3])
    want = TOY.cut(cache_of("int8", EVERY[3], shares=False), tokens, [100] * 4)
    with cache.open() as first:
        for at in range(0, 300, 100):
            TOY.run([(first, tokens[at : at + 100])])
            first.settle()
        with first.fork() as twin:
            assert torch.equal(TOY.run([(twin, tokens[300:])])[0], want[300:])
        TOY.run([(first, text(50, 9))])
        first.trim(300)
        assert torch.equal(TOY.run([(first, tokens[300:])])[0], want[300:])
    with cache.open(tokens) as again:
        assert again.cached == 288
        assert torch.equal(TOY.run([(again, tokens[288:])])[0], want[288:])
    cache.check()


def test_rows_under_other_positions_are_never_found():
    true, moved = (Spec.parse(f"f32+window:40,sinks:5{word}", LAYERS) for word in ("", ",relative"))
    assert true.fingerprint != moved.fingerprint
    assert root_key("w", true, "") != root_key("w", moved, "")


def test_other_groups_and_other_texts_are_read_as_before(ops):
    layers = LAYERS * 2
    mixed = make_cache("f32+window:40,sinks:5,relative; layers 1: f32", layers)
    toy = Turning(layers)
    toy.tables[1] = toy.tables[0]
    tokens = text(150)
    with mixed.open() as a, mixed.open(salt="b") as b:
        TOY_LIKE = toy.run([(a, tokens[:120]), (b, text(20, 1))])[0]
        rest = toy.run([(b, text(30, 2)), (a, tokens[120:])])[1]
    got = torch.cat((TOY_LIKE, rest))
    for layer, kept in enumerate(("+window:40,sinks:5,relative", "")):
        assert torch.equal(got[:, layer], TOY.cut(make_cache(f"f32{kept}", LAYERS), tokens, [150])[:, 0])


# Angles.


def test_queries_are_turned_back_exactly_from_any_position():
    q = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0))
    rotation = Rotation(ROPE, torch.device("cpu"))
    want = turn(q.clone(), rotation.angles([1027] * 4))
    at = [1027, 8192, 4_000_000, MOST_POSITIONS - 1]
    asked = turn(q.clone(), rotation.angles(at))
    got = relative.turned_back(asked, torch.tensor(at), 1028, LAYERS[0].frequencies)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    assert torch.equal(got[0], asked[0])


def test_angles_in_single_precision_are_seen(monkeypatch):
    monkeypatch.setattr(weigh, "turns", lambda f, at: torch.exp(1j * at[:, None] * f.float()))
    with sees():
        test_queries_are_turned_back_exactly_from_any_position()


def test_distances_are_the_same_at_any_position(ops):
    """A window's scores in f32, far beyond any model's positions."""
    rotation = Rotation(ROPE, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for base in (0, 8192, 4_000_000, MOST_POSITIONS - 1024):
        a, b = turn(q.clone(), rotation.angles([base + 1000])), turn(k.clone(), rotation.angles([base]))
        found.append((a.double() * b.double()).sum())
    torch.testing.assert_close(torch.stack(found[1:]), found[0].expand(3), atol=3e-6, rtol=0)


# Far beyond the model's positions.


@pytest.mark.parametrize("shares", [True, False])
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


def test_a_bias_by_distance_is_refused(ops):
    with cache_of("f32").open() as sequence, pytest.raises(SpecError, match="bias by distance"):
        TOY.run([(sequence, text(60))], bias=torch.zeros(4, 8))


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
