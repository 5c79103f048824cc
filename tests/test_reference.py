"""The reference attention against dense float64, and the merge law (3)."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import PAGES, Toy, make_cache, pairwise, sees, shapes, text
from kvik.ops import reference
from kvik.ops.padding import TILE, row_multiple
from kvik.ops.reads import Partial, merge

DEFAULT = {"softcap": None, "bias": None}


def dense(toy, tokens, window=None, sinks=0, softcap=None, bias=None, scale=0.2):
    """(out [T, H, E], lse [T, H], mass [L, T]) of a whole text in float64, its mask and distances by position."""
    at = torch.arange(len(tokens))
    q, k, v = (toy.row(name, 0, tokens, at.tolist()).double() for name in "qkv")
    shared = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(shared, 1)) * scale
    back = at[:, None] - at
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if bias is not None:
        scores = scores + bias.double()[:, back.clamp(0, bias.shape[1] - 1)]
    visible = (back >= 0) & ((back < (window or len(tokens))) | (at < sinks))
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1)
    out = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(shared, 1))
    return out, scores.logsumexp(-1).T, weights.unflatten(0, (-1, shared)).sum((1, 2))


def ours(toy, cache, texts, pieces, **options):
    """Several texts side by side, in pieces: (out, lse, mass by position) of each."""
    sequences, found = [cache.open() for _ in texts], [([], [], []) for _ in texts]
    lanes = len(cache.spec.groups[0].lanes)
    masses, page = [torch.zeros(lanes, len(tokens)) for tokens in texts], cache.spec.page_size
    at = 0
    for piece in pieces:
        members = [i for i, tokens in enumerate(texts) if tokens[at : at + piece]]
        with cache.step([(sequences[i], texts[i][at : at + piece]) for i in members]) as step:
            toy.append(step, 0)
            q = toy.row("q", 0, step.tokens, step.positions)
            part = step.attend(0, q, scale=0.2, want_lse=True, want_mass=True, **options)
            sizes = [len(chunk) for chunk in step.chunks]
            for i, out, lse in zip(members, part.out.split(sizes), part.lse.split(sizes), strict=True):
                found[i][0].append(out), found[i][1].append(lse)
            for i, mass in zip(members, part.mass, strict=True):
                logical = torch.from_numpy(sequences[i].tables[0].logical.astype("int64"))
                held = (logical[:, None] * page + torch.arange(page)).flatten()
                inside = held < len(texts[i])
                masses[i].index_add_(1, held[inside], mass[:, inside])
                assert not mass[:, ~inside].any()
        at += piece
        for i in members:
            sequences[i].settle()
    for sequence in sequences:
        sequence.close()
    return [(torch.cat(outs), torch.cat(lses), mass) for (outs, lses, _), mass in zip(found, masses, strict=True)]


def check_dense(
    width=16, heads=2, shared=2, page=32, lengths=(300, 40, 130), pieces=(100, 1, 37, 162), kept="", **options
):
    layers = shapes(layers=1, heads=heads, width=width)
    toy, cache = Toy(layers, shared), make_cache("f32" + kept, layers, page=page)
    texts = [text(length, i) for i, length in enumerate(lengths)]
    retention = cache.spec.groups[0].retention
    for tokens, (out, lse, mass) in zip(texts, ours(toy, cache, texts, pieces, **options), strict=True):
        want = dense(toy, tokens, retention.window, retention.sinks, **options)
        torch.testing.assert_close(out.double(), want[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lse.double(), want[1], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(mass.double(), want[2], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(mass.sum(1), torch.full((heads,), float(len(tokens) * shared)), atol=0.01, rtol=0)


@pairwise(width=(16, 40, 64, 80, 128), shared=(1, 2, 3, 8), page=PAGES)
def test_attention_equals_dense_float64(width, shared, page, ops):
    check_dense(width=width, shared=shared, page=page)


@pytest.mark.parametrize("kept", ["", "+window:20", "+window:100,sinks:3", "+window:1"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("reach", [None, 1, 17, 500])
def test_masks_softcap_and_bias_by_distance_equal_dense_float64(kept, softcap, reach, ops):
    bias = None if reach is None else torch.randn(4, reach, generator=torch.Generator().manual_seed(1))
    check_dense(kept=kept, softcap=softcap, bias=bias)


@settings(max_examples=40)
@given(st.data())
def test_any_shape_equals_dense_float64(data):
    lengths = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=4))
    pieces = []
    while sum(pieces) < max(lengths):
        pieces.append(data.draw(st.sampled_from([1, 2, 7, 63, 64, 65, 200, 300])))
    check_dense(
        width=data.draw(st.sampled_from([8, 16, 24])),
        heads=data.draw(st.integers(1, 3)),
        shared=data.draw(st.integers(1, 3)),
        page=data.draw(st.sampled_from([16, 32, 64, 128])),
        lengths=lengths,
        pieces=pieces,
        kept=data.draw(st.sampled_from(["", "+window:20", "+window:300,sinks:3"])),
    )


def test_a_mask_that_is_off_by_one_is_seen(monkeypatch, plain):
    honest = reference.Block.hidden
    shift = lambda self, *sizes: honest(self, *sizes).roll(1, -1)  # noqa: E731
    monkeypatch.setattr(reference.Block, "hidden", shift)
    with sees():
        check_dense()


# 3. Merge law.


def check_merge(kv, kept, join):
    """attend(A ∪ B) = merge(attend A, attend B), wherever the rows are divided."""
    layers = shapes(layers=1)
    toy, cache = Toy(layers), make_cache(kv + kept, layers)
    sequences = [cache.open(), cache.open()]
    toy.run([(s, text(300, i)) for i, s in enumerate(sequences)])
    with cache.step([(s, text(20, i)) for i, s in enumerate(sequences)]) as step:
        toy.append(step, 0)
        q, plan = toy.row("q", 0, step.tokens, step.positions), step._plans[0]
        whole_blocks = plan.blocks

        def over(chosen):
            plan.blocks = [dataclasses.replace(b, visible=b.visible & chosen(b.held)[:, :, None]) for b in whole_blocks]
            return plan.attend(cache.parts[0][0].lanes, q, scale=0.2, want_lse=True)

        whole = over(lambda held: held >= 0)
        for chosen in (
            lambda p: p < 100,
            lambda p: p % 2 == 0,
            lambda p: p < TILE,
            lambda p: p >= 0,
            lambda p: p == 310,
        ):
            joined = join(over(chosen), over(lambda held, chosen=chosen: ~chosen(held)))
            torch.testing.assert_close(joined.out, whole.out, atol=2e-6, rtol=2e-5)
            torch.testing.assert_close(joined.lse, whole.lse, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("kept", ["", "+window:90,sinks:5"])
@pytest.mark.parametrize("kv", ["f32", "bf16", "int8", "int4", "k8v4"])
def test_attention_over_parts_merges(kv, kept, plain):
    check_merge(kv, kept, merge)


def test_a_merge_without_weights_is_seen(plain):
    with sees():
        check_merge("f32", "", lambda a, b: Partial((a.out + b.out) / 2, torch.logaddexp(a.lse, b.lse)))


def test_merging_needs_the_log_sum_exp():
    part = Partial(torch.zeros(1, 1, 4))
    with pytest.raises(AssertionError, match="want_lse=True"):
        merge(part, part)


@pytest.mark.parametrize("width", [16, 40, 64, 80, 128, 256])
def test_a_row_multiple_is_found(width):
    assert row_multiple(width, torch.device("cpu")) in (4, 8, 16, 32, 64)
