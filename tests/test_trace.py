"""What `kvik trace` records: what is counted is what ran, and what is looked at is what was stored."""

import dataclasses

import pytest
import torch

from helpers import Toy, make_cache, sees, shapes, text
from kvik.errors import ContextError, ModelError, UsageError
from kvik.models.watch import Watch
from kvik.ops import codecs
from kvik.plan.work import Arithmetic
from kvik.trace import record
from kvik.trace.observe import Tally
from kvik.trace.recording import Again
from kvik.trace.summary import states
from traces import ALL, MODELS, TINY, VOCAB, over_families, over_specs, rows_of, tiny, traced

# What is counted.


def check_counts(model, tokens, kv="bf16", prefill=1):
    """Every step's counts, with a cache and without, are those of plan/work.py's formula."""
    arithmetic = Arithmetic.of(model, kv)
    frames = list(record(model, tokens, kv=kv, prefill=prefill))
    assert [frame.length for frame in frames] == list(range(prefill, len(tokens) + 1))
    for frame in frames:
        for counted, cached in ((frame.cached, True), (frame.recomputed, False)):
            want = arithmetic.text(frame.length, cached=cached, prefill=prefill)
            assert (counted.rows.sum(), counted.pairs.sum()) == (want.rows, want.pairs), (frame.length, cached)
    return frames[-1]


@pytest.mark.parametrize("kv", ["bf16", "int8+window:4,sinks:2", "bf16; layers 1 heads 0: int8+window:5"])
@over_families
def test_counts_are_those_of_the_formula(family, kv):
    check_counts(MODELS[family], text(9), kv, 4)


@pytest.mark.parametrize(("length", "prefill"), [(1, 1), (2, 1), (11, 1), (7, 7), (70, 67), (131, 128)])
def test_counts_are_those_of_the_formula_at_any_length(length, prefill):
    check_counts(TINY, text(length), "bf16", prefill)


def test_six_tokens_one_at_a_time():
    last = check_counts(TINY, text(6))
    assert (last.cached.rows == 6).all() and (last.recomputed.rows == 21).all()
    assert (last.cached.pairs == 21).all() and (last.recomputed.pairs == 56).all()


@pytest.mark.parametrize("call", ["append", "attend"])
def test_work_that_is_done_twice_is_counted_twice(call, monkeypatch):
    def twice(self, *arguments, **options):
        getattr(super(Twice, self), call)(*arguments, **options)
        return getattr(super(Twice, self), call)(*arguments, **options)

    Twice = type("Twice", (Watch,), {call: twice})
    honest = TINY.decoder.forward
    monkeypatch.setattr(TINY.decoder, "forward", lambda step, *rest: honest(Twice(step), *rest))
    with sees():
        check_counts(TINY, text(6))


# Is it the same?


def check_same(kv, family="llama", prefill=1, length=12):
    """A step differs from a recomputation of its whole text by exactly nothing."""
    for frame in record(MODELS[family], text(length), kv=kv, prefill=prefill, layers=ALL):
        assert frame.same.largest == 0, (kv, frame.length)
        assert (frame.plain.largest == 0) == (kv == "f32"), (kv, frame.length)


@over_specs
def test_a_step_is_bit_for_bit_a_recomputation(kv):
    check_same(kv)


@over_families
def test_a_step_is_bit_for_bit_a_recomputation_in_every_family_and_over_tiles(family):
    check_same("k8v4", family, length=7)
    check_same("int8+window:40,sinks:3; page 16", family, prefill=127, length=130)


def test_a_recomputation_of_another_text_is_seen(monkeypatch):
    honest = Again.run
    monkeypatch.setattr(Again, "run", lambda self, tokens: honest(self, [*tokens[:-1], tokens[-1] ^ 1]))
    with sees():
        check_same("bf16")


def test_rows_that_share_a_scale_are_seen(monkeypatch, plain):
    def shared(x):
        scale = (x.abs().amax() / 127).to(torch.bfloat16).expand(*x.shape[:-1], 1)
        return (x / scale).round().to(torch.int8).view(torch.uint8), scale.contiguous().view(torch.uint8)

    monkeypatch.setattr(codecs, "_int8", shared)
    with sees():
        check_same("int8")


def test_attention_that_differs_is_seen_where_logits_do_not(monkeypatch):
    frame = list(record(TINY, text(3), layers=ALL))[-1]
    assert dataclasses.replace(frame.plain, logits=0.0).largest == frame.plain.attention > 0


# What is looked at.


def check_weights(trace):
    """Weights add up to 1 over the rows that are seen, and mix the stored values to what attention gave."""
    for layer in ALL:
        v = rows_of(trace, layer)[1].repeat_interleave(trace.heads // trace.lanes, dim=0)
        for look in (frame.looks[layer] for frame in trace.frames):
            weights = look.weights.transpose(0, 1)  # [H, T, n]
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]), atol=1e-5, rtol=0)
            mixed = (weights @ v[:, : weights.shape[2]]).transpose(0, 1)
            torch.testing.assert_close(mixed, look.out, atol=2e-6, rtol=1e-4)
            seen = look.seen.repeat_interleave(trace.heads // trace.lanes, dim=0)
            assert (weights[~seen] == 0).all() and (weights[seen] > 0).all()


@over_specs
def test_weights_times_values_are_the_output(kv, plain):
    check_weights(traced(text(11), kv=kv, prefill=3))


@over_families
def test_weights_times_values_are_the_output_in_every_family_and_over_tiles(family, plain):
    check_weights(traced(text(20), family, kv="k8v4", prefill=17))
    check_weights(traced(text(150), family, kv="bf16+window:30,sinks:2; page 16", prefill=149))


def test_weights_of_other_rows_are_seen():
    trace = traced(text(9))
    look = trace.frames[5].looks[0]
    look.weights[0, 1] = look.weights[0, 1].flip(0)
    with sees():
        check_weights(trace)


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"bias": torch.randn(4, 7)}])
def test_weights_know_softcap_and_bias(options):
    layers = shapes(layers=1)
    cache, toy = make_cache(layers=layers), Toy(layers)
    tally = Tally(cache.spec, 4, [0])
    with cache.open() as sequence:
        with sequence.append(text(12)) as step:
            watch = tally.watch(step)
            rows = {name: toy.row(name, 0, step.tokens, step.positions) for name in "kvq"}
            watch.append(0, k=rows["k"], v=rows["v"])
            out = watch.attend(0, rows["q"], scale=0.25, **options).out
        stored = sequence.read(0)
    seen = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 12, 12)
    weights = tally.asked[0].weights(stored["k"], seen, cache.spec.groups * 2)
    v = stored["v"].repeat_interleave(2, dim=0)
    torch.testing.assert_close(torch.einsum("thn,hnd->thd", weights, v), out, atol=1e-5, rtol=1e-4)


@over_specs
def test_the_rows_shown_are_those_that_are_stored(kv):
    tokens = text(12)
    trace = traced(tokens, kv=kv)
    with TINY.cache(kv, shares=False).open() as sequence:
        TINY.run([(sequence, tokens)])
        for layer in ALL:
            stored = sequence.read(layer)
            for name, rows in zip("kv", rows_of(trace, layer), strict=True):
                assert torch.equal(rows, stored[name])


def test_a_window_hides_rows_and_drops_them_by_the_page():
    trace = traced(text(40), kv="bf16+window:4,sinks:1; page 16; layers 1: bf16", prefill=38)
    look = trace.frames[-1].looks[0]
    assert states(look, 0) == ["seen"] + ["hidden"] * 15 + ["gone"] * 16 + ["hidden"] * 4 + ["seen"] * 4
    assert states(trace.frames[-1].looks[1], 0) == ["seen"] * 40
    assert trace.hides and not traced(text(3), "mistral").hides
    assert states(traced(text(9), "mistral").frames[-1].looks[0], 0) == ["hidden"] * 4 + ["seen"] * 5


def test_bytes_and_guesses_are_the_sequences_own():
    tokens = text(7)
    frames = traced(tokens, kv="k8v4").frames
    with TINY.cache("k8v4", shares=False).open() as sequence:
        for frame in frames:
            logits = TINY.run([(sequence, frame.tokens)])[0]
            sequence.settle()
            assert frame.nbytes == sequence.nbytes
            assert frame.guesses[0].token == int(logits.argmax())
            assert frame.guesses[0].probability == pytest.approx(float(logits.softmax(-1).max()), rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "no tokens"),
        ([1] * 513, {}, "513 tokens.*512 at the most"),
        ([1, 2], {"prefill": 3}, "prefill 3: the text has 2 tokens; use 1 to 2"),
        ([1, 2], {"prefill": 0}, "prefill 0"),
        ([1], {"layers": [2]}, "layer 2: tiny has layers 0 to 1"),
    ],
)
def test_what_cannot_be_traced_is_refused_before_anything_runs(tokens, options, message):
    with pytest.raises(UsageError, match=message):
        record(TINY, tokens, **options)


def test_a_text_beyond_the_context_is_refused(monkeypatch):
    monkeypatch.setattr("kvik.trace.recording.MOST_TOKENS", 1000)
    with pytest.raises(ContextError, match="601 tokens"):
        record(TINY, [1] * 601)


def test_a_model_that_gives_no_numbers_is_refused():
    broken = tiny()
    with torch.inference_mode():
        broken.decoder.norm.weight[3] = torch.nan
    with pytest.raises(ModelError, match=r"token 0 gives is no number.*--weights f32"):
        next(record(broken, [1, 2]))


def test_a_recomputation_that_gives_no_numbers_is_infinitely_far(monkeypatch):
    monkeypatch.setattr(Again, "run", lambda self, tokens: torch.full((VOCAB,), torch.nan))
    assert next(record(TINY, [1], layers=())).same.largest == torch.inf


# Rows that a policy lets go.

POLICIES = [
    ("int8+snapkv:25%,sinks:1,recent:2,last:8; page 16", 37),
    ("k8v4+ada(expected):40%,sinks:1,recent:2; page 16", 48),
    ("f32+h2o:50%,sinks:1,recent:2,every:5; page 16", 33),
    ("f32+keydiff:12rows,sinks:1,recent:2,every:6; page 16", 20),
    ("int4+window:9; layers 1 heads 0: bf16+rkv:30%,sinks:1,recent:2; page 16", 40),
]
over_policies = pytest.mark.parametrize(("kv", "prefill"), POLICIES)


@over_policies
def test_every_pair_row_and_bit_is_right_where_a_policy_lets_rows_go(kv, prefill, plain):
    trace, tokens = traced(text(60), kv=kv, prefill=prefill), text(60)
    check_weights(trace)
    arithmetic = dataclasses.replace(Arithmetic.of(TINY, kv), prompt=prefill)
    for frame in trace.frames:
        assert frame.same.largest == 0, frame.length
        want = arithmetic.text(frame.length)
        assert (frame.cached.rows.sum(), frame.cached.pairs.sum()) == (want.rows, want.pairs), frame.length
        assert (frame.phase == "prefill") == (frame.start < prefill)
    assert trace.prompt == prefill and trace.hides == "every row"
    assert trace.frames[-1].plain.largest > 0
    with TINY.cache(kv, shares=False).open(tokens[:prefill]) as sequence:
        for frame in trace.frames:
            TINY.run([(sequence, frame.tokens)])
            sequence.settle()
            assert frame.nbytes == sequence.nbytes
            for layer in ALL:
                rows, held = sequence.read(layer), frame.looks[layer].held
                there = torch.zeros_like(held)
                there[:, rows["positions"]] = ~rows["k"].isnan().all(-1)
                assert torch.equal(held, there)
    gone = [states(trace.frames[-1].looks[layer], 0).count("gone") for layer in ALL]
    assert gone[1] > 10


def test_the_prompt_goes_in_by_the_steps_that_a_policy_allows():
    trace = traced(text(20), kv="bf16+keydiff:12rows,sinks:1,recent:2,every:6; page 16", prefill=14)
    assert [len(frame.tokens) for frame in trace.frames] == [6, 6, 2, *[1] * 6]
    assert [frame.phase for frame in trace.frames] == ["prefill"] * 3 + ["decode"] * 6
    one = traced(text(20), kv="bf16+snapkv:25%", prefill=14)
    assert [len(frame.tokens) for frame in one.frames] == [14, *[1] * 6] and one.prompt == 14


def test_a_row_that_was_let_go_and_is_looked_at_is_seen(monkeypatch, plain):
    monkeypatch.setattr(Tally, "settled", lambda *_: None)
    with sees():
        test_every_pair_row_and_bit_is_right_where_a_policy_lets_rows_go(*POLICIES[0], None)
