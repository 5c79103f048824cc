"""What the pictures share: colours, type, axes of lengths, dots, and labels beside their curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvik.bench.words import time_text
from kvik.units import format_bytes, format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvik.bench.growth import Growth
    from kvik.bench.speed import Speed

WITH, WITHOUT, WEIGHTS = "#0b6fb8", "#d1480b", "#7a828c"  # one colour means one thing in every panel
INK, SOFT, FAINT = "#1f2328", "#57606a", "#e4e8ec"
STYLE: Any = {
    "font.family": ["DejaVu Sans"], "font.size": 8.5, "text.color": INK,
    "axes.edgecolor": "#aab1ba", "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": FAINT, "grid.linewidth": 0.7,
    "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "xtick.major.size": 3, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "lines.linewidth": 1.7, "lines.solid_capstyle": "round", "svg.hashsalt": "kvik",
}  # fmt: skip


def write(path: Path, inches: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Draws a figure on white and writes it as PNG (200 dots an inch) or SVG. Leaves matplotlib's settings alone."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=inches, dpi=200, facecolor="white")
        draw(figure)
        figure.savefig(path, facecolor="white", metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def head(figure: Figure, title: str, *lines: str) -> None:
    """A figure's title, and lines of small type below it; they take 0.8 inches with two lines."""
    height = figure.get_size_inches()[1]
    figure.text(0.02, 1 - 0.12 / height, title, size=15, weight="bold", va="top")
    for number, line in enumerate(lines):
        figure.text(0.02, 1 - (0.43 + 0.18 * number) / height, line, size=8.5, color=SOFT, va="top")


def described(found: Growth | Speed) -> str:
    """What was measured, and where, in a line."""
    where = found.environment
    device = where.cpu if where.device == "cpu" else where.device
    weights = f"weights {found.weights}, {format_bytes(found.arithmetic.weight_bytes)}"
    return f"{found.model} · {weights} · cache {found.spec} · {device}, {where.threads} threads"


def titled(axes: Axes, finding: str, what: str) -> None:
    """A panel's finding, and below it what is drawn."""
    axes.annotate(
        finding, (0, 1), (0, 17), xycoords="axes fraction", textcoords="offset points", size=9.5, weight="bold"
    )
    axes.annotate(what, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", size=8, color=SOFT)


def label(
    axes: Axes, x: float, y: float, text: str, color: str, *, dx: float = 0, dy: float = 0, **options: Any
) -> None:
    """Text beside a point, `dx` and `dy` points away, on a white halo."""
    from matplotlib.patheffects import withStroke

    settings: dict[str, Any] = {"ha": "left", "va": "center", "weight": "bold", "size": 8.5}
    settings |= {"linespacing": 1.25, "path_effects": [withStroke(linewidth=2.5, foreground="white")]}
    axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", color=color, **settings | options)


def dots(
    axes: Axes, xs: Sequence[float], ys: Sequence[float], color: str, *, hollow: bool = False, size: float = 4.0
) -> None:
    """What was counted or measured."""
    face = "white" if hollow else color
    axes.plot(xs, ys, "o", color=color, markersize=size, markerfacecolor=face, markeredgewidth=1.0, zorder=3)


def lengths_axis(axes: Axes, shortest: float, longest: int) -> None:
    """A logarithmic axis of tokens, a tick every second power of two from the longest down."""
    powers = longest.bit_length() - 1
    ticks = [2**power for power in range(powers, -1, -2 if powers > 5 else -1)]
    axes.set_xscale("log", base=2)
    axes.set_xticks([tick for tick in ticks if tick >= shortest], minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(shortest / 1.25, longest * 1.25)


def decades(axes: Axes, texts: Callable[[float], str]) -> None:
    """Ticks at powers of ten on a logarithmic axis of figures, seven at the most."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: texts(value))


def count_tick(value: float) -> str:
    """`1k`, `10M`.

    >>> count_tick(1e7)
    '10M'
    """
    return format_count(round(value), digits=0) if value >= 1 else ""


def bytes_tick(value: float) -> str:
    """`32 KiB`.

    >>> bytes_tick(32768.0)
    '32 KiB'
    """
    return format_bytes(round(value), digits=0)


def time_tick(value: float) -> str:
    """`10 ms`; whole seconds up to thousands.

    >>> time_tick(0.01), time_tick(100.0), time_tick(0.00001)
    ('10 ms', '100 s', '10 µs')
    """
    if 1 <= value < 100_000:
        return f"{value:,.0f} s"
    return time_text(value).replace(".00", "").replace(".0", "")
