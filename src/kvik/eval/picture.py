"""The frontier as a picture: bytes a token against mean KL divergence, a point a spec. Specs that differ only in their
budget are one curve; chance and foresight stand behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvik.bench.drawing import INK, SOFT, WEIGHTS, WITH, WITHOUT, head, write
from kvik.eval.budgets import SEEDS, budget_text, families
from kvik.eval.results import Evaluation, Measured
from kvik.eval.view import amount
from kvik.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CODEC, EVICTION = WITH, WITHOUT  # rows are stored smaller; rows are dropped
CURVES = ("#0a8f6a", "#8a4fbf", "#c2185b", "#a67c00", "#00838f", "#5d4037", "#3f51b5", "#7cb342")
MANY = 5  # legend entries that find room within the axes
Box = tuple[float, float, float, float]
LETTER, LINE, GAP = 4.7, 10.0, 7.0  # points: a letter's width at this size, a line's height, from a dot to its label


@dataclass(frozen=True)
class Curve:
    """Points that look alike.

    Attributes:
        name: as the legend has it.
        points: the smallest budget first, where they are of one family.
        joined: the line that goes through them, if any.
        labels: what each is named by, if at all.
    """

    name: str
    points: tuple[Measured, ...]
    color: str
    mark: str
    joined: Literal["-", "--", ":", ""] = ""
    labels: Literal["spec", "budget", ""] = "spec"


def curves(found: Evaluation) -> list[Curve]:
    """What is drawn, and how: specs with a family of their own, then all others, then what they are held against."""
    usable = [each for each in found.measured if not each.foresees]
    colors = iter(CURVES * (1 + len(usable) // len(CURVES)))
    out = [
        Curve(family.name, tuple(members), next(colors), "D", "-", "budget")
        for family, members in families(usable).items()
        if len(members) > 1
    ]
    alone = [each for each in usable if not any(each in curve.points for curve in out)]
    out.append(Curve("every row stays", tuple(it for it in alone if not it.evicts), CODEC, "o"))
    out.append(Curve("rows are dropped", tuple(it for it in alone if it.evicts), EVICTION, "D"))
    behind = [*found.baselines, *(each for each in found.measured if each.foresees)]
    for members in families(behind).values():
        foresight = members[0].foresees
        what = "chosen by the future: the bound" if foresight else f"chosen by chance: {SEEDS} seeds, least to most"
        if foresight:
            out.append(Curve(what, tuple(members), INK, "*", ":", ""))
        else:
            out.append(Curve(what, tuple(members), WEIGHTS, "X", "--", ""))
    return [curve for curve in out if curve.points]


def draw_frontier(found: Evaluation, path: Path) -> None:
    """Writes one panel, 8 by 5 inches; wider with many curves, whose legend then stands beside it.

    Args:
        found: measured.
        path: ends in .png or .svg.

    Raises:
        OSError: it can't be written.
    """
    drawn = curves(found)
    names = list(dict.fromkeys(curve.name for curve in drawn))
    wide = 8.0 if len(names) < MANY else 8.6 + 0.068 * max(map(len, names))

    def draw(figure: Figure) -> None:
        right = 0.975 if wide == 8.0 else 7.8 / wide
        grid = figure.add_gridspec(1, 1, left=0.76 / wide, right=right, top=0.81, bottom=0.105)
        axes = figure.add_subplot(grid[0])
        _frontier(axes, found, drawn)
        _legend(axes, drawn, beside=wide > 8.0)
        it, where = found.setup, found.environment
        device = where.cpu if where.device == "cpu" else where.device
        head(
            figure, "What a smaller cache costs in quality",
            f"{it.model} · weights {it.weights} · {amount(it)} of {it.text} · {device}",
            "Lower and further left is better. Bars: 95 % of the mean over documents. On the lower edge: exactly 0.",
        )  # fmt: skip

    write(path, (wide, 5.0), draw)


def _frontier(axes: Axes, found: Evaluation, drawn: Sequence[Curve]) -> None:
    every = [each for curve in drawn for each in curve.points]
    floor = _scales(axes, found, every)
    line = [each for each in found.frontier if each.kl > 0]
    axes.plot([each.bytes_a_token for each in line], [each.kl for each in line], color=WEIGHTS, alpha=0.35, zorder=1)
    for curve in drawn:
        _draw(axes, curve, floor)
    _label(axes, list(_labels(drawn, floor)), [(each.bytes_a_token, max(each.kl, floor)) for each in every])


def _draw(axes: Axes, curve: Curve, floor: float) -> None:
    sizes, values = [each.bytes_a_token for each in curve.points], [max(each.kl, floor) for each in curve.points]
    look: dict[str, Any] = {"color": curve.color, "markersize": 8.5 if curve.mark == "*" else 7}
    if curve.joined and len(sizes) > 1:
        axes.plot(sizes, values, curve.joined, color=curve.color, alpha=0.7, linewidth=1.4, zorder=2)
    for each, size, value in zip(curve.points, sizes, values, strict=True):
        between = each.kl_interval if each.spread is None else each.spread
        if each.kl == 0:
            axes.plot(size, value, curve.mark, markerfacecolor="white", zorder=4, clip_on=False, **look)
            continue
        if between is not None and not each.foresees:
            bar: dict[str, Any] = {"color": curve.color, "alpha": 0.55, "linewidth": 2.2, "zorder": 2}
            axes.vlines(size, max(between[0], floor), between[1], **bar)
        axes.plot(size, value, curve.mark, zorder=3, **look)


def _labels(drawn: Sequence[Curve], floor: float) -> Iterator[tuple[float, float, str, str]]:
    """(bytes, KL, text, colour): specs by name; of points with one budget and as many bytes, only the highest."""
    highest: dict[tuple[str, int], tuple[float, float, str, str]] = {}
    for curve in drawn:
        for each in curve.points:
            size, value = each.bytes_a_token, max(each.kl, floor)
            if curve.labels == "spec":
                yield size, value, f"{each.spec}: 0" if each.kl == 0 else each.spec, curve.color
            elif curve.labels == "budget":
                text = budget_text(each.spec)
                place = text, round(20 * math.log(size))
                if place not in highest or highest[place][1] < value:
                    highest[place] = size, value, text, SOFT
    yield from highest.values()


def _scales(axes: Axes, found: Evaluation, every: Sequence[Measured]) -> float:
    """Sets both axes; returns the KL at the lower edge, where what equals full rows is drawn."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    sizes = [each.bytes_a_token for each in every]
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.35, max(sizes) * 1.35)
    ticks = [2.0**power for power in range(4, 40) if min(sizes) / 1.35 <= 2.0**power <= max(sizes) * 1.35]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(round(value), digits=0))
    after = f"bytes a token that were held after {found.setup.prefix:,} tokens, scales and tables included"
    axes.set_xlabel(after, color=SOFT, size=8.5)
    axes.set_ylabel("mean KL divergence from full rows in f32, nats", color=SOFT, size=8.5)
    values = [each.kl for each in every if each.kl > 0] or [1e-3]
    floor = min(values) / 6
    axes.set_yscale("log")
    axes.set_ylim(floor, max(values) * 3.5)
    axes.yaxis.set_major_locator(LogLocator(base=10, numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("e-0", "e-"))
    return floor


def _legend(axes: Axes, drawn: Sequence[Curve], *, beside: bool) -> None:
    from matplotlib.lines import Line2D

    looks = {curve.name: curve for curve in drawn}
    handles = [
        Line2D([], [], color=it.color, marker=it.mark, linestyle=it.joined, alpha=0.9, markersize=6, label=name)
        for name, it in looks.items()
    ]
    handles.append(Line2D([], [], color=WEIGHTS, alpha=0.35, label="no other has fewer bytes and less KL"))
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02)} if beside else {"loc": "upper right"}
    axes.legend(handles=handles, frameon=False, fontsize=8, handletextpad=0.6, **place)


def _label(axes: Axes, points: Sequence[tuple[float, float, str, str]], every: Sequence[tuple[float, float]]) -> None:
    """Each name beside its point, where it covers none of `every` one: right, left, above, below, and further away."""
    from matplotlib.patheffects import withStroke

    inches = axes.figure.dpi / 72
    at = [axes.transData.transform((x, y)) / inches for x, y, *_ in points]
    (left, bottom), (right, top) = (axes.transAxes.transform(corner) / inches for corner in ((0, 0), (1, 1)))
    marks = [axes.transData.transform(point) / inches for point in every]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in marks]
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
