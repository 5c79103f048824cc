"""Many clients over a shared prefix: kvik beside OpenVINO GenAI, llama-server and transformers serve, in one run.

    benchmarks/peers_setup                     # once: the other engines, in .peers
    python benchmarks/serve.py [--rounds 5] [--only kvik,openvino] [--more] [--json docs/serve.json]

Two are called as libraries (`batches.py`), three over HTTP (`clients.py`); compared is like with like. Each is a
process of its own, and all but the one that works are stopped. In a turn, each in its order gets the same: 16 clients
at once whose prompts share 1,000 tokens that nobody has seen, each with a question of 64 tokens, for 64 tokens each;
two more such rounds with other questions; single clients with a known and with a new prefix; and four answers in the
writing while a prompt of 4,000 tokens comes. A turn's texts are those of no other turn. Medians of all turns.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import clients
import workers
from batches import Heard
from rich.console import Console
from rich.progress import Progress
from serve_report import KEYS, draw, into, page
from workers import Worker

CLIENTS, PREFIX, QUESTION, ANSWER = 16, 1000, 64, 64
LATER, SINGLES = 2, 3  # rounds over the known prefix, and single clients of each kind, in a turn
FEWER = {"transformers serve": 1}  # later rounds of who takes a minute for one
STREAMS, LONG = 4, 4000  # answers in the writing; tokens of the newcomer's prompt
CALM, BEFORE, ROOM = 8, 40, 1024  # an answer's tokens before it is looked at, before the newcomer comes, and in all


class Texts:
    """Pieces of one long text that are the same as tokens and as text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._ids, self._at = tokenizer, tokenizer.encode(workers.text()), 0

    def piece(self, tokens: int, behind: Sequence[int] = ()) -> list[int]:
        """`behind` and then so many tokens that no other piece has in this order."""
        while True:
            found = [*behind, *(self._ids[self._at :] + self._ids)[:tokens]]
            if self._tokenizer.encode(self.text(found)) == found:
                self._at = (self._at + tokens) % len(self._ids)
                return found
            self._at += 1  # a cut through a word or a letter

    def text(self, ids: Sequence[int]) -> str:
        """As a client sends it."""
        return str(self._tokenizer.decode(ids, skip_special=False))


@dataclass
class Material:
    """A turn's prompts, as tokens.

    Attributes:
        rounds: the first is over a prefix that nobody has seen.
        known, new: for single clients: over that prefix, and over none that was seen.
        streams, newcomer: answers in the writing, and who comes then.
    """

    wake: list[int]
    rounds: list[list[list[int]]]
    known: list[list[int]]
    new: list[list[int]]
    streams: list[list[int]]
    newcomer: list[int]

    @classmethod
    def of(cls, texts: Texts) -> Material:
        """From texts that were in no turn before."""
        prefix = texts.piece(PREFIX)

        def questions(count: int) -> list[list[int]]:
            return [texts.piece(QUESTION, prefix) for _ in range(count)]

        rounds = [questions(CLIENTS) for _ in range(1 + LATER)]
        new = [texts.piece(PREFIX + QUESTION) for _ in range(SINGLES)]
        return cls(texts.piece(PREFIX), rounds, questions(SINGLES), new, questions(STREAMS), texts.piece(LONG))


@dataclass
class Contender:
    """An engine or a server, and what was found of it.

    Attributes:
        found: name → a figure for each time; see `serve_report.py`.
    """

    key: str
    worker: Worker
    texts: Texts
    said: str = ""
    found: dict[str, list[float]] = field(default_factory=dict)

    def start(self) -> None:
        """Runs it."""
        self.worker.start()
        with self.worker.awake():
            if isinstance(self.worker, clients.Server):
                self.worker.ready()
                self.said = self.worker.said
            else:
                self.said = self.worker.answer()["ready"]

    def play(
        self, prompts: list[list[int]], tokens: int, newcomer: list[int] | None = None, after: int = 0
    ) -> list[Heard]:
        """Asks all prompts at once. Raises SystemExit where an answer is not as long as was asked."""
        if isinstance(self.worker, clients.Server):
            texts = [self.texts.text(prompt) for prompt in prompts]
            late = None if newcomer is None else self.texts.text(newcomer)
            played = clients.play(self.worker, texts, tokens, late, after)
            for client, prompt in zip(played, prompts, strict=False):
                if (said := client.usage.get("prompt_tokens", len(prompt))) != len(prompt):
                    raise SystemExit(f"{self.key} sees {said} tokens in a prompt of {len(prompt)}: no like with like")
            return [client.heard for client in played]
        told = self.worker.ask(prompts=prompts, tokens=tokens, newcomer=newcomer, after=after)["heard"]
        heard = [Heard(**each) for each in told]
        if newcomer is None and any(len(each.times) != tokens for each in heard):
            raise SystemExit(f"{self.key} wrote {[len(each.times) for each in heard]} tokens, not {tokens}")
        return heard

    def turn(self, given: Material, told: Callable[[str], None]) -> dict[str, list[float]]:
        """All parts, one after another. What was found is kept once the turn is whole, and returned."""
        new: dict[str, list[float]] = {}

        def note(**figures: float) -> None:
            for name, value in figures.items():
                new.setdefault(name, []).append(value)

        with self.worker.awake():
            told("wakes")
            self.play([given.wake], 8)
            for at, prompts in enumerate(given.rounds[: 1 + FEWER.get(self.key, LATER)]):
                told("first round" if at == 0 else "later round")
                used, began = time.process_time(), time.perf_counter()
                heard = self.play(prompts, ANSWER)
                used, took = time.process_time() - used, time.perf_counter() - began
                speed = CLIENTS * ANSWER / (max(h.ended for h in heard) - min(h.sent for h in heard))
                note(**{"later" if at else "first": speed}, clients=used / took)
            for name, prompts in (("known", given.known), ("new", given.new)):
                told(f"single clients, {name} prefix")
                for prompt in prompts:
                    note(**{name: first_token(self.play([prompt], 8)[0])})
            told("a long prompt comes")
            note(**mixed(self.play(given.streams, ROOM, given.newcomer, BEFORE)))
        note(peak_bytes=self.worker.peak())
        for name, values in new.items():
            self.found[name] = [*self.found.get(name, ()), *values]
        return new


def first_token(heard: Heard) -> float:
    """Seconds to the first token."""
    return heard.times[0] - heard.sent


def mixed(heard: list[Heard]) -> dict[str, float]:
    """Seconds between tokens of all but the last, which is the newcomer: the median before it comes (once each has
    CALM tokens), and the median and the 99th percentile of those that overlap its wait for its first token."""
    *streams, newcomer = heard
    calm, came = max(each.times[CALM] for each in streams), newcomer.times[0]
    pairs = [pair for each in streams for pair in zip(each.times, each.times[1:], strict=False)]
    if any(each.times[-1] < came and len(each.times) >= ROOM for each in streams):
        raise SystemExit(f"an answer of {ROOM} tokens had ended before the newcomer's began; give ROOM more")
    alone = [after - before for before, after in pairs if before >= calm and after <= newcomer.sent]
    beside = [after - before for before, after in pairs if after > newcomer.sent and before < came]
    return {
        "alone": statistics.median(alone),
        "beside": statistics.median(beside),
        "beside_p99": percentile(beside, 0.99),
        "newcomer": first_token(newcomer),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least that share of all values doesn't exceed.

    >>> percentile([3.0, 1.0, 2.0, 4.0], 0.5), percentile([3.0, 1.0, 2.0, 4.0], 0.99)
    (2.0, 4.0)
    """
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def measure(contenders: list[Contender], turns: int, texts: Texts) -> None:
    """Starts all, then turn after turn."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(contenders) * (1 + turns))
        for contender in contenders:
            bar.update(task, description=f"starting {contender.key}", advance=1)
            contender.start()
        for _ in range(turns):
            given = Material.of(texts)
            for contender in contenders:
                new = contender.turn(given, lambda part, c=contender: bar.update(task, description=f"{c.key}: {part}"))
                bar.update(task, advance=1)
                last = ", ".join(f"{name} {statistics.median(values):.4g}" for name, values in new.items())
                console.print(f"{contender.key}: {last}", highlight=False, soft_wrap=True)


def joined(old: dict[str, Any], contenders: list[Contender], more: bool) -> dict[str, Any]:
    """What was found, in the place of what was found before of the same contenders, or (`more`) beside it."""
    entries = {entry["key"]: entry for entry in old.get("contenders", ())}
    for each in (each for each in contenders if each.found):
        found = dict(each.found)
        if more and each.key in entries:
            before = entries[each.key]["found"]
            found = {name: [*before.get(name, ()), *values] for name, values in found.items()}
        entries[each.key] = {"key": each.key, "said": each.said, "found": found}
    scenario = {"clients": CLIENTS, "prefix": PREFIX, "question": QUESTION, "answer": ANSWER, "long": LONG}
    shown = [entries[key] for key in KEYS if key in entries]
    return {**workers.machine(), **scenario, "contenders": shown}


def chosen(options: argparse.Namespace, texts: Texts, python: Path, gguf: Path) -> list[Contender]:
    """Those that were asked for, in their order."""

    def library(engine: str, setting: str, interpreter: str) -> Worker:
        command = [interpreter, str(workers.HERE / "batches.py"), engine, setting, str(gguf)]
        return Worker(f"{engine} {setting} batches", command, workers.TORCH if engine == "kvik" else None)

    makers: dict[str, Callable[[], Worker]] = {
        "kvik": lambda: library("kvik", options.kv, sys.executable),
        "openvino": lambda: library("openvino", "u8", str(python)),
        "kvik serve": lambda: clients.kvik(gguf, python, options.kv),
        "llama-server": lambda: clients.llama(gguf, python, "f16"),
        "transformers serve": lambda: clients.transformers(gguf, python, "bfloat16"),
    }
    wanted = options.only.split(",") if options.only else list(makers)
    if unknown := set(wanted) - set(makers):
        raise SystemExit(f"nobody here is called {', '.join(sorted(unknown))}; known are {', '.join(makers)}")
    return [Contender(key, makers[key](), texts) for key in makers if key in wanted]


def main() -> None:
    """Measures, prints the tables, and writes what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--only", default="", help="kvik, openvino, kvik serve, llama-server, transformers serve")
    parser.add_argument(
        "--more", action="store_true", help="add to what --json holds of these, instead of replacing it"
    )
    parser.add_argument("--kv", default="int8", help="what kvik's cache keeps")
    parser.add_argument("--peers", type=Path, default=workers.PEERS)
    parser.add_argument("--gguf", type=Path, help="by default the SmolLM2 beside the engines")
    parser.add_argument("--json", type=Path, help="figures; those of contenders that don't run stay")
    parser.add_argument("--page", type=Path, help="Markdown: the part between its two markers is written anew")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    python, gguf = workers.installed(options.peers, options.gguf)
    old = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the contenders end, whole turns are kept
    contenders: list[Contender] = []
    stopped = False
    if options.rounds:
        import kvik

        texts = Texts(kvik.load(gguf).tokenizer)
        contenders = chosen(options, texts, python, gguf)
        try:
            measure(contenders, options.rounds, texts)
        except KeyboardInterrupt:
            stopped = True
        finally:
            for contender in contenders:
                contender.worker.end()
    found = joined(old, contenders, options.more)
    if not found["contenders"]:
        raise SystemExit("no turn was whole, so nothing was found")
    print(page(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.page:
        options.page.write_text(into(options.page.read_text(), page(found)))
    if options.plot:
        draw(found, options.plot)
    if stopped:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
