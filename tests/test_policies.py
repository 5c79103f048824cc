"""How much stays, and when: policies as text, their arithmetic, and triggers in a simulated run."""

import functools
import importlib.util
import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvik.cache.allocators import ALLOCATORS
from kvik.cache.methods import Needs
from kvik.cache.policy import Policy, Trigger, When, apply
from kvik.cache.scorers import METHODS, scorer
from kvik.cache.seen import Seen
from kvik.errors import SpecError, UsageError

over_allocators = pytest.mark.parametrize("name", ALLOCATORS)


# Policies as text.


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("snapkv:25%", "snapkv:25%"),
        ("uniform(snapkv):25%", "snapkv:25%"),
        (" ada ( expected ) : 30 % ", "ada(expected):30%"),
        ("pyramid(snapkv):12.5%", "pyramid(snapkv):12.5%"),
        ("global(kvzip):25%", "global(kvzip):25%"),
        ("keydiff:1024rows", "keydiff:1024rows"),
        ("keydiff:1024rows,every:128", "keydiff:1024rows"),
        ("h2o:25%,every:128", "h2o:25%,every:128"),
        ("rkv:512rows,every:64,mix:0.2", "rkv:512rows,every:64,mix:0.2"),
        ("quest:16pages", "quest:16pages"),
        ("quest:16pages,dense:0,sinks:8", "quest:16pages,sinks:8,dense:0"),
        ("random:25%,seed:3,recent:64,sinks:8", "random:25%,sinks:8,recent:64,seed:3"),
        ("random:25%,seed:0,recent:32,sinks:4", "random:25%"),
        ("snapkv:25%,pool:7,last:32", "snapkv:25%,last:32,pool:7"),
        ("ada(chunk(snapkv)):25%,size:10,floor:0.000001", "ada(chunk(snapkv)):25%,size:10,floor:0.000001"),
        ("ada(snapkv):25%,floor:1", "ada(snapkv):25%,floor:1"),
        ("expected:25%,epsilon:0,ahead:999999999", "expected:25%,ahead:999999999"),
    ],
)
def test_a_policy_prints_what_it_reads(written, printed):
    policy = Policy.parse(written)
    assert str(policy) == printed
    assert Policy.parse(printed) == policy
    assert repr(Policy.parse(printed)) == repr(policy)
    assert hash(policy) == hash(Policy.parse(printed))


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("", "'' is no method"),
        ("snapkw:25%", "(did you mean 'snapkv'?)"),
        ("snapkv", "'snapkv' says not how much stays; write 'snapkv:25%' or 'snapkv:1024rows'"),
        ("ada:25%", "write 'ada(snapkv):25%'"),
        ("ada():25%", "write 'ada(snapkv):25%'"),
        ("ada(snapkv:25%", "write 'ada(snapkv):25%'"),
        ("ada(snapkw):25%", "did you mean 'snapkv'"),
        ("adda(snapkv):25%", "did you mean 'ada'"),
        ("chunk:25%", "write 'chunk(snapkv)'"),
        ("chunk(snapkv:25%", "the ')' that belongs to 'chunk'"),
        ("chunk(chunk(snapkv)):25%", "both take 'size'"),
        ("chunk(ada(snapkv)):25%", "nothing called 'ada' goes around a method"),
        ("chunk(quest):25%", "quest scores no rows"),
        ("ada(quest):16pages", "quest drops no rows"),
        ("snapkv:0%", "more than 0 and at most 100"),
        ("snapkv:101%", "more than 0 and at most 100"),
        ("snapkv:25", "'25' is no budget of 'snapkv'; write 'snapkv:25%' or 'snapkv:1024rows'"),
        ("snapkv:-5%", "is no budget"),
        ("snapkv:16pages", "is no budget of 'snapkv'"),
        ("keydiff:0rows", "a whole number, at least 1"),
        ("keydiff:99.5rows", "a whole number, at least 1"),
        ("keydiff:20rows", "fewer than the 36 that always stay"),
        ("quest:25%", "write 'quest:16pages'"),
        ("quest:16pages,every:3", "says nothing of 'quest'"),
        ("kvzip:512rows", "write 'kvzip:25%'"),
        ("kvzip:25%,every:64", "says nothing of 'kvzip'"),
        ("snapkv:25%,recnt:3", "did you mean 'recent'"),
        ("knorm:25%,last:3", "'last:3' is no setting"),
        ("snapkv:25%,floor:0.2", "'floor:0.2' is no setting"),
        ("snapkv:25%,", "'' is no setting"),
        ("snapkv:25%,sinks:4,sinks:4", "'sinks' is given twice"),
        ("snapkv:25%,sinks:-1", "a whole number from 0"),
        ("snapkv:25%,every:0", "a whole number from 1, as in 'every:64'"),
        ("snapkv:25%,pool:0", "a whole number from 1, as in 'pool:5'"),
        ("snapkv:25%,pool:2.5", "a whole number from 1"),
        ("expected:25%,epsilon:2", "a part from 0 to 1, as in 'epsilon:0.1'"),
        ("rkv:25%,mix:1.5", "a part from 0 to 1, as in 'mix:0.1'"),
        ("ada(\nsnapkv)", "write 'ada(snapkv):25%'"),
        ("x" * 2000, "1,000 are enough"),
    ],
)
def test_a_policy_that_cannot_be_read_is_named_with_the_way_out(written, named):
    with pytest.raises(SpecError) as error:
        Policy.parse(written)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert str(error.value).startswith("policy ")


def test_in_a_spec_the_whole_spec_is_named():
    with pytest.raises(SpecError, match=r"^spec 'int8\+snapkw:3%': 'snapkw' is no method"):
        Policy.parse("snapkw:3%", "int8+snapkw:3%")


@given(st.text(alphabet="snapkvhdo(),:%0123456789.rowsevyczt\n ", max_size=40))
def test_no_string_does_anything_but_parse_or_name_what_is_wrong(tail):
    for head in ("", "snapkv:", "ada(rkv):5%,"):
        try:
            policy = Policy.parse(head + tail)
        except SpecError:
            continue
        assert Policy.parse(str(policy)) == policy


def test_a_policy_says_what_it_must_see():
    assert Policy.parse("snapkv:25%").last == 64
    assert Policy.parse("chunk(snapkv):25%,last:16").last == 16
    assert Policy.parse("chunk(snapkv):25%").needs is Needs.QUERIES
    assert Policy.parse("keydiff:25%").needs is Needs.NOTHING and Policy.parse("keydiff:25%").last == 0
    assert Policy.parse("h2o:25%").needs is Needs.MASS
    assert Policy.parse("global(kvzip):25%").needs is Needs.PASS
    quest = Policy.parse("quest:16pages,dense:3")
    assert (quest.pages, quest.needs, quest.option("dense")) == (16, Needs.PAGES, 3)
    assert Policy.parse("snapkv:25%").pages is None and Policy.parse("snapkv:25%").option("pool") == 5


def test_torch_is_not_loaded_until_a_policy_is_named():
    code = "import sys, kvik.cache.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# When, and how much.


def test_a_part_is_taken_once_when_the_prompt_ends():
    policy = Policy.parse("snapkv:25%")
    assert policy.trigger == Trigger(When.PROMPT)
    assert [policy.fires(at, 200, at) for at in (0, 128, 199, 200, 201, 400)] == [False] * 3 + [True] + [False] * 2
    assert [policy.next_trigger(at, 200, 32) for at in (0, 199, 200, 300)] == [200, 200, None, None]
    assert policy.budget_at(203) == 50
    assert (policy.rows(200), policy.rows(300, 200), policy.rows(100, 200), policy.rows(20)) == (50, 150, 100, 20)
    assert (policy.peak(200), policy.peak(260, 200), policy.peak(400, 200)) == (200, 200, 250)
    assert not policy.fires(200, None, 200) and policy.next_trigger(5, None, 32) is None
    assert not policy.fires(200, 200, 50), "nothing to drop"
    assert Policy.parse("snapkv:100%").fires(200, 200, 200) is False


def test_and_again_at_every_so_many_positions_after_it():
    policy = Policy.parse("snapkv:25%,every:100")
    assert [at for at in range(1, 700) if policy.fires(at, 250, at)] == [250, 350, 450, 550, 650]
    assert [policy.next_trigger(at, 250, 32) for at in (0, 250, 349, 350)] == [250, 350, 350, 450]
    assert (policy.rows(449, 250), policy.rows(450, 250)) == (87 + 99, 112)


def test_a_bound_on_rows_is_looked_at_everywhere():
    policy = Policy.parse("keydiff:1024rows")
    assert [at for at in range(2000) if policy.fires(at, 999, 1025)] == list(range(128, 2000, 128))
    assert not policy.fires(1280, None, 1024)
    assert [policy.next_trigger(at, None, 32) for at in (0, 127, 128)] == [128, 128, 256]
    assert (policy.rows(1100), policy.rows(1152), policy.rows(5000), policy.peak(9999)) == (1100, 1024, 1032, 1152)


def test_a_way_to_read_drops_nothing():
    policy = Policy.parse("quest:16pages")
    assert not any(policy.fires(at, 128, at) for at in range(300))
    assert [policy.next_trigger(at, 100, 32) for at in (5, 100, 128)] == [100, 128, 160]
    assert (policy.rows(999), policy.peak(999)) == (999, 999)


@functools.cache
def row(layer, lane, position, width):
    return torch.randn(width, generator=torch.Generator().manual_seed(position * 100 + layer * 10 + lane))


def shown(held, layer, tokens, policy):
    """What a layer's lanes look like to a scorer: held is a list of positions for each lane."""
    lanes, wide = len(held), max(map(len, held))
    positions = torch.full((lanes, wide), -1)
    keys, values = torch.full((lanes, wide, 4), torch.nan), torch.full((lanes, wide, 4), torch.nan)
    for lane, at in enumerate(held):
        positions[lane, : len(at)] = torch.tensor(at)
        for column, position in enumerate(at):
            keys[lane, column], values[lane, column] = row(layer, lane, position, 8).split(4)
    asking = torch.arange(max(0, tokens - policy.last), tokens)
    queries = [[[row(layer, 5 + lane, at, 4)] for lane in range(lanes)] for at in asking.tolist()]
    queries = torch.stack([torch.stack([torch.stack(g) for g in lanes]) for lanes in queries]) if queries else None
    mass = torch.where(positions >= 0, positions * 7 % 11, torch.nan)
    return Seen(keys, values, positions, tokens, 0.5, queries, asking, mass, None, policy.seed, mass)


def simulate(policy, tokens, prompt, chunk, layers=2, lanes=2):
    """A run over a text: (positions that each lane holds at the end, rows a lane on average after each event)."""
    held, counts, position = [[[] for _ in range(lanes)] for _ in range(layers)], [], 0
    while position < tokens:
        stop = min(position + chunk, policy.next_trigger(position, prompt, 32) or tokens, tokens)
        for lane in itertools.chain(*held):
            lane += range(position, stop)
        position = stop
        counts.append(sum(map(len, itertools.chain(*held))) / layers / lanes)
        if policy.fires(position, prompt, counts[-1]):
            keep = apply(policy, (shown(layer, i, position, policy) for i, layer in enumerate(held)))
            held = [
                [
                    [p for p, k in zip(lane, row.tolist(), strict=False) if k]
                    for lane, row in zip(layer, kept, strict=True)
                ]
                for layer, kept in zip(held, keep, strict=True)
            ]
            counts.append(sum(map(len, itertools.chain(*held))) / layers / lanes)
    return held, counts


@pytest.mark.parametrize("inner", ["random", "keydiff", "h2o", "lagkv", "tova", "chunk(rkv)"])
@over_allocators
def test_never_more_than_the_bound_and_one_interval_are_held(name, inner):
    policy = Policy.parse(f"{name}({inner}):40rows,sinks:2,recent:6,every:16")
    held, counts = simulate(policy, 144, 90, 13)
    assert 40 < max(counts) <= 56
    assert max(counts) == policy.peak(144) and counts[-1] <= policy.rows(144) == 40
    for lane in itertools.chain(*held):
        assert {0, 1, *range(138, 144)} <= set(lane)
        assert lane == sorted(set(lane))


@pytest.mark.parametrize(
    "text", ["ada(snapkv):30%,recent:5", "global(expected):30%,recent:5,every:20", "random:40rows,every:8"]
)
def test_the_cut_into_chunks_does_not_show(text):
    policy = Policy.parse(text)
    runs = [simulate(policy, 120, 77, chunk) for chunk in (1, 10, 1000)]
    assert runs[0][0] == runs[1][0] == runs[2][0]
    assert max(runs[0][1]) == policy.peak(120, 77)
    assert runs[0][1][-1] == policy.rows(120, 77)


def test_a_part_of_the_prompt_stays_and_later_rows_all_do():
    held, counts = simulate(Policy.parse("pyramid(keydiff):50%,recent:4"), 120, 80, 1000)
    assert counts == [80, 40, 80]
    first, last = (len(layer[0]) for layer in held)
    assert first > last and first + last == 160
    assert all(set(range(80, 120)) <= set(lane) for lane in itertools.chain(*held))
    level, _ = simulate(Policy.parse("pyramid(keydiff):50%,recent:4,steep:1"), 80, 80, 1000)
    assert all(len(lane) == 40 for lane in itertools.chain(*level))


def test_a_budget_that_is_not_reached_keeps_everything():
    for name, inner in itertools.product(ALLOCATORS, ["snapkv", "keydiff"]):
        for budget in ("100%", "80rows,every:10"):
            held, _ = simulate(Policy.parse(f"{name}({inner}):{budget}"), 80, 80, 1000)
            assert held == [[list(range(80))] * 2] * 2
            keep = apply(Policy.parse(f"{name}({inner}):{budget}"), [shown(held[0], 0, 80, Policy.parse("snapkv:9%"))])
            assert keep[0].all()


def test_layers_draw_apart_and_a_seed_changes_every_draw():
    def kept(text):
        return simulate(Policy.parse(text), 80, 80, 1000)[0]

    first = kept("random:60%")
    assert first == kept("random:60%") != kept("random:60%,seed:1")
    assert len({tuple(lane) for lane in itertools.chain(*first)}) == 4


# A method of one's own.

OWN = '''"""A method of my own: rows whose values are long stay."""
import torch

from kvik.cache.scorers import scorer
from kvik.cache.seen import Seen


@scorer("loud")
def loud(seen: Seen, *, power: float = 0.5) -> torch.Tensor:
    return seen.values.norm(dim=-1) ** power
'''


@pytest.fixture
def forget():
    """Takes out again what a test registered."""
    methods, wrappers = dict(METHODS.methods), dict(METHODS.wrappers)
    yield
    for own, before in ((METHODS.methods, methods), (METHODS.wrappers, wrappers)):
        own.clear()
        own.update(before)


def test_a_new_method_takes_fifteen_lines_in_a_file_of_its_own(tmp_path, forget):
    assert len(OWN.splitlines()) <= 15
    with pytest.raises(SpecError, match="'loud' is no method"):
        Policy.parse("loud:25%")
    (tmp_path / "mine.py").write_text(OWN)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    policy = Policy.parse("ada(chunk(loud)):25%,power:0.3,size:1,recent:0,sinks:0,floor:0")
    assert str(policy) == "ada(chunk(loud)):25%,sinks:0,recent:0,power:0.3,size:1,floor:0"
    seen = shown([list(range(40)), list(range(30))], 0, 40, policy)
    loudness = seen.values.norm(dim=-1).nan_to_num(-1)
    assert torch.equal(apply(policy, [seen])[0], loudness >= loudness.flatten().sort().values[-20])


def test_a_name_can_be_taken_only_once(forget):
    with pytest.raises(UsageError, match="a method named 'snapkv' already"):
        scorer("snapkv")(lambda seen: seen.mass)
    with pytest.raises(UsageError, match="a method named 'chunk' already"):
        scorer("chunk")(lambda seen: seen.mass)
    with pytest.raises(UsageError, match="a method named 'knorm' already"):
        METHODS.wrapper("knorm")(lambda scores, seen: scores)


def test_a_method_that_could_not_be_written_in_a_spec_is_refused(forget):
    with pytest.raises(UsageError, match="can't name a method"):
        scorer("My method")(lambda seen: seen.mass)
    with pytest.raises(UsageError, match="give both or neither"):
        scorer("mine", needs=Needs.QUERIES)(lambda seen: seen.mass)
    with pytest.raises(UsageError, match="'seed' is a setting of every policy"):
        scorer("mine")(lambda seen, *, seed=1: seen.mass)
    for default in ("text", None, 0, 1.5, True):
        with pytest.raises(UsageError, match="'size' needs a default"):
            scorer("mine")(lambda seen, *, size=default: seen.mass)


def test_a_method_that_returns_something_else_is_named(forget):
    scorer("wrong")(lambda seen: seen.keys)
    with pytest.raises(SpecError, match=r"'wrong' returned scores \[2, 3, 4\].*\[2, 3\]"):
        apply(Policy.parse("wrong:50%"), [shown([[0, 1, 2]] * 2, 0, 3, Policy.parse("knorm:50%"))])
