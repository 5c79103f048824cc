"""docs/claims.md says what its figures say, and its figures are what the model does."""

import copy
import json
import sys
from pathlib import Path

import pytest

from kvik.ops import loader

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import claims
import verdicts

DOCS = Path(__file__).parent.parent / "docs"
FIGURES = json.loads((DOCS / "claims.json").read_text())


def test_the_page_is_written_from_its_figures():
    assert (DOCS / "claims.md").read_text() == verdicts.render(FIGURES)


@pytest.mark.parametrize(
    "broken",
    [
        {"rows_without": 64}, {"pairs_with": 64}, {"rows_read_last": 1}, {"last_step": {"q": 1, "k": 0, "v": 0}},
        {"gpt3_token": 20_480}, {"opt": 180 * 2**30}, {"stored_changed": 1}, {"moved": 1}, {"logits_different": 1},
        {"later_changed_alone": 1}, {"earlier_changed_attending": 1}, {"moved_both_ways": 0},
        {"encoder_moved": 77}, {"encoder_moved": 0, "encoder_states": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_verdict_that_its_figures_do_not_carry_is_not_written(broken):
    with pytest.raises(AssertionError):
        verdicts.render(copy.deepcopy(FIGURES) | broken)


def test_times_that_do_not_grow_carry_no_verdict():
    flat = copy.deepcopy(FIGURES)
    for point in flat["timed"]["points"]:
        point["with_ms"] = 8.0
    with pytest.raises(AssertionError):
        verdicts.render(flat)


@pytest.mark.weights
def test_all_that_no_clock_decides_is_measured_again(smollm2_in):
    found = claims.exact(smollm2_in("int4"))
    left_out = {"timed"} if loader.native() else {"timed", "weight_bytes", "equal_bytes"}  # torch holds them otherwise
    assert {name: figure for name, figure in found.items() if name not in left_out} == {
        name: figure for name, figure in FIGURES.items() if name not in left_out
    }
