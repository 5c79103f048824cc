"""Decoders and ViTs with an operator of choice: what is trained is what kvik runs, under every way of keeping rows."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvik.bench.runs import measure
from kvik.bench.speed_runs import measure_speed
from kvik.errors import ConfigError, ContextError, SpecError, UsageError
from kvik.models.families import from_hf, from_json
from kvik.models.families.gpt import GPTConfig
from kvik.models.families.masked import MaskedConfig
from kvik.models.families.vit import ViTConfig
from kvik.models.files.weights import check
from kvik.models.model import Model
from kvik.models.shapes.families import from_config
from kvik.plan import run_plan
from kvik.trace.recording import record
from kvik.train import tasks
from kvik.train.loop import Loop, Schedule
from kvik.train.network import GPT, ViT, parameters

WORDS = [
    "attention", "attention:learned", "attention:rotary", "translution:qkv", "translution:k", "lor:qkv,2",
    "bucketed:qkv,6", "convolution:3",
]  # fmt: skip


def config(word="translution:qkv", layers=2, share=None, **more):
    found = GPTConfig(
        name="tiny", vocab_size=50, layers=layers, hidden=24, heads=2, kv_heads=2, head_dim=12, ffn=48,
        max_positions=64, tied_embeddings=False, eos_ids=(), bos_id=None, operator=word, **more,
    )  # fmt: skip
    return found.sharing(share) if share else found


def both(given, seed=0, weights="f32"):
    """A network as it is trained, and as kvik runs it."""
    torch.manual_seed(seed)
    network = GPT(given).eval().requires_grad_(False)
    tensors = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    return network, Model(given, dict(check(tensors, given)), weights=weights)


def ids(n=45):
    return torch.randint(50, (n,), generator=torch.Generator().manual_seed(2))


def run(model, tokens, kv="f32", cut=(20, 1, 1, 23)):
    cache, outs, at = model.cache(kv), [], 0
    with cache.open() as sequence:
        for count in cut:
            outs.append(model.run([(sequence, tokens[at : at + count].tolist())], every=True))
            sequence.settle()
            at += count
    cache.check()
    return torch.cat(outs)


@pytest.mark.parametrize("word", WORDS)
def test_what_is_trained_is_what_kvik_runs(word):
    network, model = both(config(word))
    tokens = ids()
    want = network(tokens[None])[0]
    assert {name: tuple(x.shape) for name, x in network.state_dict().items()} == model.config.tensor_shapes()
    assert (run(model, tokens) - want).abs().max() < 1e-5
    assert (run(model, tokens, "int8") - want).abs().max() < 0.2
    if word.startswith(("translution", "convolution")):
        assert "x[24] f32" in str(model.spec("f32").groups[0])


@pytest.mark.parametrize("rule", ["last-half", "last:2", "pairs"])
@pytest.mark.parametrize("word", ["attention:rotary", "attention:learned"])
def test_layers_that_share_are_trained_so(rule, word):
    network, model = both(config(word, layers=4, share=rule))
    assert (run(model, ids()) - network(ids()[None])[0]).abs().max() < 1e-5
    whole = config(word, layers=4)
    assert parameters(network) < parameters(GPT(whole))
    assert (
        model.spec("f32").nbytes(64).payload
        < Model(whole, dict(check({n: x.detach() for n, x in GPT(whole).state_dict().items()}, whole)), weights="f32")
        .spec("f32")
        .nbytes(64)
        .payload
    )
    with pytest.raises(UsageError, match="can't share rows"):
        config("translution:qkv").sharing(rule)


def masked(word):
    return MaskedConfig(
        name="tiny", vocab_size=50, layers=2, hidden=24, heads=2, kv_heads=2, head_dim=12, ffn=48, max_positions=40,
        tied_embeddings=False, eos_ids=(), bos_id=None, operator=word, mask_id=49,
    )  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_an_encoder_with_an_operator_is_what_was_trained(word):
    given = masked(word)
    network, model = both(given)
    tokens = ids(40)
    want = network(tokens[None])[0]
    assert {name: tuple(x.shape) for name, x in network.state_dict().items()} == given.tensor_shapes()
    assert (model.network.logits(tokens) - want).abs().max() < 1e-5
    assert model.encode(tokens, every=True).shape == (3, 40, 24)
    before, after = model.encode(tokens[:-1]), model.encode(tokens)[:-1]
    assert (before - after).abs().max() > 1e-6  # each sees both sides
    assert replace(from_hf(given.to_hf(), None, "tiny"), name="tiny") == given
    assert from_json(json.loads(json.dumps(given.to_json()))) == given
    plan = from_config(given.to_hf())
    assert plan.parameters == parameters(network) and not plan.layers


def test_an_encoder_says_what_it_can_not():
    _, model = both(masked("translution:v"))
    for source, named in (([], "at least one"), ([50], "0 to 49"), ([1] * 41, "40 positions")):
        with pytest.raises(UsageError if named != "40 positions" else ContextError, match=named):
            model.encode(torch.tensor(source, dtype=torch.int64))
    with pytest.raises(UsageError, match="nothing stays valid"):
        model.cache("bf16")
    with pytest.raises(ConfigError, match="50 tokens"):
        from_hf({**masked("attention").to_hf(), "mask_token_id": 50}, None, "tiny")


@pytest.mark.parametrize("word", WORDS)
def test_a_step_of_training_stays_on_its_device(word):
    """On a device without numbers: a tensor left elsewhere would be refused."""
    for given in (config(word), masked(word)):
        network = GPT(given).to("meta")
        loop = Loop(network, Schedule(1, 2), tasks.windows(ids(60), 20), tasks.cross_entropy, 40)
        batch = loop._draw(torch.Generator(), 2)
        torch.autograd.backward(tasks.cross_entropy(network, batch))
        assert all(each.grad is not None and each.grad.device.type == "meta" for each in network.parameters()), word
    if word != "attention:rotary":
        given = pictures(word), torch.rand(2, 1, 16, 16), torch.tensor([1, 2])
        torch.autograd.backward(tasks.cross_entropy(ViT(given[0], 10).to("meta"), given[1:]))


def test_a_window_of_the_users():
    """Rows that a window drops are as if they had never been: offsets beyond it have no matrices that matter."""
    network, model = both(config("translution:qkv", layers=1))
    tokens = ids(60)
    got = run(model, tokens, "f32+window:16", (60,))
    assert (got[:16] - network(tokens[None])[0, :16]).abs().max() < 1e-5
    assert (got[40] - network(tokens[None, 25:41])[0, -1]).abs().max() < 1e-5
    with pytest.raises(SpecError, match="reads its rows back itself"):
        model.cache("bf16+snapkv:25%")


def test_configurations_go_and_come():
    for word in WORDS:
        given = config(word)
        assert from_json(json.loads(json.dumps(given.to_json()))) == given
        assert replace(from_hf(given.to_hf(), None, "tiny"), name="tiny") == given
    shared = config("attention:rotary", layers=4).sharing("last-half")
    assert from_hf(shared.to_hf(), None, shared.name) == shared
    for wrong, named in (
        ({"operator": "translution:xyz"}, "none that kvik has"),
        ({"owners": [0, 1]}, "share keys and values"),
        ({"owners": [1, 1]}, "an earlier layer"),
        ({"num_attention_heads": 5}, "not a multiple"),
    ):
        with pytest.raises(ConfigError, match=named):
            from_hf({**config().to_hf(), **wrong}, None, "tiny")


def test_training_multiplies_each_pair_once():
    """3 n (n + 1) d m and 2 n k d m operations; eight offsets go through one product, padded to the longest: 11 %."""
    for word, pairs in (("translution:qkv", 3 * 64 * 65 // 2), ("convolution:3", 64 + 63 + 62)):
        operator = config(word).mixer(0).requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            operator.mix(torch.randn(1, 64, 24))
        assert 1 <= counter.get_total_flops() / (2 * pairs * 24 * 24) < 1.12, word


def pictures(word):
    return ViTConfig(
        name="tiny", layers=2, hidden=24, heads=2, kv_heads=2, head_dim=12, ffn=48, tied_embeddings=False, eos_ids=(),
        bos_id=None, operator=word, norm_eps=1e-5, vocab_size=0, max_positions=17, activation="gelu_new", channels=1,
        size=16, patch=4, qkv_bias=False,
    )  # fmt: skip


@pytest.mark.parametrize("word", ["attention:learned", "translution:qkv", "lor:qk,2", "bucketed:v,2", "convolution:3"])
def test_a_vit_takes_operators_by_the_same_word(word):
    given = pictures(word)
    torch.manual_seed(0)
    network, picture = ViT(given, 10).eval().requires_grad_(False), torch.rand(1, 16, 16)
    model = Model(given, dict(check(network.named(), given)), weights="f32")
    got = torch.nn.functional.linear(model.encode(picture)[0], network.classifier.weight, network.classifier.bias)
    assert (got - network(picture[None])[0]).abs().max() < 1e-5
    assert replace(from_hf(given.to_hf(), None, "tiny"), name="tiny") == given
    assert model.spec().nbytes(100).allocated == 0
    assert from_config(given.to_hf()).parameters == parameters(network) - parameters(network.classifier)
    with pytest.raises(ConfigError, match="two positions"):
        pictures("attention:rotary").mixer()


def test_plans_know_operators():
    """The figures of the paper's code by formula: GPT base, 1,024 positions, all three relative."""
    millions = {"gpt-base": 163.0, "translution-base": 21_884.3, "lor-base": 505.5, "bucketed-base": 480.7}
    for name, wanted in millions.items():
        plan = run_plan(name)
        assert plan.shape.parameters / 1e6 == pytest.approx(wanted, abs=0.05), name
    plan = run_plan("translution-base")
    assert plan.per_token.payload == 12 * 768 * 2 and plan.weight_bytes == 4 * plan.shape.parameters
    told = " ".join(plan.notes)
    assert "2.2 TiB for each of 3" in told and "9.0 GiB in all" in told and "48.0 MiB at a time" in told
    for word in WORDS:
        given = config(word)
        shape = from_config(given.to_hf())
        assert shape.parameters == parameters(GPT(given)) and list(shape.layers) == given.layer_shapes(), word
    shared = config("attention:rotary", layers=4).sharing("last-half")
    assert from_config(shared.to_hf()).parameters == parameters(GPT(shared))


def test_what_counts_attention_refuses_other_operators():
    _, model = both(config("bucketed:k,4"))
    for ask in (
        lambda: record(model, [1, 2]),
        lambda: measure(model, [1] * 16),
        lambda: measure_speed(model, [1], [4]),
    ):
        with pytest.raises(UsageError, match="speaks of attention, and tiny's operator"):
            ask()
    _, plain = both(config("attention:rotary"))
    assert len(list(record(plain, [1, 2, 3]))) == 3


def test_an_operator_keeps_what_its_form_says():
    for word in WORDS:
        given = config(word)
        assert given.mixer(0).shapes() * 2 == given.layer_shapes(), word
        assert given.cost.sets == given.mixer(0).geometry.sets, word
