"""`kvik fuzz`: what is right passes and climbs every rung, what is broken on purpose is found, and made small."""

import json
import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bench_models
from kvik.cache import cache as caches
from kvik.cache.cache import Cache
from kvik.cache.sequence import Sequence
from kvik.engine.loop import Loop
from kvik.engine.scheduler import Scheduler
from kvik.errors import StorageError, UsageError
from kvik.fuzz import Sizes, facts, fuzz, make, read, write
from kvik.fuzz.minimise import minimise
from kvik.fuzz.oracle import Oracle
from kvik.fuzz.replay import replay
from kvik.fuzz.trace import Abort, Ask, Failed, Part, Said, Trace, part_ids
from kvik.models import families
from kvik.models.model import Model

AMPLE, TIGHT = 64 << 20, 1536 << 10
SIZES = Sizes(longest=700, waiting=12, answers=8)
WIDE = {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model():
    """A random one with wide heads, so that a few texts fill tiny memory."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**{**bench_models.SIZES, **WIDE}))
    return Model(families.from_hf(theirs.config.to_dict(), None, "tiny"), theirs.state_dict(), weights="f32")


def made(count=24, seed=0, **changes):
    return make(count, seed, 258, replace(SIZES, **changes))


def found(model, trace, kv="f32", **options):
    """What is wrong, after as much minimising as a test may take."""
    return fuzz(model, trace, (kv,), **{"seconds": 300.0, "name": "tiny", **options})


@pytest.mark.parametrize(
    ("kv", "guesses", "seed"),
    [
        ("f32", 4, 1),
        ("int4+window:64,sinks:4", 3, 1),
        ("int8+snapkv:50%", 0, 2),
        ("bf16+keydiff:96rows,every:32", 0, 1),
    ],
)
def test_a_trace_climbs_every_rung_and_changes_no_bit(model, kv, guesses, seed):
    trace = made(36, seed=seed)
    report = found(model, trace, kv, guesses=guesses)
    assert report.wrong == [] and report.failure is None
    assert report.missed == [], facts(report, trace, model="tiny", seed=seed)
    ample, tiny = report.rows
    assert tiny.run.budget < ample.run.budget
    assert ample.verdict.worst == tiny.verdict.worst == 0.0 and report.forced[kv] > 5
    for row in report.rows:
        assert row.verdict.compared > 20 and row.verdict.tokens > 150 and row.run.counts.cached_tokens > 0
    assert all(ample.left[stage] + tiny.left[stage] for stage in ("queued", "prompt", "answer", "preempted"))
    if guesses:
        assert ample.run.counts.accepted_tokens > 0


def smallest(report, most=4):
    """The trace that is left of a failure, which fails for the same reason and has few requests."""
    assert report.failure is not None and len(report.failure.asks) <= most, report.wrong
    return report.failure


def test_a_row_that_changes_while_its_text_waits_is_found(model, monkeypatch):
    honest = Scheduler.preempt

    def preempt(self, job):
        sequence = next((task.sequence for task in job.tasks if task.sequence is not None), None)
        block = None if sequence is None or not sequence._keys else self.cache.index.get(sequence._keys[0])
        if block is not None:
            self.cache.pages(self.cache.spec.groups[0])[block.pages[0][0], :4] += 1
        honest(self, job)

    monkeypatch.setattr(Scheduler, "preempt", preempt)
    trace = made(12, seed=5)
    assert found(model, trace, memory=AMPLE).wrong == [], "nobody is preempted there"
    report = found(model, trace, memory=TIGHT)
    assert re.search(r"request \d+: answer \d: token \d+", report.wrong[0])
    failure = smallest(report)
    assert (failure.failed.memory, failure.failed.kv) == (TIGHT, "f32") and failure.failed.what in report.wrong[0]


def test_a_prefix_that_crosses_salts_is_found(model, monkeypatch):
    honest = caches.root_key
    monkeypatch.setattr(caches, "root_key", lambda weights, spec, salt, *rest: honest(weights, spec, "", *rest))
    report = found(model, made(10), memory=AMPLE)
    assert "others of its salt have only" in report.wrong[0]
    assert len({ask.salt for ask in smallest(report, 2).asks}) == 2


def test_a_trim_that_forgets_a_row_is_found(model, monkeypatch):
    honest = Sequence.trim
    monkeypatch.setattr(Sequence, "trim", lambda self, length: honest(self, min(length + 1, len(self))))
    assert found(model, made(8), memory=AMPLE, guesses=0).wrong == []
    smallest(found(model, made(8), memory=AMPLE, guesses=4), 1)


def test_pages_that_nobody_gives_back_are_found(model, monkeypatch):
    honest = Loop.abort

    def abort(self, number):
        for task in self.jobs[number].tasks if number in self.jobs else ():
            task.sequence = None
        honest(self, number)

    monkeypatch.setattr(Loop, "abort", abort)
    report = found(model, made(10), memory=AMPLE)
    assert "a sequence is nobody's" in report.wrong[0]
    failure = smallest(report, 1)
    assert len(failure.aborts) == 1


def test_who_is_forgotten_and_who_never_goes_on_are_found(model, monkeypatch):
    waiting = Scheduler.add

    def add(self, job):
        if job.preempted:
            self._keys.pop(job.number)
        else:
            waiting(self, job)

    monkeypatch.setattr(Scheduler, "add", add)
    report = found(model, made(12, seed=5), memory=TIGHT)
    assert "was never answered" in report.wrong[0]
    smallest(report)
    monkeypatch.setattr(Scheduler, "add", waiting)
    monkeypatch.setattr(Scheduler, "next_waiting", lambda self: None)
    assert "no token in 300 steps, and request" in found(model, made(2), memory=AMPLE).wrong[0]


def test_an_engine_that_breaks_is_found_and_its_error_told(model, monkeypatch):
    def broken(self, job):
        raise ValueError("a wire came loose")

    monkeypatch.setattr(Scheduler, "preempt", broken)
    report = found(model, made(12, seed=5), memory=TIGHT)
    assert "broken down (ValueError: a wire came loose)" in report.wrong[0]
    smallest(report)


def test_a_cut_that_shows_is_bounded_or_found(model, monkeypatch):
    honest = Model.run

    def run(self, chunks, *given, **options):
        return honest(self, chunks, *given, **options) * (1 + 1e-4 * len(chunks[0][1]))

    monkeypatch.setattr(Model, "run", run)
    trace = made(8)
    assert "log-probability" in found(model, trace, memory=AMPLE, seconds=0.0).wrong[0]
    report = found(model, trace, memory=AMPLE, bound=0.05)
    assert report.wrong == [] and 1e-4 < report.rows[0].verdict.worst <= 0.05
    assert "log-probability" in found(model, trace, memory=AMPLE, bound=1e-4, seconds=0.0).wrong[0]


def heard(run):
    return {number: vars(each) for number, each in run.heard.items()}, run.counts, run.steps, run.queued


def test_a_trace_that_was_saved_replays_step_by_step(model, tmp_path):
    trace = made(24, seed=1)
    write(trace, tmp_path / "trace.jsonl")
    again = read(tmp_path / "trace.jsonl")
    assert again == trace
    oracle = Oracle(model, "int8")
    requests = oracle.requests(trace)
    first, second = (replay(model, each, requests, "int8", memory=768 << 10, guesses=3) for each in (trace, again))
    assert heard(first) == heard(second) and first.counts.preemptions > 0


def test_what_others_are_told_is_written_out_where_they_are_gone(model):
    asks = (
        Ask(0, 0, (Part(1, 0, 40),), 5),
        Ask(1, 3, (Part(1, 0, 40), Said(0, 3), (7, 8)), 4),
    )
    trace = Trace(258, 4, 64, 8, 0, asks, (Abort(2, 1, "answer", 2),))
    oracle = Oracle(model, "f32")
    prompts = {number: request.prompt for number, request in oracle.requests(trace).items()}
    told = oracle.answers(0, oracle.requests(trace)[0])[0].token_ids
    assert prompts[1] == (*part_ids(Part(1, 0, 40), 258), *told[:3], 7, 8)
    alone = oracle.spelled(trace.only({1}), trace)
    assert alone.asks[0].prompt == (Part(1, 0, 40), tuple(told[:3]), (7, 8)) and alone.aborts == trace.aborts
    assert Oracle(model, "f32").requests(alone)[1].prompt == prompts[1]


def test_minimising_keeps_what_is_needed_and_keeps_its_time():
    trace = Trace(10, 1, 8, 0, 0, tuple(Ask(number, number, (Part(1, 0, 2),), 1) for number in range(40)))
    left = []
    small = minimise(trace, lambda part: {3, 17} <= {a.number for a in part.asks}, seconds=60, show=left.append)
    assert [ask.number for ask in small.asks] == [3, 17] and left == sorted(left, reverse=True)
    assert small.asks[1].at > 1000, "it fails without haste too"
    assert minimise(trace, lambda part: True, seconds=-1.0, show=left.append) == trace


DAMAGES = {
    "cut off": lambda lines: lines[:-1],
    "a line in two": lambda lines: [*lines[:-1], lines[-1][:20], lines[-1][20:]],
    "of another kind": lambda lines: [lines[0].replace("fuzz-1", "eval-1"), *lines[1:]],
    "no head": lambda lines: lines[1:],
    "a number as a text": lambda lines: [lines[0], re.sub(r'"at": (\d+)', r'"at": "\1"', lines[1]), *lines[2:]],
    "a word that is not known": lambda lines: [lines[0], lines[1].replace('"at"', '"exec": 1, "at"'), *lines[2:]],
    "a token beyond": lambda lines: [lines[0], re.sub(r'"prompt": \[', '"prompt": [[999], ', lines[1]), *lines[2:]],
    "a stranger": lambda lines: [*lines[:-1], '{"at": 1, "abort": 999}'],
    "no prompt": lambda lines: [lines[0], re.sub(r'"prompt": \[.*?\]', '"prompt": []', lines[1]), *lines[2:]],
    "an answer to itself": lambda lines: [
        lines[0], re.sub(r'"prompt": \[', '"prompt": [{"answer": 0, "tokens": 1}, ', lines[1]), *lines[2:],
    ],
    "out of range": lambda lines: [
        lines[0], lines[1].replace('"sampling": {', '"sampling": {"top_p": 7, '), *lines[2:],
    ],
    "a text of numbers": lambda lines: [lines[0], "[" * 100_000, *lines[2:]],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_refused(damage, tmp_path):
    path = tmp_path / "trace.jsonl"
    write(made(12), path)
    path.write_text("\n".join(DAMAGES[damage](path.read_text().splitlines())) + "\n")
    with pytest.raises(StorageError, match=r"trace.jsonl, line \d+: .*so it can't be replayed; name a trace"):
        read(path)


def test_a_failure_and_its_trace_survive_the_file(tmp_path):
    trace = replace(made(12), failed=Failed("tiny", "f32", "int8", 1 << 20, 3, "request 7: answer 0: token 1"))
    write(trace, tmp_path / "failed.jsonl")
    assert read(tmp_path / "failed.jsonl") == trace
    with pytest.raises(StorageError, match="can't be read"):
        read(tmp_path / "none.jsonl")


def test_the_command(tmp_path, kvik_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = bench_models.write_model(tmp_path / "model")
    arguments = ["fuzz", folder, "--requests", 12, "--memory", "4MiB", "--kv", "int8", "--kv", "f32"]
    done = kvik_here(*arguments, "--json", "--save", "t.jsonl")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [row["kv"] for row in told["rows"]] == ["int8", "f32"] and not told["wrong"] and told["seed"] == 0
    assert told["rows"][0]["compared"] > 8 and told["rows"][0]["worst"] == 0
    assert any("f32: dropped" in each for each in told["not_climbed"])
    shown = kvik_here("fuzz", folder, "--memory", "4MiB", "--trace", "t.jsonl")
    assert shown.returncode == 0 and "bit for bit" in shown.stdout and "give less --memory" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 80
    monkeypatch.setattr(Cache, "touch", lambda self, keys: self.index.remove(self.index.get(keys[0])) if keys else None)
    wrong = kvik_here(*arguments[:-2])
    assert wrong.returncode == 1 and "fuzz-failed.jsonl" in wrong.stderr
    again = kvik_here("fuzz", "--trace", "fuzz-failed.jsonl", "--json")
    assert again.returncode == 1 and json.loads(again.stdout)["wrong"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--trace", "README.md"], "no trace|JSON"),
        (["--memory", "much"], "is no size"),
        (["--kv", "int9"], "int9"),
        (["--save", "no/where.jsonl"], "there is no folder"),
        (["--requests", "0"], "requests"),
        (["--trace", "any.jsonl", "--requests", "5"], "requests of its own; leave --requests"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(arguments, why, kvik_here):
    done = kvik_here("fuzz", *arguments)
    assert done.returncode == 2 and not done.stdout and re.search(why, done.stderr)
    assert len(bench_models.told(done.stderr)) == 1


def test_a_trace_of_another_vocabulary_is_refused(model):
    with pytest.raises(UsageError, match="replay it with the model"):
        found(model, make(5, 0, 9999, SIZES))


def test_a_trace_of_which_nothing_fits_is_no_success(model):
    with pytest.raises(UsageError, match="f32: every request was refused"):
        found(model, made(4), memory=100_000)
