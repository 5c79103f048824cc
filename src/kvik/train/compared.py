"""A comparison's results as a table and a picture: means over seeds, and how far apart those are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from kvik.bench.drawing import head, write
from kvik.train.compare import EQUALS, Question, relative

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = {
    "text": "perplexity",
    "masked": "perplexity",
    "digits": "accuracy",
    "moving": "accuracy",
    "share": "perplexity",  # last: it has one size, and the others fill a row of panels
}
COLOURS = {
    "attention": "#0b6fb8", "translution": "#d1480b", "lor": "#b8860b", "bucketed": "#2a8c4a", "convolution": "#7a828c",
}  # fmt: skip
TITLES = {
    "text": "next byte: perplexity, lower is better", "masked": "hidden bytes: perplexity, lower is better",
    "share": "layers that share: perplexity, lower is better", "digits": "digits: accuracy, higher is better",
    "moving": "moving digits where none was learnt: accuracy, higher is better",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One operator in one part of a comparison.

    Attributes:
        part, size, equal, label: see `Question`.
        width: of its network.
        seeds: trainings that are done.
        figures: means over them, by name.
        spread: of the part's metric: the largest value less the smallest.
    """

    part: str
    size: str
    equal: str
    label: str
    width: int
    seeds: int
    figures: dict[str, float]
    spread: float


def gather(asked: Iterable[Question], known: Mapping[str, Mapping[str, Any]], data: str) -> list[Row]:
    """Rows of what is done; questions without any training are left out."""
    found: dict[tuple[str, str, str, str], list[tuple[int, Mapping[str, Any]]]] = {}
    for question in asked:
        result = known.get(question.trial.key(data))
        if result is not None:
            place = question.part, question.size, question.equal, question.label
            found.setdefault(place, []).append((question.trial.width, result))
    rows = []
    for (part, size, equal, label), results in found.items():
        figures = {name: mean(float(each[name]) for _, each in results) for name in results[0][1]}
        values = [float(each[_metric(part, each)]) for _, each in results]
        rows.append(Row(part, size, equal, label, results[0][0], len(results), figures, max(values) - min(values)))
    order = {"small": 0, "shared": 1, "large": 2}
    return sorted(rows, key=lambda row: (list(METRICS).index(row.part), order[row.size], EQUALS.index(row.equal)))


def as_json(rows: Sequence[Row]) -> str:
    """All of it."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def table(rows: Sequence[Row]) -> str:
    """Markdown, a table a part and size."""
    out, last = [], ("", "", "")
    for row in rows:
        if (row.part, row.size, row.equal) != last:
            last = row.part, row.size, row.equal
            columns = _columns(row)
            out += ["", f"**{TITLES[row.part]}** · {row.size} · equal {row.equal}", ""]
            out += [
                "| operator | width | " + " | ".join(columns) + " | seeds |",
                "|---|" + "---:|" * (len(columns) + 2),
            ]
        values = " | ".join(_shown(row, name) for name in _columns(row).values())
        out.append(f"| `{row.label}` | {row.width} | {values} | {row.seeds} |")
    return "\n".join(out[1:])


def summary(rows: Sequence[Row], part: str) -> str:
    """Markdown of one part's metric alone: operators down, sizes and what is equal across, each with its width, and its
    seeds where others have more."""
    mine = [row for row in rows if row.part == part]
    most = max((row.seeds for row in mine), default=0)
    places = list(dict.fromkeys((row.size, row.equal) for row in mine))
    out = ["| operator | " + " | ".join(f"{size}, equal {equal}" for size, equal in places) + " |"]
    out.append("|---|" + "---:|" * len(places))
    for label in dict.fromkeys(row.label for row in mine):
        cells = []
        for place in places:
            found = next((row for row in mine if (row.size, row.equal, row.label) == (*place, label)), None)
            name = None if found is None else _metric(part, found.figures)
            if found is None or name is None:
                cells.append("")
                continue
            fewer = "" if found.seeds == most else f", {found.seeds} seed{'s' * (found.seeds > 1)}"
            cells.append(f"{_shown(found, name)} ({found.width}{fewer})")
        out.append(f"| `{label}` | " + " | ".join(cells) + " |")
    return "\n".join(out)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars of each operator, a panel a part and size, at equal width, parameters and operations."""
    panels = [(part, size) for part in METRICS for size in ("small", "shared", "large")
              if any((row.part, row.size) == (part, size) for row in rows)]  # fmt: skip
    columns = 2
    height = 3.0 * -(-len(panels) // columns) + 0.8

    def paint(figure: Figure) -> None:
        head(
            figure, "Operators side by side",
            "means over seeds, lines from the best seed to the worst; rows of one panel are the same task and budget",
        )  # fmt: skip
        axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False)
        figure.subplots_adjust(
            left=0.15, right=0.98, top=1 - 0.95 / height, bottom=0.35 / height, hspace=0.38, wspace=0.42
        )
        for place, panel in zip(axes.flat, panels, strict=False):
            _panel(place, [row for row in rows if (row.part, row.size) == panel])
        for spare in list(axes.flat)[len(panels) :]:
            spare.set_visible(False)

    write(path, (11, height), paint)


def _panel(axes: Axes, rows: Sequence[Row]) -> None:
    labels = list(dict.fromkeys(row.label for row in rows))
    marks = {"width": ("o", 0.0), "parameters": ("s", 0.22), "operations": ("^", 0.44)}
    for row in rows:
        marker, down = marks[row.equal]
        value = row.figures[_metric(row.part, row.figures)]
        kind = relative(row.label) if row.part != "share" else "attention"
        at = labels.index(row.label) + down
        axes.errorbar(
            value, at, xerr=row.spread / 2, fmt=marker, markersize=5, color=COLOURS[kind],
            alpha=1 if row.equal == "parameters" else 0.6, linewidth=1.2,
        )  # fmt: skip
    axes.set_yticks([number + 0.2 for number in range(len(labels))], labels)
    axes.set_ylim(len(labels) - 0.25, -0.4)
    names = {"width": "● width", "parameters": "■ parameters", "operations": "▲ operations"}
    equal = "  ".join(names[each] for each in EQUALS if any(row.equal == each for row in rows))
    axes.set_title(f"{TITLES[rows[0].part]}\n{rows[0].size} · equal {equal}", fontsize=8.5, loc="left")


def _metric(part: str, figures: Mapping[str, Any]) -> str:
    return "shifted" if part == "moving" else METRICS[part]


def _columns(row: Row) -> dict[str, str]:
    found = {"parameters": "parameters", "GFLOP a step": "operations", "train s": "seconds", "train MB": "held_mb"}
    if row.part in ("digits", "moving"):
        found = {"accuracy": "accuracy", **({"shifted": "shifted"} if row.part == "moving" else {}), **found}
    else:
        found = {"perplexity": "perplexity", **found}
    if row.part in ("text", "share"):
        found |= {"cache B/token": "cache_bytes", "prefill ms": "prefill_ms", "decode ms": "decode_ms"}
    return found


def _shown(row: Row, name: str) -> str:
    value = row.figures[name]
    spread = f" ± {row.spread / 2:.2f}" if name == _metric(row.part, row.figures) and name == "perplexity" else ""
    if name in ("accuracy", "shifted"):
        wide = f" ± {row.spread / 2:.1%}" if name == _metric(row.part, row.figures) else ""
        return f"{value:.1%}{wide}"
    if name == "parameters":
        return f"{value / 1e3:,.0f} k"
    if name == "operations":
        return f"{value / 1e9:.2f}"
    if name in ("prefill_ms", "decode_ms", "perplexity"):
        return f"{value:.2f}{spread}"
    return f"{value:,.0f}"
