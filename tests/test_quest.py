"""Queries that choose which pages they read: the best by their bound, and nothing but position and rows decides."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import Toy, make_cache, sees, shapes, text
from kvik.errors import SequenceError, SpecError
from kvik.ops import quest
from kvik.ops.reads import Select

LAYERS = shapes(layers=3, heads=3)
TOY = Toy(LAYERS)
PAGE, PROMPT, SCALE = 16, 150, 0.25
CODECS = ["f32", "bf16", "int8", "int8-rot", "int4", "k8v4"]


def opened(kv, prompt=PROMPT, **options):
    cache = make_cache(kv, LAYERS, page=PAGE, **options)
    return cache, cache.open(text(prompt))


def feed(sequence, tokens, piece=1000):
    """Appends and settles wherever it must; all outputs, [tokens, layers, heads, width]."""
    outs = []
    while tokens:
        count = min(piece, len(tokens), sequence.next_trigger - len(sequence))
        outs += TOY.run([(sequence, tokens[:count])])
        sequence.settle()
        tokens = tokens[count:]
    return torch.cat(outs)


def keys_of(rows, pages=6, width=8, seed=0):
    return torch.randn(2, pages, rows, width, generator=torch.Generator().manual_seed(seed))


def packed(keys):
    room = quest.room(len(keys), keys.shape[1], keys.shape[-1])
    quest.put(room, 0, quest.extremes(keys))
    return room


def outwards(x, towards):
    """To bf16, never inwards."""
    near = x.bfloat16()
    inside = near.double() < x if towards > 0 else near.double() > x
    return torch.where(inside, torch.nextafter(near, torch.full_like(near, towards)), near).double()


def brute(sequence, layer, q, pages, sinks, recent):
    """Which pages each lane's best are, in float64, from the rows as stored."""
    rows, at = sequence.read(layer), len(sequence) - 1
    keys, own = rows["k"].double(), at // PAGE
    late = max(at - recent + 1, 0) // PAGE
    out = []
    for lane, mine in enumerate(torch.unflatten(q.double(), 0, (len(keys), -1))):
        fixed = {*range(-(-sinks // PAGE)), *range(late, own + 1)}
        bound = {}
        for page in set(range(own)) - fixed:
            k = keys[lane, page * PAGE : (page + 1) * PAGE]
            low, high = outwards(k.amin(0), -torch.inf), outwards(k.amax(0), torch.inf)
            bound[page] = float(torch.maximum(mine * low, mine * high).sum(-1).max())
        best = sorted(bound, key=bound.__getitem__, reverse=True)
        out.append(fixed | set(best[: max(pages - len(fixed), 0)]))
    return out


def test_no_key_of_a_page_goes_beyond_its_bound():
    keys, queries = keys_of(7) * 3, torch.randn(5, 2, 3, 8, generator=torch.Generator().manual_seed(1))
    bound = quest.bounds(queries, packed(keys))[..., :6]
    products = torch.einsum("tlgd,lcnd->tlgcn", queries, keys).amax((2, 4))
    assert (bound >= products).all()
    ends = torch.maximum(
        queries[..., None, :] * keys.amin(2)[None, :, None], queries[..., None, :] * keys.amax(2)[None, :, None]
    )
    assert torch.allclose(bound, ends.sum(-1).amax(2), rtol=2e-2, atol=0.2), "bf16 is near"


def test_extremes_lie_outside_and_are_finite():
    keys = torch.tensor([[[[1.00001, -1.00001, 3e38]], [[torch.nan, torch.inf, 0.0]]]])
    low, high = (
        torch.from_numpy(x.astype(np.int32) << 16).view(torch.float32) for x in np.moveaxis(quest.extremes(keys), 2, 0)
    )
    assert (low[0, 0] <= keys[0, 0, 0]).all() and (high[0, 0] >= keys[0, 0, 0]).all()
    assert (high[0, 0] - low[0, 0])[:2].max() < 0.01
    assert low.isfinite().all() and high.isfinite().all()
    assert low[0, 1, 0] < -1e38 and high[0, 1, 0] > 1e38, "a page with a NaN spans everything"


def test_of_equal_pages_the_later_ones_are_read_and_none_whose_bound_is_no_number():
    same = packed(torch.ones(1, 9, 4, 8))
    select = Select(4, 4, 4, 0)
    span = select.span(9 * 4 - 1, 4)
    assert (span.sinks, span.recent, span.free) == (1, 8, 2)
    assert quest.chosen(select, span, torch.ones(1, 1, 2, 8), same).tolist() == [[[0, 6, 7]]]
    assert quest.chosen(select, span, torch.full((1, 1, 1, 8), torch.nan), same).tolist() == [[[0, 6, 7]]]


@pytest.mark.parametrize("kv", CODECS)
def test_attention_sees_the_best_pages_and_no_other(kv, ops):
    cache, sequence = opened(f"{kv}+quest:4pages,dense:1,recent:8", shares=False)
    feed(sequence, text(PROMPT))
    for token in text(20, 3):
        (out,) = TOY.run([(sequence, [token])])
        sequence.settle()
        at = len(sequence) - 1
        for layer in range(3):
            q = TOY.row("q", layer, [token], [at])[0]
            rows, chosen = sequence.read(layer), brute(sequence, layer, q, 4, 4, 8)
            for head in range(6):
                lane = head // 2
                mine = torch.tensor([layer == 0 or p // PAGE in chosen[lane] for p in range(at + 1)])
                k, v = (rows[name][lane].double() for name in "kv")
                scores = (k @ q[head].double() * SCALE).masked_fill(~mine, -torch.inf)
                want = scores.softmax(-1) @ v
                off = (out[0, layer, head].double() - want).abs().max() / want.abs().max()
                assert off < (3e-2 if "bf16" in kv or "4" in kv else 1e-3)
    cache.check()


def test_both_implementations_choose_the_same(monkeypatch):
    """The products are added in one order, so that no last bit decides differently."""
    found = {}
    for ops in ("reference", "native"):
        monkeypatch.setenv("KVIK_OPS", ops)
        _, sequence = opened("f32+quest:4pages,dense:0,recent:8", shares=False)
        feed(sequence, text(PROMPT))
        found[ops] = feed(sequence, text(100, 4), piece=1)
    assert torch.allclose(found["reference"], found["native"], atol=1e-5)


@pytest.mark.parametrize("kv", CODECS)
def test_the_cut_cannot_show_and_neighbours_neither(kv, ops):
    spec = f"{kv}+quest:4pages,recent:8"
    cache, alone = opened(spec, shares=False)
    feed(alone, text(PROMPT))
    want = feed(alone, text(60, 4), piece=1)
    others = [cache.open(text(n)) for n in (PROMPT, 40, 3)]
    for sequence, n in zip(others, (PROMPT, 40, 3), strict=True):
        feed(sequence, text(n), piece=37)
    tokens, got = text(60, 4), []
    while tokens:
        count = min(7, len(tokens), *(s.next_trigger - len(s) for s in others))
        out, *_ = TOY.run([(others[0], tokens[:count]), (others[1], tokens[:count]), (others[2], tokens[:1])])
        got.append(out)
        tokens = tokens[count:]
        for sequence in others:
            sequence.settle()
    assert torch.equal(torch.cat(got), want)


@pytest.mark.parametrize("kv", ["f32", "int8", "int4"])
def test_enough_pages_change_no_bit(kv, ops):
    outs = []
    for kept in ("", "+quest:14pages"):
        cache = make_cache(kv + kept, LAYERS, page=PAGE, shares=False)
        with cache.open(text(PROMPT)) as sequence:
            TOY.fill(sequence, text(PROMPT))
            sequence.settle()
            outs.append(torch.cat([TOY.run([(sequence, [t])])[0] for t in text(6, 1)]))
    assert torch.equal(*outs)
    with sees():
        cache, sequence = opened(f"{kv}+quest:9pages", shares=False)
        TOY.fill(sequence, text(PROMPT))
        sequence.settle()
        assert torch.equal(outs[0], torch.cat([TOY.run([(sequence, [t])])[0] for t in text(6, 1)]))


def test_a_prompt_is_read_whole_and_so_is_another_turn(ops):
    plain = make_cache("f32", LAYERS, page=PAGE, shares=False).open()
    _, sequence = opened("f32+quest:3pages,recent:8,dense:0", shares=False)
    for other in (plain, sequence):
        other.out = TOY.run([(other, text(PROMPT))])[0]
        other.settle()
    assert torch.equal(plain.out, sequence.out)
    first, second = (TOY.run([(s, [7])])[0] for s in (plain, sequence))
    assert not torch.equal(first, second)
    sequence.settle()
    sequence.prompt = len(sequence) + 30
    assert torch.equal(*(TOY.run([(s, text(30, 2))])[0] for s in (plain, sequence)))


def test_chunks_end_where_pages_do(ops):
    _, sequence = opened("f32+quest:3pages", prompt=40)
    assert sequence.next_trigger == 40
    with pytest.raises(SequenceError, match="give 40 tokens"):
        sequence.append(text(41))
    feed(sequence, text(40))
    assert sequence.next_trigger == 48


def test_only_a_prompt_is_published_and_what_is_found_is_known_again(ops):
    cache, first = opened("f32+quest:3pages,recent:8,dense:0")
    feed(first, text(PROMPT))
    want = feed(first, text(60, 4))
    assert len(cache.index) == PROMPT // PAGE, "what follows a prompt depends on where it ended"
    second = cache.open(text(PROMPT))
    assert second.cached == (PROMPT - 1) // PAGE * PAGE
    feed(second, text(PROMPT)[second.cached :])
    assert torch.equal(feed(second, text(60, 4)), want)
    first.close()
    second.close()
    cache.check()


def test_a_fork_and_a_trimmed_text_choose_by_what_they_hold(ops):
    cache, sequence = opened("f32+quest:4pages,recent:8,dense:0", shares=False)
    feed(sequence, text(PROMPT))
    twin = sequence.fork()
    want = feed(twin, text(50, 4))
    feed(sequence, text(50, 9))  # other keys at the same places
    assert sequence.tables[0].known == 200 // PAGE
    sequence.trim(PROMPT)
    assert sequence.tables[0].known == PROMPT // PAGE
    assert torch.equal(feed(sequence, text(50, 4)), want)
    for each in (sequence, twin):
        each.close()
    cache.check()


def test_bytes_are_what_the_spec_says_and_extremes_are_in_the_books(ops):
    cache, sequence = opened("int8+quest:4pages", shares=False)
    feed(sequence, text(PROMPT))
    feed(sequence, text(60, 1))
    assert sequence.nbytes == cache.spec.nbytes(210)
    plain = make_cache("int8", LAYERS, page=PAGE).spec.nbytes(210)
    extremes = sum(table.extremes.nbytes for table in sequence.tables)
    assert sequence.nbytes.allocated - plain.allocated == extremes == 9 * 16 * 2 * 2 * 16
    cache.check()
    sequence.close()
    assert cache.arena.tables == 0


def test_mass_falls_on_the_pages_that_were_read(ops):
    cache, sequence = opened("f32+quest:4pages,recent:8,dense:1", shares=False)
    feed(sequence, text(PROMPT))
    with cache.step([(sequence, [5])]) as step:
        for layer in range(3):
            TOY.append(step, layer)
            q = TOY.row("q", layer, [5], [PROMPT])
            (mass,) = step.attend(layer, q, scale=SCALE, want_mass=True).mass
            assert mass.shape == (3, -(-(PROMPT + 1) // PAGE) * PAGE)
            assert torch.allclose(mass.sum(1), torch.full((3,), 2.0), atol=1e-4), "of two queries, all there is"
            pages = [set(row.nonzero().flatten().tolist()) for row in torch.unflatten(mass, 1, (-1, PAGE)).amax(2)]
            assert [len(p) for p in pages] == [10 if layer == 0 else 4] * 3
            assert all({0, 9} <= p for p in pages)


def test_what_can_go_wrong_is_said():
    latent = [replace(LAYERS[0], streams=(("latent", 16), ("rope", 8)))]
    with pytest.raises(SpecError, match="no keys to choose pages by"):
        make_cache("f32+quest:4pages", latent)


def test_extremes_that_are_out_of_date_are_seen(monkeypatch):
    """The test of forks and trimmed texts sees a table that forgets nothing."""
    monkeypatch.setattr("kvik.cache.table.Table.forget", lambda self, length: None)
    with sees(), contextlib.suppress(SequenceError):
        test_a_fork_and_a_trimmed_text_choose_by_what_they_hold("native")
