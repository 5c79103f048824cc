"""Spec strings, the groups they make, and bytes: three figures whose sum is exact."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import PAGES, RETAINED, Toy, make_cache, shapes, text
from kvik.cache.retention import Retention
from kvik.cache.rules import parse_rules
from kvik.cache.spec import Bytes, LayerShape, Spec
from kvik.errors import SpecError
from kvik.ops.layout import CODECS
from kvik.ops.reads import Reads

LAYERS = shapes(layers=4, heads=2)


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("int8", "int8"),
        ("k8v4", "k8v4"),
        ("k:int8,v:int4", "k8v4"),
        ("k8v8", "int8"),
        ("k16v32", "k16v32"),
        ("k:bf16,v:int8-rot", "k:bf16,v:int8-rot"),
        ("int4+full", "int4"),
        ("int4 + window:1024 , sinks:4", "int4+window:1024,sinks:4"),
        ("bf16+sinks:4,window:9", "bf16+window:9,sinks:4"),
        ("int4; layers 0-1: bf16", "int4; layers 0-1: bf16"),
        ("int4; layer 3,0,1: bf16+window:5", "int4; layers 0-1,3: bf16+window:5"),
        ("bf16; layers 2 heads 0-1: k8v4; page 64", "bf16; layers 2 heads 0-1: k8v4; page 64"),
        ("bf16; page 32", "bf16"),
    ],
)
def test_a_spec_prints_what_it_reads(written, printed):
    spec = Spec.parse(written, LAYERS)
    assert str(spec) == printed
    again = Spec.parse(printed, LAYERS)
    assert (again, again.fingerprint) == (spec, spec.fingerprint)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("", "no codec; put one first"),
        ("int9", "did you mean 'int8'"),
        ("k9v4", "9 bits; k and v take 32, 16, 8, 4"),
        ("k8", "'k8' is no codec"),
        ("k:int8,k:int4", "names streams wrongly"),
        ("k:int8,v", "names streams wrongly"),
        ("k:int8", "no codec for 'v'"),
        ("x:int8,v:int4", "this model keeps k and v"),
        ("int8+h2o:3", "'3' is no budget of 'h2o'"),
        ("int8+h3o:25%", "did you mean"),
        ("int8+orakel:25%", "observed, quest, random"),
        ("int8+window", "one whole number"),
        ("rkv:512rows", "put a codec in front, as in 'int8+rkv:512rows'"),
        ("window:512,sinks:4; page 64", "as in 'int8+window:512,sinks:4'"),
        ("int8; layers 0: ada(snapkv):25%", "as in 'int8+ada(snapkv):25%'"),
        ("h3o:25%", "is no codec"),
        ("int8+window:0", "one whole number"),
        ("int8+window:-3", "one whole number"),
        ("int8+window:1e3", "one whole number"),
        ("int8+window:3,window:4", "one whole number"),
        ("int8+window:9999999999", "one whole number"),
        ("int8+sinks:4", "add a window"),
        ("int8; page 48", "use 16, 32, 64 or 128"),
        ("int8; page", "is no rule"),
        ("int8; bf16", "is no rule"),
        ("layers 0: int8", "the first rule is for every layer"),
        ("int8; layers 1-0: bf16", "no layer or range"),
        ("int8; layers 4: bf16", "layers 0-3"),
        ("int8; layers 0 heads 2: bf16", "KV heads are 0-1"),
        ("int8; " + "layers 0: bf16; " * 100 + "layers 0: bf17", "'bf17' is no codec"),
        ("x" * 20_000, "10,000 are enough"),
    ],
)
def test_a_spec_that_cannot_be_read_is_named_with_the_way_out(written, named):
    with pytest.raises(SpecError) as error:
        Spec.parse(written, LAYERS)
    assert named in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@given(st.text(alphabet="kv0123456789int:bf+;, -windowskslayerpgh", max_size=40))
def test_no_string_does_anything_but_parse_or_name_what_is_wrong(written):
    try:
        spec = Spec.parse(written, LAYERS)
    except SpecError:
        return
    assert Spec.parse(str(spec), LAYERS) == spec


def test_lanes_of_one_shape_codec_and_retention_are_one_group():
    layers = [*shapes(layers=1, window=64), *shapes(layers=2)]
    groups = Spec.parse("int8+window:100,sinks:4; layers 2 heads 1: f32", layers).groups
    assert [(g.lanes, str(g.retention)) for g in groups] == [
        (((0, 0), (0, 1)), "window:64"),
        (((1, 0), (1, 1), (2, 0)), "window:100,sinks:4"),
        (((2, 1),), "full"),
    ]


def test_a_later_rule_wins():
    groups = Spec.parse("int8; layers 0-3: int4; layers 1: bf16", LAYERS).groups
    assert {g.layout.streams[0].codec.name: len(g.lanes) for g in groups} == {"int4": 6, "bf16": 2}


def test_every_difference_of_what_is_stored_is_a_difference_of_the_fingerprint():
    specs = [
        *(Spec.parse(kv + kept, LAYERS, page) for kv in CODECS for kept in RETAINED for page in PAGES),
        Spec.parse("int8", shapes(layers=3)),
        Spec.parse("int8", shapes(layers=4, heads=1)),
        Spec.parse("int8", shapes(layers=4, width=32)),
        Spec.parse("int8", [LayerShape(2, (("k", 16), ("latent", 16)))] * 4),
        Spec.parse("k8v4", LAYERS),
        Spec.parse("k4v8", LAYERS),
        Spec.parse("int8; layers 0: int4", LAYERS),
    ]
    assert len({spec.fingerprint for spec in specs}) == len(specs)


@given(st.integers(0, 500), st.integers(1, 300), st.integers(0, 100), st.sampled_from(PAGES))
def test_a_page_lives_exactly_if_a_later_query_may_see_one_of_its_rows(tokens, window, sinks, page):
    """Or one row more: the one that the window has just left may stay."""
    kept = Retention(window, sinks)
    reads = Reads(Spec.parse("f32", LAYERS).groups[0].layout, page, window, sinks, ())
    positions = range(tokens)
    seen = {p // page for p in positions if reads.visible(tokens, p)}
    most = {p // page for p in positions if p >= tokens - window or p < sinks}
    live = kept.live_pages(tokens, page)
    assert live == sorted(set(live))
    assert seen <= set(live)
    assert set(live) <= most | seen
    assert kept.rows(tokens) == sum(p >= tokens - window or p < sinks for p in positions)


# Bytes.


def measured(kv="f32", layers=2, heads=2, width=16, length=64, batch=1, page=32):
    """The three figures of real sequences, and of the cache that holds them; both must agree with the formula."""
    layers = shapes(layers, heads, width)
    cache, toy = make_cache(kv, layers, page=page, shares=False), Toy(layers)
    sequences = [cache.open() for _ in range(batch)]
    for i, sequence in enumerate(sequences):
        toy.fill(sequence, text(length, i))
        sequence.settle()
        assert sequence.nbytes == cache.spec.nbytes(length)
    whole = sum((s.nbytes for s in sequences), Bytes(0, 0))
    assert whole == cache.spec.nbytes(length, batch)
    assert cache.nbytes.payload == whole.payload
    assert cache.nbytes.allocated == cache.arena.held == cache.nbytes.payload + cache.nbytes.overhead
    assert whole.allocated == whole.payload + whole.overhead
    assert 0 <= cache.nbytes.allocated - whole.allocated < cache.arena.slab_bytes * len(cache.arena.classes), (
        "one slab each"
    )
    return whole


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("kv", ("int4", "int8", "bf16", "f32")),
        ("layers", (1, 2, 4)),
        ("heads", (1, 2, 4)),
        ("width", (16, 32, 64)),
        ("length", (32, 64, 128)),
        ("batch", (1, 2, 4)),
    ],
)
def test_payload_doubles_with(name, values):
    found = [measured(**{name: value}) for value in values]
    assert all(after.payload == 2 * before.payload for before, after in itertools.pairwise(found))


def test_payload_is_the_formula():
    assert measured("bf16", layers=3, heads=2, width=16, length=100).payload == 3 * 2 * 100 * (16 + 16) * 16 // 8


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 257])
@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("kept", RETAINED)
@pytest.mark.parametrize("kv", ["f32", "int8", "k8v4", "int4-plain"])
def test_measured_bytes_are_the_specs(kv, kept, page, length):
    measured(kv + kept, length=length, page=page)


def test_a_fork_and_a_hit_cost_tables_only():
    layers = shapes()
    cache, toy = make_cache("int8", layers), Toy(layers)
    with cache.open() as sequence:
        toy.fill(sequence, text(128))
        sequence.settle()
        alone = cache.nbytes
        with sequence.fork() as twin, cache.open([*text(128), 1]) as hit:
            tables = sum(t.nbytes for s in (twin, hit) for t in s.tables)
            assert cache.nbytes == Bytes(alone.payload, alone.overhead + tables)
        assert cache.nbytes == alone
    assert cache.nbytes.payload == alone.payload, "kept for reuse"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "put one first"),
        ("none", "for 'kvik run' alone"),
        ("int8; layers 0: none", "give a codec"),
        ("tuned", "'kvik tune' printed"),
        ("relative", "a codec and a window in front"),
        ("INT8", "did you mean 'int8'"),
        ("int8+window:512+snapkv:25%", "says twice which rows stay"),
        ("int8+windw:512", "or a method, such as 'snapkv:25%'"),
    ],
)
def test_words_at_a_wrong_place_are_told_apart(text, told):
    with pytest.raises(SpecError) as raised:
        parse_rules(text)
    assert told in str(raised.value)


def test_what_looks_like_no_codec_gets_no_guess():
    with pytest.raises(SpecError, match=r"like k8v4$"):
        parse_rules("xyzzy")
