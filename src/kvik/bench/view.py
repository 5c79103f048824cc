"""A measurement as tables and verdicts, for a terminal of 80 columns or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvik.bench.growth import FACTORS, Growth
from kvik.bench.speed import Speed
from kvik.bench.words import percent, reached_text, three, time_text, times_text
from kvik.units import format_bytes, format_count


def render(growth: Growth, console: Console, *, pictures: bool = False) -> None:
    """Prints all figures at each doubling of the length, and what follows from them.

    Args:
        growth: measured.
        console: where to.
        pictures: whether they are drawn; if not, the last line says how to get them.
    """
    console.print(title(growth))
    for caption, table in (
        ("What a text computes, one token a step (counted)", _work(growth)),
        (f"Time of one more token, and what was predicted from {growth.tokens // 2:,} tokens and less", _steps(growth)),
        ("Time of the whole text: its steps' measured times, added up", _texts(growth)),
        ("Bytes that one more token reads, and that the cache holds", _bytes(growth)),
        (f"Time of one more token for each sequence of a batch, {growth.context:,} tokens each", _batches(growth)),
    ):
        console.print()
        console.print(Text(caption, "bold"))
        console.print(table)
    console.print()
    console.print(_verdicts(growth, pictures))


def title(found: Growth | Speed) -> Text:
    """What was measured, and where, in two lines."""
    where, weights = found.environment, format_bytes(found.arithmetic.weight_bytes)
    device = where.cpu if where.device == "cpu" else where.device
    rounds = "one round" if found.rounds == 1 else f"medians of {found.rounds} rounds"
    return Text.assemble(
        (found.model, "bold"), f"  cache {found.spec} · weights {found.weights}, {weights}\n",
        (f"{device}, {where.threads} threads · torch {where.torch} · {rounds}", "dim"),
    )  # fmt: skip


def _shown(growth: Growth) -> list[int]:
    """Which lengths are printed: the longest, its half, and so on down to 16 or so; eight at the most."""
    halves = {round(growth.tokens / 2**power) for power in range(8)}
    return [i for i, length in enumerate(growth.lengths) if length in halves and (length >= 12 or growth.tokens < 64)]


def columns(*heads: str) -> Table:
    """A table of figures, empty."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 1), show_edge=False)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _work(growth: Growth) -> Table:
    table = columns(
        "tokens", "rows of k, v\nwithout", "\nwith", "pairs q·k\nwithout", "\nwith", "products\nwithout", "\nwith"
    )
    for i in _shown(growth):
        length, (a, b) = growth.lengths[i], (growth.without.texts[i], growth.cached.texts[i])
        figures = [a.rows, b.rows, a.pairs, b.pairs, growth.products(a, length), growth.products(b, length)]
        table.add_row(f"{length:,}", *map(format_count, figures))
    return table


def _steps(growth: Growth) -> Table:
    table = columns("tokens", "without", "predicted", "with a cache", "predicted", "faster")
    without, cached = growth.without_model, growth.cached_model
    for i in _shown(growth):
        table.add_row(
            f"{growth.lengths[i]:,}",
            time_text(growth.without.medians[i]),
            _predicted(without.predicted[i], without.tested[i]),
            time_text(growth.cached.medians[i]),
            _predicted(cached.predicted[i], cached.tested[i]),
            times_text(growth.step_gain[i]),
        )
    return table


def _predicted(seconds: float, tested: bool) -> Text:
    return Text(time_text(seconds), "" if tested else "dim")


def _texts(growth: Growth) -> Table:
    table = columns("tokens", "without", "with a cache", "faster")
    for i in _shown(growth):
        table.add_row(
            f"{growth.lengths[i]:,}",
            time_text(growth.without_text[i]),
            time_text(growth.cached_text[i]),
            times_text(growth.text_gain[i]),
        )
    return table


def _bytes(growth: Growth) -> Table:
    rows = ("rows read\nwithout", "\nwith") if growth.windowed else ("rows read\neither way",)
    table = columns("tokens", *rows, "their bytes\nin the cache", "weights\nread", "cache\npayload", "\n+ overhead")
    steps = growth.steps(cached=True)
    for i in _shown(growth):
        read = (growth.without.steps[i].read, growth.cached.steps[i].read)[-len(rows) :]
        held = growth.cached.held[i]
        sizes = (steps[i].rows_read, steps[i].weights_read, held.payload, held.overhead)
        table.add_row(f"{growth.lengths[i]:,}", *(f"{each:,}" for each in read), *map(format_bytes, sizes))
    return table


def _batches(growth: Growth) -> Table:
    table = columns(
        "batch", "without", "\ntokens/s", "with\na cache", "\ntokens/s", "\nfaster", "weights\na token", "cache"
    )
    for batch in growth.batches:
        without, cached = batch.without.median, batch.cached.median
        table.add_row(
            f"{batch.sequences:,}",
            time_text(without),
            three(batch.sequences / without),
            time_text(cached),
            three(batch.sequences / cached),
            times_text(without / cached),
            format_bytes(growth.arithmetic.read_bytes // batch.sequences),
            format_bytes(batch.held.allocated),
        )
    return table


def _verdicts(growth: Growth, pictures: bool) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in verdicts(growth):
        table.add_row(label, text)
    if not pictures:
        table.add_row("pictures", "--plot curves.png draws all curves, --plot-step step.png one")
    return table


def verdicts(growth: Growth) -> Iterable[tuple[str, str]]:
    """What follows from the figures: (about what, in a line or two)."""
    tokens = f"{growth.tokens:,}"
    if growth.chooses:
        which = f"as it ends, {' and '.join(growth.chooses)} chooses which rows stay"
        yield "prompt", f"the first {growth.arithmetic.prompt:,} tokens; {which}"
    yield "one token", _faster(growth, growth.step_reaches, growth.step_gain[-1])
    yield "whole text", _faster(growth, growth.text_reaches, growth.text_gain[-1])
    yield "a step", step_verdict(growth)
    yield "attention", _equal(growth.arithmetic.equal_work, "as much work as one more token's products")
    yield "cache", _equal(growth.arithmetic.equal_bytes, "as many bytes to read as the weights")
    held = format_bytes(growth.without.held[-1].allocated)
    yield "no cache", f"keeps nothing, but holds {held} during its step of {tokens} tokens"
    errors = (
        f"{percent(growth.cached_model.errors[-1])} with a cache, {percent(growth.without_model.errors[-1])} without"
    )
    yield "prediction", f"off by {errors}, at {tokens} tokens"
    yield "counts", _counted(growth)


def _faster(growth: Growth, reaches: Callable[[float], float | None], last: float) -> str:
    parts = [f"{factor}× {reached_text(reaches(factor), growth.tokens)}" for factor in FACTORS]
    return f"faster: {', '.join(parts)}; {times_text(last)} at {growth.tokens:,}"


def step_verdict(growth: Growth) -> str:
    """How a step with a cache grows."""
    constant = growth.cached_model.constant
    base, more = time_text(constant["step"]), time_text(1000 * constant["row"])
    if constant["row"] == 0:
        return f"{base} with a cache; up to {growth.tokens // 2:,} tokens no cost of rows shows"
    return f"grows with a cache too: {base} + {more} for 1,000 rows"


def _equal(length: int | None, what: str) -> str:
    return f"at no length {what}" if length is None else f"from {length:,} tokens on {what}"


def _counted(growth: Growth) -> str:
    different = list(growth.differences())
    if not different:
        return f"rows and pairs equal their formulas at all {len(growth.lengths)} lengths"
    return f"differs from the formulas: {different[0]}"
