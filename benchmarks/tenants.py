"""Two tenants of one cache: what one finds of the other's prompts, and what a flood leaves.

    python benchmarks/tenants.py [--kv int8] [--weights int4] [--memory 64MiB] [--prompts 8]

Found: a prompt of 512 tokens asked for the first time, again, and by the other tenant; seconds to the first token,
medians and ranges over the prompts, in turn. Flood: a's prompts fill a third of the cache; b asks for ten times the
memory, 16 requests at once; a asks again. `none`: one account for both, so that whatever was used least recently goes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from fractions import Fraction

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from pydoc_data.topics import topics

import kvik
from kvik.engine.engine import Engine
from kvik.engine.quota import Quota
from kvik.engine.request import Request
from kvik.units import parse_bytes

TOKENS, FLOOD, NEW = 512, 384, 16
SHARES = {"none": None, "fair": None, "33%": Quota(Fraction(33, 100), 2)}


class Asker:
    """Asks for slices of one long text, each another."""

    def __init__(self, engine: Engine, ids: list[int], *, apart: bool = True) -> None:
        self.engine, self.ids, self.apart = engine, ids, apart

    def request(self, who: str, start: int, tokens: int, new: int = 1) -> Request:
        prompt = self.ids[start : start + tokens]
        assert len(prompt) == tokens, "the text is long enough"
        return Request(prompt, new, ignore_end=True, salt=who, owner=who if self.apart else "")

    def first(self, request: Request) -> tuple[float, int]:
        """Seconds to the first token, and how many of the prompt's were known."""
        began = time.perf_counter()
        update = next(iter(self.engine.submit(request)))
        assert update.known is not None, "the first update says"
        return time.perf_counter() - began, update.known.cached


def found(asker: Asker, count: int) -> dict[str, list[tuple[float, int]]]:
    """What each kind of asking took, prompt by prompt."""
    told: dict[str, list[tuple[float, int]]] = {"first": [], "again": [], "the other": []}
    asker.first(asker.request("warm", len(asker.ids) - TOKENS, TOKENS))
    for at in range(count):
        for kind, who in (("first", "a"), ("again", "a"), ("the other", "b")):
            told[kind].append(asker.first(asker.request(who, at * TOKENS, TOKENS)))
    return told


def flood(asker: Asker, memory: int) -> tuple[list[tuple[float, int]], float]:
    """What a finds of its prompts afterwards, and b's tokens a second."""
    engine = asker.engine
    row = engine.cache.spec.nbytes(TOKENS).allocated / TOKENS
    mine = [asker.request("a", at * TOKENS, TOKENS) for at in range(int(memory / 3 / row) // TOKENS)]
    for each in mine:
        asker.first(each)
    requests, began = round(10 * memory / row / FLOOD), time.perf_counter()
    streams = []
    for at in range(requests):
        start = (len(mine) * TOKENS + at * FLOOD) % (len(asker.ids) - FLOOD)
        streams.append(engine.submit(asker.request("b", start, FLOOD, NEW)))
        if len(streams) == 16 or at == requests - 1:
            for stream in streams:
                stream.answers()
            streams = []
    speed = requests * (FLOOD + NEW) / (time.perf_counter() - began)
    return [asker.first(each) for each in mine], speed


def ms(told: list[tuple[float, int]]) -> str:
    seconds = [each for each, _ in told]
    return f"{statistics.median(seconds) * 1e3:.0f} ({min(seconds) * 1e3:.0f}-{max(seconds) * 1e3:.0f}) ms"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kv", default="int8")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--memory", default="64MiB")
    parser.add_argument("--prompts", type=int, default=8)
    args = parser.parse_args()
    model, memory = kvik.load("smollm2", weights=args.weights), parse_bytes(args.memory)
    assert model.tokenizer is not None, "it has one"
    ids = model.tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))
    with Engine(model, args.kv, memory="512MiB") as engine:
        for kind, told in found(Asker(engine, ids), args.prompts).items():
            print(f"{kind:>9}: {ms(told)} to the first token, known {sorted({known for _, known in told})} of {TOKENS}")
    for name, quota in SHARES.items():
        with Engine(model, args.kv, memory=memory, quota=quota) as engine:
            told, speed = flood(Asker(engine, ids, apart=name != "none"), memory)
            known, preempted = sum(known for _, known in told), engine.counts.preemptions
            print(
                f"{name:>9}: known {known} of {len(told) * TOKENS}, {ms(told)} to the first token; the flood had "
                f"{speed:.0f} tokens/s, {preempted} preempted"
            )


if __name__ == "__main__":
    main()
