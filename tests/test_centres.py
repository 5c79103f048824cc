"""Keys less a constant for each lane: attention, merges, reads and policies are as if it were not there, but closer."""

from dataclasses import replace

import pytest
import torch

from helpers import Toy, make_cache, sees, shapes, text
from kvik.cache import compaction
from kvik.cache.centres import Centres
from kvik.errors import UsageError
from kvik.ops import loader, native, reads, reference
from kvik.ops import pages as paged
from kvik.ops.layout import CODECS
from kvik.ops.reads import merge
from test_laws import check_cut
from test_native import KV, Case, bound
from test_native_kept import KeptCase

FLOATS = ("f32", "bf16", "f16")
COARSE = tuple(kv for kv in KV if kv not in (*FLOATS, "k:f16,v:int4-row"))  # keys are quantised
LAYERS = shapes(layers=2)
over_coarse = pytest.mark.parametrize("kv", COARSE)
needs_kernels = pytest.mark.skipif(loader.built() is None, reason="the kernels are not built")


def far(layers=LAYERS, size=20.0, seed=0):
    """Centres far from 0."""
    g = torch.Generator().manual_seed(seed)
    return Centres([size * torch.randn(s.heads, dict(s.streams)["k"], generator=g) for s in layers])


class Shifted(Toy):
    """A toy whose keys all lie around these centres."""

    def __init__(self, layers=LAYERS, centres=None, shared=2):
        super().__init__(layers, shared)
        for table, centre in zip(self.tables, (centres or far(layers)).layers, strict=True):
            table["k"] += centre


class CentredCase(Case):
    """Ragged texts appended by the kernels, each lane less a centre; what `stored` gives has it again."""

    away = 0.5  # rows less it are hardly larger, and so are the bounds

    def centre(self):
        width = self.layout.streams[0].width
        return self.away * torch.randn(self.lanes, width, generator=torch.Generator().manual_seed(9))

    def reads(self, spans):
        return replace(super().reads(spans), centre=self.centre())

    def stored(self, member):
        k, v = super().stored(member)
        return k + self.centre().double()[:, None], v


class CentredKept(CentredCase, KeptCase):
    """The same, and some rows were kept when others left."""


# append


@needs_kernels
@over_coarse
@pytest.mark.parametrize("width", [24, 64, 80])
def test_rows_are_the_references_bit_for_bit(isa, kv, width):
    case = CentredCase(kv, width, 40, lanes=3, page=16, members=((37, 1), (5, 1)))
    bare = replace(case.reads([(0, 37), (0, 5)]), centre=None)
    by_hand = case.rows | {"k": case.rows["k"] - case.centre()}
    mine, theirs, parts, want = (case.pages.clone() for _ in range(4))
    native.plan(mine, replace(bare, centre=case.centre())).append(slice(0, 3), case.rows)
    reference.plan(theirs, replace(bare, centre=case.centre())).append(slice(0, 3), case.rows)
    plan = native.plan(parts, replace(bare, centre=case.centre()))
    plan.append(slice(0, 1), {name: x[:, :1] for name, x in case.rows.items()})
    plan.append(slice(1, 3), {name: x[:, 1:] for name, x in case.rows.items()})
    reference.plan(want, bare).append(slice(0, 3), by_hand)
    assert torch.equal(theirs, want)
    assert torch.equal(mine, want)
    assert torch.equal(parts, want)


@pytest.mark.parametrize("kv", FLOATS)
def test_floats_stay_as_they_are(kv, ops):
    held, outs, roots = [], [], []
    for centres in (None, far()):
        cache = make_cache(kv, LAYERS, centres=centres)
        sequence = cache.open()
        outs += Toy(LAYERS).run([(sequence, text(70))])
        held.append(cache.pages(cache.spec.groups[0])[sequence.tables[0].pages.astype("int64")])
        roots.append(sequence._root)
    assert torch.equal(held[0], held[1]) and torch.equal(outs[0], outs[1])
    assert roots[0] == roots[1], "a centre that is not used is no part of the key"


# attend


@needs_kernels
@over_coarse
def test_attention_and_its_log_sum_exp_are_those_of_whole_keys(isa, kv):
    CentredCase(kv, members=((700, 37), (33, 1), (1, 1))).check(isa)
    CentredCase(kv, 80, 40, lanes=3, shared=1, page=16, members=((300, 2),), window=100, sinks=3).check(isa)


@needs_kernels
@pytest.mark.parametrize("kv", ["int8", "int4", "int4-row"])
def test_kept_rows_have_the_same_centre(isa, kv):
    CentredKept(kv).check(isa)
    CentredKept(kv).check(isa, bias=torch.randn(6, 650, generator=torch.Generator().manual_seed(2)))


@needs_kernels
@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_the_reference_gives_the_same(kv):
    case = CentredCase(kv, members=((320, 20), (64, 1)))
    got = reference.plan(case.pages, case.tail).attend(slice(0, 2), case.q, scale=0.125, want_lse=True)
    for mine, want in zip((got.out, got.lse), case.dense(), strict=True):
        torch.testing.assert_close(mine.double(), want, atol=1e-4, rtol=1e-4)


@needs_kernels
def test_a_log_sum_exp_without_what_was_subtracted_is_seen(isa, monkeypatch):
    monkeypatch.setattr(reads.Reads, "whole", lambda self, lanes, q, scale, lse: lse)
    with sees():
        CentredCase("int8").check(isa)


def check_close(kv, ops):
    """Where all keys lie far from 0, a centre saves most of the error; where they don't, it changes little."""
    for size, at_most in ((20.0, 0.2), (0.0, 1.5)):
        centres, errors = far(size=size), []
        toy = Shifted(centres=centres)
        (want,) = toy.run([(make_cache("f32", LAYERS).open(), text(300))])
        for given in (None, centres):
            (got,) = toy.run([(make_cache(kv, LAYERS, centres=given).open(), text(300))])
            errors.append((got - want).square().mean().sqrt())
        assert errors[1] <= at_most * errors[0], f"{ops}: {errors[1]:.1e} with, {errors[0]:.1e} without, at {size}"


@pytest.mark.parametrize("kv", ["int8", "int8-rot", "int4", "int4-plain", "k:int4-row,v:int8", "k8v4"])
def test_what_all_keys_have_in_common_costs_nothing(kv, ops):
    if kv == "k8v4":  # of which the values' error is the larger part
        kv = "k:int8,v:f32"
    check_close(kv, ops)


def test_a_centre_that_is_not_subtracted_is_seen(monkeypatch, plain):
    monkeypatch.setattr(reads.Reads, "centred", lambda self, lanes, rows: rows)
    with sees():
        check_close("int4", "reference")


@needs_kernels
def test_attention_mass_is_that_of_whole_keys(isa):
    case = CentredCase("int8", members=((300, 20), (50, 1)))
    mine = case.attend(want_mass=True)
    theirs = reference.plan(case.pages, case.tail).attend(slice(0, 2), case.q, scale=0.125, want_mass=True)
    for a, b in zip(mine.mass, theirs.mass, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)
    total = torch.stack([mass.sum(1) for mass in mine.mass]).sum(0)
    torch.testing.assert_close(total, torch.full((2,), 3.0 * 21), atol=1e-3, rtol=0)


@needs_kernels
@pytest.mark.parametrize("other", ["int8", "f32"])
@pytest.mark.parametrize("backend", [reference, native])
def test_segments_with_different_centres_merge(isa, other, backend):
    """Law 3: rows of one text under one centre, rows of another under another centre or none."""
    a = CentredCase("int8", members=((320, 1),))
    b = (CentredCase if other == "int8" else Case)(other, members=((160, 1),), seed=5)
    b.away, b.q = -0.5, a.q
    if other == "int8":
        native.plan(b.pages, b.reads([(0, 160)])).append(slice(0, 2), b.rows)
    parts = [
        backend.plan(case.pages, case.tail).attend(slice(0, 2), a.q, scale=0.125, want_lse=True) for case in (a, b)
    ]
    joined = merge(*parts)
    (out, lse), (out_b, lse_b) = a.dense(), b.dense()
    share = (lse - torch.logaddexp(lse, lse_b)).exp()[..., None]
    limit = bound("int8", isa)
    torch.testing.assert_close(joined.out.double(), out * share + out_b * (1 - share), atol=limit, rtol=0)
    torch.testing.assert_close(joined.lse.double(), torch.logaddexp(lse, lse_b), atol=limit, rtol=0)


def test_a_softcap_is_refused_with_the_way_out(ops):
    cache = make_cache("int8", LAYERS, centres=far())
    toy = Toy(LAYERS)
    with pytest.raises(UsageError, match=r"softcap bends scores.*without centres"):
        toy.run([(cache.open(), text(3))], softcap=30.0)
    toy.run([(make_cache("f32", LAYERS, centres=far()).open(), text(3))], softcap=30.0)


# 1. The cut.


@pytest.mark.parametrize("kv", ["int8", "int4", "int4-plain"])
@pytest.mark.parametrize("kept", ["", "+window:40,sinks:5"])
def test_the_cut_does_not_show(kv, kept, ops):
    layers = shapes(layers=1)
    check_cut(make_cache(kv + kept, layers, centres=far(layers)), Shifted(layers))


def test_the_log_sum_exp_shows_no_cut(ops):
    layers = shapes(layers=1, heads=3, width=24)
    toy, found = Shifted(layers, shared=3), []
    for pieces in ([200], [1] * 9 + [191], [37, 64, 99]):
        sequence, parts = make_cache("int8", layers, centres=far(layers)).open(), []
        for piece in pieces:
            with sequence.append(text(200)[len(sequence) : len(sequence) + piece]) as step:
                toy.append(step, 0)
                q = toy.row("q", 0, step.tokens, step.positions)
                parts.append(step.attend(0, q, scale=0.2, want_lse=True).lse)
        found.append(torch.cat(parts))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# What looks at stored keys sees whole ones.


@pytest.mark.parametrize("kv", ["int8", "int4", "f32; layers 1 heads 1: int8", "int4; layers 0 heads 0: f32"])
def test_what_is_read_is_what_was_appended(kv, ops):
    toy, cache = Shifted(), make_cache(kv, LAYERS, centres=far())
    sequence, tokens = cache.open(), text(90)
    toy.fill(sequence, tokens)
    for layer in range(2):
        want = toy.row("k", layer, tokens, range(90)).transpose(0, 1)
        assert (sequence.read(layer)["k"] - want).abs().max() <= 0.7  # of keys around 20


def test_policies_see_whole_keys(monkeypatch, ops):
    shown = []

    def apply(policy, layers):
        layers = list(layers)
        shown.extend(layers)
        return honest(policy, iter(layers))

    honest = compaction.apply
    monkeypatch.setattr(compaction, "apply", apply)
    toy, cache, tokens = (
        Shifted(),
        make_cache("int8+knorm:25%; layers 1 heads 1: int4", LAYERS, centres=far()),
        text(256),
    )
    with cache.open(tokens) as sequence:
        toy.fill(sequence, tokens)
        sequence.settle()
        kept = [sequence.read(layer) for layer in range(2)]
    first = toy.row("k", 0, tokens, range(256)).transpose(0, 1)
    assert (shown[0].keys - first).abs().max() <= 0.7
    assert shown[1].keys.shape[0] == 1, "one head of the second layer is in another group"
    for layer, rows in enumerate(kept):
        want = toy.row("k", layer, tokens, range(256)).transpose(0, 1)[:, rows["positions"]]
        assert (rows["k"] - want).abs().nan_to_num(0).max() <= 0.7
        assert rows["k"].isnan().any(), "rows have left"


# 6. Keys.


def test_rows_under_other_centres_are_not_found():
    caches = [make_cache("int8; layers 0: f32", LAYERS, centres=c) for c in (None, far(), far(seed=1), far())]
    none, one, other, again = (cache.open()._root for cache in caches)
    assert len({none, one, other}) == 3
    assert one == again
    blocks, toy, tokens = [], Toy(LAYERS), text(64)
    for cache in caches[1:]:
        with cache.open(tokens) as sequence:
            toy.fill(sequence, tokens)
            sequence.settle()
        blocks.append({block.key for block in cache.index})
    assert blocks[0] == blocks[2] and not blocks[0] & blocks[1]


def test_a_small_change_is_another_fingerprint():
    layers = [x.clone() for x in far().layers]
    layers[1][1, 3] = torch.nextafter(layers[1][1, 3], torch.tensor(1e9))
    assert Centres(layers).fingerprint != far().fingerprint == far().fingerprint
    assert repr(far()) == f"<Centres of 2 layers' keys, {far().fingerprint[:8]}>"


# What can't be.


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (shapes(layers=1), "layer 1 has 0 heads of 0"),
        (shapes(heads=1), "layer 0 has 1 heads of 16 there, but its head 1 has keys of 16"),
        (shapes(width=8), "layer 0 has 2 heads of 8"),
    ],
)
def test_centres_for_other_layers_are_refused(layers, named):
    with pytest.raises(UsageError, match=named):
        make_cache("int8", LAYERS, centres=far(layers))
    make_cache("f32", LAYERS, centres=far(layers))


def test_keys_that_no_centre_is_for_are_left_alone():
    turned = [replace(layer, frequencies=(1.0,) * 8) for layer in LAYERS]
    spec = "int8+window:64,sinks:4"
    assert make_cache(spec, turned, centres=far()).centres[0] is not None
    cache = make_cache(f"{spec},relative", turned, centres=far())
    assert cache.centres == [None], "they may stand beyond the positions that the model knows"
    assert cache.open()._root == make_cache(f"{spec},relative", turned).open()._root
    source = [*LAYERS, replace(LAYERS[0], source=True)]
    assert [c is None for c in make_cache("int8", source, centres=far(LAYERS)).centres] == [False, True]
    gap = Centres([*far().layers, torch.zeros(0, 0)])
    latent = replace(LAYERS[0], heads=1, streams=(("latent", 16), ("rope", 8)))
    assert [c is None for c in make_cache("int8", [*LAYERS, latent], centres=gap).centres] == [False, True]


@pytest.mark.parametrize("bad", [torch.full((2, 16), torch.nan), torch.zeros(16), torch.zeros(2, 16).double()])
def test_what_is_no_centre_is_refused(bad):
    with pytest.raises(UsageError, match="layer 1"):
        Centres([torch.zeros(2, 16), bad])


def test_every_codec_is_one_or_the_other():
    assert {name for name, codec in CODECS.items() if not codec.quantises} == set(FLOATS)
    case = Case("int8", members=((40, 1),)) if loader.built() else None
    assert case is None or paged.packed(case.pages, case.layout, 32).shape[-1] == case.layout.row_bytes
