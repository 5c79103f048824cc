"""What `serve.py` found, as Markdown and as a picture.

Of each contender, a list of figures by name: `first` and `later`, tokens/s of 16 clients over a prefix that is new, and
over one that is known; `new` and `known`, seconds to a single client's first token; `alone`, `beside`, `beside_p99`,
seconds between tokens of four answers, before a long prompt comes and while it does; `newcomer`, seconds to that one's
first token; `clients`, cores that the script itself took meanwhile; `peak_bytes`.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import workers

BEGIN, END = "<!-- benchmarks/serve.py writes from here -->", "<!-- to here -->"
KEYS = {
    "kvik": "kvik's engine", "openvino": "OpenVINO GenAI", "kvik serve": "kvik serve", "llama-server": "llama-server",
    "transformers serve": "transformers serve",
}  # fmt: skip
COLUMNS = (
    ("first", "first round, tokens/s", 1.0, ",.0f"),
    ("later", "later rounds, tokens/s", 1.0, ",.0f"),
    ("new", "first token, new prefix, ms", 1e3, ",.0f"),
    ("known", "known prefix, ms", 1e3, ",.0f"),
    ("alone", "between tokens, ms", 1e3, ",.1f"),
    ("beside", "while a long prompt comes", 1e3, ",.1f"),
    ("beside_p99", "its 99th percentile", 1e3, ",.1f"),
    ("newcomer", "the long prompt's first token, s", 1.0, ",.1f"),
    ("peak_bytes", "MB", 1e-6, ",.0f"),
)  # fmt: skip


def medians(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Key → name → the median; of memory, the most."""
    return {
        entry["key"]: {
            name: max(values) if name == "peak_bytes" else statistics.median(values)
            for name, values in entry["found"].items()
        }
        for entry in found["contenders"]
    }


def table(found: dict[str, Any]) -> str:
    """A line a contender."""
    lines = ["| | " + " | ".join(title for _, title, _, _ in COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for key, of in medians(found).items():
        cells = [format(of[name] * scale, form) for name, _, scale, form in COLUMNS]
        lines.append(f"| {KEYS[key]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def aims(found: dict[str, Any]) -> str:
    """What was aimed at and what was reached; only what both sides of were measured."""
    of = medians(found)
    rows: list[tuple[str, str, tuple[str, str], tuple[str, str], str]] = [
        ("later rounds, engine / OpenVINO", "≥ 1.5, better 2", ("kvik", "later"), ("openvino", "later"), ".2f"),
        ("first round, engine / OpenVINO", "", ("kvik", "first"), ("openvino", "first"), ".2f"),
        ("later rounds, kvik serve / llama-server", "≥ 5", ("kvik serve", "later"), ("llama-server", "later"), ".1f"),
        ("first round, kvik serve / llama-server", "≥ 12", ("kvik serve", "first"), ("llama-server", "first"), ".1f"),
        ("later rounds, kvik serve / transformers serve", "", ("kvik serve", "later"),
         ("transformers serve", "later"), ".1f"),
        ("first round, kvik serve / transformers serve", "", ("kvik serve", "first"),
         ("transformers serve", "first"), ".1f"),
        ("later rounds, kvik serve / engine", "", ("kvik serve", "later"), ("kvik", "later"), ".2f"),
        ("first token, known / new prefix, engine", "≤ 15 %", ("kvik", "known"), ("kvik", "new"), ".1%"),
        ("first token, known / new prefix, kvik serve", "≤ 15 %", ("kvik serve", "known"),
         ("kvik serve", "new"), ".1%"),
        ("first token, known prefix, engine / OpenVINO", "≤ 1", ("kvik", "known"), ("openvino", "known"), ".2f"),
        ("99th percentile / median while a long prompt comes, engine", "≤ 4", ("kvik", "beside_p99"),
         ("kvik", "beside"), ".2f"),
        ("… / median before it comes, engine", "", ("kvik", "beside_p99"), ("kvik", "alone"), ".2f"),
        ("99th percentile / median while a long prompt comes, kvik serve", "≤ 4", ("kvik serve", "beside_p99"),
         ("kvik serve", "beside"), ".2f"),
        ("… / median before it comes, kvik serve", "", ("kvik serve", "beside_p99"), ("kvik serve", "alone"), ".2f"),
    ]  # fmt: skip
    lines = ["| | aim | reached |", "|---|---|---|"]
    for title, aim, (mine, name), (other, against), form in rows:
        if mine in of and other in of:
            ratio = format(of[mine][name] / of[other][against], form).replace("%", " %")
            lines.append(f"| {title} | {aim} | {ratio}{'' if '%' in form else ' ×'} |")
    return "\n".join(lines)


def page(found: dict[str, Any]) -> str:
    """All that stands between the markers."""
    turns = sorted({len(entry["found"]["first"]) for entry in found["contenders"]})
    memory = f"{found['cpu']}, {found['cores']} cores; medians of {' or '.join(map(str, turns))} turns."
    said = [f"- {KEYS[entry['key']]}: `{entry['said']}`" for entry in found["contenders"]]
    return "\n\n".join((memory, table(found), aims(found), "\n".join(said)))


def into(text: str, part: str) -> str:
    """A page with the part between its markers written anew. Raises SystemExit where they are missing."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"the page has no place for the tables; put {BEGIN!r} and {END!r} where they should stand")
    return f"{head}{begin}\n{part}\n{end}{tail}"


def draw(found: dict[str, Any], path: Path) -> None:
    """Tokens a second, seconds to the first token, and between tokens; a group of bars a contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    of = medians(found)
    keys = list(of)[::-1]
    colours = [workers.COLOURS[_family(key)] for key in keys]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained", sharey=True)
    panels = (
        ("Tokens/s of 16 clients", 1.0, "linear", (("first", "new prefix", 0.4), ("later", "known prefix", 1.0))),
        ("First token of one client, ms", 1e3, "log", (("new", "new prefix", 0.4), ("known", "known prefix", 1.0))),
        ("Between tokens of four answers, ms", 1e3, "log", (("alone", "before", 0.4),
         ("beside", "while 4,000 tokens come", 0.7), ("beside_p99", "its 99th percentile", 1.0))),
    )  # fmt: skip
    for axis, (title, scale, kind, bars) in zip(axes, panels, strict=True):
        height = 0.8 / len(bars)
        for at, (name, label, alpha) in enumerate(bars):
            places = [place + 0.4 - height * (at + 0.5) for place in range(len(keys))]
            values = [of[key][name] * scale for key in keys]
            axis.barh(places, values, height * 0.9, color=colours, alpha=alpha)
            for place, value in zip(places, values, strict=True):
                axis.text(value, place, f" {value:,.0f}  {label}", va="center", fontsize=7)
        axis.set_xscale(kind)
        axis.set_xlim(0 if kind == "linear" else 1, axis.get_xlim()[1] * (1.35 if kind == "linear" else 12))
        axis.set_title(title, loc="left", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(keys)), [KEYS[key] for key in keys])
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _family(key: str) -> str:
    return {"llama-server": "llama.cpp"}.get(key, key.split(" ")[0])
