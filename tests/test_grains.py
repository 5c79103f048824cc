"""`benchmarks/grains.py`: its choices hold the budget, and its figures are those of its specs."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from bench_models import ids, tiny
from eval_models import made
from kvik.cache.spec import Spec
from kvik.eval import Ledger
from kvik.eval.results import Costs

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import grains

PREFIX = 500


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def plans(model):
    return grains.Plans(model, [[0.1, 0.6], [0.4, 0.2]], PREFIX, [20, 60])


@pytest.mark.parametrize(("most", "wanted"), [(10, 7), (7, 7), (5, 5), (0, 0)])
def test_the_largest_that_fits_is_found(most, wanted):
    assert grains.largest(lambda n: n <= 7, most) == wanted
    assert grains.largest(lambda n: n < 1, most) == 0


@pytest.mark.parametrize("place", grains.PLACES)
@pytest.mark.parametrize("layers", [1, 2, 7, 30])
def test_layers_are_as_many_as_asked_and_each_once(place, layers):
    for count in range(layers + 1):
        found = grains.layers_at(place, count, layers)
        assert len(set(found)) == len(found) == count and set(found) <= set(range(layers))
        assert found == sorted(found)


@pytest.mark.parametrize("budget", [70.0, 60.0, 40.0])
def test_every_choice_fits_its_budget_and_nearly_fills_it(plans, model, budget):
    room = budget / 100 * plans.size(grains.FULL)
    choices, page = list(plans.choices(budget)), 4 * (16 * 2 * 24 + 16 * 4 + 4)  # of every head, with its positions
    assert {it.grain for it in choices} == {*grains.GRAINS} - ({"layers"} if budget < 50 else set())
    assert sum(it.grain == "requests" for it in choices) == 2 and sum(it.grain == "tokens" for it in choices) == 3
    for it in choices:
        held = sum(part * plans.size(kv) for part, kv in it.specs)
        assert sum(part for part, _ in it.specs) == pytest.approx(1)
        assert room - page < held <= 1.0001 * room, it
        for _, kv in it.specs:
            assert str(model.spec(kv)) == kv


def test_heads_that_keep_every_row_are_those_that_look_furthest(plans, model):
    it = next(each for each in plans.choices(50.0) if each.grain == "heads")
    spec = Spec.parse(it.specs[0][1], model.decoder.layers)
    kept = {lane for group in spec.groups if group.retention.window is None for lane in group.lanes}
    assert kept == {(0, 1)} and it.name.startswith("1 of 4 all, others window:1")
    places = [each.specs[0][1] for each in plans.choices(60.0) if each.grain == "layers"]
    assert len(places) == 8 and {kv.split("; ")[1] for kv in places} == {"layers 0: bf16", "layers 1: bf16"}
    assert len(set(places)) == 2, "the window is as long as fits, whatever it began with"


def test_figures_are_means_over_requests_of_both_kinds():
    full, small = made(grains.FULL, 0.001, 256.0), made("small", 2.0, 32.0)
    choice = grains.Choice(50.0, "requests", "some", ((0.25, grains.FULL), (0.75, "small")))
    found = grains.outcome(choice, {grains.FULL: full, "small": small})
    assert found.kl == pytest.approx(0.25 * 0.001 + 0.75 * 2.0)
    assert found.nbytes == 0.25 * full.held.allocated + 0.75 * small.held.allocated
    assert found.part == found.nbytes / full.held.allocated
    assert found.between == pytest.approx((found.kl * 0.5, found.kl * 1.5)) and found.same == 0.75
    with pytest.raises(AssertionError, match="one way or another"):
        grains.outcome(dataclasses.replace(choice, specs=((0.5, grains.FULL),)), {grains.FULL: full})


def test_the_table_has_the_best_of_each_grain_and_says_of_how_many():
    def found(grain, name, kl):
        return grains.Found(grains.Choice(50.0, grain, name, ()), 100.0, 0.498, kl, (0.5 * kl, 2 * kl), 0.91)

    every = [found("layers", "first", 0.4), found("layers", "last", 0.2), found("tokens", "window", 0.1)]
    text = grains.table([*every, found("tokens", "keydiff", 0.05)], "about")
    lines = text.splitlines()
    assert lines[0] == "about" and lines[4:] == [
        "| 50 % | layers | last (best of 2) | 49.8 % | 0.20 | 0.10 to 0.40 | 91.0 % |",
        "| 50 % | tokens | keydiff | 49.8 % | 0.050 | 0.025 to 0.10 | 91.0 % |",
        "| 50 % | tokens | window | 49.8 % | 0.10 | 0.050 to 0.20 | 91.0 % |",
    ]


def test_bytes_are_the_sequences_own_account_within_a_few_percent_of_the_budget(model, tmp_path):
    told = []
    found, evaluation = grains.measure(
        model, ids(650), [60.0], [20], prefix=PREFIX, scored=12, documents=1, ledger=Ledger(tmp_path / "a.jsonl"),
        show=lambda *each: told.append(each),
    )  # fmt: skip
    held = {each.spec: each.documents[0].costs for each in evaluation.measured}
    assert isinstance(held[grains.FULL], Costs) and told
    for each in found:
        mine = sum(part * held[kv].allocated for part, kv in each.choice.specs)
        assert each.nbytes == mine and each.part == mine / held[grains.FULL].allocated
        assert each.part == pytest.approx(0.6, abs=0.03) and each.kl > 0, each.choice.name
    assert {each.choice.grain for each in found} == set(grains.GRAINS)
    json.dumps([dataclasses.asdict(each) for each in found], allow_nan=False)
