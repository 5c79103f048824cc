"""`kvik eval`: its formulas beside plain ones, what changes nothing, and what a resumed file may hold."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench_models import ids, tiny
from eval_models import SETUP, evaluation, made
from kvik.cache.cache import Cache
from kvik.cache.sequence import Sequence
from kvik.errors import SpecError, StorageError, UsageError
from kvik.eval import evaluate
from kvik.eval.caches import CHUNK
from kvik.eval.ledger import Ledger
from kvik.eval.measures import Reference, interval, joined
from kvik.eval.results import Document, Kept
from kvik.eval.runs import TIMED
from kvik.models.model import Model

PREFIX, SCORED = 80, 90
SIZES = {"prefix": PREFIX, "scored": SCORED, "documents": 2}


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def text():
    return ids(600)


def measured(model, text, *specs, **options):
    """By spec."""
    return {each.spec: each for each in evaluate(model, text, specs, **SIZES | options).measured}


# Formulas.


def plain(full, other, targets):
    """For each position (NLL over full rows, NLL, KL, same likeliest), by sums written out."""
    found = []
    for a, b, target in zip(full.tolist(), other.tolist(), targets.tolist(), strict=True):
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (a, b))
        kl = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        found.append((-math.log(p[target]), -math.log(q[target]), kl, a.index(max(a)) == b.index(max(b))))
    return found


def test_kl_nll_and_agreement_are_the_plain_formulas():
    torch.manual_seed(1)
    full, targets = torch.randn(20, 11), torch.randint(11, (20,))
    other = full + 0.5 * torch.randn(20, 11)
    reference = Reference(full, targets)
    found = joined([reference.compare(0, other[:7]), reference.compare(7, other[7:])])
    wanted = plain(full, other, targets)
    assert any(not same for *_, same in wanted), "some are not the same"
    for name, column in zip(("full", "nll", "kl", "same"), zip(*wanted, strict=True), strict=True):
        assert getattr(found, name).tolist() == pytest.approx(list(column), rel=1e-9), name


def test_predictions_that_never_come_have_a_finite_kl_and_equal_ones_have_none():
    full = torch.tensor([[0.0, 90.0, -90.0]])
    reference = Reference(full, torch.tensor([2]))
    assert reference.compare(0, full.clone()).kl.tolist() == [0.0]
    far = reference.compare(0, -full)
    assert far.kl.item() == pytest.approx(180) and far.nll.item() == pytest.approx(0, abs=1e-30)


def test_a_document_is_scored_at_every_position_after_its_prefix(model, text):
    """Against one run over the whole document: prediction t is of token t + 1, and there are SCORED of them."""
    found = measured(model, text, "int4")
    for number, start in enumerate((0, 300)):
        document = text[start : start + PREFIX + SCORED + 1]
        logits = {}
        for kv in ("f32", "int4"):
            with model.cache(kv).open() as sequence:
                logits[kv] = model.run([(sequence, document[:-1])], every=True)[PREFIX:]
        wanted = plain(logits["f32"], logits["int4"], torch.tensor(document[PREFIX + 1 :]))
        full, mine, kl, same = (np.array(each) for each in zip(*wanted, strict=True))
        assert len(kl) == SCORED
        it = found["int4"].documents[number]
        assert it.kl == pytest.approx(kl.tolist(), rel=1e-6, abs=1e-12)
        assert it.nll == pytest.approx(mine.mean()) and it.same == same.sum()
        assert it.delta == pytest.approx(mine.mean() - full.mean(), abs=1e-9)
        assert found["f32"].documents[number].nll == pytest.approx(full.mean())


def test_sums_over_documents_are_plain_ones():
    found = made("int8", 0.2, 100.0)
    every = [value for each in found.documents for value in each.kl]
    assert found.kl == pytest.approx(np.mean(every)) == pytest.approx(0.2)
    assert found.kl_at(1.0) == max(every) and found.kl_at(0.5) == pytest.approx(np.median(every))
    assert found.kl_at(0.99) == pytest.approx(np.quantile(every, 0.99))
    assert (found.scored, found.same) == (8, 6 / 8)
    assert found.delta == pytest.approx(0.1) and found.perplexity_ratio == pytest.approx(math.exp(0.1))
    assert found.bytes_a_token == 100.0 and (found.held.payload, found.held.overhead) == (8000, 2000)
    assert found.first == 0.75 and found.step == 0.01 and found.peak == 13000
    low, high = found.kl_interval
    assert low == pytest.approx(0.1) and high == pytest.approx(0.3)


def test_the_bootstrap_repeats_itself_and_says_nothing_of_one_document():
    values = [0.1, 0.4, 0.2, 0.35, -0.1]
    assert interval(values) == interval(values) != interval(values, seed=1)
    low, high = interval(values)
    assert min(values) < low < np.mean(values) < high < max(values)
    assert interval([0.3] * 4) == pytest.approx((0.3, 0.3))
    assert interval([0.3]) is None
    shifted = interval([value + 1 for value in values])
    assert shifted == pytest.approx((low + 1, high + 1)), "the same documents are drawn"


def test_only_what_no_other_beats_is_on_the_frontier():
    found = evaluation(
        made("int4", 0.1, 100.0), made("k8v4", 0.2, 110.0), made("int8", 0.01, 200.0), made("f16", 0.01, 210.0),
        made("int4+oracle:25%", 0.001, 20.0),
    )  # fmt: skip
    assert [each.spec for each in found.frontier] == ["int4", "int8", "f32"], "and what nobody can know"


# What changes nothing, and what does.


@pytest.mark.parametrize("protocol", ["prompt", "stream"])
def test_full_rows_and_windows_that_hide_nothing_differ_by_exactly_nothing(model, text, protocol):
    long = PREFIX + SCORED
    same = ("f32; page 64", f"f32+window:{long}", f"f32+window:{long - 4},sinks:4", "f32+snapkv:100%")
    found = measured(model, text, *same, f"f32+window:{long // 2}", protocol=protocol)
    for spec in ("f32", *same):
        it = found[spec]
        assert {kl for each in it.documents for kl in each.kl} == {0.0}, spec
        assert (it.delta, it.same, it.perplexity_ratio, it.kept, it.evicts) == (0.0, 1.0, 1.0, 1.0, False), spec
        assert it.nll == found["f32"].nll
    small = found[f"f32+window:{long // 2}"]
    assert small.kl > 0 and small.delta != 0 and small.same < 1 and small.delta_interval != (0.0, 0.0)


def test_both_protocols_give_the_same_bits_where_rows_depend_on_no_cut(model, text):
    specs = ("int8", "int4+window:30,sinks:3")
    found = [measured(model, text, *specs, protocol=protocol) for protocol in ("prompt", "stream")]
    for spec in specs:
        ways = [[each.kl for each in one[spec].documents] for one in found]
        assert ways[0] == ways[1]


def test_each_protocol_takes_the_prefix_in_as_it_says(model, text, monkeypatch):
    taken, told, settled = [], [], []
    run, opened, settle = Model.run, Cache.open, Sequence.settle

    def watched(self, chunks, every=False, watch=None):
        taken.append((len(chunks[0][0]), len(chunks[0][1]), every))
        return run(self, chunks, every, watch)

    def told_of(self, tokens=(), salt=""):
        told.append(len(tokens))
        return opened(self, tokens, salt)

    monkeypatch.setattr(Model, "run", watched)
    monkeypatch.setattr(Cache, "open", told_of)
    monkeypatch.setattr(Sequence, "settle", lambda self: settled.append(len(self)) or settle(self))
    steps = [(PREFIX + at, 1, True) for at in range(TIMED)]
    steps += [(PREFIX + TIMED, CHUNK, True), (PREFIX + TIMED + CHUNK, SCORED - TIMED - CHUNK, True)]
    beside = (PREFIX, SCORED, False)  # in a fork, to see where attention goes
    evaluate(model, text, [], prefix=PREFIX, scored=SCORED, documents=1)
    assert told == [PREFIX] and taken == [(0, PREFIX, False), beside, *steps]
    taken.remove(beside)
    assert settled == [start + count for start, count, _ in taken], "whatever went in is settled"
    taken.clear()
    evaluate(model, text, [], prefix=PREFIX, scored=SCORED, documents=1, protocol="stream")
    assert told[1:] == [0] and taken == [(0, 64, False), (64, PREFIX - 64, False), beside, *steps]


def test_a_policy_drops_where_the_prompt_ends_and_later_where_it_says(model, text):
    specs = ("f32+snapkv:25%", "f32+snapkv:25%,every:16", "f32+keydiff:40rows,every:32")
    found = measured(model, text, *specs, prefix=160)
    once, again, bound = (found[spec] for spec in specs)
    whole = model.spec("f32").nbytes(160).allocated
    for each in (once, again):
        assert each.evicts and each.kept == pytest.approx(0.25, abs=0.02) and each.peak == whole
    assert bound.evicts and bound.peak < whole, "during the prompt too"
    assert once.kl > 0 < bound.kl and once.kl != again.kl, "and where a chunk of 64 would pass it, too"
    rows = once.documents[0].kept.rows
    assert rows.mean(axis=1) == pytest.approx(np.full(4, 0.25), abs=0.05) and not (rows == rows[0]).all()
    stream = measured(model, text, *specs, prefix=160, protocol="stream")
    assert not stream[specs[0]].evicts and stream[specs[2]].kl == bound.kl


def test_mixed_layers_and_a_models_own_window_can_be_measured(text):
    found = measured(tiny(window=50), text, "int4; layers 0: bf16", "int8+window:20")
    assert found["f32"].kl == 0 and found["f32"].kept < 1, "the model's own window drops rows"
    assert found["int4; layers 0: bf16"].kl > 0 and found["int8+window:20"].kept < found["f32"].kept


# What it takes.


class Ticks:
    """A clock that goes on by a second each time it is looked at."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        self.now += 1
        return float(self.now)


def test_bytes_rows_and_times_are_those_after_the_prefix(model, text):
    found = measured(model, text, "int8", "bf16+window:20,sinks:3; page 16", clock=Ticks())
    for spec in ("f32", "int8"):
        it, wanted = found[spec], model.spec(spec).nbytes(PREFIX)
        assert it.held == wanted and it.peak == wanted.allocated and it.kept == 1
        assert it.bytes_a_token == wanted.allocated / PREFIX
        assert (it.first, it.step) == (1.0, 1.0)
    small = found["bf16+window:20,sinks:3; page 16"]
    assert small.kept == 23 / PREFIX and small.evicts
    assert small.held == model.spec(small.spec).nbytes(PREFIX)
    whole = model.spec("bf16; page 16").nbytes(PREFIX).allocated
    assert small.peak == whole > small.held.allocated, "until it settles"


def test_the_map_is_of_the_rows_that_are_held(model, text):
    found = measured(model, text, "f32; layers 1 heads 0: bf16+window:20,sinks:3; page 16", scored=4)
    documents = next(reversed(found.values())).documents
    assert documents[1].kept is None, "of the first document only"
    kept = documents[0].kept
    assert (kept.heads, kept.tokens) == ((2, 2), PREFIX)
    rows = kept.rows
    assert rows[[0, 1, 3]].all()
    assert np.flatnonzero(~rows[2]).tolist() == list(range(16, 48)), "pages with a row that is seen are held"
    assert Kept.from_dict(json.loads(json.dumps(kept.to_dict()))) == kept


def test_what_can_not_be_measured_is_refused(model, text):
    for wrong in ({"prefix": 0}, {"scored": 0}, {"documents": 0}, {"protocol": "flood"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            measured(model, text, **wrong)
    with pytest.raises(UsageError, match="600 tokens are fewer than the 684 that 4 documents of 171 take"):
        measured(model, text, documents=4)
    with pytest.raises(SpecError, match="int5"):
        measured(model, text, "int5")


# A file to resume from.


def test_what_is_done_is_not_done_again(model, text, tmp_path, monkeypatch):
    path, specs, runs = tmp_path / "done.jsonl", ["int8", "int4+window:30"], []
    honest = Model.run
    monkeypatch.setattr(Model, "run", lambda self, *a, **k: runs.append(a[0][0][0].cache.spec) or honest(self, *a, **k))
    first = evaluate(model, text, specs, ledger=Ledger(path), **SIZES)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 6 and "int8, document 2" in lines[4]
    runs.clear()
    assert evaluate(model, text, specs, ledger=Ledger(path), **SIZES) == first
    assert not runs and len(path.read_text().splitlines()) == 6
    path.write_text("".join(lines[:4] + lines[5:]))  # without int8's second document
    again = evaluate(model, text, specs, ledger=Ledger(path), **SIZES)
    assert {str(spec) for spec in runs} == {"f32", "int8"}, "full rows are needed to compare with"
    assert [each.kl for each in again.measured] == [each.kl for each in first.measured]
    assert again.full == first.full, "what was there stays as it was"
    more = evaluate(model, text, [*specs, "bf16"], ledger=Ledger(path), **SIZES)
    assert more.measured[1:3] == again.measured[1:] and len(path.read_text().splitlines()) == 8


def test_a_key_names_all_that_a_figure_depends_on(model, text):
    spec = model.spec("int8")
    key = SETUP.key(str(spec), spec.fingerprint, 0, text)
    assert key == SETUP.key(str(spec), spec.fingerprint, 0, text)
    others = [
        replace(SETUP, fingerprint="0" * 64), replace(SETUP, prefix=99), replace(SETUP, scored=5),
        replace(SETUP, protocol="stream"),
    ]  # fmt: skip
    keys = {key, *(other.key(str(spec), spec.fingerprint, 0, text) for other in others)}
    keys |= {SETUP.key("int4", spec.fingerprint, 0, text), SETUP.key(str(spec), "0", 0, text)}
    keys |= {SETUP.key(str(spec), spec.fingerprint, 1, text), SETUP.key(str(spec), spec.fingerprint, 0, text[1:])}
    assert len(keys) == 9
    assert replace(SETUP, model="another name", text="elsewhere").key(str(spec), spec.fingerprint, 0, text) == key


DAMAGED = {
    "cut off": (lambda line: line[:-20], "line 2: has no end"),
    "no JSON": (lambda line: "what is this?\n", "line 2: is no JSON"),
    "a list": (lambda line: "[]\n", "line 2: is no line of an evaluation"),
    "empty": (lambda line: "\n", "line 2: is no JSON"),
    "another figure": (lambda line: line.replace('"nll": 1.5', '"nll": 1.25'), "line 2: is not as it was written"),
    "another key": (lambda line: line.replace('"key": "b"', '"key": "c"'), "line 2: is not as it was written"),
    "another format": (lambda line: line.replace("eval-1", "eval-0"), "line 2: is no line of an evaluation"),
    "one field more": (lambda line: line.replace("{", '{"more": 1, ', 1), "line 2: is no line of an evaluation"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_or_foreign_line_is_refused_with_file_and_line(case, tmp_path):
    path = tmp_path / "done.jsonl"
    ledger = Ledger(path)
    for key in "ab":
        ledger.put(key, "about", {"nll": 1.5})
    first, second = path.read_text().splitlines(keepends=True)
    change, wanted = DAMAGED[case]
    assert Ledger(path).get("b") == {"nll": 1.5} and change(second) != second
    path.write_text(first + change(second))
    with pytest.raises(StorageError) as refused:
        Ledger(path)
    assert f"{path}, {wanted}" in str(refused.value) and "delete that line" in str(refused.value)


def test_documents_come_back_from_json_bit_for_bit(model, text):
    it = measured(model, text, "int4+window:30")["int4+window:30"].documents[0]
    assert Document.from_dict(json.loads(json.dumps(it.to_dict()))) == it


def test_the_file_is_there_when_the_work_is_interrupted(model, text, tmp_path):
    def stop(what, *_):
        if "document 2" in what and "int8" in what:
            raise KeyboardInterrupt

    path = tmp_path / "done.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, text, ["bf16", "int8"], ledger=Ledger(path), show=stop, **SIZES)
    assert len(Ledger(path)) == 5
