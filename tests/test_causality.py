"""Law 9 through whole models: appending tokens moves no stored row and no hidden state. It is why a cache is valid."""

import sys
from pathlib import Path

import pytest
import torch

import kvik
from encoders import encoder
from helpers import text
from test_laws import tiny

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from lenses import Alone, BothWays, States, moved, seen

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])
LENGTH, MORE = 40, 17


def check_causality(model, tokens, lens=States, kv="f32"):
    """Queries, keys, values and attention of every layer, and the logits, before and after more tokens came."""
    before, after = (seen(model, some, lens, kv) for some in (tokens[:-MORE], tokens))
    assert moved(before, after, list(range(len(tokens) - MORE))) == {}


@FAMILIES
@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kv", ["f32", "int8", "int4+window:20,sinks:2"])
def test_more_tokens_move_no_earlier_state(family, weights, kv):
    check_causality(tiny(family, weights), text(LENGTH), kv=kv)


@FAMILIES
def test_the_same_model_without_its_mask_moves_them_all(family):
    model, tokens = tiny(family, "f32"), text(LENGTH)
    with pytest.raises(AssertionError):
        check_causality(model, tokens, BothWays)
    before, after = seen(model, tokens[:-1], BothWays), seen(model, tokens, BothWays)
    found = moved(before, after, list(range(LENGTH - 1)))
    # The first layer's rows are functions of a token and its position; from its attention on all has met the new token.
    assert found == {name: LENGTH - 1 for name in before if name not in [(0, "q"), (0, "k"), (0, "v")]}


@FAMILIES
def test_stored_rows_are_bit_for_bit_what_they_were(family):
    model, tokens = tiny(family, "f32"), text(LENGTH)
    with model.cache("int8", memory=8 << 20).open() as sequence:
        model.run([(sequence, tokens[:-MORE])])
        before = [sequence.read(layer) for layer in range(model.config.layers)]
        for token in tokens[-MORE:]:
            model.run([(sequence, [token])])
        for layer, rows in enumerate(before):
            now = sequence.read(layer)
            assert all(torch.equal(now[name][:, : LENGTH - MORE], rows[name]) for name in ("k", "v"))


@FAMILIES
def test_tokens_meet_in_attention_alone(family):
    """Another token in one place: with attention all later ones change, without it only itself; no earlier one ever."""
    model, tokens, place = tiny(family, "f32"), text(LENGTH), 11
    other = [*tokens[:place], (tokens[place] + 1) % model.config.vocab_size, *tokens[place + 1 :]]
    earlier, later = list(range(place)), list(range(place + 1, LENGTH))
    for lens in (States, Alone):
        before, after = seen(model, tokens, lens), seen(model, other, lens)
        assert moved(before, after, earlier) == {}
        assert moved(before, after, [place])["logits"] == 1
        assert moved(before, after, later).get("logits", 0) == (len(later) if lens is States else 0)


def test_an_encoder_has_nothing_to_keep():
    """One more word, and every earlier state of a small BERT (random weights) is another, in every layer."""
    model, tokens = encoder("bert"), text(12)
    before, after = model.encode(tokens[:-1], every=True), model.encode(tokens, every=True)
    assert torch.equal(before[0], after[0, :-1]), "what enters the first layer knows of no neighbour"
    assert (before[1:] - after[1:, :-1]).abs().amax(dim=-1).min() > 1e-4
    assert model.spec("int8").nbytes(10**6).allocated == 0


@pytest.mark.weights
def test_smollm2_keeps_the_law_and_breaks_it_without_its_mask():
    model = kvik.load("smollm2", weights="int4")
    tokens = model.tokenizer.encode(
        "The cat is on the mat, and it sleeps there until the evening comes and it is dark."
    )
    check_causality(model, tokens, kv="bf16")
    with pytest.raises(AssertionError):
        check_causality(model, tokens, BothWays)
