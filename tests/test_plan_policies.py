"""`kvik plan` for specs whose rows leave by worth: bytes once they have left, the most before, and what is said."""

import io
import json
import re

import pytest
from rich.console import Console

from kvik.cache.policy import Policy
from kvik.cache.spec import Spec
from kvik.errors import SpecError
from kvik.plan import list_plans, make_plan, render_plan, render_refusals, run_plan
from kvik.plan.find import lookup
from kvik.plan.formula import stays
from kvik.units import parse_bytes

SHAPE = lookup("smollm2")
ROW = 90 * 128  # bytes of a row of all lanes, int8
KV = ["int8+snapkv:25%", "k8v4+ada(expected):30%", "int8+keydiff:1024rows", "int4+h2o:25%,every:64"]
MIXED = "int8+window:100; layers 3 heads 1: int8+knorm:25%; layers 4: int4+keydiff:64rows,every:40"


def printed(plan):
    out = io.StringIO()
    render_plan(plan, Console(file=out, width=80))
    return " ".join(out.getvalue().split())


@pytest.mark.parametrize("kv", [*KV, MIXED])
def test_a_plan_has_the_bytes_after_the_prompt_and_the_most_before(kv):
    spec = Spec.parse(kv, SHAPE.layers)
    for tokens in (1, 40, 1000, 4096, 5003):
        plan = make_plan(SHAPE, kv=kv, context=tokens)
        assert plan.per_sequence == spec.nbytes(tokens)
        assert plan.peak == spec.peak(tokens).allocated >= plan.total.allocated
        assert sum(term.payload for term in plan.terms) == plan.total.payload


def test_a_quarter_of_the_prompt_is_a_quarter_of_the_payload_and_all_of_it_at_most():
    plan = make_plan(SHAPE, kv="int8+snapkv:25%", context=4096)
    assert plan.total.payload == 1024 * ROW and plan.per_token.payload == plan.per_token_later.payload == ROW
    assert plan.peak == Spec.parse("int8", SHAPE.layers).nbytes(4096).allocated
    three = make_plan(SHAPE, kv="int8+snapkv:25%", context=4096, batch=3)
    assert three.peak == plan.peak + 2 * plan.total.allocated, "prompts come in one after another"


def test_a_bound_on_rows_bounds_every_length():
    plan = make_plan(SHAPE, kv="int8+keydiff:1024rows", context=100_000)
    assert plan.per_token_later.payload == 0 and plan.total.payload == (1024 + 100_000 % 128) * ROW
    assert 1152 * ROW < plan.peak < 1300 * ROW and plan.outweighs is None
    assert make_plan(SHAPE, kv="int8+keydiff:1024rows", batch=3).peak == 3 * plan.peak, "each comes to its bound again"
    assert "never: the spec bounds the cache below the weights" in printed(plan)
    part = make_plan(SHAPE, kv="int8+h2o:25%,every:64")
    assert part.per_token_later.payload == ROW // 4


@pytest.mark.parametrize("kv", KV)
def test_what_outweighs_and_what_fits_counts_the_way_there(kv):
    memory = parse_bytes("1GiB")
    plan = make_plan(SHAPE, kv=kv, context=4096, batch=2, memory=memory)
    if plan.outweighs is not None:
        peaks = [make_plan(SHAPE, kv=kv, context=plan.outweighs - less, batch=2).peak for less in (0, 1)]
        assert peaks[0] > plan.weight_bytes >= peaks[1]
    room, largest = memory - plan.weight_bytes, plan.fit.batch
    assert plan.fit.fits and largest > 2
    peaks = [make_plan(SHAPE, kv=kv, context=4096, batch=largest + more).peak for more in (0, 1)]
    assert peaks[0] <= room < peaks[1]
    one = make_plan(SHAPE, kv="int8+snapkv:25%", context=4096, memory=plan.weight_bytes + (20 << 20))
    assert not one.fit.fits and one.fit.batch == 0, "15 MiB would stay, but 46 MiB come first"


SAID = {
    "snapkv:25%": "25 % of the prompt's tokens, chosen as the prompt ends (here after 4,096); later rows all stay",
    "ada(snapkv):25%": "25 % of the prompt's tokens, on average over a layer's heads, chosen as the prompt ends",
    "global(snapkv):2.5%": "2.5 % of the prompt's tokens, on average over all heads, chosen",
    "pyramid(snapkv):25%": "lower layers more",
    "h2o:25%,every:64": "and of all so far after every 64 more",
    "keydiff:1024rows": "1,024 a head, chosen after every 128 positions, in the prompt too; up to 1,152 in between",
    "knorm:64rows,every:32": "64 a head, chosen after every 32 positions",
    "quest:16pages": "all; a query reads 16 pages of each head",
}


@pytest.mark.parametrize("policy", SAID)
def test_what_a_budget_is_a_part_of_and_when_it_is_taken_is_said(policy):
    said = stays(Policy.parse(policy), 4096)
    assert SAID[policy] in said and "always stay" not in said
    assert "the first 4 and the last 32 always stay" in stays(Policy.parse("snapkv:25%"), 100)
    if policy != "quest:16pages":
        plan = make_plan(SHAPE, kv=f"int8+{policy}", context=4096)
        assert f"rows {policy}: {said}" in printed(plan)
        assert f"at most, on the way there {plan.peak:,}" in " ".join(
            word for word in printed(plan).split() if not word.endswith(("iB", "MB")) and "." not in word
        )


def test_a_spec_without_a_policy_says_nothing_of_it():
    text = printed(make_plan(SHAPE, kv="int8+window:64", context=4096))
    assert "on the way there" not in text and "rows" not in text.split("textbook")[0].replace("fewer rows", "")
    assert "a token, windows full" in text and "a token, once rows leave" not in text
    assert "a token, once rows leave" in printed(make_plan(SHAPE, kv="int8+keydiff:1024rows", context=4096))


def test_a_models_own_windows_are_no_policys():
    plan = make_plan(lookup("gemma-3-1b"), kv="int8+snapkv:25%", context=4096)
    assert any("22 layers have a window of their own" in note for note in plan.notes)
    assert not any("window" in note for note in make_plan(lookup("gemma-3-1b"), kv="int8", context=4096).notes)
    assert not any("window" in note for note in make_plan(SHAPE, kv="int8+snapkv:25%", context=4096).notes)


def test_json_has_the_peak_and_the_words():
    told = json.loads(json.dumps(run_plan("smollm2", kv="int8+snapkv:25%", context=4096).to_dict()))["cache"]
    assert told["peak"] == make_plan(SHAPE, kv="int8", context=4096).total.allocated
    assert told["policies"][0]["policy"] == "snapkv:25%" and "prompt ends" in told["policies"][0]["rows"]


def test_a_list_leaves_out_models_that_cannot_have_the_spec_and_says_why():
    plans, refused = list_plans("int8+snapkv:25%")
    assert len(plans) > 10 and "t5-small" in refused and not refused.keys() & {plan.shape.name for plan in plans}
    console = Console(file=io.StringIO(), width=80)
    render_refusals(refused, console)
    biased, operators = console.file.getvalue().splitlines()
    assert re.match(r"not t5-small, [\w, -]+: snapkv:25%: it weighs rows", biased)
    assert re.match(
        r"not [\w, -]*translution-base[\w, -]*: snapkv:25%: this model's operator reads its rows", operators
    )
    with pytest.raises(SpecError, match="int3"):
        list_plans("int3")
