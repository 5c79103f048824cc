"""What one more word moves: nothing in a decoder, everything in an encoder; and what is not so shows."""

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import kvik
from encoders import encoder
from kvik.errors import UsageError
from kvik.trace.context import SENTENCE, compare, split
from kvik.trace.context_view import draw_moved, part, render_moved
from test_laws import tiny

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "it", "was", "too", "small"]


class Words:
    """A tokenizer of whole words; `joins` are two that become one; an encoder's texts stand between 40 and 41."""

    def __init__(self, joins=()):
        self.joins = joins

    def encode(self, text, *, add_special_tokens=False):
        words = (text.replace(" ".join(self.joins), "".join(self.joins)) if self.joins else text).split()
        ids = [WORDS.index(word) if word in WORDS else 30 for word in words]
        return [40, *ids, 41] if add_special_tokens else ids

    def decode(self, ids, *, skip_special=True):
        return "".join({40: "[CLS]", 41: "[SEP]"}.get(i, WORDS[i] if i < len(WORDS) else "?") for i in ids)


def with_words(model, joins=()):
    model = copy.copy(model)
    model.tokenizer = Words(joins)
    return model


SENTENCE_HERE, WORD = "the cat sat on a mat and it was too", "small"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("weights", ["f32", "int4"])
def test_nothing_moves_in_a_decoder(family, weights):
    model = with_words(tiny(family, weights))
    found = compare(model, SENTENCE_HERE, WORD)
    assert found.moved.shape == (model.config.layers, 10)
    assert (found.moved.max(), found.changed, found.kept_changed, found.word_changed) == (0.0, 0, 0, 0)
    assert found.numbers == model.config.layers * 10 * model.config.hidden
    row = sum(width for _, width in model.decoder.layers[0].streams) * model.config.kv_heads
    assert found.kept == model.config.layers * 10 * row
    assert (found.computed, found.added, found.tokens) == (1, (WORD,), tuple(SENTENCE_HERE.split()))


class Leaks:
    """A layer that lets each token know of the mean of all: causality is gone."""

    def __init__(self, block):
        self.block = block

    def __call__(self, *given):
        x = self.block(*given)
        return x + 0.1 * x.mean(0)


def test_a_decoder_that_looked_ahead_would_be_seen():
    model = with_words(tiny("llama", "f32"))
    model.network = copy.copy(model.network)
    model.network.blocks = [Leaks(block) for block in model.network.blocks]
    found = compare(model, SENTENCE_HERE, WORD)
    assert (found.moved > 0).all()
    assert found.changed > 0.9 * found.numbers
    assert found.word_changed > 0, "the word alone has met no other"


def test_all_moves_in_an_encoder_by_what_its_states_say():
    model = with_words(encoder("bert"))
    found = compare(model, SENTENCE_HERE, WORD)
    before, after = (model.encode([40, *range(n), 41], every=True)[1:, : 1 + 10].double() for n in (10, 11))
    wanted = ((after - before).square().sum(2) / before.square().sum(2)).sqrt()
    torch.testing.assert_close(torch.tensor(found.moved), wanted)
    assert (found.moved > 1e-4).all()
    assert found.tokens == ("[CLS]", *SENTENCE_HERE.split())
    assert (found.added, found.computed, found.kept) == ((WORD,), 13, 0)
    assert found.changed > 0.99 * found.numbers


@pytest.mark.parametrize("model", ["llama", "bert"])
@pytest.mark.parametrize("word", ["small", "small cat"])
def test_a_word_that_its_tokenizer_joins_is_refused(model, word):
    plain = encoder("bert") if model == "bert" else tiny("llama", "f32")
    with pytest.raises(UsageError, match=f"joins '{word}' with what comes before it, .* take another --word"):
        compare(with_words(plain, joins=("too", "small")), SENTENCE_HERE, word)


def test_a_model_without_text_is_refused():
    with pytest.raises(UsageError, match="reads no text"):
        compare(encoder("vit"), SENTENCE_HERE, WORD)


def test_the_last_word_is_added_where_none_is_given():
    assert split(" a b  c ", None) == ("a b", "c")
    assert split("a b", " c ") == ("a b", "c")
    assert split("a", "b") == ("a", "b")
    for sentence, word in (("a", None), ("", None), (" ", "b"), ("a", " ")):
        with pytest.raises(UsageError, match="give at least two words"):
            split(sentence, word)


def both():
    return [compare(with_words(model), SENTENCE_HERE, WORD) for model in (tiny("llama", "f32"), encoder("bert"))]


def test_the_table_says_what_moved_and_what_it_means():
    console = Console(width=80, record=True, file=io.StringIO())
    found = both()
    render_moved(found, SENTENCE_HERE, WORD, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    assert f"1 to {len(found[0].moved)} 0 0 none" in flat
    for row in found[1].moved:
        assert f"{part(row.max())} {part(row.mean())} {found[1].tokens[row.argmax()]}" in flat
    assert f"0 of {found[0].numbers:,} numbers of earlier states are others" in flat
    assert f"cost 1 row, not 11: 0 of {found[0].kept:,} stored numbers changed" in flat
    assert "All 13 rows had to be computed again" in flat


def test_the_picture_shows_every_cell_of_an_encoder(tmp_path):
    found = both()
    draw_moved(found, SENTENCE_HERE, WORD, tmp_path / "moved.svg")
    draw_moved(found[:1], SENTENCE_HERE, WORD, tmp_path / "moved.png")
    assert (tmp_path / "moved.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "moved.svg").stat().st_size > 10_000


def test_figures_are_plain_json():
    told = json.loads(json.dumps([each.to_dict() for each in both()]))
    assert [each["both_sides"] for each in told] == [False, True]
    assert all(len(each["moved"][0]["tokens"]) == len(each["tokens"]) for each in told)
    assert told[1]["moved"][0]["layer"] == 1
    assert told[1]["moved"][0]["max"] == max(told[1]["moved"][0]["tokens"])


@pytest.mark.weights
def test_the_command_alone_compares_smollm2_and_minilm(kvik_here, loaded_once, tmp_path):
    done = kvik_here("compare-context", "--json", "--plot", tmp_path / "moved.png")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert f"{told['sentence']} {told['word']}" == SENTENCE
    causal, encodes = told["models"]
    assert (causal["changed"], causal["kept_changed"], causal["word_changed"]) == (0, 0, 0)
    assert [layer["max"] for layer in causal["moved"]] == [0.0] * 30
    assert (tmp_path / "moved.png").exists()
    page = (Path(__file__).parent.parent / "docs" / "encoders.md").read_text()
    for layer in encodes["moved"]:
        assert f"| {layer['layer']} | 0 | {part(layer['max'])} | {part(layer['mean'])} |" in page
    assert f"0 of {causal['numbers']:,} numbers are others" in page
    assert f"none of\nthe {causal['kept']:,} stored numbers changed" in page
    assert f"all {encodes['computed']} rows had to be computed again" in page


def test_a_lone_word_is_refused_in_a_line(kvik_here):
    done = kvik_here("compare-context", "word")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.weights
def test_the_default_sentence_is_about_it():
    """The reason for the sentence: of the earlier tokens that name no thing, `it` learns much of what the word says."""
    found = compare(kvik.load("minilm"), *split(SENTENCE, None))
    place = found.tokens.index("it")
    assert found.moved[:, place].max() > 2 * found.moved[:, found.tokens.index("trophy")].max()
