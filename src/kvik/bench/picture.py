"""The curves as pictures: eight panels that keep apart what a cache saves and costs, or one panel of a step's time.

Blue is with a cache, vermilion without, grey the weights. Lines are formulas (counts, bytes) or fitted constants
(times); dots were counted or measured. Constants were fitted to the hollow dots; the filled ones test them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvik.bench.counting import Counts
from kvik.bench.drawing import (
    INK,
    SOFT,
    WEIGHTS,
    WITH,
    WITHOUT,
    bytes_tick,
    count_tick,
    decades,
    described,
    dots,
    head,
    label,
    lengths_axis,
    time_tick,
    titled,
    write,
)
from kvik.bench.fit import whole_text
from kvik.bench.growth import FACTORS, Growth
from kvik.bench.words import three, time_text, times_text
from kvik.plan.work import Work
from kvik.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def curves(growth: Growth, path: Path) -> None:
    """Writes all curves, 8 by 11.6 inches.

    Args:
        growth: measured.
        path: ends in .png or .svg.

    Raises:
        OSError: it can't be written.
    """

    def draw(figure: Figure) -> None:
        panels = (_rows, _pairs, _products, _reads, _step_time, _text_time, _memory, _batches)
        grid = figure.add_gridspec(4, 2, left=0.085, right=0.98, top=0.885, bottom=0.035, hspace=0.48, wspace=0.24)
        for place, panel in enumerate(panels):
            panel(figure.add_subplot(grid[divmod(place, 2)]), growth)
        head(
            figure, "What a KV cache saves, and what it costs", described(growth),
            "Dots are counted or measured. Lines are formulas; for times, with constants fitted to the hollow dots.",
        )  # fmt: skip

    write(path, (8.0, 11.6), draw)


def slope(growth: Growth, path: Path) -> None:
    """Writes the time of one more token against the length of the text, 8 by 4.4 inches.

    Args, Raises: as `curves`.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(figure.add_gridspec(1, 1, left=0.085, right=0.98, top=0.805, bottom=0.125)[0])
        _one_more(axes, growth)
        head(
            figure, "Time of one more token, with a KV cache and without", described(growth),
            "Lines are predictions by constants fitted to the hollow dots; filled dots test them.",
        )  # fmt: skip

    write(path, (8.0, 4.4), draw)


# Counts: lines are formulas, dots were counted.


def _rows(axes: Axes, growth: Growth) -> None:
    titled(axes, "Rows of k and v: n instead of n²/2", "computed for a text of n tokens")
    _counts(axes, growth, lambda work: work.rows, lambda counts, _: counts.rows)


def _pairs(axes: Axes, growth: Growth) -> None:
    saved = "far fewer" if growth.bounded else "n²/2 instead of n³/6"
    titled(axes, f"Query–key pairs: {saved}", "attention's work for a text of n tokens")
    _counts(axes, growth, lambda work: work.pairs, lambda counts, _: counts.pairs)


def _products(axes: Axes, growth: Growth) -> None:
    titled(axes, "Projections, feed-forward: n instead of n²/2", "floating-point operations for a text of n tokens")
    _counts(axes, growth, lambda work: work.products, growth.products)
    equal = growth.arithmetic.equal_work
    if equal is not None:
        text = f"One more token's attention is\nas much from {equal:,} tokens on"
        axes.annotate(text, (0.98, 0.04), xycoords="axes fraction", ha="right", va="bottom", size=8, color=SOFT)


def _counts(axes: Axes, growth: Growth, formula: Callable[[Work], int], counted: Callable[[Counts, int], int]) -> None:
    for cached, side, color in ((False, growth.without, WITHOUT), (True, growth.cached, WITH)):
        axes.plot(growth.lengths, [formula(work) for work in growth.texts(cached=cached)], color=color)
        values = [counted(counts, length) for counts, length in zip(side.texts, growth.lengths, strict=True)]
        dots(axes, growth.lengths, values, color)
        _name(axes, growth.lengths, values, cached=cached)
    decades(axes, count_tick)
    lengths_axis(axes, 1, growth.tokens)


def _name(axes: Axes, lengths: Sequence[int], values: Sequence[float], *, cached: bool, share: float = 0.45) -> None:
    """Writes beside a curve whose it is, above that without a cache and below the other, at a share of the lengths."""
    at = int(share * len(lengths))
    if cached:
        label(axes, lengths[at], values[at], "with a cache", WITH, dx=6, dy=-4, va="top")
    else:
        label(axes, lengths[at], values[at], "without", WITHOUT, dx=-6, dy=3, ha="right", va="bottom")


# Bytes.


def _reach(growth: Growth) -> int:
    """How far the formulas of bytes are drawn: past where cache and weights are equal, if that is anywhere near."""
    equal = growth.arithmetic.equal_bytes
    far = growth.tokens if equal is None or equal > 64 * growth.tokens else max(3 * equal // 2, growth.tokens)
    return 1 << (far - 1).bit_length()


def _reads(axes: Axes, growth: Growth) -> None:
    rows_say = "the rows that stay" if growth.windowed else "the same rows either way"
    titled(axes, f"Bytes read: {rows_say}", "by one more token at length n, as the cache stores rows")
    most, weights = _reach(growth), growth.arithmetic.read_bytes
    lengths = [2**power for power in range(most.bit_length())]
    rows = [growth.arithmetic.step(length).rows_read for length in lengths]
    axes.plot(lengths, [weights] * len(lengths), color=WEIGHTS)
    axes.plot(lengths, rows, color=WITH)
    works = growth.steps(cached=True)
    widths = [work.rows_read / counts.read for work, counts in zip(works, growth.cached.steps, strict=True)]
    for side, color, size in ((growth.without, WITHOUT, 7.0), (growth.cached, WITH, 3.5)):
        read = [counts.read * width for counts, width in zip(side.steps, widths, strict=True)]
        dots(axes, growth.lengths, read, color, hollow=color == WITHOUT, size=size)
        if growth.windowed:
            _name(axes, growth.lengths, read, cached=side is growth.cached)
    label(axes, 1, weights, "weights", WEIGHTS, dy=-4, va="top")
    if not growth.windowed:
        middle, text = len(lengths) // 2, "rows: as many with\na cache as without"
        label(axes, lengths[middle], rows[middle], text, INK, dx=9, dy=-3, va="top")
    _equal(axes, growth.arithmetic.equal_bytes, most, weights, above=True)
    axes.set_yscale("log", base=2)
    highest = max(weights, rows[-1])
    ticks = [2**power for power in range(0, 60, 3)]
    axes.set_ylim(rows[0] / 2, highest * 8)
    axes.set_yticks([tick for tick in ticks if rows[0] / 2 <= tick <= highest * 8])
    axes.yaxis.set_major_formatter(lambda value, _: bytes_tick(value))
    lengths_axis(axes, 1, most)


def _memory(axes: Axes, growth: Growth) -> None:
    most, mib = _reach(growth), 2**20
    each = growth.held(growth.tokens).payload // growth.tokens
    titled(
        axes,
        "What it costs: memory" if growth.bounded else f"What it costs: {each:,} bytes a token",
        "memory that the cache holds at length n, MiB",
    )
    weights = growth.arithmetic.weight_bytes / mib
    top = max(weights, growth.held(most).payload / mib) * 1.2
    lengths = range(0, most + 1, max(most // 128, 1))
    axes.plot(lengths, [weights] * len(lengths), color=WEIGHTS)
    axes.plot(lengths, [growth.held(length).payload / mib for length in lengths], color=WITH)
    dots(axes, growth.lengths, [held.allocated / mib for held in growth.cached.held], WITH)
    label(axes, 0, weights, "all weights", WEIGHTS, dx=2, dy=3, va="bottom")
    last = growth.cached.held[-1].allocated
    text = f"{format_bytes(last)} at {growth.tokens:,}"
    if growth.tokens > most / 2:
        label(axes, growth.tokens, last / mib, text, WITH, dy=5, ha="right", va="bottom")
    else:
        label(axes, growth.tokens, max(last / mib, 0.12 * top), text, WITH, dx=8, dy=-4, va="top")
    _equal(axes, growth.arithmetic.equal_held, most, weights, above=False)
    axes.set_xlim(-most * 0.02, most * 1.02)
    axes.set_ylim(0, top)
    axes.set_xticks([most * part // 4 for part in range(5)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _equal(axes: Axes, length: int | None, most: int, height: float, *, above: bool) -> None:
    """Marks the length at which the cache's bytes are the weights'."""
    if length is not None and length <= most:
        axes.plot([length], [height], "o", color=INK, markersize=4.5, zorder=4)
        place = {"ha": "right", "va": "bottom"} if above else {"ha": "left", "va": "top"}
        dx, dy = (-4, 6) if above else (5, -6)
        label(axes, length, height, f"equal at\n{length:,} tokens", INK, dx=dx, dy=dy, weight="normal", **place)


# Times: lines are fitted constants, hollow dots what they were fitted to, filled dots what tests them.


def _step_time(axes: Axes, growth: Growth) -> None:
    faster = times_text(growth.step_gain[-1])
    titled(
        axes,
        f"One more token: {faster} faster at {growth.tokens:,}",
        "time of a step at whose end the text has n tokens",
    )
    _times(axes, growth, growth.cached.medians, growth.without.medians)


def _text_time(axes: Axes, growth: Growth) -> None:
    faster = times_text(growth.text_gain[-1])
    titled(axes, f"The whole text: {faster} faster at {growth.tokens:,}", "time of all n steps, added up")
    _times(axes, growth, growth.cached_text, growth.without_text, partial(whole_text, growth.lengths))


def _times(
    axes: Axes,
    growth: Growth,
    cached: Sequence[float],
    without: Sequence[float],
    drawn: Callable[[Sequence[float]], Sequence[float]] = tuple,
    named: float = 0.45,
) -> None:
    tested = growth.cached_model.tested
    first = growth.lengths[tested.index(True)]
    edge = math.sqrt(first * growth.lengths[max(tested.index(True) - 1, 0)])
    axes.axvspan(edge, growth.tokens * 2, color="#f2f4f7", zorder=0, linewidth=0)
    axes.annotate("predicted", (0.995, 0.02), xycoords="axes fraction", ha="right", size=8, color=SOFT)
    for seconds, model, color in ((without, growth.without_model, WITHOUT), (cached, growth.cached_model, WITH)):
        axes.plot(growth.lengths, drawn(model.predicted), color=color)
        for hollow in (True, False):
            chosen = [i for i, each in enumerate(tested) if each != hollow]
            at, took = [growth.lengths[i] for i in chosen], [seconds[i] for i in chosen]
            dots(axes, at, took, color, hollow=hollow, size=4.5)
        _name(axes, growth.lengths, seconds, cached=color == WITH, share=named)
    decades(axes, time_tick)
    axes.set_ylim(min(cached) / 4, max(without) * 2)
    lengths_axis(axes, 1, growth.tokens)


def _one_more(axes: Axes, growth: Growth) -> None:
    """The larger panel: with the lengths at which a cache is 2 and 4 times faster, and how a step grows."""
    _times(axes, growth, growth.cached.medians, growth.without.medians, named=0.55)
    for factor in FACTORS:
        length = growth.step_reaches(factor)
        if length is not None and 1 < length < growth.tokens / 4:
            high = _gap(axes, growth, length)
            text = f"{factor}× from {math.ceil(length):,} tokens"
            label(axes, length, high, text, INK, dx=6, dy=5, ha="right", va="bottom")
    _gap(axes, growth, growth.tokens)
    high, low = growth.without.medians[-1], growth.cached.medians[-1]
    lowest = min(*growth.cached.medians[-3:], *growth.cached_model.predicted[-3:])
    label(axes, growth.tokens, high, time_text(high), WITHOUT, dx=4, dy=5, ha="right", va="bottom")
    label(axes, growth.tokens, lowest, time_text(low), WITH, dx=4, dy=-6, ha="right", va="top")
    middle = math.sqrt(growth.cached.medians[-1] * growth.without.medians[-1])
    label(axes, growth.tokens, middle, times_text(growth.step_gain[-1]), INK, dx=-5, ha="right", size=11)
    constant = growth.cached_model.constant
    if constant["row"] > 0:
        more = time_text(1000 * constant["row"])
        text = f"A step is not constant with a cache: + {more} for each 1,000 rows that it reads"
        axes.annotate(text, (0.012, 0.035), xycoords="axes fraction", size=8.5, color=WITH)
    axes.set_xlabel("tokens of context", size=8.5, color=SOFT, labelpad=3)


def _gap(axes: Axes, growth: Growth, length: float) -> float:
    """An arrow from the time with a cache up to that without, at one length; returns the latter, seconds."""
    low, high = (float(np.interp(length, growth.lengths, side.medians)) for side in (growth.cached, growth.without))
    arrow = {"arrowstyle": "<->", "color": INK, "linewidth": 0.9, "shrinkA": 4, "shrinkB": 4}
    axes.annotate("", (length, high), (length, low), arrowprops=arrow)
    return high


# Batches.


def _batches(axes: Axes, growth: Growth) -> None:
    speeds = [(b.sequences / b.without.median, b.sequences / b.cached.median) for b in growth.batches]
    titled(
        axes,
        "A batch reads the weights once for all",
        f"tokens/s by number of sequences, {growth.context:,} tokens each",
    )
    for shift, side, color in ((-0.2, 0, WITHOUT), (0.2, 1, WITH)):
        places = [index + shift for index in range(len(speeds))]
        axes.bar(places, [each[side] for each in speeds], width=0.36, color=color, zorder=2)
        for place, each in zip(places, speeds, strict=True):
            label(axes, place, each[side], three(each[side]), color, dy=2, ha="center", va="bottom", size=8)
    for left, text, color in ((0.015, "with a cache", WITH), (0.3, "without", WITHOUT)):
        axes.annotate(text, (left, 0.92), xycoords="axes fraction", color=color, weight="bold")
    axes.grid(axis="x", visible=False)
    axes.set_xticks(range(len(speeds)), [f"{batch.sequences:,}" for batch in growth.batches])
    axes.set_ylim(0, max(each[1] for each in speeds) * 1.25)
