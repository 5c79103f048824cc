"""Answers with a draft's guesses, with guesses from their own text, and with none, side by side.

    python benchmarks/drafts.py [--model smollm2] [--weights f32] [--draft smollm2] [--draft-weights int4] [--kv bf16]
        [--draft-kv int8] [--batch 1 4] [--temperature 0 0.8] [--tokens 128] [--rounds 3] [--guesses 8]

Every way answers the same chat prompts, in an engine of its own that lives for all rounds, as a server's does; the ways
alternate within a round, and the first round warms up and is not counted. Tokens a second: all answers' new tokens over
the time from the first request to the last token, prompts included; medians. Right: of all guesses. A step: tokens of
an answer in a step of the engine. All ways must give the same tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass, field

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import kvik
from kvik.engine.engine import Engine
from kvik.engine.generation import encode_prompt
from kvik.engine.loop import Counts
from kvik.engine.request import Request
from kvik.engine.sampling import Sampling
from kvik.models.model import Model

PROMPTS = (
    "Explain how a rainbow forms.",
    "Write a short story about a lighthouse keeper.",
    "Give me a recipe for pancakes.",
    "What is the difference between a virus and a bacterium?",
    "Describe the city of Lisbon to a traveller.",
    "Why do leaves change their colour in autumn?",
    "List ten ideas for a rainy afternoon.",
    "How does a bicycle stay upright?",
)


@dataclass
class Way:
    """One way to answer, and what was measured of it.

    Attributes:
        name: of the way.
        options: of its engine.
        speeds: tokens a second, round by round.
        answers: token ids of the last round.
        before, after: the engine's counts around the rounds that count.
    """

    name: str
    options: dict[str, object]
    speeds: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    before: Counts = field(default_factory=Counts)
    after: Counts = field(default_factory=Counts)

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return statistics.median(self.speeds)

    @property
    def right(self) -> float:
        """Of all guesses."""
        guessed = self.after.guessed_tokens - self.before.guessed_tokens
        return (self.after.accepted_tokens - self.before.accepted_tokens) / max(guessed, 1)

    def a_step(self, batch: int) -> float:
        """Tokens of an answer in a step."""
        return (self.after.new_tokens - self.before.new_tokens) / (self.after.steps - self.before.steps) / batch


def measured(model: Model, ways: list[Way], requests: list[Request], kv: str, rounds: int) -> None:
    """Fills the ways with what `rounds` rounds took, after one to warm up. Raises SystemExit where tokens differ."""
    engines = [Engine(model, kv, memory="512MiB", **way.options) for way in ways]
    try:
        for round in range(rounds + 1):
            for way, engine in zip(ways, engines, strict=True):
                way.before = Counts(**vars(engine.counts)) if round == 1 else way.before
                started = time.perf_counter()
                streams = [engine.submit(request) for request in requests]
                way.answers = [answer.token_ids for stream in streams for answer in stream.answers()]
                seconds = time.perf_counter() - started
                way.after = Counts(**vars(engine.asked(lambda engine=engine: engine.counts)))
                if round:
                    way.speeds.append(sum(map(len, way.answers)) / seconds)
            if any(way.answers != ways[0].answers for way in ways):
                raise SystemExit("a guess changed a token, which must never be")
    finally:
        for engine in engines:
            engine.close()


def lines(ways: list[Way], batch: int, temperature: float) -> list[str]:
    """Of a table."""
    found = []
    for way in ways:
        right = f"{way.right:.0%}" if way.after.guessed_tokens else "-"
        columns = batch, f"{temperature:g}", way.name, f"{way.speed:.1f}", f"{way.speed / ways[0].speed:.2f}", right
        found.append(f"| {' | '.join(map(str, columns))} | {way.a_step(batch):.2f} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights", default="f32")
    parser.add_argument("--draft", default="smollm2")
    parser.add_argument("--draft-weights", default="int4")
    parser.add_argument("--kv", default="bf16")
    parser.add_argument("--draft-kv", default="int8")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--guesses", type=int, default=8)
    given = parser.parse_args()
    model = kvik.load(given.model, weights=given.weights)
    draft = kvik.load(given.draft, weights=given.draft_weights)
    print("| answers | temperature | guesses | tokens/s | times | right | tokens of an answer a step |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for batch in given.batch:
        prompts = [encode_prompt(model, PROMPTS[at % len(PROMPTS)]) for at in range(batch)]
        for temperature in given.temperature:
            requests = [
                Request(prompt, given.tokens, sampling=Sampling(temperature, seed=at), ignore_end=True)
                for at, prompt in enumerate(prompts)
            ]
            ways = [
                Way("none", {}),
                Way("from the text", {"guesses": given.guesses}),
                Way("by a draft", {"guesses": given.guesses, "draft": draft, "draft_kv": given.draft_kv}),
            ]
            measured(model, ways, requests, given.kv, given.rounds)
            print("\n".join(lines(ways, batch, temperature)), flush=True)


if __name__ == "__main__":
    main()
