"""What an evaluation holds policies against: attention that was kept, an oracle, chance; curves of one family."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from transformers import LlamaConfig, LlamaForCausalLM

from bench_models import SIZES, check_refused, ids
from eval_models import command, evaluation, made, reader
from helpers import Toy, make_cache, shapes
from kvik.cache.policy import Policy
from kvik.engine.generation import generate, prefill
from kvik.errors import SpecError
from kvik.eval import draw_frontier, evaluate, oracle
from kvik.eval.budgets import baselines, budget_text, families, family, pooled
from kvik.eval.oracle import Future, by_lane, recall, weighed
from kvik.eval.picture import curves
from kvik.models import families as model_families
from kvik.models.model import Model
from test_eval_views import printed
from test_reread import Passing, received

PREFIX, SCORED = 160, 40
METHODS = ["knorm", "keydiff", "snapkv", "tova", "h2o", "observed", "expected", "rkv", "kvzip", "random", "lagkv"]
MEASURE = {"prefix": PREFIX, "scored": SCORED, "documents": 1}


@pytest.fixture(scope="module")
def model():
    """Of large weights, so that attention is not the same everywhere."""
    torch.manual_seed(4)
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.15))
    return Model(model_families.from_hf(theirs.config.to_dict(), None, "tiny"), theirs.state_dict(), weights="f32")


@pytest.fixture(scope="module")
def text():
    return ids(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reader(tmp_path_factory)[0]


# Attention that was kept.


def test_recall_of_a_case_made_by_hand():
    """Two lanes; the first keeps rows with 1/4 and 1/2 of its attention, the second all of it."""
    layers = shapes(layers=1)
    toy, cache = Toy(layers), make_cache("f32; layers 0 heads 0: f32+window:2,sinks:1", layers)
    with cache.open() as sequence:
        toy.fill(sequence, [1, 2, 3, 4])
        sequence.settle()
        mass = {(0, 0): torch.tensor([1.0, 4.0, 1.0, 2.0]), (0, 1): torch.tensor([0.1, 0.2, 0.3, 0.7])}
        # The next query, at 4, sees positions 0 (a sink), 3 and its own.
        assert recall(mass, sequence) == pytest.approx((3 / 8 + 1) / 2)
        mass[0, 0] = torch.tensor([0.0, 4.0, 1.0, 0.0])
        assert recall(mass, sequence) == 0.5
        mass[0, 0] = torch.zeros(4)
        assert recall(mass, sequence) == 1.0, "what receives nothing can't lose any"


@pytest.mark.parametrize("kv", ["f32", "f32; layers 1 heads 0: int8; page 16"])
def test_attention_that_comes_later_is_what_dense_sums_give(kv, model, text):
    found, later = {}, text[200:240]
    with model.cache(kv, shares=False).open() as sequence:
        prefill(model, [sequence], text[:100])
        before = sequence.cache.books
        mass = by_lane(sequence, weighed(model, sequence, [later[:25], later]))
        assert sequence.cache.books == before and sequence.tokens == text[:100]
        sequence.cache.check()
    for tokens in (later[:25], later):
        passed = {}
        with model.cache("f32", shares=False).open() as sequence:
            model.run([(sequence, text[:100] + tokens)], watch=lambda step, passed=passed: Passing(step, passed))
        for layer, (keys, (q, scale)) in passed.items():
            for head in range(4):
                scores = (q[100:, head] @ keys[:, head // 2].T * scale).masked_fill(
                    ~torch.ones(len(tokens), 100 + len(tokens)).tril(100).bool(), -math.inf
                )
                lane = layer, head // 2
                found[lane] = found.get(lane, 0) + scores.softmax(-1).sum(0)[:100]
    assert set(mass) == set(found)
    for lane, rows in mass.items():
        loose = 1e-4 if kv == "f32" else 3e-2
        torch.testing.assert_close(rows, found[lane], atol=loose, rtol=loose)


def test_an_oracle_is_shown_what_comes_after_and_others_the_text(model, text):
    cache = model.cache("f32+oracle:25%; layers 1: f32+kvzip:25%; page 16", shares=False)
    with cache.open(text[:PREFIX]) as sequence:
        prefill(model, [sequence], text[:PREFIX], passes=Future(text[PREFIX : PREFIX + 40]))
        cache.check()
        shown = [received(sequence, group) for group in (0, 1)]
    plain = model.cache("f32", shares=False)
    with plain.open(text[:PREFIX]) as sequence:
        prefill(model, [sequence], text[:PREFIX])
        mass = by_lane(sequence, weighed(model, sequence, [text[PREFIX : PREFIX + 40]]))
    assert torch.equal(shown[0], torch.stack([mass[0, 0], mass[0, 1]]).float())
    with model.cache("f32+kvzip:25%; page 16", shares=False).open(text[:PREFIX]) as sequence:
        prefill(model, [sequence], text[:PREFIX])
        assert torch.equal(shown[1], received(sequence)[2:])


@pytest.mark.parametrize("budget", ["12.5%", "25%", "60%"])
def test_no_method_recalls_more_than_the_oracle(budget, model, text):
    options = "sinks:2,recent:8"
    specs = [f"f32+{method}:{budget},{options}" for method in [*METHODS, "oracle"]]
    found = {each.spec: each for each in evaluate(model, text, specs, **MEASURE).measured}
    bound = found.pop(f"f32+oracle:{budget},{options}")
    assert found.pop("f32").recall == 1.0 and 0 < bound.recall < 1
    assert len(found) == len(METHODS)
    for each in found.values():
        assert 0 < each.recall <= bound.recall + 1e-9, each.spec
        assert each.kept == pytest.approx(bound.kept, abs=0.01)
    assert min(each.recall for each in found.values()) < bound.recall - 0.05, "and the bound says something"


def test_recall_is_of_the_rows_that_are_there_and_one_where_all_are(model, text):
    specs = ["int4", "f32+snapkv:100%", "f32+random:25%,sinks:1,recent:1", "f32+window:40,sinks:4"]
    found = {each.spec: each for each in evaluate(model, text, specs, **MEASURE).measured}
    assert [found[kv].recall for kv in ("f32", *specs[:2])] == [1.0] * 3
    assert found[specs[2]].recall == pytest.approx(0.27, abs=0.12), "chance recalls what it keeps"
    with model.cache("f32", shares=False).open() as sequence:
        prefill(model, [sequence], text[:PREFIX])
        mass = by_lane(sequence, weighed(model, sequence, [text[PREFIX : PREFIX + SCORED]]))
    seen = [*range(4), *range(PREFIX - 39, PREFIX)]
    wanted = np.mean([float(rows[seen].sum() / rows.sum()) for rows in mass.values()])
    assert found[specs[3]].recall == pytest.approx(wanted), "a window keeps what the first scored token sees"
    assert found[specs[3]].documents[0].to_dict()["recall"] == found[specs[3]].recall


def test_nothing_is_watched_while_a_step_is_timed(model, text, monkeypatch):
    seen, run = [], Model.run

    def watched(self, chunks, every=False, watch=None):
        if every and len(chunks[0][1]) == 1:
            seen.append((watch, len(chunks[0][0].cache.sequences)))
        return run(self, chunks, every, watch)

    monkeypatch.setattr(Model, "run", watched)
    evaluate(model, text, ["f32+oracle:25%"], **MEASURE)
    assert len(seen) == 16 and set(seen) == {(None, 1)}, "and no fork is open"


# Chance and foresight beside a policy.


@pytest.mark.parametrize(
    ("kv", "chance", "foresight"),
    [
        ("int8+snapkv:25%", "int8+random:25%", "int8+oracle:25%"),
        ("k8v4+ada(chunk(snapkv)):30%,sinks:2,recent:64,floor:0.1,size:9", "k8v4+random:30%,sinks:2,recent:64",
         "k8v4+oracle:30%,sinks:2,recent:64"),
        ("int8+h2o:25%,every:64", "int8+random:25%,every:64", "int8+oracle:25%"),
        ("int8+keydiff:64rows,every:32", "int8+random:64rows,every:32", "int8+oracle:40%"),
        ("int8+keydiff:50rows", "int8+random:50rows", "int8+oracle:31.25%"),
        ("int8+keydiff:51rows", "int8+random:51rows", "int8+oracle:31.875%"),
        ("int8+keydiff:400rows", "int8+random:400rows", None),
        ("int4+snapkv:25%; layers 0: bf16+knorm:50%; layers 1 heads 0: int8; page 64",
         "int4+random:25%; layers 0: bf16+random:50%; layers 1 heads 0: int8; page 64",
         "int4+oracle:25%; layers 0: bf16+oracle:50%; layers 1 heads 0: int8; page 64"),
    ],
)  # fmt: skip
def test_a_policy_is_held_against_its_budget_and_codec(kv, chance, foresight, model):
    found = baselines(kv, PREFIX, "prompt")
    assert found[0][0] == chance and len(found[0]) == 3
    for seed, each in enumerate(found[0]):
        policies = [g.retention.policy for g in model.spec(each).groups if g.retention.policy is not None]
        assert {policy.seed for policy in policies} == {seed}
    assert [one for bound in found[1:] for one in bound] == ([] if foresight is None else [foresight])
    for each in (*found[0], *([foresight] if foresight else [])):
        assert str(model.spec(each)) == each
        rows = {spec: [g.retention.rows(PREFIX) for g in model.spec(spec).groups] for spec in (kv, each)}
        if "rows" not in kv and "every" not in kv:
            assert rows[kv] == rows[each]


@pytest.mark.parametrize(
    "kv", ["int8", "int8+window:64,sinks:4", "f32+random:25%", "f32+oracle:25%; layers 0: int8+random:9%"]
)
def test_what_chooses_nothing_is_held_against_nothing(kv):
    assert baselines(kv, PREFIX, "prompt") == []


def test_a_bound_on_rows_is_never_fewer_of_the_prefix():
    ((kv,),) = baselines("int8+keydiff:50rows", 150, "prompt")[1:]
    assert kv == "int8+oracle:33.3334%" and Policy.parse(kv.split("+")[1]).budget_at(150) == 50


def test_where_no_prompt_ends_only_bounds_on_rows_have_a_chance():
    assert baselines("int8+snapkv:25%", PREFIX, "stream") == []
    assert baselines("int8+keydiff:64rows", PREFIX, "stream")[0][0] == "int8+random:64rows"
    assert len(baselines("int8+keydiff:64rows", PREFIX, "stream")) == 1


def test_baselines_are_measured_once_and_shown_as_one(model, text):
    specs = ["f32+snapkv:25%", "f32+knorm:25%", "f32+knorm:50%", "f32+oracle:50%"]
    found = evaluate(model, text, specs, **MEASURE | {"documents": 2}, baselines=True)
    assert [each.spec for each in found.measured] == ["f32", *specs]
    assert [each.spec for each in found.baselines] == ["f32+random:25%", "f32+oracle:25%", "f32+random:50%"]
    chance, bound, _ = found.baselines
    seeds = [f"f32+random:25%{tail}" for tail in ("", ",seed:1", ",seed:2")]
    alone = evaluate(model, text, seeds, **MEASURE | {"documents": 2}).measured[1:]
    kls = [each.kl for each in alone]
    assert len(set(kls)) == 3 and chance.spread == (min(kls), max(kls)) and bound.spread is None
    assert chance.kl == pytest.approx(np.mean(kls)) and chance.nll == pytest.approx(np.mean([a.nll for a in alone]))
    assert chance.recall == pytest.approx(np.mean([each.recall for each in alone])) and chance.scored == 6 * SCORED
    assert chance.same == pytest.approx(np.mean([each.same for each in alone]))
    assert chance.held.allocated == pytest.approx(np.mean([each.held.allocated for each in alone]), abs=1)
    assert len(chance.documents) == 2 and found.frontier[0].spec != "f32+oracle:50%"
    assert not any(each.foresees for each in found.frontier)
    facts = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [each["spec"] for each in facts["baselines"]] == [each.spec for each in found.baselines]
    assert facts["baselines"][0]["kl"]["seeds"] == list(chance.spread)
    recalls = [each["attention_recall"] for each in facts["specs"] + facts["baselines"]]
    assert recalls == [each.recall for each in found.every] and recalls[0] == 1.0 > max(recalls[1:])
    assert evaluate(model, text, specs, **MEASURE).baselines == ()


def test_needles_may_be_asked_of_an_oracle(folder):
    import kvik
    from kvik.eval.ledger import Ledger
    from kvik.eval.needles import ask_all

    reading = kvik.load(folder, weights="f32")
    specs = [reading.spec(kv) for kv in ("f32", "f32+oracle:10%")]
    found = ask_all(reading, specs, Ledger(), lambda *_: None)
    assert len(found.answers[1]) == len(found.answers[0]) and found.answers[0] != found.answers[1]


# Curves, tables, pictures.


def test_a_family_is_all_but_the_budget():
    names = {}
    for kv in (
        "int8+snapkv:25%", "int8+snapkv:12.5%", "int8+snapkv:25%,recent:64", "int4+snapkv:25%", "int8+snapkv:512rows",
        "int8+window:64", "int8+window:32", "int8+window:64,sinks:4", "int8", "int8+snapkv:25%; page 64",
        "int8+knorm:25%; layers 0: f32+knorm:50%", "int8+knorm:5%; layers 0: f32+knorm:10%",
    ):  # fmt: skip
        found = family(kv)
        names.setdefault(None if found is None else found[0], []).append(kv)
    together = sorted(len(each) for each in names.values())
    assert together == [1, 1, 1, 1, 1, 1, 2, 2, 2] and names[None] == ["int8"]
    order = families([made(f"int8+snapkv:{part}%", 0.1, 9.0, 0.5) for part in (50, 6.25, 100, 25)])
    assert [[each.spec for each in members] for members in order.values()] == [
        ["int8+snapkv:6.25%", "int8+snapkv:25%", "int8+snapkv:50%", "int8+snapkv:100%"]
    ]
    assert budget_text("int8+window:64") == "64" and budget_text("int8+snapkv:6.25%") == "6.25 %"


def full_picture():
    """Two methods at three budgets, codecs, a window, and what they are held against."""
    specs = [made("int8", 8e-4, 130.0), made("int4", 5e-2, 70.0), made("int8+window:512", 0.3, 40.0, 0.3)]
    bounds = []
    for part, size in ((50, 68.0), (25, 36.0), (12.5, 20.0)):
        for method, factor in (("snapkv", 1.0), ("ada(kvzip)", 0.7), ("keydiff", 1.04)):
            specs.append(made(f"int8+{method}:{part}%", factor * 5 / part, size, part / 100, recall=0.9))
        seeds = [made(f"int8+random:{part}%", 30 / part + seed, size, part / 100, recall=0.5) for seed in range(3)]
        bounds += [pooled(seeds), made(f"int8+oracle:{part}%", 2 / part, size, part / 100, recall=0.95)]
    return replace(evaluation(*specs), baselines=tuple(bounds))


def test_specs_that_differ_in_their_budget_are_one_curve():
    drawn = curves(full_picture())
    names = [curve.name for curve in drawn]
    assert names[:3] == ["int8+snapkv", "int8+ada(kvzip)", "int8+keydiff"] and len({c.color for c in drawn[:3]}) == 3
    assert [each.spec for each in drawn[0].points] == ["int8+snapkv:12.5%", "int8+snapkv:25%", "int8+snapkv:50%"]
    assert [len(curve.points) for curve in drawn] == [3, 3, 3, 3, 1, 3, 3], "f32, int8 and int4 stay; one window"
    assert names[3:5] == ["every row stays", "rows are dropped"] and "chance" in names[5] and "bound" in names[6]
    assert len({curve.mark for curve in drawn}) == 4 and all(curve.joined for curve in drawn[5:])
    alone = curves(evaluation(made("int8+snapkv:25%", 0.1, 30.0, 0.25)))
    assert [curve.name for curve in alone] == ["every row stays", "rows are dropped"]
    mine = curves(evaluation(made("int8+oracle:25%", 0.1, 30.0, 0.25)))
    assert [curve.mark for curve in mine] == ["o", "*"], "an oracle that was asked for is none of the dropped"


def test_the_picture_has_a_legend_beside_it_and_no_label_on_another(monkeypatch, tmp_path):
    found, seen = full_picture(), []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: seen.append(self))
    draw_frontier(found, tmp_path / "a.png")
    (figure,) = seen
    axes, renderer = figure.axes[0], FigureCanvasAgg(figure).get_renderer()
    words = [each.get_text() for each in figure.findobj(Text)]
    for name in ("int8+snapkv", "int8+ada(kvzip)", "int8+window:512", "int4", "f32: 0"):
        assert name in words, name
    assert [words.count(text) for text in ("50 %", "25 %", "12.5 %")] == [1, 1, 1], "once for all that hold as much"
    boxes = [each.get_window_extent(renderer) for each in axes.texts]
    assert len(boxes) == 7 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    frame, legend = axes.get_window_extent(renderer), axes.get_legend().get_window_extent(renderer)
    assert legend.x0 >= frame.x1 and legend.x1 <= figure.bbox.x1, "beside, and all of it"
    lines = {line.get_linestyle() for line in axes.lines if len(line.get_xdata()) == 3}
    assert {"-", "--", ":"} <= lines


def test_the_tables_have_chance_and_foresight_in_80_columns():
    found = full_picture()
    text = printed(found)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    words = " ".join(text.split())
    assert sum(line.startswith(" int8+random:25% ×3 ") for line in (f" {line}" for line in text.splitlines())) == 3
    assert "int8+random:25% 1.2 to 3.2;" in words and "seeds 0 to 2 side by side" in words
    assert "a bound, and nothing that could be used" in words and "attention" in words
    assert "oracle" not in " ".join(printed(evaluation(made("int8", 1e-3, 100.0))).split())


# The command.


def test_an_oracle_is_for_eval_alone(monkeypatch, capsys, folder):
    monkeypatch.setattr("kvik.cli.run.load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("kvik.cli.tune.load_model", lambda *_: pytest.fail("the model was loaded"))
    for arguments in (
        ["run", "--kv", "f32+oracle:25%", "Hi"], ["chat", "--kv", "int8; layers 0: f32+oracle:25%"],
        ["tune", "--max-kl", "0.1", "--specs", "int8|f32+ada(oracle):25%"],
    ):  # fmt: skip
        check_refused(capsys, command(monkeypatch, *arguments), "seen the future", "only 'kvik eval'", "kvzip:25%")
    import kvik

    with pytest.raises(SpecError, match="seen the future"):
        "".join(generate(kvik.load(folder), "Hi and hello " * 9, kv="f32+oracle:25%", raw=True, max_tokens=2))


def test_the_command_adds_baselines_unless_told_not_to(monkeypatch, capsys, tmp_path, folder):
    options = ["eval", "int8+kvzip:25%", "f32+oracle:50%", "--model", folder, "--prefix", 200, "--scored", 9]
    options += ["--documents", 1, "--resume", tmp_path / "done.jsonl", "--json"]
    assert command(monkeypatch, *options, "--plot", tmp_path / "f.png") == 0
    facts = json.loads(capsys.readouterr().out)
    assert [each["spec"] for each in facts["specs"]] == ["f32", "int8+kvzip:25%", "f32+oracle:50%"]
    assert [each["spec"] for each in facts["baselines"]] == ["int8+random:25%", "int8+oracle:25%"]
    assert facts["specs"][1]["attention_recall"] <= facts["baselines"][1]["attention_recall"] + 0.01
    lines = len((tmp_path / "done.jsonl").read_text().splitlines())
    assert command(monkeypatch, *options, "--no-baselines") == 0
    assert json.loads(capsys.readouterr().out)["baselines"] == []
    assert lines == 7 == len((tmp_path / "done.jsonl").read_text().splitlines())


def test_an_oracle_of_other_rows_would_be_beaten(model, text, monkeypatch):
    """What the bound is worth: the same oracle over figures that are shifted by a row recalls less than it could."""
    honest = evaluate(model, text, ["f32+oracle:12.5%,sinks:2,recent:8"], **MEASURE).measured[1].recall
    monkeypatch.setattr(
        oracle, "weighed", lambda *each: [mass.roll(3, -1) if len(each) == 3 else mass for mass in weighed(*each)]
    )
    assert evaluate(model, text, ["f32+oracle:12.5%,sinks:2,recent:8"], **MEASURE).measured[1].recall < honest - 0.05
