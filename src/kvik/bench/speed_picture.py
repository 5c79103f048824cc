"""The speed as a picture: tokens a second by length, and where a step's time goes beside its floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvik.bench.drawing import INK, WEIGHTS, WITH, described, dots, head, label, titled, write
from kvik.bench.speed import Reached, Speed
from kvik.bench.words import three, time_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REST = "#c9d0d8"


def draw_speed(speed: Speed, path: Path) -> None:
    """Writes two panels, 8 by 4 inches.

    Args:
        speed: measured.
        path: ends in .png or .svg.

    Raises:
        OSError: it can't be written.
    """

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(1, 2, left=0.07, right=0.98, top=0.69, bottom=0.075, wspace=0.18)
        _tokens(figure.add_subplot(grid[0]), speed)
        _steps(figure.add_subplot(grid[1]), speed)
        reads, computes = three(speed.bandwidth.median / 1e9), three(speed.rate.median / 1e9)
        rounds = "One round" if speed.rounds == 1 else f"Medians and ends of {speed.rounds} rounds"
        how = f"{rounds}; floors by {reads} GB/s and {computes} G operations a second, measured in between."
        head(figure, "How fast one more token comes", described(speed), how)

    write(path, (8.0, 4.0), draw)


def _tokens(axes: Axes, speed: Speed) -> None:
    titled(axes, "Tokens a second", "of an answer, by tokens of the prompt")
    places, figures = range(len(speed.lengths)), [each.decode_tokens_per_s for each in speed.lengths]
    axes.vlines(places, [each.least for each in figures], [each.most for each in figures], color=WITH, linewidth=3.5)
    axes.plot(places, [each.median for each in figures], color=WITH, alpha=0.35)
    dots(axes, list(places), [each.median for each in figures], WITH, size=5)
    for place, each in zip(places, figures, strict=True):
        label(axes, place, each.most, three(each.median), WITH, dy=4, ha="center", va="bottom")
    axes.set_ylim(0, max(each.most for each in figures) * 1.2)
    _lengths(axes, speed)


def _steps(axes: Axes, speed: Speed) -> None:
    titled(axes, "Where a step's time goes", "ms a token; the line is the least that this machine allows")
    places = range(len(speed.lengths))
    below = [0.0 for _ in places]
    for text, color, parts in (
        ("products", WEIGHTS, ("products",)),
        ("attention", WITH, ("attention",)),
        ("rest", REST, ("append", "rest")),
    ):
        high = [_milliseconds(each, *parts) for each in speed.lengths]
        axes.bar(places, high, bottom=below, width=0.62, color=color, zorder=2, label=text)
        below = [a + b for a, b in zip(below, high, strict=True)]
    for place, each in zip(places, speed.lengths, strict=True):
        floor = speed.decode_floor(each.context)
        axes.hlines(1e3 * floor.seconds, place - 0.4, place + 0.4, color=INK, linewidth=1.8, zorder=4)
        share = f"{100 * floor.seconds / each.step.median:.0f} %"
        label(axes, place, 1e3 * floor.seconds, share, INK, dy=3, ha="center", va="bottom", size=7.5, zorder=5)
        label(axes, place, below[place], time_text(each.step.median), INK, dy=3, ha="center", va="bottom", size=8)
    axes.set_ylim(0, max(below) * 1.3)
    axes.legend(loc="upper left", frameon=False, ncols=3, fontsize=8, handlelength=1, columnspacing=1.2)
    _lengths(axes, speed)


def _milliseconds(reached: Reached, *parts: str) -> float:
    """A plain step's time, by the shares of a watched one."""
    return 1e3 * reached.step.median * sum(reached.parts.shares[part] for part in parts)


def _lengths(axes: Axes, speed: Speed) -> None:
    axes.grid(axis="x", visible=False)
    axes.set_xticks(range(len(speed.lengths)), [f"{each.context:,}" for each in speed.lengths])
    axes.set_xlim(-0.6, len(speed.lengths) - 0.4)
