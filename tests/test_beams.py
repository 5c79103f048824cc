"""Beam search against transformers' generate, token by token; what makers ask of tokens; and what beams share."""

from itertools import product

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import readers
from helpers import listening, pairwise
from kvik import events
from kvik.cache.cache import Cache
from kvik.engine.beams import Beam, beams
from kvik.errors import BudgetError, ConfigError, ContextError, UsageError
from kvik.models import families
from kvik.models.constraints import Constraints
from kvik.models.fields import Fields
from kvik.models.files.weights import check
from kvik.models.model import Model
from readers import drawn, generate, ours, tokens

MEMORY = 16 << 20
NEW = 20


def llama():
    torch.manual_seed(0)
    sizes = dict(vocab_size=157, hidden_size=64, intermediate_size=112, num_hidden_layers=2, max_position_embeddings=99)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.1)
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    config = families.from_hf(theirs.config.to_dict(), None, "tiny")
    return theirs, Model(config, {n: theirs.state_dict()[n] for n in config.tensor_shapes()}, weights="f32")


PAIRS = ["t5", "bart", "marian", "whisper", "llama"]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    """(transformers' model, ours); their makers' wishes about tokens taken away."""
    if request.param == "llama":
        return llama()
    theirs = drawn(request.param)
    theirs.config.forced_eos_token_id = theirs.generation_config.forced_eos_token_id = None
    return theirs, ours(theirs)


@torch.no_grad()
def their_beams(theirs, given, ends, count, **options):
    """[(new tokens, score)], best first."""
    out = generate(
        theirs, given, attention_mask=torch.ones(1, len(given)), num_beams=count, num_return_sequences=count,
        max_new_tokens=NEW, do_sample=False, eos_token_id=ends or None, pad_token_id=1, return_dict_in_generate=True,
        output_scores=True, use_cache=not theirs.config.is_encoder_decoder, **options,
    )  # fmt: skip
    begun = 1 if theirs.config.is_encoder_decoder else len(given)
    return list(zip((row[begun:] for row in out.sequences.tolist()), out.sequences_scores.tolist(), strict=True))


def our_beams(model, given, ends, count, kv="f32", **options):
    cache = model.cache(kv, memory=MEMORY)
    source = None if model.reading is None else model.fill(cache, given)
    found = beams(
        model, cache, given if source is None else [], source=source, ends=ends, count=count, max_tokens=NEW, **options
    )
    cache.check()
    assert cache.books.in_use == 0, "all closed"
    return found


def compare(got, want, padding=1):
    assert len(got) == len(want)
    for beam, (row, score) in zip(got, want, strict=True):
        length = len(beam.token_ids)
        assert list(beam.token_ids) == row[:length] and set(row[length:]) <= {padding}
        assert beam.score == pytest.approx(score, rel=1e-5, abs=1e-5)


def some_ends(theirs, given):
    """Tokens that likely texts reach, early and late."""
    likely = their_beams(theirs, given, [], 4)
    return sorted({likely[0][0][3], likely[1][0][7], likely[3][0][12], 11})


PENALTIES, STOPPING, COUNTS = (1.0, 0.0, 2.5, -1.0), (True, False, "never"), (2, 4)
SETTINGS = list(product(PENALTIES, STOPPING, COUNTS))


@pairwise(pair=PAIRS, length_penalty=PENALTIES, early_stopping=STOPPING, count=COUNTS)
def test_beams_are_those_of_transformers(pair, length_penalty, early_stopping, count):
    theirs, model = pair
    seed = SETTINGS.index((length_penalty, early_stopping, count))
    given = readers.source(model, 11 + seed, seed)
    ends = some_ends(theirs, given)[: 1 + seed % 4]
    options = dict(length_penalty=length_penalty, early_stopping=early_stopping)
    got = our_beams(model, given, ends, count, **options)
    compare(got, their_beams(theirs, given, ends, count, **options))
    assert all(len(beam.token_ids) == NEW or beam.token_ids[-1] in ends for beam in got)


def test_texts_really_end_before_the_limit(pair):
    """Else the settings above would compare nothing but texts of one length."""
    theirs, model = pair
    given = readers.source(model, 11, 0)
    ends = some_ends(theirs, given)
    lengths = [{len(b.token_ids) for b in our_beams(model, given, ends, 4, length_penalty=p)} for p in (-1.0, 0.0, 2.5)]
    assert min(lengths[0]) < min(lengths[2]) <= NEW and len(set.union(*lengths)) > 3


@pytest.mark.parametrize("pair", ["t5", "whisper", "llama"], indirect=True)
@pytest.mark.parametrize(
    ("options", "constraints", "least"),
    [
        ({"no_repeat_ngram_size": 2}, {}, 0),
        ({"bad_words_ids": [[13], [20, 21], [116]]}, {}, 0),
        ({"min_length": 9}, {}, 0),
        ({"min_new_tokens": 9}, {}, 0),
        ({"min_new_tokens": 9}, None, 9),
        ({"suppress_tokens": [116, 8]}, {}, 0),
        ({"begin_suppress_tokens": [116, 150, 90], "no_repeat_ngram_size": 3}, {}, 0),
    ],
    ids=str,
)
def test_wishes_of_a_models_makers_hold_as_in_transformers(pair, options, constraints, least):
    theirs, model = pair
    given = readers.source(model, 12, 3)
    ends = some_ends(theirs, given)
    made = Constraints() if constraints is None else Constraints.read(Fields(options, "x"), tuple(ends))
    got = our_beams(model, given, ends, 3, constraints=made, min_tokens=least)
    compare(got, their_beams(theirs, given, ends, 3, **options))


@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_forced_tokens_come_first_and_last_as_in_transformers(name):
    theirs, given = drawn(name), tokens(20, 1)
    wishes = dict(forced_bos_token_id=17, forced_eos_token_id=23)
    theirs.generation_config.update(**wishes)
    settings = {**theirs.generation_config.to_dict(), "eos_token_id": 23}
    config = families.from_hf(theirs.config.to_dict(), settings, "tiny")
    assert (config.constraints.first, config.constraints.last) == (17, (23,))
    model = Model(config, check(theirs.state_dict(), config), weights="f32")
    got = our_beams(model, given, [23], 3)
    compare(got, their_beams(theirs, given, [23], 3))
    assert {(b.token_ids[0], b.token_ids[-1]) for b in got} == {(17, 23)}


@pytest.mark.parametrize("kv", ["f32", "int8; cross: int4"])
def test_beams_share_pages_and_one_source(kv, monkeypatch):
    model = ours(drawn("t5"))
    cache = model.cache(kv, memory=MEMORY)
    heard, used = listening(cache), []
    source = model.fill(cache, tokens(100, 1))
    held = cache.books.kept
    run = Model.run

    def counted(self, chunks, **options):
        out = run(self, chunks, **options)
        used.append((len(chunks), cache.books.in_use))
        return out

    monkeypatch.setattr(Model, "run", counted)
    found = beams(model, cache, source=source, ends=(), count=5, max_tokens=80)
    assert [e.rows for e in heard if isinstance(e, events.Filled)] == [100]
    lanes = 3 * 4
    assert held == lanes * 4, "100 rows in pages of 32"
    assert used[0] == (1, held + lanes), "one prompt, whatever the number of beams"
    assert all(pages == held + 5 * lanes for count, pages in used[2:30]), "a page each, and one source"
    ages = len({beam.token_ids[:64] for beam in found})
    assert used[-1][1] <= held + lanes * (5 + 5 + ages) and all(len(b.token_ids) == 80 for b in found)
    assert cache.books.in_use == 0
    cache.check()


def test_beams_over_a_known_prompt_and_beside_others():
    theirs, model = llama()
    given = tokens(50, 2)
    want = their_beams(theirs, given, [11, 40], 3)
    cache = model.cache("f32", memory=MEMORY)
    for known in (0, 49):  # all but the last, though half of it lies in a page that is full of a beam
        opened = []
        cache.listen(lambda e, opened=opened: opened.append(e) if isinstance(e, events.Opened) else None)
        with cache.open() as other, other.append([5]) as step:
            _nothing(step)
        compare(beams(model, cache, given, ends=(11, 40), count=3, max_tokens=NEW), want)
        assert opened[-1].cached == known
    cache.check()


def _nothing(step):
    for layer in range(2):
        step.append(layer, k=torch.zeros(1, 2, 16), v=torch.zeros(1, 2, 16))


@pytest.mark.parametrize("kv", ["int8+window:12,sinks:2", "f32+keydiff:20rows,recent:4,every:8; page 16", "int4"])
def test_beams_run_under_any_spec(pair, kv):
    _, model = pair
    found = our_beams(model, readers.source(model, 11, 5), (11,), 3, kv)
    scores = [beam.score for beam in found]
    assert len(found) == 3 and scores == sorted(scores, reverse=True)


def test_an_error_leaves_nothing_open(monkeypatch):
    model = ours(drawn("t5"))
    cache = model.cache("f32", memory=MEMORY)
    source, fork, left = model.fill(cache, tokens(10)), Cache.fork, [7]

    def failing(self, sequence):
        left[0] -= 1
        if left[0] < 0:
            raise BudgetError("full", needed=2, available=1)
        return fork(self, sequence)

    monkeypatch.setattr(Cache, "fork", failing)
    with pytest.raises(BudgetError):
        beams(model, cache, source=source, count=5, max_tokens=30, ends=())
    assert cache.books.in_use == 0
    cache.check()


def test_what_cannot_be_is_refused():
    model = ours(drawn("bart"))
    cache = model.cache("f32", memory=MEMORY)
    source = model.fill(cache, [5])
    for options, named in (
        ({"count": 0}, "0 beams"), ({"max_tokens": 0}, "of 0 to 0"), ({"min_tokens": 9, "max_tokens": 8}, "9 to 8"),
        ({"early_stopping": "soon"}, "'soon'"), ({"count": 80}, "too many"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=named):
            beams(model, cache, source=source, **options)
    with pytest.raises(ContextError, match="301 tokens"):
        beams(model, cache, source=source, max_tokens=300)
    with pytest.raises(UsageError, match="prompt is empty"):
        beams(llama()[1], cache)
    assert cache.books.in_use == 0 and isinstance(beams(model, cache, source=source, max_tokens=1)[0], Beam)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("repetition_penalty", 1.2), ("encoder_no_repeat_ngram_size", 3), ("sequence_bias", [[[3], 2.0]]),
        ("forced_decoder_ids", [[1, 3]]), ("bad_words_ids", [3]), ("bad_words_ids", [[]]), ("bad_words_ids", 0),
        ("forced_bos_token_id", -1), ("min_length", "9"), ("guidance_scale", 2.0),
    ],
)  # fmt: skip
def test_wishes_that_cannot_be_met_are_refused_in_one_line(key, value):
    values = drawn("bart").config.to_dict()
    for settings in ({**values, key: value}, None), (values, {key: value}):
        with pytest.raises(ConfigError, match=key) as caught:
            families.from_hf(*settings, "x")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="constraints has token 157"):
        families.from_hf(values, {"bad_words_ids": [[5, 157]]}, "x")


def test_marians_padding_may_not_come_and_its_end_may():
    values = drawn("marian").config.to_dict()
    config = families.from_hf(values, {"bad_words_ids": [[156], [0]], "forced_eos_token_id": 0}, "x")
    assert config.constraints == Constraints(last=(0,), never=((156,),))
    assert config.start_id == 156
    assert families.from_json(config.to_json()) == config
