"""Decode and prefill of one GGUF file in kvik, llama.cpp, OpenVINO GenAI and transformers, side by side.

    benchmarks/peers_setup                     # once: the other engines, in .peers
    python benchmarks/peers.py [--contexts 32,1024,4096,8128] [--rounds 5] [--json FILE] [--plot FILE]

Each engine is a process of its own (`contender.py`); all but the one that works are stopped, so that none of their
threads spins. A round gives every engine the same tasks in turn; every prompt is another piece of Python's own texts,
so that no prefix cache helps. Medians of the rounds. Memory is the largest each process ever held.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import workers
from rich.console import Console
from rich.progress import Progress
from workers import Worker

SETTINGS = ("bf16", "int8", "k8v4", "int4")
PEERS = (("llama.cpp", "f16"), ("llama.cpp", "q8_0"), ("openvino", "u8"), ("transformers", "dynamic"))
SLOW = {("llama.cpp", "q8_0"): 4096, ("transformers", "dynamic"): 4096}  # longer texts would take minutes a round


@dataclass
class Contender:
    """An engine with a setting, and what it took."""

    engine: str
    setting: str
    python: str
    gguf: str
    room: int
    said: str = ""
    peak: int = 0
    worker: Any = None
    prefill: dict[int, list[float]] = field(default_factory=dict)
    decode: dict[int, list[float]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.engine} {self.setting}"

    def start(self) -> None:
        command = [
            self.python,
            str(workers.HERE / "contender.py"),
            self.engine,
            self.setting,
            self.gguf,
            str(self.room),
        ]
        self.worker = Worker(self.name, command, workers.TORCH if self.engine in ("kvik", "transformers") else None)
        self.worker.start()
        with self.worker.awake():
            self.said = self.worker.answer()["ready"]

    def work(self, context: int, prompt: list[int], tokens: int) -> None:
        with self.worker.awake():
            took = self.worker.ask(prompt=prompt, tokens=tokens)
        self.peak = max(self.peak, self.worker.peak())
        self.prefill.setdefault(context, []).append(took["prefill_s"])
        self.decode.setdefault(context, []).append(took["decode_s"] / tokens)

    def end(self) -> None:
        if self.worker is not None:
            self.worker.end()


def measure(contenders: list[Contender], contexts: list[int], tokens: int, rounds: int, ids: list[int]) -> None:
    """All rounds; the first task of each engine, at the shortest context, counts for nothing."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(contenders) * (1 + rounds * len(contexts)))
        at = 0
        for contender in contenders:
            bar.update(task, description=f"starting {contender.name}", advance=1)
            contender.start()
            contender.work(0, ids[: contexts[0]], 8)
        for _ in range(rounds):
            for context in contexts:
                for contender in contenders:
                    at = (at + 7919) % len(ids)
                    bar.update(task, description=f"{contender.name} at {context}", advance=1)
                    if context <= SLOW.get((contender.engine, contender.setting), context):
                        contender.work(context, (ids[at:] + ids)[:context], tokens)


def figures(contenders: list[Contender], contexts: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, as JSON."""
    rows = []
    for each in contenders:
        rows.append(
            {
                "engine": each.engine,
                "setting": each.setting,
                "said": each.said,
                "peak_bytes": each.peak,
                "decode_tokens_per_s": {
                    str(n): 1 / statistics.median(each.decode[n]) for n in contexts if n in each.decode
                },
                "prefill_tokens_per_s": {
                    str(n): n / statistics.median(each.prefill[n]) for n in contexts if n in each.prefill and n >= 512
                },
            }
        )
    return {
        "contexts": contexts,
        "tokens": options.tokens,
        "rounds": options.rounds,
        **workers.machine(),
        "engines": rows,
    }


def tables(found: dict[str, Any]) -> str:
    """Two Markdown tables: tokens a second, and in brackets the ratio to the best peer at that length."""
    out = []
    for what, key in (("decode", "decode_tokens_per_s"), ("prefill", "prefill_tokens_per_s")):
        contexts = [n for n in map(str, found["contexts"]) if any(n in e[key] for e in found["engines"])]
        best = {
            n: max((e[key].get(n, 0.0) for e in found["engines"] if e["engine"] != "kvik"), default=0.0)
            for n in contexts
        }
        peak = what == "decode"
        out.append(
            f"| {what}, tokens/s | " + " | ".join(f"{int(n):,}" for n in contexts) + (" | MB |" if peak else " |")
        )
        out.append("|---" * (len(contexts) + 1 + peak) + "|")
        for e in found["engines"]:
            cells = []
            for n in contexts:
                speed = e[key].get(n)
                ratio = f" ({speed / best[n]:.2f}×)" if speed and best[n] and e["engine"] == "kvik" else ""
                cells.append("–" if speed is None else f"{speed:,.0f}{ratio}")
            memory = [f"{e['peak_bytes'] / 1e6:,.0f}"] if peak else []
            out.append(f"| {e['engine']} {e['setting']} | " + " | ".join(cells + memory) + " |")
        out.append("")
    return "\n".join(out)


def draw(found: dict[str, Any], path: Path) -> None:
    """Decode and prefill by context, a line an engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {"bf16": "-", "int8": "--", "k8v4": "-.", "int4": ":", "q8_0": "--"}
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for axis, key, title in zip(
        axes, ("decode_tokens_per_s", "prefill_tokens_per_s"), ("Decode", "Prefill"), strict=True
    ):
        for e in found["engines"]:
            lengths = [int(n) for n in e[key]]
            axis.plot(
                lengths, list(e[key].values()), styles.get(e["setting"], "-"), marker="o", markersize=3.5,
                color=workers.COLOURS[e["engine"]], label=f"{e['engine']} {e['setting']}",
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        ticks = [n for n in found["contexts"] if key.startswith("decode") or n >= 512]
        axis.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axis.set_ylim(bottom=0)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("tokens in the text")
        axis.set_ylabel("tokens a second")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measures, prints the tables, and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="32,1024,4096,8128")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv", default=",".join(SETTINGS))
    parser.add_argument("--without", default="", help="engines to leave out, with commas")
    parser.add_argument("--peers", type=Path, default=workers.PEERS)
    parser.add_argument("--gguf", type=Path, help="by default the SmolLM2 beside the engines")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    contexts = [int(n) for n in options.contexts.split(",")]
    python, gguf = workers.installed(options.peers, options.gguf)
    import kvik

    ids = kvik.load(gguf).tokenizer.encode(workers.text())
    room = max(contexts) + options.tokens
    chosen = [("kvik", kv, sys.executable) for kv in options.kv.split(",")]
    chosen += [(engine, setting, str(python)) for engine, setting in PEERS if engine not in options.without.split(",")]
    contenders = [Contender(*each, str(gguf), room + 32) for each in chosen]
    try:
        measure(contenders, contexts, options.tokens, options.rounds, ids)
    finally:
        for contender in contenders:
            contender.end()
    found = figures(contenders, contexts, options)
    print(tables(found))
    for each in contenders:
        print(f"{each.name}: {each.said}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()
