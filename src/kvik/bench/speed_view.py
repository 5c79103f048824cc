"""A speed as tables and what follows from them, for a terminal of 80 columns or a file."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvik.bench.speed import Speed
from kvik.bench.view import columns, title
from kvik.bench.words import three, time_text
from kvik.units import format_bytes

APART = 1.25  # rounds that differ by more are those of a busy machine


def render_speed(speed: Speed, console: Console, *, picture: bool = False) -> None:
    """Prints all medians, and what they are held against.

    Args:
        speed: measured.
        console: where to.
        picture: whether one is drawn; if not, the last line says how to get it.
    """
    console.print(title(speed))
    for caption, table in (
        (f"One more token: the mean of {speed.tokens} after each prompt", _decode(speed)),
        ("Where its time goes: of steps that are timed inside, in turn with those above", _parts(speed)),
        ("The prompt, and what memory it takes", _prefill(speed)),
    ):
        console.print()
        console.print(Text(caption, "bold"))
        console.print(table)
    console.print()
    console.print(_facts(speed, picture))


def _decode(speed: Speed) -> Table:
    table = columns("prompt", "tokens/s", "a step", "of floor:\nreading", "\ncomputing")
    for each in speed.lengths:
        reached = speed.decode_floor(each.context).reached(each.step.median)
        figures = three(each.decode_tokens_per_s.median), time_text(each.step.median)
        table.add_row(f"{each.context:,}", *figures, _share(reached["reading"]), _share(reached["computing"]))
    return table


def _parts(speed: Speed) -> Table:
    table = columns("prompt", "products", "their GB/s", "attention", "its GB/s", "appending", "rest")
    for each in speed.lengths:
        shares = each.parts.shares
        table.add_row(
            f"{each.context:,}",
            _share(shares["products"]),
            three(speed.product_rate(each) / 1e9),
            _share(shares["attention"]),
            three(speed.attention_rate(each) / 1e9),
            _share(shares["append"]),
            _share(shares["rest"]),
        )
    return table


def _prefill(speed: Speed) -> Table:
    table = columns(
        "prompt", "tokens/s", "in all", "of floor:\nreading", "\ncomputing", "process,\nat most", "rows,\nby formula"
    )
    for each in speed.lengths:
        reached = speed.prefill_floor(each.context).reached(each.prefill.median)
        table.add_row(
            f"{each.context:,}",
            three(each.prefill_tokens_per_s.median),
            time_text(each.prefill.median),
            _share(reached["reading"]),
            _share(reached["computing"]),
            format_bytes(each.peak),
            format_bytes(speed.held(each.context).allocated),
        )
    return table


def _share(share: float) -> str:
    """
    >>> _share(0.4567), _share(0.0)
    ('46 %', '0 %')
    """
    return f"{100 * share:.0f} %"


def _facts(speed: Speed, picture: bool) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in facts(speed):
        table.add_row(label, text)
    if not picture:
        table.add_row("picture", "--plot speed.png draws it")
    return table


def facts(speed: Speed) -> Iterator[tuple[str, str]]:
    """What the figures are held against, and how they were taken: (about what, in a line or two)."""
    width, rate = speed.bandwidth, speed.rate
    yield (
        "reading",
        (
            f"{three(width.median / 1e9)} GB/s of memory ({three(width.least / 1e9)} to {three(width.most / 1e9)}); "
            f"a step reads {format_bytes(speed.product_bytes)} of weights and the rows that it attends to"
        ),
    )
    yield (
        "computing",
        (
            f"{three(rate.median / 1e9)} G operations a second ({three(rate.least / 1e9)} to {three(rate.most / 1e9)}) "
            "by the layers' products with 512 rows"
        ),
    )
    yield "of floor", "100 % would be as fast as this machine reads, or computes"
    yield "rest", "turning by position, page tables, choosing, calls"
    yield (
        "memory",
        (
            f"{format_bytes(speed.peak_before)} at most before the first prompt: Python, torch, the weights "
            f"({format_bytes(speed.arithmetic.weight_bytes)}) and their loading"
        ),
    )
    for each in speed.lengths:
        if each.context < each.asked:
            yield "prompt", f"{each.context:,} instead of {each.asked:,}: the steps after it need positions too"
    if speed.rounds > 1:
        widest = max(speed.lengths, key=lambda each: each.step.most / each.step.least)
        low, high = widest.decode_tokens_per_s.least, widest.decode_tokens_per_s.most
        busy = "; something else computed meanwhile: measure again" if high > APART * low else ""
        yield "rounds", f"{three(low)} to {three(high)} tokens/s at {widest.context:,} tokens, the widest apart{busy}"
