"""What one more word moved, as tables for a terminal of 80 columns, a picture, and the sentences that go with both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvik.bench.drawing import FAINT, INK, SOFT, WITH, WITHOUT, head, titled, write
from kvik.trace.context import Moved

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WHAT = "‖after − before‖ / ‖before‖ of the state that leaves each layer, over the earlier tokens"
LABELLED = 32  # tokens that a picture has room to name
_WIDE, _SIDE = 8.0, 0.26  # inches: the picture, and a layer


def render_moved(found: Sequence[Moved], sentence: str, word: str, console: Console) -> None:
    """Prints a table for each model, layers that moved alike in one line, and what it means."""
    console.print(Text.assemble(sentence, (f" + {word}", "bold")))
    console.print(Text(WHAT, "dim"))
    for each in found:
        console.print()
        console.print(Text.assemble((each.model, "bold"), f"  weights {each.weights} · {sides(each)}"))
        console.print(_table(each))
        for line in meaning(each):
            console.print(Text(line))


def _table(found: Moved) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("layer", no_wrap=True)
    for name in ("most", "mean"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("most moved")
    figures = [(part(row.max()), part(row.mean()), _furthest(found, row)) for row in found.moved]
    for alike, group in groupby(range(len(figures)), key=lambda layer: figures[layer]):
        layers = [layer + 1 for layer in group]
        name = str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
        table.add_row(*(Text(text) for text in (name, *alike)))
    return table


def _furthest(found: Moved, row: np.ndarray[tuple[int], np.dtype[np.float64]]) -> str:
    return found.tokens[int(row.argmax())] if row.max() > 0 else "none"


def part(value: float) -> str:
    """A part of one; 0 is exactly 0.

    >>> part(0.0), part(0.5787), part(0.00012)
    ('0', '57.9 %', '0.012 %')
    """
    if value == 0:
        return "0"
    digits = max(1, 1 - math.floor(math.log10(value * 100)))
    return f"{100 * value:.{digits}f} %"


def sides(found: Moved) -> str:
    """Which tokens a token sees."""
    return "every token sees both sides" if found.both_sides else "every token sees those before it"


def meaning(found: Moved) -> Iterator[str]:
    """What the figures say, in sentences."""
    changed = f"{found.changed:,} of {found.numbers:,} numbers of earlier states are others, bit for bit"
    every, word = len(found.tokens + found.added), f"{len(found.added)} row" + "s" * (len(found.added) > 1)
    if found.both_sides:
        yield f"{changed}. All {found.computed} rows had to be computed again: nothing could be kept."
        yield (
            "Each state is about the whole text, which is what a search or a classifier wants. The price: it is valid "
            "for this text alone, so that a text made word by word would be computed anew for each."
        )
        return
    yield (
        f"{changed}. Through the cache the word cost {word}, not {every}: {found.kept_changed:,} of {found.kept:,} "
        f"stored numbers changed, and {found.word_changed:,} of the word's are other than computed anew."
    )
    yield (
        "What was computed stays valid, so it can be cached, which makes generation cheap. The price: no earlier token "
        "ever learns what came behind it; only later ones can put the two together."
    )


def draw_moved(found: Sequence[Moved], sentence: str, word: str, path: Path) -> None:
    """Writes a panel for each model, 8 inches wide: tokens beside one another, layers below, how far each state moved.

    Args:
        path: ends in .png or .svg.

    Raises:
        OSError: it can't be written.
    """
    tall = [max(_SIDE * 4, min(_SIDE * len(each.moved), 2.4)) for each in found]
    labels = 0.6 if any(len(each.tokens) <= LABELLED for each in found) else 0.35
    high = 0.95 + sum(tall) + len(found) * (0.5 + labels)
    most = max((float(each.moved.max()) for each in found), default=0.0) or 1.0

    def draw(figure: Figure) -> None:
        top = high - 0.95
        for each, size in zip(found, tall, strict=True):
            top -= 0.42 + size
            axes = figure.add_axes((0.55 / _WIDE, top / high, 7.25 / _WIDE, size / high))
            _panel(axes, each, most)
            top -= labels + 0.08
        head(
            figure, "What one more word changes", shorten(f"“{sentence}” + “{word}”", 110, placeholder=" …"),
            "Orange: how far the state that leaves a layer moved, of its length. Blue: computed for the first time.",
        )  # fmt: skip

    write(path, (_WIDE, high), draw)


def _panel(axes: Axes, found: Moved, most: float) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    layers, tokens = found.moved.shape
    names = (*found.tokens, *found.added)
    colors = LinearSegmentedColormap.from_list("moved", ["#ffffff", "#f6c3a7", WITHOUT])
    axes.imshow(
        found.moved, cmap=colors, vmin=0, vmax=most, aspect="auto", interpolation="nearest",
        extent=(0, tokens, layers, 0),
    )  # fmt: skip
    axes.axvspan(tokens, len(names), color=WITH, alpha=0.85, linewidth=0)
    axes.set_xlim(0, len(names))
    roomy = len(names) <= LABELLED
    if roomy and layers <= 12:
        for (layer, token), value in np.ndenumerate(found.moved):
            color = "white" if value > 0.7 * most else INK
            text = "0" if value == 0 else "<1 %" if value < 0.005 else f"{100 * value:.0f} %"
            axes.text(token + 0.5, layer + 0.5, text, ha="center", va="center", size=6.5, color=color)
    if not found.changed:
        axes.text(tokens / 2, layers / 2, "0 in every layer, bit for bit", ha="center", va="center", color=SOFT)
    every = 1 if roomy else math.ceil(len(names) / LABELLED)
    shown = range(0, len(names), every)
    texts = [name.strip("␣") or name for name in names]
    if roomy:
        axes.set_xticks([at + 0.5 for at in shown], [texts[at] for at in shown], rotation=35, ha="right", size=7.5)
    else:
        axes.set_xticks([at + 0.5 for at in shown], [str(at) for at in shown])
    step = max(1, math.ceil(layers / 8))
    marks = range(0, layers, step)
    axes.set_yticks([layer + 0.5 for layer in marks], [str(layer + 1) for layer in marks])
    axes.set_ylabel("layer", size=8, color=SOFT)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for at in range(1, len(names)):
        axes.axvline(at, color=FAINT, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_visible(True)
    share = "nothing moved" if not found.changed else f"moved by {part(float(found.moved.max()))} at the most"
    cost = (
        f"all {found.computed} rows computed again"
        if found.both_sides
        else f"{found.computed} of {len(names)} rows computed, the others kept"
    )
    titled(axes, f"{found.model}: {share}", f"{sides(found)}; {cost}")
