"""Allocators: what holds for every one of them, and what each is for."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvik.cache.allocators import ALLOCATORS, ada, everywhere, pyramid, uniform

few = settings(max_examples=50)
over_allocators = pytest.mark.parametrize("name", ALLOCATORS)


@st.composite
def layers(draw):
    """(scores, held, protected) of a few layers, with ties, NaN and infinities, and garbage where nothing is held."""
    parts = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        lanes, rows = draw(st.integers(1, 3)), draw(st.integers(1, 9))

        def table(values, dtype, lanes=lanes, rows=rows):
            row = st.lists(values, min_size=rows, max_size=rows)
            return torch.tensor(draw(st.lists(row, min_size=lanes, max_size=lanes)), dtype=dtype)

        some = st.sampled_from([0.0, 1.0, 1.0, 2.0, -3.0, 3.4e38, -3.4e38, float("nan"), float("inf"), -float("inf")])
        parts[0].append(table(some, torch.float32))
        parts[1].append(table(st.sampled_from([True, True, True, False]), torch.bool))
        parts[2].append(table(st.sampled_from([True, False, False, False]), torch.bool))
    return parts


def ranked(scores, held, protected, lane):
    """A lane's columns, what stays first in front: by protection, score and column; NaN below -inf."""

    def worth(column):
        score = scores[lane, column].item()
        return (bool(protected[lane, column]), score == score, score if score == score else 0.0, column)

    return sorted(held[lane].nonzero().flatten().tolist(), key=worth, reverse=True)


def all_lanes(*parts):
    """Pairs of (that layer's tensors, lane)."""
    return [(layer, lane) for layer in zip(*parts, strict=True) for lane in range(len(layer[0]))]


@over_allocators
@few
@given(given_layers=layers(), budget=st.integers(0, 10))
def test_what_holds_for_every_allocator(name, given_layers, budget):
    scores, held, protected = given_layers
    keep = ALLOCATORS[name](scores, held, protected, budget)
    sure = [p & h for p, h in zip(protected, held, strict=True)]
    assert all(k.dtype == torch.bool and k.shape == s.shape for k, s in zip(keep, scores, strict=True))
    assert all((k & ~h).sum() == 0 for k, h in zip(keep, held, strict=True)), "a row stays that wasn't there"
    assert all((s & ~k).sum() == 0 for k, s in zip(keep, sure, strict=True)), "a protected row left"
    lanes = all_lanes(keep, scores, held, sure)
    total, fixed = (int(sum(x.sum() for x in masks)) for masks in (keep, sure))
    assert total <= max(len(lanes) * budget, fixed)
    for (k, s, h, p), lane in lanes:
        best = ranked(s, h, p, lane)
        assert set(k[lane].nonzero().flatten().tolist()) == set(best[: int(k[lane].sum())]), "a worse row stayed"
    if budget >= max(int(h[lane].sum()) for (_, _, h, _), lane in lanes):
        assert all(torch.equal(k, h) for k, h in zip(keep, held, strict=True)), "a free budget took a row"
    again = ALLOCATORS[name](scores, held, protected, budget)
    assert all(torch.equal(a, b) for a, b in zip(keep, again, strict=True))


@few
@given(given_layers=layers(), budget=st.integers(0, 10))
def test_uniform_gives_every_lane_the_same(given_layers, budget):
    lanes = all_lanes(uniform(*given_layers, budget), *given_layers)
    assume(all(int((p & h)[lane].sum()) <= budget for (_, _, h, p), lane in lanes))
    assert all(int(k[lane].sum()) == min(budget, int(h[lane].sum())) for (k, _, h, _), lane in lanes)


def worst_and_best(keep, scores, held, protected):
    """(the least score that stayed unprotected, the best that left): ±inf where there is none; NaN is below all."""
    stayed, left = [float("inf")], [-float("inf")]
    for k, s, h, p in zip(keep, scores, held, protected, strict=True):
        s = s.nan_to_num(-float("inf"), float("inf"), -float("inf"))
        stayed += s[k & ~p].tolist()
        left += s[h & ~k].tolist()
    return min(stayed), max(left)


@few
@given(given_layers=layers(), budget=st.integers(0, 10))
def test_global_keeps_the_best_wherever_they_are_and_uses_all_of_its_budget(given_layers, budget):
    scores, held, protected = given_layers
    keep = everywhere(scores, held, protected, budget)
    stayed, left = worst_and_best(keep, scores, held, protected)
    assert stayed >= left
    rows, fixed = (
        int(sum(x.sum() for x in masks)) for masks in (held, [h & p for h, p in zip(*given_layers[1:], strict=True)])
    )
    lanes = sum(len(x) for x in scores)
    assert int(sum(k.sum() for k in keep)) == min(rows, max(fixed, lanes * budget))


@few
@given(given_layers=layers(), budget=st.integers(0, 10), floor=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_ada_keeps_the_best_of_a_layer_above_each_lanes_floor(given_layers, budget, floor):
    scores, held, protected = given_layers
    keep = ada(scores, held, protected, budget, floor=floor)
    sure = [p & h for p, h in zip(protected, held, strict=True)]
    assume(all(int(s.sum()) <= budget * len(s) for s in sure))  # else layers borrow from each other
    for layer in zip(keep, scores, held, sure, strict=True):
        k, _, h, p = layer
        total = budget * len(k)
        assert int(k.sum()) == min(total, int(h.sum()))
        floors = [min(int(floor * budget + 1e-9), int(row.sum())) for row in h]
        if sum(max(f, int(row.sum())) for f, row in zip(floors, p, strict=True)) <= total:
            assert all(int(row.sum()) >= f for row, f in zip(k, floors, strict=True))
        if floor == 0:
            stayed, left = worst_and_best(*([x] for x in layer))
            assert stayed >= left


def table(lanes, rows, fixed=0, seed=0):
    scores = torch.rand(lanes, rows, generator=torch.Generator().manual_seed(seed))
    protected = torch.zeros(lanes, rows, dtype=torch.bool)
    protected[:, :fixed] = True
    return scores, torch.ones(lanes, rows, dtype=torch.bool), protected


def rows_by_layer(allocate, count, rows, budget, fixed=0, **options):
    """Rows that each lane of each layer keeps."""
    parts = zip(*(table(2, rows, fixed, seed) for seed in range(count)), strict=True)
    return [k.sum(1).tolist() for k in allocate(*map(list, parts), budget, **options)]


def test_a_pyramid_falls_in_a_line():
    assert rows_by_layer(pyramid, 5, 100, 24, fixed=4) == [[43, 43], [34, 34], [24, 24], [14, 14], [5, 5]]
    assert rows_by_layer(pyramid, 5, 100, 24, fixed=4, steep=1) == [[24, 24]] * 5
    assert rows_by_layer(pyramid, 1, 100, 24) == [[24, 24]]


def test_a_pyramid_as_broad_as_the_text_is_less_steep_and_loses_nothing():
    found = rows_by_layer(pyramid, 5, 40, 32)
    assert found == [[40, 40], [36, 36], [32, 32], [28, 28], [24, 24]]
    for budget in range(45):
        assert sum(map(sum, rows_by_layer(pyramid, 4, 40, budget, fixed=3))) == 8 * min(max(budget, 3), 40)


def test_lanes_share_by_what_their_rows_are_worth():
    scores, held, protected = table(3, 50)
    scores[1] += 1
    counts = ada([scores], [held], [protected], 20)[0].sum(1).tolist()
    assert counts[1] == 50 and sum(counts) == 60 and min(counts) >= 4
    flat = torch.zeros(2, 6)
    keep = everywhere([flat, flat], [flat == 0] * 2, [flat != 0] * 2, 2)
    assert [k.int().tolist() for k in keep] == [[[0, 0, 0, 0, 1, 1]] * 2] * 2, "of equals the later ones, lane by lane"
    keep = everywhere([flat, flat], [flat == 0] * 2, [flat != 0] * 2, 1, floor=1.0)
    assert all(k.sum(1).tolist() == [1, 1] for k in keep)
