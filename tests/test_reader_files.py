"""Models that read a source from files: layouts of several ages, settings, and `kvik run` over a folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, processors
from tokenizers.pre_tokenizers import ByteLevel

import readers
from kvik.engine.generation import Generation, Request, ask, encode_prompt, generate, opened
from kvik.engine.sampling import Sampling
from kvik.errors import ConfigError, UsageError, WeightsError
from kvik.models import families
from kvik.models.files.folder import load
from kvik.models.files.weights import check
from kvik.models.model import Model
from kvik.models.model import load as load_model
from readers import READERS, drawn, ours, their_logits, tokens
from test_cli import in_process
from test_readers import read
from test_sentencepieces import IDS, spm

MEMORY = 16 << 20


def saved(folder, theirs, change=lambda tensors: tensors, **settings):
    """A transformers folder; its tensors and settings changed."""
    theirs.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({n: t.clone() for n, t in change(tensors).items()}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return folder


def check_folder(folder, theirs):
    loaded = load(folder)
    model = Model(loaded.config, loaded.tensors, weights="f32")
    source, text = readers.source(model, 20, 1), tokens(30, 2)
    assert (read(model, source, text) - their_logits(theirs, source, text)).abs().max() < 1e-4


@pytest.mark.parametrize("name", READERS)
def test_folders_of_transformers_today_and_of_its_version_4_are_the_same_model(name, tmp_path):
    theirs = drawn(name)
    check_folder(saved(tmp_path / "new", theirs), theirs)
    untied = name in ("t5 v1.1", "mt5")
    old = {"scale_decoder_outputs": "absent", "tie_word_embeddings": not untied, "is_encoder_decoder": True}
    check_folder(saved(tmp_path / "old", theirs, **old), theirs)


def copies(table, *names):
    return lambda tensors: tensors | dict.fromkeys(names, tensors[table])


EXTRA = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
STACKS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
LAYOUTS = {
    "every copy of the embedding": ("t5", copies("shared.weight", *STACKS, "lm_head.weight")),
    "a bias that nothing reads": ("t5", lambda tensors: tensors | {EXTRA: torch.randn(32, 4)}),
    "another copy's name alone": (
        "t5", lambda tensors: {STACKS[1] if n == "shared.weight" else n: t for n, t in tensors.items()}
    ),
    "no prefix": ("bart", lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()}),
    "copies beside it": (
        "bart", copies("model.shared.weight", *(f"model.{name}" for name in STACKS), "lm_head.weight")
    ),
    "positions that follow": (
        "marian", lambda tensors: tensors | {"model.encoder.embed_positions.weight": torch.zeros(300, 64)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_of_the_same_model_load(layout, tmp_path):
    name, change = LAYOUTS[layout]
    theirs = drawn(name)
    check_folder(saved(tmp_path / "x", theirs, change), theirs)


def test_a_head_that_is_not_there_is_the_embedding_unscaled(tmp_path):
    """What transformers 5 makes of a new T5 whose settings say untied."""
    theirs = drawn("t5", feed_forward_proj="gated-gelu")
    theirs.config.scale_decoder_outputs = False
    check_folder(saved(tmp_path / "x", theirs), theirs)


def test_a_model_without_its_heads_bias_has_none(tmp_path):
    theirs = drawn("bart")
    theirs.final_logits_bias.zero_()
    folder = saved(tmp_path / "x", theirs, lambda t: {n: x for n, x in t.items() if n != "final_logits_bias"})
    check_folder(folder, theirs)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    differ = saved(tmp_path / "a", drawn("t5"), lambda tensors: tensors | {STACKS[0]: tensors["shared.weight"] + 1})
    with pytest.raises(WeightsError, match=r"shared.weight and encoder.embed_tokens.weight hold different values"):
        load(differ)
    extra = saved(tmp_path / "b", drawn("bart"), lambda tensors: tensors | {"model.more": torch.zeros(2)})
    with pytest.raises(WeightsError, match=r"1 unknown: model.more"):
        load(extra)
    less = saved(tmp_path / "c", drawn("t5"), lambda t: {n: x for n, x in t.items() if "wi" not in n})
    with pytest.raises(WeightsError, match=r"5 missing: encoder.block.0.layer.1.DenseReluDense.wi.weight"):
        load(less)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("t5", "feed_forward_proj", "gated-sigmoid"), ("t5", "feed_forward_proj", "gated-gelu-x"),
        ("t5", "relative_attention_num_buckets", 3), ("t5", "relative_attention_max_distance", 16),
        ("t5", "is_encoder_decoder", False), ("t5", "d_kv", 0), ("t5", "tie_encoder_decoder", True),
        ("bart", "normalize_before", True), ("bart", "normalize_embedding", False), ("bart", "add_bias_logits", True),
        ("bart", "static_position_embeddings", True), ("marian", "static_position_embeddings", False),
        ("marian", "normalize_embedding", True), ("bart", "activation_function", "sigmoid"), ("bart", "d_model", 66),
        ("marian", "decoder_start_token_id", 157), ("marian", "decoder_start_token_id", None),
    ],
)  # fmt: skip
def test_settings_that_kvik_does_not_compute_are_refused_in_one_line(name, key, value):
    values = drawn(name).config.to_dict()
    with pytest.raises(ConfigError, match="start_id" if value == 157 else key) as caught:
        families.from_hf({**values, key: value}, None, "x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_a_readers_config_survives_json(name):
    config = families.from_hf(drawn(name).config.to_dict(), {"bad_words_ids": [[5, 6], [7]], "min_length": 3}, "x")
    assert families.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 that reads bytes: a source ends with its end token, as T5's tokenizer has it."""
    folder = tmp_path_factory.mktemp("t5") / "tiny-t5"
    saved(folder, drawn("t5", vocab_size=260, decoder_start_token_id=258, eos_token_id=256))
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))} | {"</s>": 256, "<pad>": 258}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 256)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_kvik_run_answers_a_source(folder, monkeypatch, capsys):
    arguments = ("run", "-m", folder, "--max-tokens", 12, "--kv", "int8; cross: f32", "--json", "a text to translate")
    assert in_process(monkeypatch, *arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["source_tokens"], facts["prompt_tokens"], facts["new_tokens"]) == (20, 1, 12)
    kept = facts["kv_tokens"]
    assert facts["kv_bytes"] == facts["kv_bytes_formula"] == 3 * 4 * 48 * (kept + 20 * 4)
    assert in_process(monkeypatch, *(a for a in arguments if a != "--json")) == 0
    told = capsys.readouterr()
    assert facts["text"] in told.out and "20 source + 12 new tokens (length)" in told.err
    assert f"({kept} tokens, 20 rows of the source)" in told.err


def test_kvik_run_translates_with_marians_own_files(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "marian", drawn("marian"))
    (tmp_path / "marian" / "source.spm").write_bytes(spm())
    (tmp_path / "marian" / "vocab.json").write_text(json.dumps(IDS))
    arguments = ("run", "-m", tmp_path / "marian", "--max-tokens", 9, "--json", ">>deu<<xy xy")
    assert in_process(monkeypatch, *arguments) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["source_tokens"], facts["token_ids"][-1]) == (4, 0), "forced_eos_token_id ends it"


def test_an_answer_is_transformers_with_and_without_a_cache(folder):
    from transformers import T5ForConditionalGeneration

    model = load_model(folder, weights="f32")
    request = ask(model, "a text to translate", max_tokens=30)
    assert request.source[-1] == 256 and list(request.prompt) == [258]
    theirs = T5ForConditionalGeneration.from_pretrained(folder)
    want = theirs.generate(torch.tensor([request.source]), max_new_tokens=30, do_sample=False, use_cache=False)[0]
    with opened(model, model.cache("f32", memory=MEMORY), request) as sequence:
        got = Generation(model, request, sequence).run()
    assert got.token_ids == want.tolist()[1 : 1 + len(got.token_ids)]
    hot = Sampling(temperature=1.0, seed=3)
    for sampling in (Sampling(), hot):
        options = dict(max_tokens=20, sampling=sampling)
        with_cache, without = ("".join(generate(model, "some text", kv=kv, **options)) for kv in ("f32", "none"))
        assert with_cache == without


def test_what_the_makers_ask_holds_in_an_answer_too():
    theirs = drawn("marian")
    theirs.generation_config.update(forced_eos_token_id=0, bad_words_ids=[[116], [138]], no_repeat_ngram_size=2)
    config = families.from_hf(theirs.config.to_dict(), theirs.generation_config.to_dict(), "x")
    model = Model(config, check(theirs.state_dict(), config), weights="f32", tokenizer=_Letters())
    source = tokens(20, 1)
    want = theirs.generate(torch.tensor([source]), max_new_tokens=15, do_sample=False, use_cache=False)[0].tolist()
    request = Request([config.start_id], 15, source=source)
    with opened(model, model.cache("f32", memory=MEMORY), request) as sequence:
        got = Generation(model, request, sequence).run()
    assert got.token_ids == want[1:] and got.token_ids[-1] == 0
    assert got.finish_reason == "length" and "raise --max-tokens" in got.note, "its end was forced"


class _Letters:
    """A tokenizer that only writes."""

    def stream(self):
        return self

    def step(self, token):
        return "x"

    def finish(self):
        return ""


def test_commands_that_continue_a_text_say_so(folder, monkeypatch, capsys):
    for arguments in (["chat"], ["trace", "x"], ["bench", "cache"], ["eval"], ["tune", "--max-kl", "1"]):
        assert in_process(monkeypatch, *arguments, "-m", folder) == 2, arguments
        told = capsys.readouterr().err
        assert "tiny-t5 answers a source and continues no text" in told and len(told.splitlines()) == 1
    assert in_process(monkeypatch, "run", "-m", folder, "--raw", "x") == 2
    assert "leave --raw out" in capsys.readouterr().err
    with pytest.raises(UsageError, match="continues no prompt"):
        encode_prompt(load_model(folder), "x", raw=True)
    two = ours(drawn("marian, two vocabularies"))
    with pytest.raises(UsageError, match="token ids of its own for sources"):
        ask(two, "x")
