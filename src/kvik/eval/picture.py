"""The frontier as a picture: bytes a token against mean KL divergence, a point a spec."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.bench.drawing import SOFT, WEIGHTS, WITH, WITHOUT, head, write
from kvik.eval.results import Evaluation, Measured
from kvik.eval.view import amount
from kvik.eval.words import brief
from kvik.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CODEC, EVICTION = WITH, WITHOUT  # rows are stored smaller; rows are dropped
Box = tuple[float, float, float, float]
LETTER, LINE, GAP = 4.7, 10.0, 7.0  # points: a letter's width at this size, a line's height, from a dot to its label


def draw_frontier(found: Evaluation, path: Path) -> None:
    """Writes one panel, 8 by 5 inches.

    Args:
        found: measured.
        path: ends in .png or .svg.

    Raises:
        OSError: it can't be written.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(figure.add_gridspec(1, 1, left=0.095, right=0.975, top=0.81, bottom=0.105)[0])
        _frontier(axes, found)
        it, where = found.setup, found.environment
        device = where.cpu if where.device == "cpu" else where.device
        head(
            figure, "What a smaller cache costs in quality",
            f"{it.model} · weights {it.weights} · {amount(it)} of {it.text} · {device}",
            "Lower and further left is better. Bars: 95 % of the mean over documents. On the lower edge: exactly 0.",
        )  # fmt: skip

    write(path, (8.0, 5.0), draw)


def _frontier(axes: Axes, found: Evaluation) -> None:
    different = [each for each in found.measured if each.kl > 0]
    equal = [each for each in found.measured if each.kl == 0]
    floor = _scales(axes, found, different)
    line = [each for each in found.frontier if each.kl > 0]
    axes.plot([each.bytes_a_token for each in line], [each.kl for each in line], color=WEIGHTS, alpha=0.45, zorder=1)
    for each in different:
        color = _color(each)
        if each.kl_interval is not None:
            low, high = each.kl_interval
            axes.vlines(each.bytes_a_token, max(low, floor), high, color=color, alpha=0.55, linewidth=2.2, zorder=2)
        axes.plot(each.bytes_a_token, each.kl, _mark(each), color=color, markersize=7, zorder=3)
    for each in equal:
        axes.plot(each.bytes_a_token, floor, _mark(each), color=_color(each), markerfacecolor="white", markersize=7,
                  zorder=4, clip_on=False)  # fmt: skip
    points = [(each, max(each.kl, floor)) for each in (*different, *equal)]
    _label(axes, [(each.bytes_a_token, kl, _name(each), _color(each)) for each, kl in points])
    _legend(axes, found)


def _scales(axes: Axes, found: Evaluation, different: Sequence[Measured]) -> float:
    """Sets both axes; returns the KL at the lower edge, where what equals full rows is drawn."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    sizes = [each.bytes_a_token for each in found.measured]
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.35, max(sizes) * 1.35)
    ticks = [2.0**power for power in range(4, 40) if min(sizes) / 1.35 <= 2.0**power <= max(sizes) * 1.35]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(round(value), digits=0))
    after = f"bytes a token that were held after {found.setup.prefix:,} tokens, scales and tables included"
    axes.set_xlabel(after, color=SOFT, size=8.5)
    axes.set_ylabel("mean KL divergence from full rows in f32, nats", color=SOFT, size=8.5)
    values = [each.kl for each in different] or [1e-3]
    floor = min(values) / 6
    axes.set_yscale("log")
    axes.set_ylim(floor, max(values) * 3.5)
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("e-0", "e-"))
    return floor


def _color(each: Measured) -> str:
    return EVICTION if each.evicts else CODEC


def _mark(each: Measured) -> str:
    return "D" if each.evicts else "o"


def _name(each: Measured) -> str:
    return f"{brief(each.spec)}: 0" if each.kl == 0 else brief(each.spec)


def _legend(axes: Axes, found: Evaluation) -> None:
    from matplotlib.lines import Line2D

    kinds = [("o", CODEC, "every row stays")]
    if any(each.evicts for each in found.measured):
        kinds.append(("D", EVICTION, "rows are dropped"))
    handles = [Line2D([], [], color=color, marker=mark, linestyle="", label=text) for mark, color, text in kinds]
    handles.append(Line2D([], [], color=WEIGHTS, alpha=0.45, label="no other has fewer bytes and less KL"))
    axes.legend(handles=handles, loc="upper right", frameon=False, fontsize=8, handletextpad=0.6)


def _label(axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Each point's name beside it, where it covers no other: right, left, above, below, and further away."""
    from matplotlib.patheffects import withStroke

    inches = axes.figure.dpi / 72
    at = [axes.transData.transform((x, y)) / inches for x, y, *_ in points]
    (left, bottom), (right, top) = (axes.transAxes.transform(corner) / inches for corner in ((0, 0), (1, 1)))
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
    for (x, y), point in sorted(zip(at, points, strict=True), key=lambda each: -each[0][1]):
        box = _free(x, y, len(point[2]) * LETTER, taken, (left, bottom, right, top))
        taken.append(box)
        axes.annotate(
            point[2], point[:2], ((box[0] - x), (box[1] + box[3]) / 2 - y), textcoords="offset points", size=8.5,
            color=point[3], weight="bold", va="center", ha="left", zorder=5, annotation_clip=False,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip


def _free(x: float, y: float, width: float, taken: Sequence[Box], within: Box) -> Box:
    """The first place for a label that touches nothing; the first of all where there is none. In points."""
    boxes = []
    for away in range(6):
        for side in (1, -1):
            start = x + GAP if side > 0 else x - GAP - width
            for up in {0: (0.0,)}.get(away, (away * LINE * 0.7, -away * LINE * 0.7)):
                boxes.append((start, y + up - LINE / 2, start + width, y + up + LINE / 2))
        for up in (GAP + LINE / 2 + away * LINE, -GAP - LINE / 2 - away * LINE):
            boxes.append((x - width / 2, y + up - LINE / 2, x + width / 2, y + up + LINE / 2))
    return next((box for box in boxes if _inside(box, within) and not any(_touch(box, it) for it in taken)), boxes[0])


def _inside(box: Box, within: Box) -> bool:
    return within[0] <= box[0] and within[1] <= box[1] and box[2] <= within[2] and box[3] <= within[3]


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
