"""Rows leave by a policy: real pages, lane by lane; what stays is untouched, and is all that attention sees."""

import contextlib

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import Toy, make_cache, shapes, text
from kvik.cache import compaction
from kvik.cache.policy import apply
from kvik.engine.generation import prefill
from kvik.errors import BudgetError, SequenceError
from kvik.models import families
from kvik.models.model import Model
from kvik.models.watch import Watch

SIZES = dict(
    vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


KV = ["f32", "bf16", "int8", "int8-rot", "int4", "k8v4"]


SCALE = 0.25  # of the toy's scores


POLICIES = ["knorm:25%", "ada(knorm):30%", "keydiff:64rows", "snapkv:25%,last:16", "h2o:30%,recent:8"]


def opened(kv, prompt=300, layers=None, page=16, **options):
    layers = layers or shapes(layers=3, heads=3)
    toy, cache = Toy(layers), make_cache(kv, layers, page=page, **options)
    sequence = cache.open(text(prompt))
    return toy, cache, sequence


def feed(toy, sequence, tokens, piece=1000):
    """Appends and settles, wherever a policy asks for it; all outputs, [tokens, layers, heads, width]."""
    outs = []
    while tokens:
        at = sequence.next_trigger
        count = min(piece, len(tokens), 1000 if at is None else at - len(sequence))
        outs += toy.run([(sequence, tokens[:count])])
        sequence.settle()
        tokens = tokens[count:]
    return torch.cat(outs)


def held(sequence):
    """For each group, positions by lane."""
    out = []
    for table in sequence.tables:
        positions, _ = table.rows(len(sequence))
        out.append([lane[lane >= 0].tolist() for lane in positions])
    return out


def dense(toy, sequence, tokens, layer, kept, rows):
    """Attention of the last `len(tokens)` tokens over kept rows as stored, and over all rows from `kept` on, in f64."""
    start = len(sequence) - len(tokens)
    q = toy.row("q", layer, tokens, range(start, len(sequence))).double()
    stored, shared, outs = sequence.read(layer), toy.shared, []
    at = stored["positions"].numpy()
    for head in range(q.shape[1]):
        lane = head // shared
        mine = np.isin(at, rows[lane])
        k, v = (stored[name][lane][torch.from_numpy(mine)].double() for name in ("k", "v"))
        seen = at[mine][None] <= np.arange(start, len(sequence))[:, None]
        scores = (q[:, head] @ k.T) * SCALE
        outs.append(scores.masked_fill(~torch.from_numpy(seen), -torch.inf).softmax(-1) @ v)
    return torch.stack(outs, 1)


@pytest.mark.parametrize(
    ("kv", "policy"), [*((kv, POLICIES[0]) for kv in KV), *(("k8v4", policy) for policy in POLICIES[1:])]
)
def test_what_stays_is_what_attention_sees(kv, policy, ops):
    toy, cache, sequence = opened(f"{kv}+{policy}", shares=False)
    feed(toy, sequence, text(300))
    cache.check()
    later = text(37, 5)
    out = feed(toy, sequence, later)
    cache.check()
    rows = held(sequence)[0]
    for layer in range(3):
        want = dense(toy, sequence, later, layer, 300, rows[layer * 3 : layer * 3 + 3])
        if sequence.next_trigger is None:  # else rows left meanwhile
            assert (out[:, layer] - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.parametrize("kv", KV)
def test_rows_that_stay_keep_their_bytes(kv, ops):
    toy, _, sequence = opened(f"{kv}+knorm:25%", shares=False)
    other = opened(kv, shares=False)[2]
    tokens = text(300)
    feed(toy, sequence, tokens), feed(toy, other, tokens)
    for layer in range(3):
        mine, full = sequence.read(layer), other.read(layer)
        for name in ("k", "v"):
            for lane in range(3):
                there = ~mine[name][lane].isnan().any(-1)
                at = mine["positions"][there]
                assert 60 < len(at) < 90
                assert torch.equal(mine[name][lane][there], full[name][lane][at])


@pytest.mark.parametrize("policy", ["knorm:25%", "ada(knorm):25%", "global(knorm):25%", "pyramid(knorm):25%"])
def test_pages_are_freed_lane_by_lane(policy, ops):
    toy, cache, sequence = opened(f"int8+{policy}", prompt=320, shares=False)
    feed(toy, sequence, text(320))
    size, table = cache.spec.page_size, sequence.tables[0]
    lanes = [len(lane) for lane in held(sequence)[0]]
    assert sum(lanes) <= 9 * 80
    assert table.held(320)[0].size == sum(-(-n // size) for n in lanes) == cache.books.in_use
    payload = cache.spec.groups[0].layout.payload_bits // 8 * sum(lanes)
    assert sequence.nbytes.payload == payload
    if policy.startswith("knorm"):
        assert cache.spec.nbytes(320).payload == payload
        assert abs(cache.spec.nbytes(320).allocated - sequence.nbytes.allocated) <= 9 * cache.spec.groups[0].page_bytes


@pytest.mark.parametrize("policy", ["knorm:100%", "snapkv:100%,last:8", "keydiff:400rows", "h2o:100%"])
@pytest.mark.parametrize("kv", ["f32", "int4"])
def test_a_budget_as_large_as_the_text_changes_no_bit(kv, policy, ops):
    outs = []
    for spec in (kv, f"{kv}+{policy}"):
        toy, _, sequence = opened(spec, shares=False)
        outs.append(feed(toy, sequence, text(340)))
        assert not any(table.kept for table in sequence.tables)
    assert torch.equal(*outs)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_cut_cannot_show(policy, ops):
    outs = []
    for piece in (1000, 64, 7):
        toy, _, sequence = opened(f"int8+{policy}", shares=False)
        outs.append((feed(toy, sequence, text(420), piece), held(sequence)))
    for out, rows in outs[1:]:
        assert rows == outs[0][1]
        assert torch.equal(out, outs[0][0])


def test_sinks_and_recent_rows_stay(ops):
    toy, _, sequence = opened("f32+random:10%,sinks:6,recent:20", shares=False)
    feed(toy, sequence, text(300))
    for lane in held(sequence)[0]:
        assert set(range(6)) | set(range(280, 300)) <= set(lane)


def test_a_bound_on_rows_holds_at_every_moment(ops):
    toy, cache, sequence = opened("f32+keydiff:64rows,every:32", prompt=0, shares=False)
    for token in range(500):
        feed(toy, sequence, [token % 40])
        assert max(len(lane) for lane in held(sequence)[0]) <= 64 + 32 + cache.spec.page_size
    assert len(sequence) == 500


def test_memory_that_a_choice_frees_goes_back(ops):
    """Pages of a chunk lie lane by lane, so that what stays of each lane lies in every slab: it is moved together."""
    layers = shapes(layers=4, heads=8)
    toy, cache = Toy(layers), make_cache("f32+knorm:10%", layers, page=16, memory=64 << 20, shares=False)
    other, sequence = cache.open(), cache.open(text(1000))
    toy.run([(other, text(50))])
    before = other.read(2)["k"].clone()
    toy.run([(sequence, text(1000))])
    held_before, rows = cache.arena.held, sequence.read(1)["k"].clone()
    sequence.settle()
    cache.check()
    assert cache.arena.held < 0.3 * held_before
    after = sequence.read(1)
    for lane in range(8):
        there = ~after["k"][lane].isnan().any(-1)
        assert torch.equal(after["k"][lane][there], rows[lane][after["positions"][there]])
    assert torch.equal(other.read(2)["k"], before)
    out = feed(toy, sequence, text(20, 1))
    assert bool(out.isfinite().all())


def test_one_sequences_choice_does_not_hurt_another(ops):
    """Law 4: blocks that were found before stay whole; the sequence takes pages of its own."""
    layers = shapes(layers=2, heads=2)
    toy, cache = Toy(layers), make_cache("int8+snapkv:25%,last:8", layers, page=16)
    a = cache.open(text(200))
    feed(toy, a, text(200))
    b = cache.open(text(260)[:200] + text(60, 3))
    assert b.cached == 192  # of a's prompt, the 8 last tokens must be seen anew; whole pages
    plain = make_cache("int8", layers, page=16)
    c = plain.open()
    toy.run([(c, text(200))])
    for layer in range(2):
        for name in ("k", "v"):
            assert torch.equal(b.read(layer)[name], c.read(layer)[name][:, :192])
    cache.check()
    feed(toy, b, text(260)[192:200] + text(60, 3))
    cache.check()
    assert len(a.tables[0].rows(200)[0][0]) < 80 and len(b.tables[0].rows(260)[0][0]) < 90


def test_a_policy_that_sees_all_queries_starts_cold():
    layers = shapes(layers=1)
    toy, cache = Toy(layers), make_cache("int8+h2o:50%", layers)
    feed(toy, cache.open(text(200)), text(200))
    assert cache.open(text(200)).cached == 0


def test_after_rows_left_nothing_is_published():
    layers = shapes(layers=1)
    toy, cache = Toy(layers), make_cache("int8+knorm:25%", layers, page=16)
    a = cache.open(text(160))
    feed(toy, a, text(160))
    feed(toy, a, text(160, 4))
    assert len(cache.index) == 10
    assert cache.open([*text(160), *text(160, 4)]).cached == 160


def test_forks_go_their_own_ways(ops):
    toy, cache, a = opened("k8v4+ada(knorm):40%", shares=False)
    feed(toy, a, text(300))
    b = a.fork()
    left, right = feed(toy, a, text(20, 1)), feed(toy, b, text(20, 1))
    assert torch.equal(left, right)
    b.close()
    cache.check()
    a.prompt = len(a) + 50
    feed(toy, a, text(50, 2))
    cache.check()
    assert held(a)[0][0][-1] == 369


def test_a_fork_that_shares_pages_compacts_into_its_own(ops):
    toy, cache, a = opened("int8+knorm:50%", prompt=200, shares=False)
    feed(toy, a, text(180))
    b = a.fork()
    before = b.read(0)["k"].clone()
    feed(toy, a, text(20, 1))
    cache.check()
    assert len(held(a)[0][0]) < 130 and len(held(b)[0][0]) == 180
    assert torch.equal(b.read(0)["k"], before)


def test_settling_succeeds_in_a_full_arena(ops):
    layers = shapes(layers=2, heads=2)
    toy, cache = Toy(layers), make_cache("f32+knorm:25%", layers, page=16, memory=300 << 10)
    sequence, fed = cache.open(text(10_000)), 0
    with contextlib.suppress(BudgetError):
        while fed < 10_000:
            toy.run([(sequence, [fed % 40])])
            sequence.settle()
            fed += 1
    sequence.prompt = fed
    assert 100 < fed < 10_000
    sequence.settle()
    cache.check()
    assert len(held(sequence)[0][0]) < fed // 2


def test_trimming_below_a_choice_is_refused():
    toy, _, sequence = opened("f32+knorm:25%", shares=False)
    feed(toy, sequence, text(310))
    sequence.trim(300)
    with pytest.raises(SequenceError, match="300"):
        sequence.trim(299)


def test_trimming_what_every_query_marked_is_refused():
    toy, _, sequence = opened("f32+h2o:25%", shares=False)
    feed(toy, sequence, text(100))
    with pytest.raises(SequenceError, match="h2o"):
        sequence.trim(90)


def test_rejected_drafts_leave_no_trace(ops):
    found = []
    for drafts in (0, 3):
        toy, _, sequence = opened("f32+snapkv:25%,last:8", prompt=200, shares=False)
        feed(toy, sequence, text(190))
        for token in text(10, 2):
            toy.run([(sequence, [token, *range(drafts)][: 200 - len(sequence)])])
            sequence.settle(1)
        found.append(held(sequence))
    assert found[0] == found[1]


def test_a_chunk_may_not_pass_a_trigger():
    toy, _, sequence = opened("f32+knorm:25%")
    with pytest.raises(SequenceError, match="passes position 300"):
        toy.run([(sequence, text(301))])
    assert len(sequence) == 0


def test_the_wrong_rows_are_seen(monkeypatch, plain):
    """What these tests are worth: a policy's choice that is shifted by one row fails them."""
    monkeypatch.setattr(compaction, "apply", lambda policy, seens: [m.roll(1, -1) for m in apply(policy, seens)])
    with pytest.raises(AssertionError):
        test_sinks_and_recent_rows_stay(None)


@pytest.mark.parametrize("policy", ["snapkv:40%,last:8,recent:8", "expected:40%,last:32,recent:8", "h2o:40%,recent:8"])
def test_a_model_shows_its_queries_though_layers_are_single_calls(policy):
    """What a policy keeps does not depend on how much of a layer is one call."""
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES))
    config = families.from_hf(theirs.config.to_dict(), None, "tiny")
    model, found = Model(config, theirs.state_dict(), weights="int4"), []
    for watch in (None, Watch):
        sequence = model.cache(f"int8+{policy}; page 16", shares=False).open(text(90))
        prefill(model, [sequence], text(90), watch=watch)
        found.append((held(sequence), model.run([(sequence, [7])])))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert 30 < len(found[0][0][0][0]) < 60


BUDGETS = ["knorm:25%", "knorm:60%,every:24", "keydiff:70rows,every:40", "knorm:50%,recent:2,sinks:1", "knorm:100%"]


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("policy", BUDGETS)
def test_bytes_by_formula_are_those_that_are_held(policy, page):
    """At every length, before and after a choice; the most of them is the peak."""
    toy, cache, sequence = opened(f"int8+{policy}", prompt=150, page=page, shares=False)
    most, spec = 0, cache.spec
    for length in range(1, 260):
        toy.fill(sequence, [length % 40])
        unsettled = sequence.nbytes
        assert unsettled == spec.nbytes(length, prompt=150, settled=False)
        sequence.settle()
        most = max(most, unsettled.allocated, sequence.nbytes.allocated)
        assert sequence.nbytes == spec.nbytes(length, prompt=150), length
        if length in (1, 16, 65, 150, 151, 259):
            assert spec.peak(length, 150).allocated == most
    assert spec.nbytes(150) == spec.nbytes(150, prompt=150) == spec.nbytes(150, prompt=None)


def test_lanes_that_share_hold_what_the_formula_says_to_a_page(ops):
    for policy in ("ada(knorm):30%", "global(knorm):30%", "pyramid(knorm):30%"):
        toy, cache, sequence = opened(f"int8+{policy}", prompt=320, shares=False)
        feed(toy, sequence, text(320))
        by_formula, held = cache.spec.nbytes(320), sequence.nbytes
        assert held.payload == by_formula.payload
        pages = sequence.tables[0].held(320)[0].size - 9 * -(-96 // 16)
        assert 0 <= pages < 9, "a lane's last page may be half empty"


def test_an_open_page_counts_among_the_rows_that_stay(ops):
    """It can't be taken apart; rows elsewhere leave in its place."""
    toy, _, sequence = opened("f32+knorm:30%,recent:2", prompt=180, page=64, shares=False)
    feed(toy, sequence, text(180))
    for lane in held(sequence)[0]:
        assert len(lane) == 4 + 52 and set(range(128, 180)) <= set(lane), "sinks, and what lies in the open page"
    toy, _, sequence = opened("f32+knorm:50%,recent:2", prompt=180, page=64, shares=False)
    feed(toy, sequence, text(180))
    assert {len(lane) for lane in held(sequence)[0]} == {90}
