"""Rows of a source, given once and seen by every token; rows that several layers read; rows that are key and value."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import Toy, listening, make_cache, sees, shapes, text
from kvik import events
from kvik.cache import source
from kvik.cache.shape import LayerShape
from kvik.cache.spec import Spec
from kvik.errors import BudgetError, SequenceError, SpecError

LAYERS = [*shapes(layers=2, heads=2), *(replace(s, source=True) for s in shapes(layers=2, heads=3))]
TOY = Toy(LAYERS)
CODECS = ["f32", "bf16", "int8", "int8-rot", "int4", "k8v4"]
ROWS, SCALE = 75, 0.25


def filled(cache, digest=b"a", rows=ROWS, seed=0):
    """Gives a cache a source's rows; returns them."""
    ids, kept = text(rows, seed), {}
    with cache.fill(digest, rows) as filling:
        for layer in (2, 3):
            kept[layer] = {name: TOY.row(name, layer, ids, range(rows)) for name in "kv"}
            filling.append(layer, **kept[layer])
    return kept


def run(chunks):
    """One step: for each sequence [tokens, 4, heads · width], self-attention layers first."""
    with chunks[0][0].cache.step(chunks) as step:
        outs = []
        for layer in range(4):
            if layer < 2:
                TOY.append(step, layer)
            q = TOY.row("q", layer, step.tokens, step.positions)
            outs.append(step.attend(layer, q, scale=SCALE).out.flatten(1)[:, :64])
    for sequence, _ in chunks:
        sequence.settle()
    return list(torch.stack(outs, 1).split([len(tokens) for _, tokens in chunks]))


@pytest.mark.parametrize("kv", CODECS)
def test_every_token_sees_all_rows_of_its_source(kv, ops):
    cache = make_cache(kv, LAYERS)
    rows = filled(cache)
    with cache.open(text(40), source=b"a") as sequence, sequence.append(text(40)) as step:
        for layer in (0, 1):
            TOY.append(step, layer)
        for layer in (2, 3):
            q = TOY.row("q", layer, step.tokens, step.positions)
            got = step.attend(layer, q, scale=SCALE, want_lse=True)
            k, v = (rows[layer][name].repeat_interleave(2, 1).double() for name in "kv")
            scores = torch.einsum("thd,rhd->htr", q.double(), k) * SCALE
            want = torch.einsum("htr,rhd->thd", scores.softmax(-1), v)
            limit = 1e-5 if kv == "f32" else 0.02 if kv == "bf16" else 0.4 if "4" in kv else 0.05
            assert (got.out - want).abs().max() < limit * 3
            assert (got.lse - scores.logsumexp(-1).T).abs().max() < limit * 3
    cache.check()


@pytest.mark.parametrize("kv", ["f32", "int8", "int4"])
def test_the_cut_cannot_show_and_neighbours_neither(kv, ops):
    cache = make_cache(kv, LAYERS)
    filled(cache)
    filled(cache, b"b", 20, 5)
    whole, other, third = (cache.open(source=s) for s in (b"a", b"a", b"b"))
    (want,) = run([(whole, text(50))])
    got, at = [], 0
    for piece in (1, 7, 1, 30, 11):
        chunk = text(50)[at : at + piece]
        got.append(run([(third, chunk), (other, chunk)])[1])
        at += piece
    assert torch.equal(torch.cat(got), want)
    assert not torch.equal(run([(third, [4])])[0], run([(other, [4])])[0])


def test_a_source_is_held_once_whoever_reads_it(ops):
    cache = make_cache("int8", LAYERS, shares=False)
    heard = listening(cache)
    assert not cache.knows(b"a")
    filled(cache)
    assert cache.knows(b"a") and not cache.knows(b"b") and not cache.knows(b"a", salt="another tenant")
    assert [e for e in heard if isinstance(e, events.Filled)] == [events.Filled(ROWS, 2 * 3 * 3)]
    held = cache.books.kept
    beams = [cache.open(source=b"a")]
    run([(beams[0], text(40))])
    beams += [beams[0].fork() for _ in range(4)]
    assert cache.books.in_use == held + pages(beams[0], own=True), "five readers, one source"
    assert beams[0].nbytes == cache.spec.nbytes(40, source=ROWS)
    for beam in beams:
        beam.close()
    cache.check()
    assert cache.books.in_use == 0 and cache.books.kept == held, "kept, to be found again"
    with pytest.raises(SequenceError, match="known already"):
        filled(cache)


def pages(sequence, own):
    return sum(table.pages.size for table in sequence.tables if table.group.source != own)


def test_texts_about_other_sources_share_nothing(ops):
    cache = make_cache("f32", LAYERS)
    filled(cache)
    filled(cache, b"b", 20, 5)
    with cache.open(text(70), source=b"a") as sequence:
        run([(sequence, text(70))])
    with cache.open(text(70), source=b"a") as same, cache.open(text(70), source=b"b") as other:
        assert (same.cached, other.cached) == (64, 0)


def test_sources_nobody_reads_make_room_and_others_stay(ops):
    layers = [*shapes(layers=1, heads=1), replace(LAYERS[2], heads=64)]
    toy = Toy(layers)
    cache = make_cache("f32", layers, memory=4 << 20)

    def fill(digest):
        with cache.fill(digest, 200) as filling:
            filling.append(1, **{n: toy.row(n, 1, text(200), range(200)) for n in "kv"})

    fill(b"read")
    with cache.open(source=b"read") as reader:
        for number in range(9):
            fill(bytes([number]))
        assert cache.knows(b"read") and cache.knows(bytes([8])) and not cache.knows(bytes([0]))
        cache.check()
        with pytest.raises(SequenceError, match="not known here"):
            cache.open(source=bytes([0]))
        with pytest.raises(BudgetError), cache.fill(b"too much", 4000):
            pass
        assert reader.read(1)["k"].shape == (64, 200, 16)
    cache.check()


def test_a_filling_that_fails_leaves_nothing(ops):
    cache = make_cache("f32", LAYERS)
    before = cache.books.all - cache.books.free
    with pytest.raises(SequenceError, match=r"layers \[3\]"), cache.fill(b"a", 5) as filling:
        filling.append(2, **{n: TOY.row(n, 2, text(5), range(5)) for n in "kv"})
    with pytest.raises(ZeroDivisionError), cache.fill(b"a", 5):
        raise ZeroDivisionError
    with pytest.raises(SequenceError, match="needs"), cache.fill(b"a", 5) as filling:
        filling.append(2, **{n: TOY.row(n, 2, text(4), range(4)) for n in "kv"})
    assert not cache.knows(b"a") and cache.books.all - cache.books.free == before
    cache.check()


def test_trim_and_moved_pages_leave_a_source_alone(ops):
    cache = make_cache("f32", LAYERS)
    filled(cache, b"x", 300)
    rows = filled(cache, b"a")
    sequence = cache.open(source=b"a")
    (want,) = run([(sequence, text(40))])
    run([(sequence, text(30, 2))])
    sequence.trim(0)
    cache.resize(400 << 10)  # drops what nobody reads, and moves the rest together
    assert not cache.knows(b"x")
    (again,) = run([(sequence, text(40))])
    assert torch.equal(want, again)
    assert torch.equal(sequence.read(2)["k"], rows[2]["k"].transpose(0, 1))
    cache.check()


def test_what_can_go_wrong_is_said():
    cache = make_cache("f32", LAYERS)
    with pytest.raises(SequenceError, match="reads a source"):
        cache.open()
    with pytest.raises(SequenceError, match="keeps no rows of any"):
        make_cache("f32").open(source=b"a")
    with pytest.raises(SequenceError, match="no rows of a source"):
        make_cache("f32").fill(b"a", 4)
    with pytest.raises(SequenceError, match="at least one"):
        cache.fill(b"a", 0)
    filled(cache)
    sequence = cache.open(source=b"a")
    with pytest.raises(SequenceError, match="writes no rows"), sequence.append([1]) as step:
        TOY.append(step, 2)
    for written, named in (
        ("int8; cross: int8+keydiff:25%", "all stay"),
        ("int8; layers 2: f32", "layers 0-1"),
        ("cross: int8", "first rule is for every layer"),
    ):
        with pytest.raises(SpecError, match=named):
            Spec.parse(written, LAYERS)
    with pytest.raises(SpecError, match="no cross-attention"):
        Spec.parse("int8; cross: f32", shapes())


def test_a_rule_for_cross_is_for_the_source_alone():
    spec = Spec.parse("int4+window:20,sinks:2; cross: int8; layers 1: f32", LAYERS)
    codecs = {lanes: g.layout.streams[0].codec.name for g in spec.groups for lanes in g.lanes}
    assert [codecs[lane] for lane in ((0, 0), (1, 0), (2, 2), (3, 0))] == ["int4", "f32", "int8", "int8"]
    assert [g.retention.window for g in spec.groups if g.source] == [None], "a window hides no row of a source"
    assert str(spec) == "int4+window:20,sinks:2; cross: int8; layers 1: f32"


def test_a_source_that_lost_a_row_is_seen(monkeypatch):
    honest = source.Filling.append
    monkeypatch.setattr(
        source.Filling,
        "append",
        lambda self, layer, **s: honest(self, layer, **{n: x.roll(1, 0) for n, x in s.items()}),
    )
    with sees():
        test_trim_and_moved_pages_leave_a_source_alone("native")


# Layers that read another's rows.

SHARING = [*shapes(layers=2), replace(shapes()[0], reads=1), replace(shapes()[0], reads=0)]


def through(cache, tokens, policy=None):
    toy = Toy(SHARING)
    sequence = cache.open(tokens)
    with sequence.append(tokens) as step:
        outs = []
        for layer in range(4):
            if layer < 2:
                toy.append(step, layer)
            q = toy.row("q", layer, step.tokens, step.positions)
            outs.append(step.attend(layer, q, scale=SCALE).out)
    sequence.settle()
    return sequence, toy, outs


@pytest.mark.parametrize("kv", CODECS)
def test_layers_read_the_rows_of_others_which_are_held_once(kv, ops):
    cache = make_cache(kv, SHARING)
    tokens = text(70)
    sequence, toy, outs = through(cache, tokens)
    assert sequence.nbytes == cache.spec.nbytes(70) == Spec.parse(kv, shapes()).nbytes(70)
    for layer, owner in ((2, 1), (3, 0)):
        q, rows = toy.row("q", layer, tokens, range(70)).double(), sequence.read(owner)
        k, v = (rows[n].repeat_interleave(2, 0).double() for n in "kv")
        scores = (torch.einsum("thd,hrd->htr", q, k) * SCALE).masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf)
        want = torch.einsum("htr,hrd->thd", scores.softmax(-1), v)
        assert (outs[layer] - want).abs().max() < (0.2 if "4" in kv else 0.05 if kv == "bf16" else 0.01)
        assert torch.equal(sequence.read(layer)["k"], rows["k"])


def test_scores_of_shared_rows_count_all_who_read_them(ops):
    """A policy that must see the last queries sees those of every reading layer, and mass adds up over them."""
    cache = make_cache("f32+h2o:30%,recent:4,sinks:1; page 16", SHARING, page=16)
    sequence, toy, _ = through(cache, text(100))
    mass = torch.zeros(2, 100)
    for layer in (1, 2):
        q, k = (toy.row(n, w, text(100), range(100)).double() for n, w in (("q", layer), ("k", 1)))
        scores = torch.einsum("thd,rhd->htr", q, k.repeat_interleave(2, 1)) * SCALE
        weights = scores.masked_fill(torch.ones(100, 100).triu(1).bool(), -torch.inf).softmax(-1)
        mass += torch.unflatten(weights.sum(1), 0, (2, 2)).sum(1).float()
    kept = sequence.tables[0].rows(100)[0][2:4]
    for lane in range(2):
        ranked = mass[lane, 1:96].argsort(descending=True)[:25] + 1
        held = set(kept[lane][kept[lane] >= 0].tolist()) - {0, 96, 97, 98, 99}
        assert set(ranked.tolist()) <= held | set(range(96, 100))


def test_queries_of_readers_are_side_by_side(ops):
    cache = make_cache("f32+snapkv:40%,last:8; page 16", SHARING, page=16)
    sequence = cache.open(text(60))
    toy, seen = Toy(SHARING), []
    observed = sequence._observed[0]
    honest = observed.done
    observed.done = lambda: (seen.append([observed.queries(layer) for layer in (0, 1, 2, 3)]), honest())
    with sequence.append(text(60)) as step:
        for layer in range(4):
            if layer < 2:
                toy.append(step, layer)
            step.attend(layer, toy.row("q", layer, step.tokens, step.positions), scale=SCALE)
    sequence.settle()
    (found,) = seen
    assert [None if q is None else tuple(q[0].shape) for q in found] == [(8, 2, 4, 16), (8, 2, 4, 16), None, None]
    want = toy.row("q", 2, text(60), range(60))[-8:].view(8, 2, 2, 16)
    assert torch.equal(found[1][0][:, :, 2:], want)


def test_a_rule_that_names_a_layer_without_rows_is_told_whose_it_reads():
    with pytest.raises(SpecError, match="reads the rows of layer 1; name that"):
        Spec.parse("int8; layers 2: bf16", SHARING)


# Latent attention: one lane, a stream that is both key and value.

LATENT = [LayerShape(1, (("latent", 32), ("rope", 8)))] * 2


@pytest.mark.parametrize("kv", [*(c for c in CODECS if c != "k8v4"), "latent:int8-rot,rope:bf16"])
def test_a_latent_stream_is_read_both_ways(kv, ops):
    cache, tokens = make_cache(kv, LATENT), text(150)
    g = torch.Generator().manual_seed(3)
    rows = {n: torch.randn(150, 1, w, generator=g) for n, w in LATENT[0].streams}
    q = torch.randn(150, 6, 40, generator=g)

    def attended(pieces):
        with cache.open() as sequence:
            outs, at = [], 0
            for piece in pieces:
                now = slice(at, at + piece)
                with sequence.append(tokens[now]) as step:
                    for layer in range(2):
                        step.append(layer, **{n: x[now] for n, x in rows.items()})
                        out = step.attend(layer, q[now], scale=SCALE).out
                outs.append(out)
                at += piece
            return torch.cat(outs), sequence.read(0)

    out, stored = attended([150])
    k = torch.cat((stored["latent"], stored["rope"]), -1)[0].double()
    scores = (torch.einsum("thd,rd->htr", q.double(), k) * SCALE).masked_fill(
        torch.ones(150, 150).triu(1).bool(), -torch.inf
    )
    want = torch.einsum("htr,rd->thd", scores.softmax(-1), stored["latent"][0].double())
    assert out.shape == (150, 6, 32) and (out - want).abs().max() < 1e-4
    assert torch.equal(attended([1, 99, 50])[0], out)
    assert np.isclose(
        cache.spec.groups[0].layout.payload_bits,
        sum(s.codec.bits * s.width for s in cache.spec.groups[0].layout.streams),
    )


def test_policies_choose_among_latent_rows(ops):
    cache = make_cache("f32+keydiff:40%; page 16", LATENT, page=16)
    sequence = cache.open(text(100))
    with sequence.append(text(100)) as step:
        for layer in range(2):
            g = torch.Generator().manual_seed(layer)
            step.append(layer, **{n: torch.randn(100, 1, w, generator=g) for n, w in LATENT[0].streams})
    sequence.settle()
    assert sequence.read(0)["latent"].shape[1] < 60
    cache.check()
