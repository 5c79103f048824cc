"""One text far past a model's trained context, in memory that stays flat: what it costs in quality.

    python benchmarks/endless.py [--tokens 20000] [--weights f32] [--window 1024] [--sinks 4]
                                 [--results FILE.json] [--plot docs/endless.png]

`pydoc_data.topics` goes in token by token, and every next token is scored (negative log-likelihood, in nats), over

    relative          f32 and int8 rows: sinks right before the window (`cache/relative.py`)
    without sinks     the window alone
    true positions    the same rows as relative, the sinks at their true distance; the model's limit is taken away here
    every row         up to the model's context
    from scratch      at 64 places, evenly: the sinks' tokens and the last window's alone, computed from position 0 on

From scratch is what a cache is measured against, and is not the same thing: there the window's first rows have seen
the sinks alone, while in a stream each row was computed with a window of its own before it. The distances are the same.

With `--results` what is done stands in a file, and an interrupted run goes on where it was. Prints a table, draws a
picture. 20,000 tokens with f32 weights took 46 minutes on two cores, others at work on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch

import kvik
from kvik.bench.drawing import INK, SOFT, WEIGHTS, WITH, WITHOUT, bytes_tick, head, label, titled, write
from kvik.engine.generation import prefill
from kvik.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK, BLOCK = 256, 500  # tokens at once, and of a mean
AFTER, PLACES, GROUP = 16, 64, 8  # tokens that are scored at each place from scratch; places; places of a mean
Found = dict[str, Any]


def nll(logits: torch.Tensor, targets: Sequence[int]) -> list[float]:
    """Of each row's target, in nats."""
    return torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none").tolist()


def stream(model: kvik.Model, kv: str, ids: Sequence[int]) -> Found:
    """A text under a spec: what every next token cost, and what was held after each chunk."""
    costs, held, started = [], [], time.perf_counter()
    with model.cache(kv, shares=False).open() as sequence:
        for at in range(0, len(ids) - 1, CHUNK):
            chunk = ids[at : min(at + CHUNK, len(ids) - 1)]
            costs += nll(model.run([(sequence, chunk)], every=True), ids[at + 1 : at + 1 + len(chunk)])
            sequence.settle()
            held.append(sequence.nbytes.allocated)
            tell(f"{kv}: {at + len(chunk):,} of {len(ids) - 1:,} tokens")
    return {"nll": [round(cost, 4) for cost in costs], "held": held, "seconds": time.perf_counter() - started}


def scratch(model: kvik.Model, ids: Sequence[int], place: int, window: int, sinks: int) -> list[float]:
    """What the next AFTER tokens cost after the sinks and the window that ends at a place, and nothing else."""
    before = [*ids[:sinks], *ids[place - window + 1 : place]]
    with model.cache("f32", shares=False).open() as sequence:
        prefill(model, [sequence], before)
        logits = model.run([(sequence, ids[place : place + AFTER])], every=True)
    return [round(cost, 4) for cost in nll(logits, ids[place + 1 : place + 1 + AFTER])]


def tell(text: str) -> None:
    """One line of progress, over the one before."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def measure(model: kvik.Model, ids: Sequence[int], window: int, sinks: int, done: Found, keep: Path | None) -> None:
    """Measures what is not in `done` yet."""
    config, kept = model.config, f"window:{window},sinks:{sinks}"
    runs = {
        "relative": (f"f32+{kept},relative", ids),
        "relative, int8": (f"int8+{kept},relative", ids),
        "without sinks": (f"f32+window:{window},relative", ids),
        "true positions": (f"f32+{kept}", ids),
        "every row": ("f32", ids[: config.max_positions]),
    }
    for name, (kv, text) in runs.items():
        if name not in done:
            if name == "true positions":
                model.config = dataclasses.replace(config, max_positions=len(ids))
            done[name] = stream(model, kv, text)
            model.config = config
            write_down(done, keep)
    anew = done.setdefault("from scratch", {"places": [], "nll": [], "seconds": 0.0})
    first, last = window + sinks, len(ids) - 1 - AFTER
    for place in [first + i * (last - first) // (PLACES - 1) for i in range(PLACES)][len(anew["places"]) :]:
        started = time.perf_counter()
        anew["nll"].append(scratch(model, ids, place, window, sinks))
        anew["places"].append(place)
        anew["seconds"] += time.perf_counter() - started
        tell(f"from scratch: {len(anew['places'])} of {PLACES} places")
        write_down(done, keep)


def write_down(done: Found, keep: Path | None) -> None:
    """Keeps what is done, whole or not at all."""
    if keep is not None:
        part = keep.with_suffix(".part")
        part.write_text(json.dumps(done))
        part.replace(keep)


def beside(found: Found, anew: Found, first: int, end: int) -> tuple[float, float, int]:
    """Mean difference to the tokens scored from scratch at places from `first` up to `end`, half of its 95 % interval
    over places, and how many places there are."""
    differences = [
        statistics.fmean(found["nll"][place : place + AFTER]) - statistics.fmean(costs)
        for place, costs in zip(anew["places"], anew["nll"], strict=True)
        if first <= place < end and place + AFTER <= len(found["nll"])
    ]
    if len(differences) < 2:
        return math.nan, math.nan, len(differences)
    error = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), error, len(differences)


def show(done: Found, trained: int, tokens: int) -> None:
    """The table."""
    anew = done["from scratch"]
    series = {name: found for name, found in done.items() if name != "from scratch"}
    step = max(tokens // 10 // 100 * 100, 100)
    print(f"\nNats a token, in blocks of {step:,}; the model was trained on {trained:,} positions\n")
    print(f"{'from':>8}" + "".join(f"{name:>16}" for name in series))
    for at in range(0, tokens - 1, step):
        parts = [found["nll"][at : at + step] for found in series.values()]
        whole = len(parts[0])
        print(f"{at:>8,}" + "".join(f"{statistics.fmean(p):>16.3f}" if len(p) == whole else f"{'':>16}" for p in parts))
    places = f"{len(anew['places'])} × {AFTER} tokens"
    print(f"\nMore than from scratch, in nats a token ({places}), and 95 % of it\n")
    print(f"{'':>16}{'up to ' + format(trained, ','):>22}{'from there':>22}{'everywhere':>22}")
    for name, found in series.items():
        cells = []
        for first, end in ((0, trained - AFTER), (trained - AFTER, tokens), (0, tokens)):
            mean, error, count = beside(found, anew, first, end)
            cells.append(f"{mean:+.3f} ± {error:.3f} ({count})" if count > 1 else "")
        print(f"{name:>16}" + "".join(f"{cell:>22}" for cell in cells))
    print(f"\n{'held':>16}{'most':>14}{'at the end':>14}{'tokens/s':>12}")
    for name, found in series.items():
        rate = len(found["nll"]) / found["seconds"]
        print(f"{name:>16}{format_bytes(max(found['held'])):>14}{format_bytes(found['held'][-1]):>14}{rate:>12,.0f}")
    rate = AFTER * len(anew["places"]) / anew["seconds"]
    print(f"{'from scratch':>16}{'':>14}{'':>14}{rate:>12,.1f}   scored")


COLORS = {  # in the order in which they are drawn: the f32 rows lie on the int8 ones, which nearly equal them
    "every row": WEIGHTS, "true positions": "#c28a00", "without sinks": WITHOUT,
    "relative, int8": "#8fc7f2", "relative": WITH,
}  # fmt: skip


def draw(done: Found, path: Path, trained: int, rows: int, what: str) -> None:
    """Nats along the text, how many more than from scratch, and bytes held.

    Args:
        rows: bytes that one token's rows take in f32 where all stay.
    """
    tokens = len(done["relative"]["nll"])

    def panels(figure: Figure) -> None:
        costs, more, held = figure.add_gridspec(
            3, 1, left=0.085, right=0.83, top=0.875, bottom=0.06, hspace=0.42, height_ratios=(3, 2.2, 1.6)
        ).subplots()
        _costs(costs, done)
        _more(more, done)
        _held(held, done, rows)
        for axes in (costs, more, held):
            axes.axvline(trained, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.set_xlim(0, tokens)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        label(costs, trained, costs.get_ylim()[1], f"trained on {trained:,}", INK, dx=4, dy=-6, weight="normal")
        held.set_xlabel("tokens", color=SOFT)
        head(figure, "One text, past the context that the model was trained on", what)

    write(path, (8.0, 7.6), panels)


def _costs(axes: Any, done: Found) -> None:
    for name, color in COLORS.items():
        costs = done[name]["nll"]
        cut = [costs[at : at + BLOCK] for at in range(0, len(costs) - BLOCK // 2, BLOCK)]
        middles = [at * BLOCK + len(block) / 2 for at, block in enumerate(cut)]
        width = 3.4 if name == "relative, int8" else 1.3
        axes.plot(middles, [statistics.fmean(block) for block in cut], color=color, linewidth=width)
        if name == "every row":
            label(axes, middles[-1], statistics.fmean(cut[-1]), name, color, dy=-9, ha="right")
    titled(axes, "What the next token costs", f"nats, means of {BLOCK} tokens")
    low, high = axes.get_ylim()
    ends = {name: statistics.fmean(done[name]["nll"][-BLOCK:]) for name in COLORS if name != "every row"}
    _names(axes, len(done["relative"]["nll"]), ends, (high - low) * 0.075)


def _more(axes: Any, done: Found) -> None:
    """Of groups of places: means, and 95 % of them."""
    anew = done["from scratch"]
    groups = [anew["places"][at : at + GROUP] for at in range(0, len(anew["places"]), GROUP)]
    ends = {}
    for shift, (name, color) in enumerate(COLORS.items()):
        found = [(statistics.fmean(each), *beside(done[name], anew, each[0], each[-1] + 1)) for each in groups]
        whole = [(x + 110 * (2 - shift), mean, error) for x, mean, error, count in found if count == GROUP]
        xs, means, errors = zip(*whole, strict=True)
        axes.errorbar(xs, means, errors, fmt="o", color=color, markersize=3.2, linewidth=1)
        ends[name] = means[-1]
    axes.axhline(0, color=SOFT, linewidth=0.9)
    many = f"{GROUP} places of {AFTER} tokens, and 95 % of it"
    titled(axes, "More than over the sinks and the window computed from scratch", f"nats a token, means of {many}")
    low, high = axes.get_ylim()
    del ends["every row"]
    _names(axes, len(done["relative"]["nll"]), ends, (high - low) * 0.1)


def _held(axes: Any, done: Found, rows: int) -> None:
    tokens = len(done["relative"]["nll"])
    for name, color in COLORS.items():
        held = done[name]["held"]
        ends = [min((i + 1) * CHUNK, len(done[name]["nll"])) for i in range(len(held))]
        axes.plot(ends, held, color=color, linewidth=1.4)
    axes.plot(range(CHUNK, tokens, CHUNK), [at * rows for at in range(CHUNK, tokens, CHUNK)], color=WEIGHTS,
              linestyle=(0, (1, 2)), linewidth=1)  # fmt: skip
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: bytes_tick(value))
    axes.set_ylim(min(done["relative, int8"]["held"][1:]) / 2, 2 * tokens * rows)
    titled(axes, "What is held", "bytes, tables included; dotted: by formula")
    for text, at, name in (
        ("every row", tokens * rows, "every row"), ("f32, window", done["relative"]["held"][-1], "relative"),
        ("int8, window", done["relative, int8"]["held"][-1], "relative, int8"),
    ):  # fmt: skip
        label(axes, tokens, at, text, COLORS[name], dx=5, annotation_clip=False)


def _names(axes: Any, x: float, ends: dict[str, float], apart: float) -> None:
    """Each curve's name beside its end, moved up where it would meet the one below."""
    last = -math.inf
    for name, end in sorted(ends.items(), key=lambda each: each[1]):
        last = max(end, last + apart)
        label(axes, x, last, name, COLORS[name], dx=5, annotation_clip=False)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--weights", default="f32")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--results", type=Path, help="keep what is done in this file, and take from it what is there")
    parser.add_argument("--plot", type=Path, help="draw into this .png or .svg file")
    options = parser.parse_args()
    model = kvik.load("smollm2", weights=options.weights)
    assert model.tokenizer is not None, "SmolLM2 has a tokenizer"
    ids = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))[: options.tokens + 1]
    key = f"{options.weights} {options.tokens} {options.window} {options.sinks} {model.fingerprint[:12]}"
    every = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    done = every if every.get("of") == key else {"of": key}
    measure(model, ids, options.window, options.sinks, done, options.results)
    del done["of"]
    tell("")
    trained = model.config.max_positions
    show(done, trained, len(ids))
    if options.plot is not None:
        rows = model.spec("f32").nbytes(32 * 1024).allocated // (32 * 1024)
        what = (
            f"SmolLM2-135M-Instruct · weights {options.weights} · {options.tokens:,} tokens of Python's topics · "
            f"window {options.window:,}, {options.sinks} sinks"
        )
        draw(done, options.plot, trained, rows, what)


if __name__ == "__main__":
    main()
