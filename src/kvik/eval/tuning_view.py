"""A tuning as a table and its winner, for a terminal of 80 columns or a file."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from kvik.bench.words import time_text
from kvik.eval.tuning import Candidate, Tuning
from kvik.eval.view import amount, by_spec, lines
from kvik.eval.words import nats, share
from kvik.units import format_bytes


def render_tuning(found: Tuning, console: Console) -> None:
    """Prints every candidate, those on the frontier marked, and the winner.

    Args:
        found: measured.
        console: where to.
    """
    it, where = found.setup, found.environment
    device = where.cpu if where.device == "cpu" else where.device
    console.print(Text.assemble((it.model, "bold"), f"  weights {it.weights} · {amount(it)} of {it.text}"))
    console.print(Text(f"{device}, {where.threads} threads · torch {where.torch}", "dim"))
    console.print()
    peaks = _peaks(found)
    most = ["at\nmost"] if peaks else []
    table = by_spec(f"{found.context:,}\ntokens", *most, "mean\nKL", "99 %\nKL", "same\nlikeliest", "each\nmore", "")
    table.columns[-1].justify = "left"
    winner = found.winner
    for each in found.candidates:
        style = "bold" if each is winner else "dim" if each not in found.frontier else ""
        sizes = [format_bytes(size) for size in (each.size, each.peak)[: 2 if peaks else 1]]
        table.add_row(Text(each.spec), *sizes, *_figures(each), _verdict(found, each), style=style)
    console.print(table)
    console.print()
    console.print(lines(_facts(found)))


def _peaks(found: Tuning) -> bool:
    """Whether a candidate takes more on the way there than once it is there."""
    return any(format_bytes(each.peak) != format_bytes(each.size) for each in found.candidates)


def _figures(each: Candidate) -> list[str]:
    it = each.measured
    if it is None:
        return ["", "", "", ""]
    return [nats(it.kl), nats(it.kl_at(0.99)), share(it.same, 1), time_text(it.step)]


def _verdict(found: Tuning, each: Candidate) -> str:
    if not found.fits(each):
        return "too large"
    if not found.close(each):
        return "too far"
    if each is found.winner:
        return "taken"
    return "" if each in found.frontier else "beaten"


def _facts(found: Tuning) -> Iterator[tuple[str, str]]:
    limits = []
    if found.memory is not None:
        limits.append(f"{format_bytes(found.memory)} for {found.context:,} tokens")
    if found.max_kl is not None:
        limits.append(f"a mean KL of {nats(found.max_kl)}")
    rule = "the lowest KL" if found.memory is not None else "the fewest bytes"
    yield "asked", f"at most {' and '.join(limits)}; of those, {rule}"
    yield "beaten", "another has fewer bytes and less KL"
    if _peaks(found):
        yield "at most", "on the way there, before rows have left; that is what --memory bounds"
    if found.winner is None:
        return
    winner = found.winner
    measured = winner.measured
    assert measured is not None, "a winner was measured"
    between = measured.kl_interval
    apart = "" if between is None else f", 95 % of the mean {nats(between[0])} to {nats(between[1])}"
    yield "taken", f"{winner.spec}: {format_bytes(winner.size)}, mean KL {nats(measured.kl)}{apart}"
