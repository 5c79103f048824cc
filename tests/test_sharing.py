"""Layers that read another's rows: what they compute, what they keep, what a prompt costs, and who refuses."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import kvik.cli
from kvik.cache.shape import LayerShape
from kvik.cache.sharing import first_late, readers, shared
from kvik.cache.spec import Spec
from kvik.errors import SequenceError, UsageError
from kvik.eval import evaluate
from kvik.models.watch import Watch
from kvik.ops.linear import Linear
from kvik.plan import run_plan
from kvik.plan.work import Arithmetic
from tiny_models import drawn, gemma, gpt2, llama, ours, their_logits, tiny, tokens

LAYERS = 6
RULES = ("pairs", "last-half", "last:2", "last:1")


def made(**changes):
    """(transformers' Llama of six layers, its weights in f64)."""
    theirs = drawn(lambda: llama(num_hidden_layers=LAYERS, **changes))
    return theirs, {name: tensor.double() for name, tensor in theirs.state_dict().items()}


# The rules.


def test_smollm2_keeps_16_of_30_layers_under_last_half():
    layers = [LayerShape(3, (("k", 64), ("v", 64)))] * 30
    owners = readers(layers, "last-half")
    assert owners == (*range(15), *[15] * 15)
    spec, plain = (Spec.parse("bf16", each) for each in (shared(layers, owners), layers))
    assert spec.nbytes(1000).payload / plain.nbytes(1000).payload == 16 / 30
    assert (spec.nbytes(1).payload, plain.nbytes(1).payload) == (16 * 768, 30 * 768)
    assert first_late(shared(layers, owners)) == 16


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_the_rules_by_their_formulas(count):
    layers = [LayerShape(1, (("k", 4), ("v", 4)))] * count
    for rule, kept in (("pairs", -(-count // 2)), ("last-half", count // 2 + 1), ("last:1", max(count - 1, 0))):
        if rule == "last-half":
            kept = min(kept, count)
        if rule == "last:1" and count == 1:
            continue
        owners = readers(layers, rule)
        assert len(set(owners)) == kept
        assert all(owner <= layer and owners[owner] == owner for layer, owner in enumerate(owners))


def test_gemmas_rule_shares_among_layers_of_one_kind():
    """Gemma 3n's: the last layers read the last layer before them that sees what they see."""
    window, every = LayerShape(1, (("k", 4), ("v", 4)), 8), LayerShape(1, (("k", 4), ("v", 4)))
    layers = [window, window, every, window, window, every, window, every]
    assert readers(layers, "last:3") == (0, 1, 2, 3, 4, 2, 4, 2)
    assert readers(layers, "last:5") == (0, 1, 2, 1, 1, 2, 1, 2)
    with pytest.raises(UsageError, match=r"layer 2 sees all positions.*none of the 2 layers"):
        readers(layers, "last:6")
    with pytest.raises(UsageError, match=r"layer 3 sees the last 8 positions.*layer 2, which sees all"):
        readers(layers, "pairs")
    for wrong in ("halves", "last:", "last:0", "last:-1", "", "pairs "):
        with pytest.raises(UsageError, match="use pairs, last-half or last:N"):
            readers(layers, wrong)


# What is computed.


def dense(config, weights, ids):
    """All logits of a Llama whose layers share rows, in f64 and without a cache."""
    hidden = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    count, width, shared_by = len(ids), config.head_dim, config.heads // config.kv_heads
    turns = torch.arange(count).double()[:, None] * 10_000.0 ** -(torch.arange(0, width, 2).double() / width)
    cos, sin = (torch.cat((x, x), -1)[:, None] for x in (turns.cos(), turns.sin()))
    mask = torch.ones(count, count).triu(1).bool()

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * weights[f"{name}.weight"]

    def heads(x, layer, part):
        return (x @ weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"].T).view(count, -1, width)

    def turned(x):
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    kept = {}
    for layer, owner in enumerate(config.owners):
        name = f"model.layers.{layer}"
        x = norm(hidden, f"{name}.input_layernorm")
        if owner == layer:
            kept[layer] = turned(heads(x, layer, "k")), heads(x, layer, "v")
        k, v = (each.repeat_interleave(shared_by, 1) for each in kept[owner])
        scores = torch.einsum("qhd,khd->hqk", turned(heads(x, layer, "q")), k) * width**-0.5
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(mask, -torch.inf).softmax(-1), v).flatten(1)
        hidden = hidden + mixed @ weights[f"{name}.self_attn.o_proj.weight"].T
        x = norm(hidden, f"{name}.post_attention_layernorm")
        gate, up = (x @ weights[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ weights[f"{name}.mlp.down_proj.weight"].T
    return norm(hidden, "model.norm") @ weights["lm_head.weight"].T


@pytest.mark.parametrize("rule", RULES)
def test_logits_equal_those_of_a_dense_computation(rule):
    theirs, weights = made()
    model, ids = ours(theirs, share=rule), tokens(90)
    want = dense(model.config, weights, ids)
    with model.cache("f32").open() as sequence:
        got = model.run([(sequence, ids)], every=True)
        assert (got - want).abs().max() < 1e-4
        sequence.settle()
        assert (model.run([(sequence, [9])]) - dense(model.config, weights, [*ids, 9])[-1]).abs().max() < 1e-4
    assert (their_logits(theirs, ids) - want).abs().max() > 0.1, "another model"


class Given:
    """In place of a projection: what the owner's gave."""

    def __init__(self, owner):
        owner.register_forward_hook(lambda module, args, out: setattr(self, "out", out))

    def __call__(self, x):
        return self.out


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: tiny("Qwen3", head_dim=32, num_hidden_layers=LAYERS), "last-half"),
        (lambda: tiny("Qwen2", num_hidden_layers=LAYERS), "pairs"),
        (lambda: gemma(3, num_hidden_layers=LAYERS, layer_types=["sliding_attention", "full_attention"] * 3), "last:3"),
        (lambda: gemma(2, num_hidden_layers=LAYERS, layer_types=["sliding_attention", "full_attention"] * 3), "last:2"),
    ],
    ids=["qwen3", "qwen2", "gemma3", "gemma2"],
)
def test_other_families_equal_transformers_given_the_owners_keys_and_values(make, rule):
    theirs = drawn(make)
    model, ids = ours(theirs, share=rule), tokens(90)
    layers = theirs.model.layers
    for layer, owner in enumerate(model.config.owners):
        if layer != owner:
            mine, others = layers[layer].self_attn, layers[owner].self_attn
            for part in ("k_proj", "v_proj"):
                delattr(mine, part)
                object.__setattr__(mine, part, Given(getattr(others, part)))
            if "k_norm" in dict(others.named_children()):
                mine.k_norm = others.k_norm
    with model.cache("f32").open() as sequence:
        got = model.run([(sequence, ids)], every=True)
    assert (got - their_logits(theirs, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("kv", ["f32", "int8", "int4; layers 0 heads 1: bf16", "f32+window:30,sinks:2,relative"])
@pytest.mark.parametrize("rule", ["pairs", "last-half"])
def test_tokens_whose_logits_nobody_wants_stop_early_and_no_bit_changes(rule, kv):
    model, ids = ours(made()[0], "int4", share=rule), tokens(80)
    cache = model.cache(kv, shares=False)
    every, last, cut = (cache.open() for _ in range(3))
    want = model.run([(every, ids)], every=True)
    assert torch.equal(model.run([(last, ids)]), want[-1:])
    at = 0
    for piece in (50, 1, 29):
        found = model.run([(cut, ids[at : at + piece])])
        at += piece
        assert torch.equal(found, want[at - 1 : at])
    for one, other in ((every, last), (every, cut)):
        for layer in range(LAYERS):
            rows = [each.read(layer) for each in (one, other)]
            assert all(torch.equal(rows[0][name], rows[1][name]) for name in "kv")


def test_a_layer_that_keeps_rows_cannot_be_left_out():
    model = ours(made()[0], share="pairs")
    rows, sequence = torch.zeros(1, 2, 16), model.cache("f32").open()
    with pytest.raises(SequenceError, match="all of the step's tokens must pass"), sequence.append([1, 2]) as step:
        step.only([1]).append(0, k=rows, v=rows)
    with pytest.raises(SequenceError, match="before it appended"), sequence.append([1, 2]) as step:
        step.only([1]).only([0]).attend(1, torch.zeros(1, 4, 16), scale=1.0)


class Passing(Watch):
    """How many tokens ask in each layer."""

    def __init__(self, step, asked):
        super().__init__(step)
        self.asked = asked

    def attend(self, layer, q, **options):
        self.asked.append(len(q))
        return super().attend(layer, q, **options)


def test_a_policy_that_looks_on_sees_every_query():
    model, ids = ours(made()[0], share="last-half"), tokens(60)
    for kv, late in (("f32", 1), ("f32+keydiff:50%", 1), ("f32+snapkv:50%,last:8", 60), ("f32+h2o:50%", 60)):
        asked = []
        with model.cache(kv).open(ids) as sequence:
            found = model.run([(sequence, ids)], watch=lambda step, asked=asked: Passing(step, asked))
            assert asked == [60] * 4 + [late] * 2
            sequence.settle()
            rows = sequence.read(0)["k"].shape[1]
            assert rows == 60 if kv == "f32" else rows < 40
        with model.cache("f32").open() as plain:
            assert torch.equal(model.run([(plain, ids)]), found)


# What it takes.


@pytest.mark.parametrize("rule", ["pairs", "last-half", "last:2"])
def test_bytes_parameters_and_operations_of_a_prompt_are_those_of_the_formula(rule, tmp_path, monkeypatch):
    theirs, _ = made(attention_bias=True)
    plain, model, n = ours(theirs), ours(theirs, share=rule), 48
    config, reading = model.config, sum(owner != layer for layer, owner in enumerate(model.config.owners))
    kept, late = LAYERS - reading, first_late(model.decoder.layers)
    per_layer = 2 * config.kv_heads * config.head_dim
    # bytes
    assert model.spec("bf16").nbytes(n).payload * LAYERS == plain.spec("bf16").nbytes(n).payload * kept
    # parameters: of the decoder, of the plan, and of what is held
    fewer = reading * (per_layer * config.hidden + per_layer)
    sizes = [sum(torch.Size(s).numel() for s in each.config.tensor_shapes().values()) for each in (plain, model)]
    assert sizes[0] - sizes[1] == fewer == (plain.nbytes - model.nbytes) // 4
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    planned = run_plan(str(tmp_path), kv="bf16", context=n, share=rule)
    assert planned.shape.parameters == sizes[1]
    assert planned.total == model.spec("bf16").nbytes(n)
    # operations: products counted as they run, pairs by hand
    seen = []
    honest = Linear.__call__
    monkeypatch.setattr(
        Linear,
        "__call__",
        lambda self, x, **more: (seen.append(len(x) * self.inputs * self.outputs), honest(self, x, **more))[1],
    )
    with model.cache("f32").open() as sequence:
        model.run([(sequence, tokens(n))])
    work = Arithmetic.of(model, "f32").step(n, chunk=n)
    assert 2 * sum(seen) == work.products
    q, hidden = config.heads * config.head_dim, config.hidden
    layer = 2 * q * hidden + 3 * hidden * config.ffn
    lower = late * layer + kept * per_layer * hidden
    assert work.products == 2 * (n * lower + (LAYERS - late) * layer + config.vocab_size * hidden)
    assert work.pairs == config.heads * (late * n * (n + 1) // 2 + (LAYERS - late) * n)
    assert work.attention == 4 * config.head_dim * work.pairs
    assert work.rows == kept * config.kv_heads * n
    after = Arithmetic.of(model, "f32").step(n + 1)
    assert after.rows_read == LAYERS * config.kv_heads * (n + 1) * 2 * config.head_dim * 4, (
        "each reads what is held once"
    )


def test_plans_say_what_is_shared_and_count_it_once():
    plan = run_plan("smollm2", kv="bf16", context=1024, share="last-half")
    plain = run_plan("smollm2", kv="bf16", context=1024)
    assert plan.total.payload * 30 == plain.total.payload * 16
    assert plain.shape.parameters - plan.shape.parameters == 14 * 2 * 576 * 192
    assert "14 of 30 layers read the rows of others" in plan.reasons
    assert "another model" in plan.notes[-1] and "share last-half" in plan.shape.name
    assert run_plan("gemma-3-1b", share="last:6").shape.parameters == run_plan("gemma-3-1b").shape.parameters - 6 * (
        2 * 256 * 1152 + 256
    )
    with pytest.raises(UsageError, match="gpt2 models can't share"):
        run_plan("gpt2", share="pairs")


# Who refuses, and what is said.


def test_models_that_cannot_share_say_so_in_one_line():
    for make, rule, named in (
        (gpt2, "pairs", "gpt2 models can't share"),
        (lambda: gemma(3), "last-half", "can't read the rows of layer 1"),
        (llama, "thirds", "use pairs, last-half or last:N"),
    ):
        with pytest.raises(UsageError, match=named) as refused:
            ours(make(), share=rule)
        assert "\n" not in str(refused.value)


def test_a_shared_model_is_another_and_finds_no_rows_of_the_plain_one():
    theirs, _ = made()
    plain, model = ours(theirs), ours(theirs, share="pairs")
    assert model.fingerprint != plain.fingerprint != ours(theirs, share="last-half").fingerprint
    assert model.config.name.endswith("(share pairs)")
    again = type(model.config).from_json(json.loads(json.dumps(model.config.to_json())))
    assert again == model.config and again.owners == (0, 0, 2, 2, 4, 4)
    assert "owners" not in plain.config.to_json(), "what has its usual value is not written"
    assert replace(again, owners=()).sharing("pairs").owners == again.owners


def test_an_evaluation_holds_a_shared_model_against_the_plain_one():
    theirs, _ = made()
    plain, model = ours(theirs), ours(theirs, share="last-half")
    text, sizes = tokens(400), dict(prefix=60, scored=40, documents=2, protocol="stream")
    found = evaluate(model, text, ["int8"], **sizes, against=plain, mark="share last-half")
    labels = [each.label for each in found.measured]
    assert labels == ["f32", "f32, share last-half", "int8, share last-half"]
    full, halved, coded = found.measured
    assert full.kl == 0 < halved.kl and halved.held.payload * 6 == full.held.payload * 4
    own = evaluate(plain, text, [], **sizes)
    assert own.measured[0].nll == full.nll and halved.delta == pytest.approx(halved.nll - full.nll)
    assert abs(coded.kl - halved.kl) < halved.kl / 10
    assert [each["mark"] for each in found.to_dict()["specs"]] == ["", *["share last-half"] * 2]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["kvik", *arguments])
    with pytest.raises(SystemExit) as stopped:
        kvik.cli.main()
    return stopped.value.code


def test_the_command_line_takes_a_rule_and_refuses_others(monkeypatch, capsys):
    assert (
        command(monkeypatch, "plan", "smollm2", "--share", "pairs", "--context", "1000", "--kv", "bf16", "--json") == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["cache"]["per_token"]["payload"] == 15 * 768
    for arguments in (("plan", "smollm2"), ("run", "Hi"), ("eval", "int8")):
        assert command(monkeypatch, *arguments, "--share", "thirds") == 2
        assert "use pairs, last-half or last:N" in capsys.readouterr().err
    assert command(monkeypatch, "plan", "--list", "--share", "pairs") == 2


@pytest.mark.weights
def test_run_says_that_a_shared_smollm2_is_another_model(monkeypatch, capsys):
    options = ("--share", "last-half", "--max-tokens", "3", "--raw")
    assert command(monkeypatch, "run", "The sky is", *options) == 0
    shown = capsys.readouterr()
    assert "share last-half: another model than its weights were trained for" in " ".join(shown.err.split())
    assert command(monkeypatch, "run", "The sky is", *options, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["share"] == "last-half" and facts["kv_bytes"] == facts["kv_tokens"] * 16 * 768
