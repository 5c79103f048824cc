"""A model's key centres: found once from a text that comes with kvik, kept, found again; and what they are good for."""

import hashlib
import os
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file, save_file

import kvik
from bench_models import ids, tiny, write_model
from kvik.cache.centres import Centres
from kvik.cache.weigh import turned, turns
from kvik.errors import StorageError
from kvik.models import centres as finding
from kvik.models.centres import find, middle, path_of
from kvik.models.watch import Watch


@pytest.fixture
def kvik_home(tmp_path, monkeypatch):
    """A home of its own, in which centres of models of any size are kept."""
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(finding, "_SMALL", 0)
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path):
    return write_model(tmp_path / "tiny")


def same(a, b):
    return a.fingerprint == b.fingerprint and all(torch.equal(x, y) for x, y in zip(a.layers, b.layers, strict=True))


# Finding.


def test_they_are_found_when_a_model_is_loaded_and_are_always_the_same(folder):
    first, second = kvik.load(folder), kvik.load(folder)
    assert [tuple(layer.shape) for layer in first.centres.layers] == [(2, 12), (2, 12)]
    assert same(first.centres, second.centres)
    assert first.fingerprint == second.fingerprint != first.held
    assert first.cache("int8").centres[0].shape == (4, 12)
    assert first.cache("bf16").centres == [None]


def test_a_model_without_a_tokenizer_has_none():
    model = tiny()
    assert model.centres is None and find(model) is None
    assert model.fingerprint == model.held


def test_a_text_of_few_tokens_or_of_unknown_ones_gives_none(folder, monkeypatch):
    model = kvik.load(folder)
    monkeypatch.setattr(finding, "text", lambda: "x" * (finding.FEWEST - 1))
    assert find(model) is None
    monkeypatch.setattr(finding, "text", lambda: "x" * finding.FEWEST)
    assert find(model) is not None
    model.config = model.config.__class__(**{**vars(model.config), "vocab_size": 50})
    assert find(model) is None


def test_a_text_longer_than_the_models_positions_is_cut(folder):
    model = kvik.load(folder)
    model.config = model.config.__class__(**{**vars(model.config), "max_positions": 200})
    assert find(model) is not None


def test_a_model_that_gives_no_numbers_has_none(folder):
    model = kvik.load(folder)
    with torch.inference_mode():
        model.decoder.blocks[1].attention_norm.weight[3] = torch.nan
    assert find(model) is None


def test_a_model_that_bends_its_scores_has_none(folder):
    class Bent(Watch):
        def attend(self, layer, q, **options):
            return super().attend(layer, q, **{**options, "softcap": 30.0})

    model = kvik.load(folder)
    straight = model.decoder.forward
    assert find(model) is not None
    model.decoder.forward = lambda step, *rest: straight(Bent(step), *rest)
    assert find(model) is None


def test_the_text_and_the_version_belong_together():
    """Another text finds other centres: give it another VERSION, so that those that were kept are found anew."""
    known = {2: "ce0f49e685fd0939"}
    assert known[finding.VERSION] == hashlib.sha256(finding.text().encode()).hexdigest()[:16]


# The middle.


@pytest.mark.parametrize("start", [0, 5000])
def test_turned_keys_are_centred_for_all_positions_of_the_model(start):
    """Slow pairs stay where they are, fast ones lie all around, between them a pair lies on a part of its circle."""
    reach, frequencies = 8192, (1.0, 0.05, 1.6e-4, 1e-7)
    pairs = torch.tensor(frequencies, dtype=torch.float64)
    content = torch.tensor([3.0, 4.0]).repeat(4).expand(512, 1, 8)
    keys = turned(content, turns(pairs, torch.arange(start, start + 512))[:, None])
    got = torch.view_as_complex(
        middle(keys, list(range(start, start + 512)), frequencies, reach).unflatten(-1, (-1, 2))
    )
    got = got[0]
    assert got[:2].abs().max() < 0.2
    assert (got[3] - (3 + 4j)).abs() < 0.01
    path = turned(torch.tensor([3.0, 4.0]).expand(reach, 2), turns(pairs[2:3], torch.arange(reach)))
    box = (path.quantile(0.02, 0) + path.quantile(0.98, 0)) / 2
    assert (torch.view_as_real(got[2]) - box).abs().max() < 0.05
    plain = middle(keys, list(range(start, start + 512)), None, reach).unflatten(-1, (-1, 2))[0]
    assert (plain[2] - box).abs().max() > 0.5, "512 positions see a small part of its circle"


def test_a_few_rows_far_out_move_no_middle():
    rows = torch.linspace(-1, 3, 501)[:, None, None].repeat(1, 1, 2)
    want = middle(rows, list(range(501)), None, 501)
    rows[7] = 1e6
    assert (middle(rows, list(range(501)), None, 501) - want).abs().max() < 0.02
    assert (want - 1.0).abs().max() < 1e-6


# Keeping.


def test_they_are_kept_and_found_again(folder, kvik_home, monkeypatch):
    steps = []
    first = kvik.load(folder, progress=lambda *step: steps.append(step))
    path = path_of(first.held)
    assert path.parent == kvik_home / "centres" and [p.name for p in path.parent.iterdir()] == [path.name]
    assert steps == [(finding._WHAT, 1, 2), (finding._WHAT, 2, 2)]
    monkeypatch.setattr(finding, "find", None)  # not asked again
    steps.clear()
    again = kvik.load(folder, progress=lambda *step: steps.append(step))
    assert same(first.centres, again.centres) and not steps
    monkeypatch.undo()


def test_small_models_leave_no_file(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "home"))
    assert kvik.load(folder).centres is not None
    assert not (tmp_path / "home").exists()


def test_weights_held_otherwise_have_centres_of_their_own(folder, kvik_home):
    models = [kvik.load(folder, weights=weights) for weights in ("f32", "int8", "f32")]
    assert len(list((kvik_home / "centres").iterdir())) == 2
    assert same(models[0].centres, models[2].centres) and not same(models[0].centres, models[1].centres)


def damage(path, how):
    held, about = load_file(path), finding.read_file(path)[1]
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "no such file format":
        path.write_text("not safetensors")
    elif how == "another number":
        held["0"][0, 0] += 1
        save_file(held, path, metadata=about)
    elif how == "a layer is missing":
        save_file({"0": held["0"]}, path, metadata={**about, "centres": Centres([held["0"]]).fingerprint})
    elif how == "layers have other names":
        save_file({"a": held["0"], "b": held["1"]}, path, metadata=about)
    elif how == "no number":
        held["0"][0, 0] = torch.nan
        save_file(held, path, metadata=about)
    else:
        save_file(held, path)


@pytest.mark.parametrize(
    "how",
    [
        "cut off",
        "no such file format",
        "another number",
        "a layer is missing",
        "layers have other names",
        "no number",
        "nothing said about it",
    ],
)
def test_a_damaged_file_is_named_with_the_way_out(folder, kvik_home, how):
    path = path_of(kvik.load(folder).held)
    damage(path, how)
    with pytest.raises(StorageError, match="delete it and they will be found again") as caught:
        kvik.load(folder)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    assert kvik.load(folder).centres is not None


def test_another_models_file_is_refused(folder, kvik_home):
    models = [kvik.load(folder, weights=weights) for weights in ("f32", "int8")]
    os.replace(path_of(models[1].held), path_of(models[0].held))
    with pytest.raises(StorageError, match="another model"):
        kvik.load(folder, weights="f32")


def test_a_home_that_cannot_be_written_costs_time_and_is_said(folder, kvik_home):
    kvik_home.write_text("")
    said = []
    assert kvik.load(folder, progress=lambda what, *_: said.append(what)).centres is not None
    assert "KVIK_HOME" in said[-1] and str(kvik_home) in said[-1]


# What they do to a model.


def logits(model, kv, **options):
    with model.cache(kv, shares=False).open() as sequence:
        return model.run([(sequence, ids(200)[:150])], every=True, **options)


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_a_layer_in_one_call_and_in_many_give_the_same_bits(folder, kv, ops):
    for weights in ("f32", "int4"):
        model = kvik.load(folder, weights=weights)
        model.centres = Centres([5 + layer for layer in model.centres.layers])
        assert torch.equal(logits(model, kv), logits(model, kv, watch=Watch))


def test_rows_in_floats_are_not_touched(folder, ops):
    model = kvik.load(folder)
    model.centres = Centres([5 + layer for layer in model.centres.layers])
    with_them = [logits(model, kv) for kv in ("f32", "bf16", "f16")]
    int8 = logits(model, "int8")
    model.centres = None
    assert all(torch.equal(a, logits(model, kv)) for a, kv in zip(with_them, ("f32", "bf16", "f16"), strict=True))
    assert not torch.equal(int8, logits(model, "int8"))


@pytest.mark.weights
def test_smollm2_is_closer_to_itself_with_them(smollm2_in, monkeypatch):
    """int8 rows: the KL divergence from f32 rows, with centres, without, and with centres on the wrong side."""
    model = smollm2_in("f32")
    tokens = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics))[20_000:22_000])[:256]

    def run(kv, centres):
        monkeypatch.setattr(model, "centres", centres)
        with model.cache(kv, shares=False).open() as sequence:
            return model.run([(sequence, tokens)], every=True).log_softmax(-1)

    found = model.centres
    want = run("f32", found)
    given = (found, None, Centres([-layer for layer in found.layers]))
    right, none, wrong = ((want.exp() * (want - run("int8", centres))).sum(-1).mean() for centres in given)
    assert right <= 0.8 * none < wrong, f"{right:.1e} with, {none:.1e} without, {wrong:.1e} on the wrong side"
