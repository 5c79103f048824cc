"""Codecs: each row by itself, bit for bit; within known errors; finite whatever comes. And where a row's bytes lie."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import KV, sees
from kvik.cache.spec import LayerShape, Spec
from kvik.ops import codecs
from kvik.ops import pages as paged
from kvik.ops.codecs import decode, encode, hadamard, unrotated
from kvik.ops.layout import CODECS, RowLayout, nearest_codec

WIDTHS = (16, 24, 40, 64, 80, 96, 128, 256)
SLACK = 1 + 2**-7  # a scale is rounded to bf16

over_widths = pytest.mark.parametrize("width", WIDTHS)


def layout_of(kv, width, values=None):
    return Spec.parse(kv, [LayerShape(1, (("k", width), ("v", values or width)))]).groups[0].layout


def rows_of(layout, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.randn(*shape, s.width, generator=generator) for s in layout.streams}


def back(layout, rows):
    return {name: unrotated(layout, name, x) for name, x in decode(layout, encode(layout, rows)).items()}


def check_row_law(layout):
    """encode(rows)[i] == encode(rows[i:i+1]), and the same backwards, at any shape."""
    rows = rows_of(layout, 37, 3)
    rows = {name: x * torch.logspace(-6, 6, 37)[:, None, None] for name, x in rows.items()}
    packed = encode(layout, rows)
    assert packed.dtype == torch.uint8
    assert packed.shape == (37, 3, layout.row_bytes)
    whole = decode(layout, packed)
    for i in range(37):
        alone = encode(layout, {name: x[i : i + 1] for name, x in rows.items()})
        assert torch.equal(packed[i : i + 1], alone), f"row {i} of 37"
        for name, x in decode(layout, alone).items():
            assert torch.equal(whole[name][i : i + 1], x), f"row {i} of 37, decoded"
    flat = encode(layout, {name: x.flatten(0, 1) for name, x in rows.items()})
    assert torch.equal(packed.flatten(0, 1), flat), "another shape"
    lanes = encode(layout, {name: x.transpose(0, 1) for name, x in rows.items()})
    assert torch.equal(packed.transpose(0, 1), lanes), "another order in memory"


@over_widths
@pytest.mark.parametrize("kv", KV)
def test_a_row_is_encoded_by_itself(kv, width):
    check_row_law(layout_of(kv, width))


def test_streams_may_differ_in_width():
    check_row_law(layout_of("k8v4", 40, 96))
    check_row_law(layout_of("int4", 96, 40))


def test_rows_that_share_a_scale_are_seen(monkeypatch):
    honest = codecs._int4

    def shared(x, group):
        codes, scales = honest(x / x.abs().max(), group)
        return codes, scales

    monkeypatch.setattr(codecs, "_int4", shared)
    with sees():
        check_row_law(layout_of("int4", 64))


@over_widths
def test_floats_round_to_nearest(width):
    rows = rows_of(layout_of("f32", width), 50)
    for kv, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16)):
        for name, x in back(layout_of(kv, width), rows).items():
            assert torch.equal(x, rows[name].to(dtype).float())


@over_widths
@pytest.mark.parametrize("seed", range(3))
def test_int8_is_off_by_at_most_half_a_step_of_the_rows_largest(width, seed):
    rows = rows_of(layout_of("int8", width), 50, seed=seed)
    for name, x in back(layout_of("int8", width), rows).items():
        peak = rows[name].abs().amax(-1, keepdim=True)
        assert ((x - rows[name]).abs() <= peak / 254 * SLACK).all()


@over_widths
@pytest.mark.parametrize("kv", ["int4", "int4-plain", "int4-row"])
def test_int4_is_no_worse_than_seven_steps_each_way(kv, width):
    """The least of two squared errors is at most that of the scale peak / 7, where nothing is off by more than half."""
    layout = layout_of(kv, width)
    rows = rows_of(layout, 50)
    codec = CODECS[kv]
    for name, x in decode(layout, encode(layout, rows)).items():
        turned = hadamard(rows[name]) if codec.rotated else rows[name]
        group = codec.group_of(width)
        want, got = (t.unflatten(-1, (-1, group)) for t in (turned, x))
        peak = want.abs().amax(-1)
        assert ((got - want).square().mean(-1).sqrt() <= peak / 14 * SLACK).all()
        assert ((got - want).abs().amax(-1) <= peak / 7 * SLACK).all()


@over_widths
def test_the_rotation_is_its_own_inverse_and_keeps_lengths(width):
    x = rows_of(layout_of("f32", width), 20)["k"]
    torch.testing.assert_close(hadamard(hadamard(x)), x, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(hadamard(x).norm(dim=-1), x.norm(dim=-1))
    matrix = hadamard(torch.eye(width))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width), atol=1e-6, rtol=0)
    order = width & -width
    assert (matrix[:order, :order].abs() - order**-0.5).abs().max() < 1e-6, "all entries alike"
    assert not matrix[:order, order:].any(), "each run of a power of two by itself"


@over_widths
@pytest.mark.parametrize("kv", KV)
def test_extreme_rows_stay_finite_and_zero_stays_zero(kv, width):
    layout = layout_of(kv, width)
    base = rows_of(layout, 1)
    for size in (0.0, 1e-45, 1e-38, 1e-30, 1e30):
        for name, x in back(layout, {name: x * size for name, x in base.items()}).items():
            assert x.isfinite().all(), (name, size)
            assert x.any() or size < 1e-29 or (size == 1e-30 and "f16" in kv)
            assert not (size == 0 and x.any())


def test_f16_saturates():
    layout = layout_of("f16", 16)
    rows = {name: torch.full((1, 16), 1e30) for name in "kv"}
    assert (back(layout, rows)["k"] == 65504).all()


@pytest.mark.parametrize("kv", ["int8", "int8-rot", "int4", "int4-plain", "int4-row"])
def test_a_codec_is_no_more_wrong_for_tiny_and_huge_rows(kv):
    layout = layout_of(kv, 64)
    rows = rows_of(layout, 30)
    errors = [
        (
            (back(layout, {n: x * size for n, x in rows.items()})["k"] / size - rows["k"]).norm() / rows["k"].norm()
        ).item()
        for size in (1.0, 1e-15, 1e15, 1e30)
    ]
    assert max(errors) < (0.02 if "8" in kv else 0.2)


@given(
    st.lists(st.tuples(st.sampled_from(list(CODECS.values())), st.integers(1, 300)), min_size=1, max_size=3),
)
def test_streams_and_scales_lie_side_by_side_and_none_overlaps(streams):
    layout = RowLayout.of(*((str(i), width, codec) for i, (codec, width) in enumerate(streams)))
    taken = []
    for stream in layout.streams:
        start, scales = layout.offsets[stream.name]
        unit = 4 if stream.codec.bits == 32 else 2 if stream.codec.bits == 16 else 1
        assert start % unit == 0
        taken += range(start, start + stream.codec.code_bytes(stream.width))
        taken += range(scales, scales + stream.codec.scale_bytes(stream.width))
        assert scales % 2 == 0 or not stream.codec.scale_bytes(stream.width)
    assert len(taken) == len(set(taken))
    assert max(taken) < layout.row_bytes <= len(taken) + 4 * (len(streams) + 1)
    assert layout.payload_bits == sum(codec.bits * width for codec, width in streams)


def test_a_rows_bytes_are_those_of_the_drawing():
    assert RowLayout.of(("k", 64, CODECS["int8"]), ("v", 64, CODECS["int8"])).row_bytes == 132
    assert RowLayout.of(("k", 64, CODECS["int8"]), ("v", 64, CODECS["int4"])).row_bytes == 102


@pytest.mark.parametrize("width", [24, 64])
@pytest.mark.parametrize("kv", KV)
def test_blanking_zeroes_the_rows_of_some_pages_from_a_slot_on_and_no_others(kv, width):
    layout, numbers = layout_of(kv, width, width + 8), torch.tensor([5, 1])
    noise = torch.randint(1, 256, (7, 16 * layout.row_bytes), generator=torch.Generator().manual_seed(0))
    for first in (0, 1, 2, 3, 8, 13, 15):
        pages = noise.to(torch.uint8)
        before = paged.packed(pages, layout, 16)
        paged.blank(pages, layout, 16, numbers, first)
        before[numbers, first:] = 0
        assert torch.equal(paged.packed(pages, layout, 16), before), first
        assert torch.equal(pages[[0, 2, 3, 4, 6]], noise[[0, 2, 3, 4, 6]])


def test_a_misspelt_codec_has_a_nearest():
    assert nearest_codec("int9") in ("int8", "int4")
    assert nearest_codec("bf-16") == "bf16"
