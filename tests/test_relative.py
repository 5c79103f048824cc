"""Sinks right before the window (`cache/relative.py`): against a dense computation by distance, the cut, angles.

Through whole models: `test_relative_models.py`.
"""

import pytest
import torch

from helpers import BACKENDS, KV, PAGES, Toy, make_cache, pairwise, sees, text
from kvik.cache import relative, weigh
from kvik.cache.prefix import root_key
from kvik.cache.retention import Retention
from kvik.cache.spec import LayerShape, Spec
from kvik.errors import SpecError
from kvik.models.parts import Rotation
from kvik.models.rope import Rope
from kvik.ops import loader
from kvik.ops.layout import MOST_POSITIONS
from kvik.ops.pointwise import turn
from test_laws import check_cut
from test_native import bound

ROPE = Rope(10_000.0, 16)
FREQUENCIES = ROPE.frequencies()[0]
LAYERS = [LayerShape(2, (("k", 16), ("v", 16)), frequencies=tuple(FREQUENCIES.tolist()))]
EVERY = [Retention(w, k, relative=True) for w, k in ((40, 5), (16, 33), (1, 1), (70, 4), (128, 64))]


class Turning(Toy):
    """Queries and keys are functions of the token alone, turned by position."""

    def content(self, name, tokens):
        """f64 [T, heads, width], not turned."""
        return self.tables[0][name][torch.tensor(tokens)].double()

    def row(self, name, layer, tokens, positions):
        rows = self.content(name, tokens)
        if name != "v":
            angles = weigh.turns(FREQUENCIES, torch.tensor(positions))[:, None]
            rows = torch.view_as_real(torch.view_as_complex(rows.unflatten(-1, (-1, 2))) * angles).flatten(-2)
        return rows.float()


TOY = Turning(LAYERS)


def cache_of(kv, kept=EVERY[0], page=32, **options):
    return make_cache(f"{kv}+{kept}", LAYERS, page=page, **options)


def apart(kept, tokens):
    """int64 [T, T]: the distance at which each position sees each other, as the paper says it; -1 where it doesn't.

    The cache of a query holds the sinks and then the window; what counts is the places of rows in that list.
    """
    out = torch.full((tokens, tokens), -1)
    for asking in range(tokens):
        held = sorted({*range(min(kept.sinks, asking + 1)), *range(max(asking - kept.window + 1, 0), asking + 1)})
        out[asking, held] = len(held) - 1 - torch.arange(len(held))
    return out


def dense(q, k, v, distance, frequencies, scale):
    """Attention by distance alone, in f64: q [T, H, D], k [T, L, D], not turned → out [T, H, E], lse, weights."""
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
    pairs = [torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k)]
    turns = torch.exp(1j * torch.arange(len(distance)).double()[:, None] * frequencies)
    turned = torch.einsum("qhd,qkd->qkhd", pairs[0], turns[distance.clamp(min=0)])
    scores = torch.einsum("qkhd,khd->hqk", turned, pairs[1].conj()).real * scale
    scores = scores.masked_fill(distance < 0, -torch.inf)
    weights = scores.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v), scores.logsumexp(-1).T, weights


# Against the definition.


def check_dense(cache, kept, length=330, piece=30):
    """What every position gets, its log-sum-exp and what rows receive are those of the definition."""
    tokens, sequence, at = text(length), cache.open(), 0
    q, k, v = (TOY.content(name, tokens) for name in "qkv")
    out, lse, weights = dense(q, k, v, apart(kept, length), FREQUENCIES, 0.25)
    received = torch.zeros(2, length, dtype=torch.float64)
    for at in range(0, length, piece):
        with sequence.append(tokens[at : at + piece]) as step:
            TOY.append(step, 0)
            asked = TOY.row("q", 0, step.tokens, step.positions)
            found = step.attend(0, asked, scale=0.25, want_lse=True, want_mass=True)
        mine = slice(at, at + piece)
        torch.testing.assert_close(found.out.double(), out[mine], atol=3e-6, rtol=1e-6)
        torch.testing.assert_close(found.lse.double(), lse[mine], atol=3e-6, rtol=1e-6)
        table = sequence.tables[0]
        places = (table.logical[:, None] * table.group.page_size + range(table.group.page_size)).reshape(-1)
        there = places < length
        received.zero_()[:, places[there]] = found.mass[0][:, torch.from_numpy(there)].double()
        want = weights[:, mine].unflatten(0, (2, 2)).sum((1, 2))
        torch.testing.assert_close(received, want, atol=1e-5, rtol=1e-5)
        sequence.settle()
    sequence.close()


@pairwise(kept=EVERY, page=PAGES, ops=BACKENDS)
def test_every_position_sees_its_sinks_right_before_its_window(kept, page, ops):
    check_dense(cache_of("f32", kept, page), kept)


@pytest.mark.parametrize("kv", KV)
def test_rows_are_read_as_they_are_stored(kv, ops):
    """The definition over keys and values as they were decoded, keys turned back to position 0."""
    kept, tokens = EVERY[3], text(200)
    with cache_of(kv, kept).open() as sequence:
        got = TOY.run([(sequence, tokens)])[0][:, 0]
        k, v = (sequence.read(0)[name].transpose(0, 1).double() for name in "kv")
    back = weigh.turns(FREQUENCIES, -torch.arange(200))[:, None]
    k = torch.view_as_real(torch.view_as_complex(k.unflatten(-1, (-1, 2)).contiguous()) * back).flatten(-2)
    want = dense(TOY.content("q", tokens), k, v, apart(kept, 200), FREQUENCIES, 0.25)[0]
    assert (got.double() - want).abs().max() <= bound(kv, loader.chosen() and loader.built().isa())


def test_softcap_is_of_the_turned_scores(ops):
    kept, tokens = EVERY[0], text(130)
    q, k, v = (TOY.content(name, tokens) for name in "qkv")
    at, turns = apart(kept, 130), {}
    with cache_of("f32").open() as sequence:
        turns["capped"] = TOY.run([(sequence, tokens)], softcap=0.5)[0][:, 0]
    scores = dense(q, k, v, at, FREQUENCIES, 0.25)[2].log()  # up to a constant a query
    shift = dense(q, k, v, at, FREQUENCIES, 0.25)[1].T.unsqueeze(-1)
    weights = (0.5 * ((scores + shift) / 0.5).tanh()).masked_fill(at < 0, -torch.inf).softmax(-1)
    want = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, dim=1))
    torch.testing.assert_close(turns["capped"].double(), want, atol=3e-6, rtol=1e-6)


def test_queries_that_are_not_turned_are_seen(monkeypatch, ops):
    honest = relative._angles
    monkeypatch.setattr(relative, "_angles", lambda positions, *rest: honest(torch.zeros_like(positions), *rest))
    with sees():
        check_dense(cache_of("f32"), EVERY[0])


def test_sinks_one_position_too_far_are_seen(monkeypatch, ops):
    honest = relative._angles
    monkeypatch.setattr(relative, "_angles", lambda at, edge, *rest: honest(at, edge + 1, *rest))
    with sees():
        check_dense(cache_of("f32"), EVERY[0])


def test_sinks_that_the_window_counts_again_are_seen(monkeypatch, ops):
    monkeypatch.setattr(relative, "_edge", lambda reads: reads.window)
    with sees():
        check_dense(cache_of("f32"), EVERY[0])


def test_masses_of_parts_that_are_not_weighed_are_seen(monkeypatch, ops):
    honest = relative.Relative._masses
    monkeypatch.setattr(
        relative.Relative, "_masses", lambda self, a, b, lse, *rest: honest(self, a, b, lse + 0.1, *rest)
    )
    with sees():
        check_dense(cache_of("f32"), EVERY[0])


def test_a_bias_by_distance_is_refused(ops):
    with cache_of("f32").open() as sequence, pytest.raises(SpecError, match="bias by distance"):
        TOY.run([(sequence, text(60))], bias=torch.zeros(4, 8))


# Laws.


@pairwise(kv=KV, kept_in=[(EVERY[0], 16), (EVERY[3], 128)], ops=BACKENDS)
def test_the_cut_does_not_show(kv, kept_in, ops):
    kept, page = kept_in
    check_cut(cache_of(kv, kept, page), TOY)


def test_the_cut_is_seen_where_a_chunk_turns_by_its_first_position(monkeypatch, ops):
    honest = relative._angles
    monkeypatch.setattr(relative, "_angles", lambda at, *rest: honest(at[:1].expand(len(at)), *rest))
    with sees():
        check_cut(cache_of("f32"), TOY)


def test_the_cut_is_seen_where_near_tokens_take_the_far_ones_way(monkeypatch, ops):
    honest = relative._Some.between
    whole = classmethod(lambda cls, reads, first, end, device: honest(reads, 0, MOST_POSITIONS, device))
    monkeypatch.setattr(relative._Some, "between", whole)
    with sees():
        check_cut(cache_of("f32"), TOY)


@pytest.mark.parametrize("kv", ["f32", "int8", "int4"])
@pytest.mark.parametrize("full", ["", "+window:70,sinks:5"])
def test_until_window_and_sinks_are_full_no_bit_differs_from_true_positions(kv, full, ops):
    found = []
    for kept in ("+window:70,sinks:5,relative", full):
        cache = make_cache(kv + kept, LAYERS)
        found.append(TOY.cut(cache, text(110), [50, 25, 35]))
    assert torch.equal(found[0][:75], found[1][:75])
    assert not torch.isclose(found[0][75:], found[1][75:], atol=1e-4).all()


def test_forks_trims_and_known_prefixes_change_no_bit(ops):
    tokens, cache = text(400), cache_of("int8", EVERY[3])
    want = TOY.cut(cache_of("int8", EVERY[3], shares=False), tokens, [100] * 4)
    with cache.open() as first:
        for at in range(0, 300, 100):
            TOY.run([(first, tokens[at : at + 100])])
            first.settle()
        with first.fork() as twin:
            assert torch.equal(TOY.run([(twin, tokens[300:])])[0], want[300:])
        TOY.run([(first, text(50, 9))])
        first.trim(300)
        assert torch.equal(TOY.run([(first, tokens[300:])])[0], want[300:])
    with cache.open(tokens) as again:
        assert again.cached == 288
        assert torch.equal(TOY.run([(again, tokens[288:])])[0], want[288:])
    cache.check()


def test_rows_under_other_positions_are_never_found():
    true, moved = (Spec.parse(f"f32+window:40,sinks:5{word}", LAYERS) for word in ("", ",relative"))
    assert true.fingerprint != moved.fingerprint
    assert root_key("w", true, "") != root_key("w", moved, "")


def test_other_groups_and_other_texts_are_read_as_before(ops):
    layers = LAYERS * 2
    mixed = make_cache("f32+window:40,sinks:5,relative; layers 1: f32", layers)
    toy = Turning(layers)
    toy.tables[1] = toy.tables[0]
    tokens = text(150)
    with mixed.open() as a, mixed.open(salt="b") as b:
        TOY_LIKE = toy.run([(a, tokens[:120]), (b, text(20, 1))])[0]
        rest = toy.run([(b, text(30, 2)), (a, tokens[120:])])[1]
    got = torch.cat((TOY_LIKE, rest))
    for layer, kept in enumerate(("+window:40,sinks:5,relative", "")):
        assert torch.equal(got[:, layer], TOY.cut(make_cache(f"f32{kept}", LAYERS), tokens, [150])[:, 0])


# Angles.


def test_queries_are_turned_back_exactly_from_any_position():
    q = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0))
    rotation = Rotation(ROPE, torch.device("cpu"))
    want = turn(q.clone(), rotation.angles([1027] * 4))
    at = [1027, 8192, 4_000_000, MOST_POSITIONS - 1]
    asked = turn(q.clone(), rotation.angles(at))
    got = relative.turned_back(asked, torch.tensor(at), 1028, LAYERS[0].frequencies)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    assert torch.equal(got[0], asked[0])


def test_angles_in_single_precision_are_seen(monkeypatch):
    monkeypatch.setattr(weigh, "turns", lambda f, at: torch.exp(1j * at[:, None] * f.float()))
    with sees():
        test_queries_are_turned_back_exactly_from_any_position()


def test_distances_are_the_same_at_any_position(ops):
    """A window's scores in f32, far beyond any model's positions."""
    rotation = Rotation(ROPE, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for base in (0, 8192, 4_000_000, MOST_POSITIONS - 1024):
        a, b = turn(q.clone(), rotation.angles([base + 1000])), turn(k.clone(), rotation.angles([base]))
        found.append((a.double() * b.double()).sum())
    torch.testing.assert_close(torch.stack(found[1:]), found[0].expand(3), atol=3e-6, rtol=0)
