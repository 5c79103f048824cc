"""A report as a table and verdicts, for a terminal of 80 columns or a file; and as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvik.fuzz.replay import RUNGS
from kvik.fuzz.run import STAGES, Report, Row
from kvik.fuzz.trace import Trace
from kvik.units import format_bytes

_RUNGS = {
    "dropped": "no page was dropped: give less --memory",
    "preempted": "no answer was preempted and went on later: give less --memory, or more --requests",
    "queued": "nobody waited in the queue: give more --requests",
    "refused": "nobody was refused: give less --memory, or more --requests",
}


def render(report: Report, trace: Trace, console: Console, *, model: str, seed: int | None) -> None:
    """Prints what came of a trace, row by row.

    Args:
        seed: of the trace; None = it comes from a file.
    """
    made = "from a file" if seed is None else f"of seed {seed}"
    console.print(
        Text.assemble(
            (model, "bold"), f"  a trace {made}: {len(trace.asks)} requests, {len(trace.aborts)} may leave early\n",
            (f"{trace.answers} answers at once, {trace.step_tokens} tokens a step, {trace.waiting} waiting", "dim"),
        )
    )  # fmt: skip
    for at, kv in enumerate(dict.fromkeys(row.kv for row in report.rows)):
        console.print()
        console.print(Text(kv, "bold"))
        console.print(_table([row for row in report.rows if row.kv == kv], head=at == 0))
    console.print()
    console.print(_verdicts(report))


def _table(rows: list[Row], *, head: bool) -> Table:
    """A spec's rows; widths are fixed, so that those of all specs lie below one head."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False, show_header=head)
    for name, width in (
        ("cache", 9), ("answers\nequal", 7), ("cut\noff", 4), ("left in\nq/p/a/r", 10), ("re-\nfused", 6),
        ("pre-\nempted", 7), ("pages\ndropped", 8), ("tokens\nknown", 7), ("steps", 6), ("worst\ndiff.", 7),
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True, width=width)
    for row in rows:
        counts, verdict = row.run.counts, row.verdict
        wrong = len({difference.ask for difference in verdict.differences})
        equal = "broken" if row.run.problem else f"{wrong} wrong" if wrong else f"{verdict.compared:,}"
        table.add_row(
            format_bytes(row.run.budget), Text(equal, "red" if row.failed else ""), f"{verdict.begun:,}",
            "/".join(str(row.left[stage]) for stage in STAGES), f"{sum(row.refused.values()):,}",
            f"{counts.preemptions:,}", f"{counts.evicted_pages:,}", f"{counts.cached_tokens:,}", f"{row.run.steps:,}",
            "0" if verdict.worst == 0 else f"{verdict.worst:.1e}",
        )  # fmt: skip
    return table


def _verdicts(report: Report) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in verdicts(report):
        table.add_row(label, text)
    return table


def verdicts(report: Report) -> Iterator[tuple[str, str]]:
    """What follows: (about what, in a line or two)."""
    for wrong in report.wrong:
        yield "wrong", wrong
    if not report.wrong:
        tokens = sum(row.verdict.tokens for row in report.rows)
        if report.bound:
            others = sum(row.verdict.others for row in report.rows)
            yield (
                "bound",
                (
                    f"not bit for bit: {others} answers have other tokens than alone; every log-probability is within "
                    f"{report.bound:g} of one pass over its own text"
                ),
            )
        else:
            yield "alone = mix", f"{tokens:,} tokens and all log-probabilities are the same, bit for bit"
        forced = sum(report.forced.values())
        yield "one pass", f"gives the same log-probabilities to {forced:,} greedy answers, prompt and answer at once"
        yield "books", "free + reusable = all after every trace, every 16th step adds up, and nothing is left"
    for missed in report.missed:
        kv, rung = missed.rsplit(": ", 1)
        yield "not climbed", f"{kv}: {_RUNGS[rung]}"


def facts(report: Report, trace: Trace, *, model: str, seed: int | None) -> dict[str, Any]:
    """The same as data."""
    return {
        "model": model,
        "seed": seed,
        "requests": len(trace.asks),
        "aborts": len(trace.aborts),
        "bound": report.bound,
        "rows": [_row(row) for row in report.rows],
        "forced": report.forced,
        "wrong": report.wrong,
        "not_climbed": report.missed,
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "kv": row.kv,
        "memory": row.run.budget,
        "compared": row.verdict.compared,
        "cut_off": row.verdict.begun,
        "tokens": row.verdict.tokens,
        "other_tokens": row.verdict.others,
        "left": row.left,
        "refused": row.refused,
        "queued": row.run.queued,
        "resumed": row.run.resumed,
        "counts": vars(row.run.counts),
        "steps": row.run.steps,
        "worst": row.verdict.worst,
        "rungs": dict(zip(RUNGS, row.run.rungs, strict=True)),
        "failed": row.failed,
        "differences": [vars(difference) for difference in row.verdict.differences[:100]],
    }
