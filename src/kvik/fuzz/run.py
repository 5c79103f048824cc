"""Traces over specs: replayed, judged, and made smaller where they fail."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from kvik.cache.limits import memory_available
from kvik.engine.engine import Engine
from kvik.engine.request import Request
from kvik.errors import KvikError, UsageError
from kvik.fuzz.check import Verdict, judge, judge_oracle
from kvik.fuzz.minimise import minimise
from kvik.fuzz.oracle import Oracle
from kvik.fuzz.replay import RUNGS, Run, replay
from kvik.fuzz.trace import Failed, Trace
from kvik.models.model import Model

Show = Callable[[str, int, int], None]
MINIMISING_S = 120.0
TOO_LARGE = (0.03, 0.1, 0.25)  # parts of the requests that are too large for tiny memory
STAGES = ("queued", "prompt", "answer", "preempted")


@dataclass(frozen=True)
class Row:
    """A trace over a spec, in one size of memory.

    Attributes:
        kv: the spec.
        run: what happened.
        verdict: whether it was right.
    """

    kv: str
    run: Run
    verdict: Verdict

    @property
    def left(self) -> dict[str, int]:
        """Requests whose askers left, by stage."""
        found = Counter(heard.left for heard in self.run.heard.values() if heard.left is not None)
        return {stage: found[stage] for stage in STAGES}  # type: ignore[index]

    @property
    def refused(self) -> dict[str, int]:
        """Requests that were not taken: the queue was full, more than the cache has, or impossible."""
        found = Counter(heard.refused for heard in self.run.heard.values() if heard.refused)
        other = sum(count for why, count in found.items() if why not in ("queue", "budget"))
        return {"queue": found["queue"], "budget": found["budget"], "other": other}

    @property
    def failed(self) -> str:
        """What is wrong; "" = nothing."""
        if self.run.problem:
            return self.run.problem
        first = self.verdict.differences[:1]
        return "" if not first else f"request {first[0].ask}: {first[0].what}"


@dataclass
class Report:
    """All rows of a trace.

    Attributes:
        rows: by spec and memory.
        forced: for each spec, how many answers one pass over prompt and answer gave as well.
        oracle: for each spec, what of that was different.
        failure: the smallest trace that fails; None = all is right.
        bound: by how much log-probabilities may differ; 0 = not at all.
    """

    rows: list[Row] = field(default_factory=list)
    forced: dict[str, int] = field(default_factory=dict)
    oracle: dict[str, Verdict] = field(default_factory=dict)
    failure: Trace | None = None
    bound: float = 0.0

    @property
    def wrong(self) -> list[str]:
        """What is wrong, spec by spec."""
        found = [f"{row.kv}: {row.failed}" for row in self.rows if row.failed]
        return found + [f"{kv}: request {d.ask}: {d.what}" for kv, v in self.oracle.items() for d in v.differences[:1]]

    @property
    def missed(self) -> list[str]:
        """Rungs that no row of a spec climbed, as `spec: rung`."""
        return [
            f"{kv}: {rung}"
            for kv in dict.fromkeys(row.kv for row in self.rows)
            for at, rung in enumerate(RUNGS)
            if not any(row.run.rungs[at] for row in self.rows if row.kv == kv)
        ]


def fuzz(
    model: Model,
    trace: Trace,
    specs: tuple[str, ...],
    *,
    memory: int | None = None,
    guesses: int = 0,
    bound: float = 0.0,
    name: str = "",
    seconds: float = MINIMISING_S,
    show: Show = lambda what, done, total: None,
) -> Report:
    """Takes a trace over each spec through an engine, and holds all that was heard against what is right.

    Args:
        memory: of the cache, in bytes; None = twice: with room for all, and with so little that some is taken back.
        guesses: see `Engine`.
        bound: see `judge`.
        name: of the model, for the file of a failure.
        seconds: for making a failure smaller.
        show: is told what happens next, and how much of how much is done.

    Raises:
        UsageError: the trace's tokens are not the model's, or no request fits.
        BudgetError: the machine has not that much memory.
    """
    report = Report(bound=bound)
    if trace.vocabulary > model.config.vocab_size:
        raise UsageError(
            f"the trace has {trace.vocabulary:,} tokens and {model.config.name} {model.config.vocab_size:,}; replay it "
            "with the model that it was made for"
        )
    for kv in specs:
        oracle = Oracle(model, kv)
        show(f"{kv}: requests", 0, 1)
        requests = oracle.requests(trace)
        show(f"{kv}: all at once", 0, 1)
        if memory is not None:
            runs = [replay(model, trace, requests, kv, memory=memory, guesses=guesses)]
        else:
            runs = _both(model, trace, requests, kv, guesses)
        if not any(run.problem or any(not each.refused for each in run.heard.values()) for run in runs):
            raise UsageError(f"{kv}: every request was refused, so nothing can be compared; give more --memory")
        _answer(oracle, requests, runs, show)
        report.rows += [Row(kv, run, judge(run, requests, oracle, bound)) for run in runs]
        report.forced[kv], report.oracle[kv] = judge_oracle(oracle, requests, bound)
        if report.failure is None:
            report.failure = _failure(model, trace, oracle, report, kv, guesses, name, seconds, show)
    return report


def _both(model: Model, trace: Trace, requests: Mapping[int, Request], kv: str, guesses: int) -> list[Run]:
    """Two ways of a trace that climb every rung between them, where that can be had: with room for all that runs at
    once, and with so little that a few requests can never fit, or a few more."""
    half = memory_available() // 2
    with Engine(model, kv, memory=half, running=trace.answers, step_tokens=trace.step_tokens) as engine:
        needs = sorted(engine.needs(request) for request in requests.values() if len(request.prompt) < engine.longest)
    if not needs:
        raise UsageError(f"every prompt of the trace is longer than {model.config.name} can read; make another trace")

    def run(memory: int) -> Run:
        return replay(model, trace, requests, kv, memory=memory, guesses=guesses)

    ample = run(min(2 * trace.answers * needs[-1], half))
    for share in TOO_LARGE:
        tiny = run(needs[int((len(needs) - 1) * (1 - share))])
        if tiny.problem or all(a or b for a, b in zip(ample.rungs, tiny.rungs, strict=True)):
            break
    return [ample, tiny]


def _answer(oracle: Oracle, requests: Mapping[int, Request], runs: list[Run], show: Show) -> None:
    """Computes the right answers to all that was taken."""
    taken = [number for number in requests if any(not run.heard[number].refused for run in runs)]
    for done, number in enumerate(taken):
        show(f"{oracle.kv}: each alone", done, len(taken))
        with contextlib.suppress(KvikError):  # told of where it is compared
            oracle.answers(number, requests[number])


def _failure(
    model: Model,
    trace: Trace,
    oracle: Oracle,
    report: Report,
    kv: str,
    guesses: int,
    name: str,
    seconds: float,
    show: Show,
) -> Trace | None:
    """The smallest part of a trace that fails over a spec; None = it doesn't."""
    requests, bound = oracle.requests(trace), report.bound
    row = next((row for row in report.rows if row.kv == kv and row.failed), None)
    if row is None:
        wrong = {difference.ask for difference in report.oracle[kv].differences}
        if not wrong:
            return None
        small, memory, what = trace.only({min(wrong)}), memory_available() // 2, report.oracle[kv].differences[0].what
    else:
        memory, what = row.run.budget, row.failed

        def fails(part: Trace) -> bool:
            run = replay(model, part, requests, kv, memory=memory, guesses=guesses)
            return bool(run.problem or judge(run, requests, oracle, bound).differences)

        total, doing = len(trace.asks), f"{kv}: makes the failure smaller"
        small = minimise(trace, fails, seconds=seconds, show=lambda left: show(doing, total - left, total))
    failed = Failed(name, model.weights, kv, memory, guesses, what[:1000])
    return replace(oracle.spelled(small, trace), failed=failed)
