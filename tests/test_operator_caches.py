"""Operators decode through kvik's pages exactly as they see a whole text: in f64 to 1e-10, at every step."""

import pytest
import torch

from kvik.cache.spec import Spec
from kvik.errors import ContextError, SequenceError, SpecError
from kvik.models.operators.pairs import mixed, scores
from operators import CUT, HEADS, SUBSETS, Halves, by_definition, cache_for, drawn, fed, inputs

EXACT = 1e-10
FULL = [f"translution:{s}" for s in SUBSETS]
LOW = [f"lor:{s},2" for s in SUBSETS]
RANGES = [f"bucketed:{s},8" for s in SUBSETS] + ["bucketed:qkv,1", "bucketed:qkv,3", "bucketed:qkv,40"]
ALL = [*FULL, *LOW, *RANGES, "convolution:3", "attention", "attention:rotary"]
SOME = ["translution:qkv", "translution:v", "lor:qkv,2", "bucketed:qkv,8", "convolution:3"]


def away(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("word", ALL)
def test_steps_are_the_whole_text_in_f64(word):
    operator, x = drawn(word), inputs()
    cache = cache_for(operator)
    with cache.open() as sequence:
        assert away(fed(operator, sequence, x), operator.mix(x[None])[0]) < EXACT
    cache.check()


@pytest.mark.parametrize("word", ALL)
def test_and_token_by_token_in_f32_as_it_is_served(word):
    operator, x = drawn(word, double=False), inputs(double=False)
    with cache_for(operator, halves=False).open() as sequence:
        assert away(fed(operator, sequence, x, (1,) * 40, False), operator.mix(x[None])[0]) < 2e-6


@pytest.mark.parametrize("word", SOME)
def test_forks_and_trims(word):
    operator, x, other = drawn(word), inputs(), inputs(seed=9)
    branch = torch.cat((x[:20], other[20:]))
    sequence = cache_for(operator).open()
    fed(operator, sequence, x[:20], (20,))
    with sequence.fork() as twin:
        assert away(fed(operator, twin, other[20:], (3, 17)), operator.mix(branch[None])[0, 20:]) < EXACT
    assert away(fed(operator, sequence, x[20:], (20,)), operator.mix(x[None])[0, 20:]) < EXACT
    back = 20
    if word in ("convolution:3", "bucketed:qkv,8"):  # windows of theirs have dropped a page by now
        with pytest.raises(SequenceError, match="rows were dropped"):
            sequence.trim(back)
        with cache_for(operator).open() as shorter:
            fed(operator, shorter, x[:30], (30,))
            shorter.trim(back)
            assert away(fed(operator, shorter, other[20:30], (10,)), operator.mix(branch[None])[0, 20:30]) < EXACT
        return
    sequence.trim(back)
    assert away(fed(operator, sequence, other[20:], (20,)), operator.mix(branch[None])[0, 20:]) < EXACT


@pytest.mark.parametrize("word", SOME)
def test_a_known_prefix_is_found(word):
    operator, x, tokens = drawn(word), inputs(), list(range(40))
    cache = cache_for(operator)
    with cache.open(tokens) as sequence:
        fed(operator, sequence, x, (40,), tokens=tokens)
    with cache.open(tokens) as sequence:
        assert sequence.cached >= 32
        at = sequence.cached
        got = fed(operator, sequence, x[at:], (40 - at,), tokens=tokens[at:])
        assert away(got, operator.mix(x[None])[0, at:]) < EXACT
    cache.check()


@pytest.mark.parametrize("word", SOME)
def test_several_sequences_in_one_step(word):
    operator, texts = drawn(word), [inputs(), inputs(seed=5)[:23]]
    cache = cache_for(operator)
    sequences = [cache.open(), cache.open()]
    fed(operator, sequences[0], texts[0][:30], (30,))
    with cache.step([(sequences[0], [1] * 10), (sequences[1], [1] * 23)]) as step:
        got = operator.step(Halves(step), 0, torch.cat((texts[0][30:], texts[1])))
    want = torch.cat((operator.mix(texts[0][None])[0, 30:], operator.mix(texts[1][None])[0]))
    assert away(got, want) < EXACT


def test_a_window_hides_what_is_further_away_and_frees_it():
    """Over rows that a window of 10 shows, each query's own text is those rows: offsets beyond are never asked for."""
    operator, x = drawn("translution:qkv", 10), inputs(200)
    cache = cache_for(operator, "f32+window:10")
    sequence = cache.open()
    got = fed(operator, sequence, x, (9, 1, 40, 150))
    for at in (3, 9, 10, 57, 199):
        assert away(got[at], by_definition(operator, x[max(at - 9, 0) : at + 1])[-1]) < EXACT
    assert sum(table.pages.size for table in sequence.tables) <= 2
    with pytest.raises(ContextError, match="matrices for 10 offsets"):
        fed(operator, cache_for(operator).open(), x, (11,))


def test_sinks_stay_at_their_true_distance():
    operator, x = drawn("lor:qkv,2", 100), inputs(100)
    with cache_for(operator, "f32+window:8,sinks:3").open() as sequence:
        got = fed(operator, sequence, x, (100,))
    pairs = operator.pairs(x[None])
    at = torch.arange(100)
    back = at[:, None] - at
    seen = (back >= 0) & ((back < 8) | (at < 3))
    object.__setattr__(pairs, "hidden", ~seen)
    assert away(got, operator.mix(x[None])[0]) < EXACT


@pytest.mark.parametrize("word", ["translution:qkv", "translution:k", "lor:qkv,2"])
def test_rows_in_int8_are_read_as_they_are_stored(word):
    """Keys and values are those of the stored rows, a token's own included; queries are of the token itself."""
    operator, x = drawn(word, double=False), inputs(double=False)
    sequence = cache_for(operator, "int8", halves=False).open()
    got = fed(operator, sequence, x, CUT, False)
    assert away(got, operator.mix(x[None])[0]) < 0.05
    if word != "translution:qkv":
        return
    stored = sequence.read(0)["x"][0]
    assert 1e-4 < away(stored, x) < 0.02
    pairs = operator.pairs(x[None])
    a = scores(x[None], stored[None], operator.q.weight, operator.k.weight, pairs, HEADS) * operator.scale
    assert away(got, mixed(a.softmax(-1), stored[None], operator.v.weight, pairs)[0]) < 2e-6


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4"])
def test_ranges_take_any_codec(kv):
    """Rows that stand for no token stay hidden in every codec: a channel of -30,000 beside keys of size 1."""
    operator, x = drawn("bucketed:qkv,8", double=False), inputs(double=False)
    with cache_for(operator, kv, halves=False).open() as sequence:
        got = fed(operator, sequence, x, CUT, False)
    assert away(got, operator.mix(x[None])[0]) < {"bf16": 0.02, "int8": 0.03, "int4": 0.4}[kv]
    assert away(got[:2], operator.mix(x[None])[0, :2]) < {"bf16": 0.01, "int8": 0.02, "int4": 0.3}[kv]


def test_ranges_hold_each_token_once():
    """k and v of every token, x of those with a boundary before them, and at most a page more for each lane."""
    operator = drawn("bucketed:qkv,8", 64)
    shapes = operator.shapes()
    assert operator.starts == (0, 1, 2, 3, 4, 8, 16, 32)
    assert [s.window for s in shapes] == [33, 4, 8, 16, None] and {s.use for s in shapes} == {"delay"}
    spec = Spec.parse("bf16", shapes)
    more = spec.nbytes(4096).payload - spec.nbytes(2048).payload
    assert more == 2048 * 2 * (2 * operator.m + 2 * HEADS)


def test_what_no_policy_can_weigh_is_refused():
    for word, kv, named in (
        ("translution:qkv", "bf16+snapkv:25%", "reads its rows back itself"),
        ("lor:qkv,2", "bf16+h2o:25%", "reads its rows back itself"),
        ("bucketed:qkv,8", "bf16+snapkv:25%", "reads its rows back itself"),
        ("bucketed:qkv,8", "bf16+window:64", "leave by its ranges of offsets"),
        ("translution:qkv", "bf16+window:16,sinks:4,relative", "no rotary"),
        ("translution:qkv", "k8v4", "keeps x"),
    ):
        with pytest.raises(SpecError, match=named):
            cache_for(drawn(word), kv, halves=False)


@pytest.mark.parametrize("word", ["bucketed:qkv,8", "bucketed:k,5", "convolution:3"])
def test_texts_longer_than_all_windows(word):
    """Token by token far beyond the last boundary: rows of x and of ranges leave when nobody asks for them any more."""
    operator, x = drawn(word, double=False), inputs(150, double=False)
    with cache_for(operator, halves=False).open() as sequence:
        got = fed(operator, sequence, x, (1,) * 150, False)
        held = sum(table.pages.size for table in sequence.tables)
    assert away(got, operator.mix(x[None])[0]) < 5e-6
    assert held <= 2 if "conv" in word else held < 2 * len(operator.shapes()) * HEADS + 2 * 5
