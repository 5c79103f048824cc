"""Scorers against plain loops over rows and queries, in float64; and what none of them may depend on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvik.cache import weigh
from kvik.cache.methods import Needs
from kvik.cache.scorers import METHODS, recalled
from kvik.cache.seen import Seen
from kvik.cache.streaming import far_sight
from kvik.errors import SpecError

FREQUENCIES = torch.tensor([1.0, 0.3, 0.05, 0.0], dtype=torch.float64)


def make(seed=0, lanes=3, rows=30, tokens=50, shared=2, queries=6, short=4, rotary=True):
    """Random lanes that hold different rows, in columns with gaps. What isn't held is NaN."""
    random, width = np.random.default_rng(seed), 8
    positions = np.full((lanes, rows), -1)
    for lane in range(lanes):
        held = rows - short * lane
        columns = np.sort(random.choice(rows, held, replace=False))
        positions[lane, columns] = np.sort(random.choice(tokens, held, replace=False))

    def noise(*shape):
        return torch.from_numpy(random.normal(size=shape)).float()

    gone = torch.from_numpy(positions < 0)
    return Seen(
        keys=(noise(lanes, rows, width) + noise(lanes, 1, width)).masked_fill(gone[..., None], torch.nan),
        values=noise(lanes, rows, 6).masked_fill(gone[..., None], torch.nan),
        positions=torch.from_numpy(positions),
        tokens=tokens,
        scale=0.4,
        queries=noise(queries, lanes, shared, width),
        asking=torch.arange(tokens - queries, tokens),
        mass=noise(lanes, rows).abs().masked_fill(gone, torch.nan),
        frequencies=FREQUENCIES if rotary else None,
        seed=5,
        repeated=noise(lanes, rows).abs().masked_fill(gone, torch.nan),
    )


def rows_of(seen, lane):
    """[(column, position, key, value)] of the rows that a lane holds."""
    at = seen.positions[lane].tolist()
    k, v = seen.keys[lane].double().numpy(), seen.values[lane].double().numpy()
    return [(c, p, k[c], v[c]) for c, p in enumerate(at) if p >= 0]


def asked(seen, lane):
    """[(position, [query of each head that shares the lane])]."""
    return list(zip(seen.asking.tolist(), seen.queries[:, lane].double().numpy(), strict=True))


def attention(seen, rows, query, at):
    """The weight of each row."""
    powers = [math.exp(seen.scale * (query @ k)) if p <= at else 0.0 for _, p, k, _ in rows]
    return [power / (sum(powers) or 1.0) for power in powers]


def rotation(position):
    """The matrix that turns a column vector to a position."""
    matrix = np.zeros((8, 8))
    for i, frequency in enumerate(FREQUENCIES.tolist()):
        c, s = math.cos(position * frequency), math.sin(position * frequency)
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
    return matrix


def slow_knorm(seen, lane, rows):
    return [-math.sqrt(sum(x * x for x in k)) for _, _, k, _ in rows]


def slow_keydiff(seen, lane, rows):
    directions = [k / np.linalg.norm(k) for _, _, k, _ in rows]
    anchor = sum(directions) / len(directions)
    return [-(d @ anchor) / np.linalg.norm(anchor) for d in directions]


def slow_lagkv(seen, lane, rows, lag=128, skip=4):
    scores = [1.0] * len(rows)
    for start in range(skip, len(rows) - 2 * lag + 1, lag):
        total = [0.0] * lag
        for stream in (2, 3):
            following = [rows[j][stream] for j in range(start + lag, start + 2 * lag)]
            low, high = np.min(following, axis=0), np.max(following, axis=0)
            spread = [np.std((rows[start + i][stream] - low) / (high - low), ddof=1) for i in range(lag)]
            powers = [math.exp(x) for x in spread]
            total = [t + power / sum(powers) for t, power in zip(total, powers, strict=True)]
        for i in range(lag):
            scores[start + i] = sum(other < total[i] for other in total) / lag
    return scores


def slow_snapkv(seen, lane, rows, pool=5):
    received = [0.0] * len(rows)
    for at, heads in asked(seen, lane):
        for query in heads:
            for j, weight in enumerate(attention(seen, rows, query, at)):
                received[j] += weight / len(heads)
    for j, row in enumerate(rows):
        received[j] /= max(1, sum(at >= row[1] for at, _ in asked(seen, lane)))
    near = [
        [received[i] for i in range(len(rows)) if -(pool // 2) <= i - j < pool - pool // 2] for j in range(len(rows))
    ]
    return [sum(some) / len(some) for some in near]


def slow_tova(seen, lane, rows):
    found = {}
    for other in range(len(seen.positions)):
        held = rows_of(seen, other)
        at, heads = asked(seen, other)[-1]
        weights = np.mean([attention(seen, held, query, at) for query in heads], axis=0)
        for row, weight in zip(held, weights, strict=True):
            found.setdefault(row[1], []).append(weight)
    return [sum(found[p]) / len(found[p]) for _, p, _, _ in rows]


def slow_h2o(seen, lane, rows):
    return [seen.mass[lane, c].item() for c, *_ in rows]


def slow_observed(seen, lane, rows):
    return [seen.mass[lane, c].item() / len(range(p, seen.tokens)) for c, p, _, _ in rows]


def slow_kvzip(seen, lane, rows):
    return [seen.repeated[lane, c].item() for c, *_ in rows]


def slow_expected(seen, lane, rows, ahead=512, skip=4, epsilon=0.0):
    turn = rotation if seen.frequencies is not None else lambda position: np.eye(8)
    future = sum(turn(seen.tokens + i) for i in range(ahead)) / ahead
    counted = [row for row in rows if row[1] >= skip]
    scores = {row[0]: 0.0 for row in counted}
    heads = seen.queries.shape[2]
    for head in range(heads):
        queries = [turn(at).T @ qs[head] for at, qs in asked(seen, lane) if at >= skip]
        mean = sum(queries) / len(queries)
        covariance = sum(np.outer(q - mean, q - mean) for q in queries) / len(queries)
        mean, covariance = future @ mean, future @ covariance @ future.T
        powers = [math.exp(seen.scale * k @ mean + seen.scale**2 * k @ covariance @ k / 2) for _, _, k, _ in counted]
        for row, power in zip(counted, powers, strict=True):
            scores[row[0]] += power / sum(powers) / heads
    scores = {c: (scores[c] + epsilon) * np.linalg.norm(v) for c, _, _, v in counted}
    return [scores.get(row[0], max(scores.values())) for row in rows]


def slow_rkv(seen, lane, rows, mix=0.1, alike=0.5, pool=7):
    importance, n = [0.0] * len(rows), len(rows)
    queries = asked(seen, lane)
    for at, heads in queries:
        powers = [math.exp(seen.scale * max(q @ k for q in heads)) if p <= at else 0.0 for _, p, k, _ in rows]
        importance = [i + power / sum(powers) / len(queries) for i, power in zip(importance, powers, strict=True)]
    importance = [max(importance[max(0, j - pool // 2) : j + pool - pool // 2]) for j in range(n)]
    totals = [0.0] * n
    for i in range(n):
        cosines = [rows[i][2] @ row[2] / np.linalg.norm(rows[i][2]) / np.linalg.norm(row[2]) for row in rows]
        cosines[i] = 0.0
        close = [j for j in range(n) if cosines[j] > alike]
        if close:
            cosines[close[-1]] = 0.0
        totals = [t + c for t, c in zip(totals, cosines, strict=True)]
    powers = [math.exp(total / n) for total in totals]
    return [mix * importance[j] - (1 - mix) * powers[j] / sum(powers) for j in range(n)]


def slow_chunk(seen, lane, rows, size=20):
    scores = slow_knorm(seen, lane, rows)
    together = [
        [s for s, other in zip(scores, rows, strict=True) if other[1] // size == p // size] for _, p, _, _ in rows
    ]
    return [sum(some) / len(some) for some in together]


CASES = [
    ("knorm", slow_knorm, {}, {}),
    ("keydiff", slow_keydiff, {}, {}),
    ("lagkv", slow_lagkv, {"lag": 6, "skip": 2}, {}),
    ("lagkv", slow_lagkv, {"lag": 5}, {"short": 10}),
    ("lagkv", slow_lagkv, {}, {}),  # too short for two runs: all alike
    ("lagkv", slow_lagkv, {}, {"rows": 300, "tokens": 320}),
    ("snapkv", slow_snapkv, {}, {"queries": 20}),
    ("snapkv", slow_snapkv, {"pool": 4}, {"shared": 1}),
    ("tova", slow_tova, {}, {}),
    ("h2o", slow_h2o, {}, {}),
    ("observed", slow_observed, {}, {}),
    ("kvzip", slow_kvzip, {}, {}),
    ("oracle", slow_kvzip, {}, {}),
    ("expected", slow_expected, {}, {"queries": 20}),
    ("expected", slow_expected, {"ahead": 7, "skip": 12, "epsilon": 0.05}, {}),
    ("expected", slow_expected, {}, {"rotary": False, "shared": 3}),
    ("expected", slow_expected, {}, {"rows": 8, "tokens": 8, "queries": 8, "short": 1}),
    ("rkv", slow_rkv, {}, {"queries": 8}),
    ("rkv", slow_rkv, {"mix": 0.6, "alike": 0.1, "pool": 4}, {"shared": 1}),
    ("chunk(knorm)", slow_chunk, {}, {}),
    ("chunk(knorm)", slow_chunk, {"size": 3}, {}),
]
CASE = pytest.mark.parametrize(("name", "slow", "options", "shape"), CASES)
SCORING = [name for name, method in METHODS.methods.items() if method.score is not None]
over_methods = pytest.mark.parametrize("name", [*SCORING, "chunk(snapkv)"])


def check(seen, name, slow, options):
    scores = METHODS.find(name).scores(seen, **options)
    want = torch.full(scores.shape, -torch.inf, dtype=torch.float64)
    for lane in range(len(want)):
        rows = rows_of(seen, lane)
        for row, score in zip(rows, slow(seen, lane, rows, **options), strict=True):
            want[lane, row[0]] = score
    torch.testing.assert_close(scores.double(), want, atol=2e-6, rtol=2e-4)


@CASE
def test_a_scorer_is_what_its_paper_says(name, slow, options, shape):
    check(make(**shape), name, slow, options)


@pytest.mark.parametrize(("name", "slow"), [("snapkv", slow_snapkv), ("rkv", slow_rkv)])
def test_blocks_of_queries_and_rows_do_not_show(name, slow, monkeypatch):
    monkeypatch.setattr(weigh, "ROOM", 500)
    check(make(queries=20), name, slow, {})


def test_every_scorer_has_a_case_and_a_paper():
    assert {name for name, *_ in CASES} == {*SCORING, "chunk(knorm)"} - {"random"}
    for name in METHODS.methods:
        assert METHODS.find(name).paper.startswith("arXiv:") == (name not in ("random", "oracle"))
    assert METHODS.find("chunk(snapkv)").paper == "arXiv:2502.00299, arXiv:2404.14469"


@over_methods
def test_lanes_that_change_places_change_their_scores_along(name):
    if name == "random":
        return  # each lane draws for itself
    seen, turn = make(seed=1), torch.tensor([2, 0, 1])
    moved = replace(
        seen,
        **{part: getattr(seen, part)[turn] for part in ("keys", "values", "positions", "mass", "repeated")},
        queries=seen.queries[:, turn],
    )
    method = METHODS.find(name)
    torch.testing.assert_close(method.scores(moved), method.scores(seen)[turn], atol=1e-6, rtol=1e-5)


@over_methods
def test_where_a_row_stands_in_memory_does_not_matter(name):
    seen = make(seed=2)
    wide = {}
    for part in ("keys", "values", "positions", "mass", "repeated"):
        rows = getattr(seen, part)
        gap = torch.full_like(rows[:, :3], -1 if part == "positions" else torch.inf)
        wide[part] = torch.cat([gap, rows[:, :9], gap, rows[:, 9:]], dim=1)
    scores = METHODS.find(name).scores(replace(seen, **wide))
    assert (scores[:, [0, 1, 2, 12, 13, 14]] == -torch.inf).all()
    held = torch.cat([scores[:, 3:12], scores[:, 15:]], dim=1)
    torch.testing.assert_close(held, METHODS.find(name).scores(seen), atol=1e-6, rtol=1e-5)


@over_methods
def test_heads_that_ask_the_same_count_as_one(name):
    one = make(seed=3, shared=1)
    three = replace(one, queries=one.queries.expand(-1, -1, 3, -1))
    method = METHODS.find(name)
    torch.testing.assert_close(method.scores(three), method.scores(one), atol=1e-6, rtol=1e-5)


@over_methods
def test_a_lane_that_holds_nothing_is_no_trouble(name):
    seen = make(seed=4)
    seen.positions[1] = -1
    scores = METHODS.find(name).scores(seen)
    assert (scores[1] == -torch.inf).all()
    assert scores[seen.held].isfinite().all()


def test_random_rows_are_drawn_once_and_for_all():
    seen = make(lanes=4, rows=5000, tokens=9000, short=0)
    method = METHODS.find("random")
    scores = method.scores(seen)
    assert abs(scores[seen.held].mean() - 0.5) < 0.01
    assert scores[seen.held].min() >= 0 and scores[seen.held].max() < 1
    assert abs(torch.corrcoef(torch.stack([scores[0], scores[1]]))[0, 1]) < 0.05, "lanes draw alike"
    assert torch.equal(method.scores(replace(seen, tokens=9999))[:, :100], scores[:, :100]), "a draw changed"
    assert (method.scores(replace(seen, seed=6)) != scores).float().mean() > 0.99
    fewer = {part: getattr(seen, part)[:, 1000:2000] for part in ("keys", "values", "positions", "mass", "repeated")}
    assert torch.equal(method.scores(replace(seen, **fewer)), scores[:, 1000:2000])


def test_of_many_copies_rkv_keeps_the_latest():
    seen = make(short=0)
    seen.keys[:, 5:25] = seen.keys[:, 5:6]
    scores = METHODS.find("rkv").scores(seen, mix=0.0, alike=0.99)
    assert (scores[:, 5:24] < scores[:, 24:25]).all()


def test_a_repeated_text_reduces_to_the_most_that_each_row_received():
    seen = make(queries=20)
    best = recalled(seen)
    for lane in range(3):
        rows = rows_of(seen, lane)
        weights = [attention(seen, rows, q, at) for at, heads in asked(seen, lane) for q in heads]
        want = torch.from_numpy(np.max(weights, axis=0)).float()
        torch.testing.assert_close(best[lane, [row[0] for row in rows]], want)


def test_a_method_that_is_not_shown_what_it_needs_is_our_own_bug():
    blind = replace(make(), queries=None, asking=None, mass=None, repeated=None)
    for name in SCORING:
        if METHODS.find(name).needs is Needs.NOTHING:
            METHODS.find(name).scores(blind)
        else:
            with pytest.raises(AssertionError, match="was not shown"):
                METHODS.find(name).scores(blind)


# DuoAttention's lanes.


def test_how_far_a_lane_looks_is_the_area_under_its_cumulated_attention():
    seen, span = make(queries=12), 40
    got = far_sight(seen, span=span)
    for lane in range(3):
        rows, areas = rows_of(seen, lane), []
        key = sum(rotation(p).T @ k for _, p, k, _ in rows) / len(rows)
        for head in range(2):
            queries = [rotation(at).T @ heads[head] for at, heads in asked(seen, lane)]
            query = rotation(span - 1) @ (sum(queries) / len(queries))
            powers = [math.exp(seen.scale * query @ rotation(p) @ key) for p in range(span)]
            areas.append(sum(sum(powers[: p + 1]) / sum(powers) for p in range(span)) / span)
        assert got[lane].item() == pytest.approx(sum(areas) / 2, rel=1e-4)


def test_lanes_of_a_model_without_rotation_cannot_be_told_apart():
    with pytest.raises(SpecError, match="no rotary"):
        far_sight(make(rotary=False))
