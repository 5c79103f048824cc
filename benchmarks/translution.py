"""What operators cost in decoding and in training, and a long series: docs/translution.json and its pictures.

    python benchmarks/translution.py --json docs/translution.json --decode docs/operators.png \\
        --series docs/series.png --drawing docs/translution.png

Rounds of all operators follow one another, and the machine's rate of reading is measured in the same rounds: what is
drawn is each one's fastest round. One thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from kvik.bench.drawing import SOFT, head, write
from kvik.cache.cache import Cache
from kvik.cache.spec import Spec
from kvik.models.operators import Cost, Form, geometry, make
from kvik.train import series, tasks
from kvik.train.compared import COLOURS
from kvik.train.loop import Loop, Schedule
from kvik.train.pictures import digits
from kvik.train.trials import saved_bytes

WIDTH, HEADS = 192, 3  # the public code's smallest network: tiny
LENGTHS = (32, 64, 128, 256, 384, 512, 768, 1024)
WORDS = ("attention:rotary", "translution:qkv", "translution:v", "lor:qkv,8", "bucketed:qkv,16", "convolution:5")
PERIODS = ("none", "bf16", "bf16+window:56,sinks:4,relative")


def operator(word, length):
    form = Form.parse(word)
    torch.manual_seed(0)
    return make(form, WIDTH, HEADS, WIDTH // HEADS, geometry(form, length)).requires_grad_(False)


def filled(made, length):
    """A sequence of all tokens before the last of `length`."""
    cache = Cache(Spec.parse("f32", made.shapes()), memory=256 << 20, shares=False)
    sequence, at = cache.open(), 0
    x = torch.randn(length - 1, WIDTH)
    while at < len(x):
        piece = x[at : at + 128]
        with sequence.append([0] * len(piece)) as step:
            for number, shape in enumerate(made.shapes()):  # rows alone: what they are costs the same
                step.append(number, **{n: torch.randn(len(piece), shape.heads, w) for n, w in shape.streams})
        at += len(piece)
    sequence.settle()
    return sequence


def decode(rounds):
    """Milliseconds of one token's step by word and length, and bytes a second that this machine reads."""
    made = {word: operator(word, max(LENGTHS) + 8) for word in WORDS}
    ready = {(word, n): (made[word], filled(made[word], n)) for n in LENGTHS for word in WORDS}
    best, x = dict.fromkeys(ready, np.inf), torch.randn(1, WIDTH)
    large, fastest = torch.randn(64 << 20), np.inf  # 256 MiB
    rows, matrices, multiplied = torch.randn(512, 1, WIDTH), torch.randn(512, WIDTH, WIDTH), np.inf
    for _ in range(rounds):
        began = time.perf_counter()
        large.sum()
        fastest = min(fastest, time.perf_counter() - began)
        began = time.perf_counter()
        torch.bmm(rows, matrices)
        multiplied = min(multiplied, time.perf_counter() - began)
        for key, (mixer, sequence) in ready.items():
            began = time.perf_counter()
            with sequence.append([0]) as step:
                mixer.step(step, 0, x)
            best[key] = min(best[key], time.perf_counter() - began)
            sequence.settle(0)
    times = {word: [1e3 * best[word, n] for n in LENGTHS] for word in WORDS}
    rates = {"read_gb_s": large.nbytes / fastest / 1e9, "product_gb_s": matrices.nbytes / multiplied / 1e9}
    return {"lengths": LENGTHS, "ms": times, **rates}


def predicted(word, n):
    """(operations, bytes of weights read) of a step, by formula."""
    form = Form.parse(word)
    sets = geometry(form, max(LENGTHS) + 8).sets
    cost = Cost(WIDTH, WIDTH, HEADS, sets, form)
    relative = len(form.relative)
    if form.kind == "translution":
        read = relative * n + 3 - relative
    else:
        read = {"attention": 3, "bucketed": relative * sets + 3 - relative, "convolution": sets}.get(form.kind, 0)
    weights = read * WIDTH * WIDTH
    if form.kind == "lor":
        weights = 3 * WIDTH * WIDTH + 3 * WIDTH * cost.rank + WIDTH * cost.rank + 3 * n * cost.rank**2
    return cost.step(n), 4 * weights


def training():
    """Megabytes that a training step of one text keeps, measured, by length; and by formula what the public code's
    gathered matrices take."""
    found = []
    form = Form.parse("translution:qkv")
    for n in (32, 64, 128):
        kept = []
        for again in (False, True):
            mixer = make(form, 64, 2, 32, geometry(form, n))
            mixer.recompute = again
            kept.append(saved_bytes(mixer, (torch.randn(1, n, 64), torch.zeros(1, n, dtype=torch.int64))) / 1e6)
        found.append({
            "length": n, "kept_mb": kept[0], "recomputed_mb": kept[1],
            "formula_mb": 4 * 3 * n * (n + 1) / 2 * (64 + 64) / 1e6, "naive_mb": 4 * 3 * n * n * 64 * 64 / 1e6,
        })  # fmt: skip
    return found


def long_series(steps, frames):
    """Trains a watcher and sends series through it under each way of keeping rows."""
    torch.manual_seed(0)
    given = digits()
    watcher = series.Watcher("attention:rotary", 64, 2, 2, 64)

    def draw(generator, count):
        return series.drawn(given.learnt, 64, count, generator)

    loop = Loop(
        watcher, Schedule(steps, 16, rate=2e-3), draw,
        tasks.cross_entropy, 16 * 64,
    )  # fmt: skip
    loop.run()
    pictures, labels = series.drawn(given.held, 64, 32, torch.Generator().manual_seed(1))
    with torch.inference_mode():
        short = float((watcher(pictures).argmax(-1) == labels).float().mean())
    pictures, labels = series.drawn(given.held, frames, 1, torch.Generator().manual_seed(1))
    courses = series.follow(watcher, pictures[0], labels[0], PERIODS)
    return {
        "learnt_length": 64,
        "steps": steps,
        "accuracy_at_64": short,
        "courses": [vars(course) for course in courses],
    }


def draw_decode(found, path):
    def paint(figure):
        head(
            figure, "One more token: milliseconds by length",
            f"one layer, width {WIDTH}, {HEADS} heads, f32, one thread; dots: measured, each the fastest of its rounds",
            f"lines: the weights that a step reads, at the {found['product_gb_s']:.1f} GB/s of batched products of one "
            "row, and the least that it takes beside",
        )  # fmt: skip
        axes = figure.subplots()
        figure.subplots_adjust(left=0.08, right=0.85, top=0.79, bottom=0.12)
        sides = {"bucketed:qkv,16": "bottom", "lor:qkv,8": "top"}
        for word, times in found["ms"].items():
            colour, line = COLOURS[word.split(":")[0]], "--" if word == "translution:v" else "-"
            rate = found["product_gb_s"] * 1e6
            bound = [predicted(word, n)[1] / rate for n in found["lengths"]]
            rest = min(time - each for time, each in zip(times, bound, strict=True))
            axes.plot(found["lengths"], times, "o", color=colour, markersize=4)
            axes.plot(found["lengths"], [each + rest for each in bound], line, color=colour, linewidth=1.2)
            axes.annotate(
                f" {word}", (found["lengths"][-1], times[-1]), color=colour, fontsize=8, va=sides.get(word, "center")
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(found["lengths"], [str(n) for n in found["lengths"]])
        axes.set_xlabel("tokens seen", color=SOFT)
        axes.set_ylabel("ms a token", color=SOFT)

    write(path, (9, 4.6), paint)


def draw_series(found, path):
    names = {"none": "no cache", "bf16": "full cache", PERIODS[-1]: "window 56 and 4 sinks, relative"}
    colours = dict(zip(PERIODS, ("#d1480b", "#0b6fb8", "#2a8c4a"), strict=True))

    def paint(figure):
        head(
            figure, "2,000 frames of a moving digit, one token a frame",
            f"trained on series of {found['learnt_length']} frames: accuracy there {found['accuracy_at_64']:.0%}; two "
            "layers of width 64, one thread; bytes without a cache are those of the largest scores of a pass",
        )  # fmt: skip
        panels = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.06, right=0.98, top=0.74, bottom=0.14, wspace=0.25)
        for course in found["courses"]:
            colour, label = colours[course["kv"]], names[course["kv"]]
            smooth = np.convolve(course["right"], np.ones(5) / 5, "valid")
            panels[0].plot(course["at"], course["ms"], color=colour, label=label)
            panels[1].plot(course["at"], np.array(course["held"]) / 1e3, color=colour, label=label)
            panels[2].plot(course["at"][2:-2], smooth, color=colour, label=label)
        for axes, title in zip(panels, ("ms a frame", "kB held", "told right, mean of 500 frames"), strict=True):
            axes.set_title(title, fontsize=9, loc="left")
            axes.set_xlabel("frames", color=SOFT)
        panels[0].set_yscale("log")
        panels[1].set_yscale("log")
        panels[2].set_ylim(0, 1)
        panels[1].legend(fontsize=7.5, frameon=False, loc="center right")

    write(path, (11, 3.6), paint)


def draw_operators(path):
    """Which matrix serves which pair of tokens, operator by operator."""
    panels = (
        ("attention", "Self-attention", "one matrix for all pairs;\nweights from the tokens", "keeps k and v"),
        (
            "convolution:3",
            "Convolution",
            "a matrix for each offset;\nweights fixed, nothing beyond",
            "keeps x of the last 3",
        ),
        ("translution:qkv", "Translution", "a matrix for each offset;\nweights from the tokens", "keeps x"),
        ("bucketed:qkv,4", "Bucketed", "a matrix for each range of\noffsets; weights from the tokens", "keeps k and v"),
    )
    shades = ("#d1480b", "#e98b3a", "#f2c14e", "#9cc06b", "#4aa3a2", "#0b6fb8", "#4a5fb0", "#7a4fa3")

    def paint(figure):
        head(
            figure, "Which matrix serves token j for token i",
            "eight tokens, causal; a cell's number is the set of matrices of the pair (query i, key and value j)",
        )  # fmt: skip
        for place, (word, name, what, keeps) in zip(figure.subplots(1, 4), panels, strict=True):
            form = Form.parse(word)
            table = geometry(form, 8).table(8)
            for i in range(8):
                for j in range(8):
                    number = int(table[i, j])
                    colour = shades[number] if number >= 0 else "#f3f4f6"
                    place.add_patch(square(j, i, colour))
                    if number >= 0:
                        place.text(j + 0.5, i + 0.5, number, ha="center", va="center", color="white", fontsize=7.5)
            place.set(xlim=(0, 8), ylim=(8, 0), aspect="equal", xticks=[], yticks=[])
            place.grid(visible=False)
            place.spines[:].set_visible(False)
            place.set_title(name, loc="left", fontsize=11, weight="bold")
            place.text(0, 8.35, what, va="top", fontsize=8.5)
            place.text(0, 10.1, keeps, va="top", fontsize=8.5, color=SOFT)
        figure.axes[0].set_ylabel("query i", color=SOFT)
        figure.subplots_adjust(left=0.035, right=0.99, top=0.75, bottom=0.22, wspace=0.14)

    write(path, (11, 4.2), paint)


def square(x, y, colour):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 0.94, 0.94, color=colour)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--decode", type=Path)
    parser.add_argument("--series", type=Path)
    parser.add_argument("--drawing", type=Path)
    parser.add_argument("--rounds", type=int, default=15, help="0 draws what was measured")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--frames", type=int, default=2000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(given.json.read_text()) if given.json.exists() else {}
    if given.decode:
        if given.rounds:
            with torch.inference_mode():
                found["decode"] = decode(given.rounds)
            found["training"] = training()
        given.json.write_text(json.dumps(found, indent=1) + "\n")
        draw_decode(found["decode"], given.decode)
    if given.drawing:
        draw_operators(given.drawing)
    if given.series:
        if given.rounds:
            found["series"] = long_series(given.steps, given.frames)
        given.json.write_text(json.dumps(found, indent=1) + "\n")
        draw_series(found["series"], given.series)


if __name__ == "__main__":
    main()
