"""Grids as pictures: which rows of a text stayed, which hidden keys were found again, which heads look far back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvik.bench.drawing import INK, SOFT, WITH, head, write
from kvik.eval.heads import Heads
from kvik.eval.needles import DEPTHS, KINDS, Answer, Kind
from kvik.eval.results import Evaluation, Kept, Measured
from kvik.eval.words import brief, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELD, GONE = "#0b6fb8", "#f1e7e1"
KINDS_TEXT: dict[Kind, str] = {"passkey": "one key in the text", "keys": "one of five keys"}


def mapped(found: Evaluation) -> list[Measured]:
    """Specs that dropped rows, and whose map is known."""
    return [each for each in found.measured if each.evicts and each.documents[0].kept is not None]


def draw_map(found: Evaluation, path: Path) -> None:
    """Writes a panel for each spec that dropped rows: what each lane held of the first document, 8 inches wide.

    Args:
        found: measured; at least one spec dropped rows.
        path: ends in .png or .svg.

    Raises:
        OSError: it can't be written.
    """
    specs = mapped(found)
    assert specs, "a map needs a spec that drops rows"
    high = 0.95 + 1.75 * len(specs)

    def draw(figure: Figure) -> None:
        top, bottom = 1 - 0.95 / high, 0.42 / high
        grid = figure.add_gridspec(
            len(specs), 2, left=0.075, right=0.975, top=top, bottom=bottom, hspace=0.42, wspace=0.06,
            width_ratios=(8, 1),
        )  # fmt: skip
        for place, each in enumerate(specs):
            kept = each.documents[0].kept
            assert kept is not None, "mapped gives those that have one"
            axes, beside = figure.add_subplot(grid[place, 0]), figure.add_subplot(grid[place, 1])
            _map(axes, each, kept, last=place == len(specs) - 1)
            _shares(beside, kept)
        head(
            figure, "Which rows stayed", f"{found.setup.model} · the first {found.setup.prefix:,} tokens of a document",
            "Blue is held, pale was dropped. Every line is a KV head, layer 0 on top; right: share held, by layer.",
        )  # fmt: skip

    write(path, (8.0, high), draw)


def _map(axes: Axes, each: Measured, kept: Kept, *, last: bool) -> None:
    from matplotlib.colors import ListedColormap

    rows = kept.rows
    colors = ListedColormap([GONE, HELD])
    axes.imshow(
        rows, cmap=colors, vmin=0, vmax=1, aspect="auto", interpolation="nearest",
        extent=(0, kept.tokens, len(rows), 0),
    )  # fmt: skip
    _name(axes, each.label, f"held {share(float(rows.mean()))} of the rows")
    edges = np.cumsum((0, *kept.heads))
    every = max(1, math.ceil(len(kept.heads) / 6))
    layers = range(0, len(kept.heads), every)
    axes.set_yticks([(edges[layer] + edges[layer + 1]) / 2 for layer in layers], [str(layer) for layer in layers])
    axes.set_ylabel("layer", size=8, color=SOFT)
    axes.grid(visible=False)
    if last:
        axes.set_xlabel("position", size=8, color=SOFT)


def _shares(axes: Axes, kept: Kept) -> None:
    """The share of rows that each layer held."""
    rows, edges = kept.rows, np.cumsum((0, *kept.heads))
    shares = [float(rows[start:stop].mean()) for start, stop in pairwise(edges)]
    axes.barh(np.arange(len(shares)) + 0.5, shares, height=1.0, color=HELD, alpha=0.6, linewidth=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(shares), 0)
    axes.set_xticks([0, 1], ["0", "1"])
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)


def draw_needles(found: Evaluation, path: Path) -> None:
    """Writes two panels for each spec, one a kind of question: depth against length, 8 inches wide.

    Args, Raises: as `draw_map`; keys were asked for.
    """
    needles = found.needles
    assert needles is not None, "keys were asked for"
    count = len(needles.specs)
    high = 1.6 + 1.28 * count

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(
            count, 2, left=0.075, right=0.985, top=1 - 1.32 / high, bottom=0.42 / high, hspace=0.32, wspace=0.12
        )
        for line, (spec, answers) in enumerate(zip(needles.specs, needles.answers, strict=True)):
            for column, kind in enumerate(KINDS):
                axes = figure.add_subplot(grid[line, column])
                mine = [each for each in answers if each.kind == kind]
                _grid(axes, mine, lengths=line == count - 1)
                right = sum(each.right for each in mine)
                _name(axes, "" if column else spec, f"{right} of {len(mine)}")
                if line == 0:
                    settings: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
                    axes.annotate(KINDS_TEXT[kind], (0.5, 1), (0, 17), size=9.5, ha="center", **settings)
        figure.supylabel("depth of the key in the text: 0 is its beginning", size=8, color=SOFT, x=0.012)
        figure.supxlabel("tokens of the text", size=8, color=SOFT, y=0.1 / high)
        head(
            figure, "Which hidden keys are found again", f"{found.setup.model} · weights {found.setup.weights}",
            "A key of five digits is asked for once the text is in. ✓: all five are the likeliest. Figures and colour: "
            "probability a digit.",
        )  # fmt: skip

    write(path, (8.0, high), draw)


def _grid(axes: Axes, answers: Sequence[Answer], *, lengths: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    columns = sorted({each.length for each in answers})
    chances = np.full((len(DEPTHS), len(columns)), np.nan)
    for each in answers:
        place = DEPTHS.index(each.depth), columns.index(each.length)
        chances[place] = math.exp(each.log_probability)
        text = f"{'✓ ' if each.right else ''}{100 * chances[place]:.0f} %"
        color = "white" if chances[place] > 0.75 else INK if each.right else SOFT
        axes.text(*place[::-1], text, ha="center", va="center", color=color, size=7.5)
    colors = LinearSegmentedColormap.from_list("found", ["#fbf3ee", "#bcd8ec", WITH])
    axes.imshow(chances, cmap=colors, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), [f"{each:,}" for each in columns] if lengths else [])
    axes.set_yticks(range(len(DEPTHS)), [f"{depth:g}" for depth in DEPTHS])
    axes.grid(visible=False)
    axes.tick_params(length=0)


def draw_heads(found: Heads, path: Path) -> None:
    """Writes one panel, layers beside one another and their heads below: how far each looks, a dot on those that keep
    every row; 8 inches wide.

    Args:
        found: measured.
        path: ends in .png or .svg.

    Raises:
        OSError: it can't be written.
    """
    layers, most = len(found.scores), max(map(len, found.scores))
    side = min(6.75 / layers, 0.3)  # inches
    wide, tall = side * layers, side * most
    high = 1.5 + max(tall, 0.6)  # the bar of colours needs some

    def draw(figure: Figure) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        axes = figure.add_axes((0.5 / 8, 1 - (0.95 + tall) / high, wide / 8, tall / high))
        scores = np.full((most, layers), np.nan)
        for layer, lane in found.lanes:
            scores[lane, layer] = found.scores[layer][lane]
        colors = LinearSegmentedColormap.from_list("far", [GONE, "#bcd8ec", HELD])
        image = axes.imshow(scores, cmap=colors, aspect="auto", interpolation="nearest")
        dots = sorted(found.far)
        axes.plot([at for at, _ in dots], [at for _, at in dots], "o", color=INK, markersize=min(3.0, 20 * side))
        for axis, count, name in ((axes.xaxis, layers, "layer"), (axes.yaxis, most, "KV head")):
            axis.set_ticks(range(0, count, max(1, math.ceil(count / 16))))
            axis.set_label_text(name, size=8, color=SOFT)
        axes.grid(visible=False)
        bar = max(tall, 0.6)
        beside = figure.add_axes(((0.58 + wide) / 8, 1 - (0.95 + bar) / high, 0.1 / 8, bar / high))
        figure.colorbar(image, cax=beside, ticks=[np.nanmin(scores), np.nanmax(scores)])
        beside.yaxis.set_major_formatter(lambda value, _: f"{value:.2f}")
        head(
            figure, "Which heads look far back",
            f"{found.model} · weights {found.weights} · {found.tokens:,} tokens of {found.text}",
            f"Colour: how far a KV head looks. Dots: the {len(found.far)} of {len(found.lanes)} that keep every row.",
        )  # fmt: skip

    write(path, (8.0, high), draw)


def _name(axes: Axes, spec: str, what: str) -> None:
    """Above a panel: its spec, and a figure in small type."""
    settings: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(brief(spec), (0, 1), (0, 4), size=8 if len(brief(spec)) < 40 else 6.5, weight="bold", **settings)
    axes.annotate(what, (1, 1), (0, 4), size=7.5, color=SOFT, ha="right", **settings)
