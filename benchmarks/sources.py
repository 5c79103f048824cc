"""Many questions about few sources, as in translation: what it saves that a source's rows are kept once.

    python benchmarks/sources.py [--requests 64] [--sources 16] [--rows 256] [--tokens 32] [--kv int8] [--rounds 3]

A tiny T5 with random weights answers requests in batches; each reads one of the sources, in turn. Shared: a source that
the cache knows is not encoded again, and all who read it read the same pages. Alone: every request gives its source
under a salt of its own, so that none is found. Again: no rows of a source are kept; each step computes them anew
from the encoder's states, in each layer. All three alternate within a round; medians. Bytes are pages and tables that
open sequences hold when all requests are in, each page once; of the third, rows and states without what pages leave
empty. Answers are the same in the first two, and in the third where --kv rounds nothing (f32).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch

from kvik import events
from kvik.cache.books import bytes_in_use
from kvik.engine.translation import translate_again
from kvik.models import families
from kvik.models.model import Model

VOCAB = 4096
CONFIG = {
    "model_type": "t5", "vocab_size": VOCAB, "d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 4, "num_heads": 8,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One way through the load.

    Attributes:
        encoded: how often the encoder ran.
        filled: bytes of the sources' rows that were computed, each time that they were.
        held: bytes that all requests held together, at their end.
        seconds: to fill and open, and to answer.
        answers: token ids.
    """

    encoded: int
    filled: int
    held: int
    seconds: tuple[float, float]
    answers: list[list[int]]


def tiny(weights: str) -> Model:
    """A T5 with random weights."""
    config = families.from_hf(CONFIG, None, "tiny T5")
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in config.tensor_shapes().items():
        spread = 1.0 if "embed" in name or "shared" in name or "bias" in name else shape[-1] ** -0.5
        norm = name.endswith("layer_norm.weight")
        tensors[name] = torch.ones(shape) if norm else torch.randn(shape, generator=g) * spread
    return Model(config, tensors, weights=weights)  # type: ignore[arg-type]


def load(model: Model, sources: list[list[int]], options: argparse.Namespace, shared: bool) -> Outcome:
    """All requests, open side by side; one step for all of them a token."""
    cache = model.cache(options.kv, memory=1 << 30)
    filled: list[events.Filled] = []
    cache.listen(lambda event: filled.append(event) if isinstance(event, events.Filled) else None)
    started = time.perf_counter()
    sequences = []
    for number in range(options.requests):
        salt = "" if shared else str(number)
        source = sources[number % len(sources)]
        sequences.append(cache.open(source=model.fill(cache, source, salt), salt=salt))
    opened = time.perf_counter()
    answers: list[list[int]] = [[] for _ in sequences]
    tokens = [0] * len(sequences)
    for _ in range(options.tokens):
        logits = model.run([(s, [t]) for s, t in zip(sequences, tokens, strict=True)])
        tokens = logits.argmax(-1).tolist()
        for sequence, answer, token in zip(sequences, answers, tokens, strict=True):
            sequence.settle()
            answer.append(token)
    ended = time.perf_counter()
    source_bytes = cache.spec.nbytes(0, source=options.rows).payload
    held = bytes_in_use(cache)
    for sequence in sequences:
        sequence.close()
    cache.check()
    return Outcome(len(filled), len(filled) * source_bytes, held, (opened - started, ended - opened), answers)


def again(model: Model, sources: list[list[int]], options: argparse.Namespace) -> Outcome:
    """The same requests without a cache for cross-attention."""
    asked = [sources[number % len(sources)] for number in range(options.requests)]
    found = translate_again(model, asked, kv=options.kv, memory=1 << 30, max_tokens=options.tokens)
    filled = found.rows * model.spec(options.kv).nbytes(0, source=options.rows).payload // options.rows
    return Outcome(found.encoded, filled, found.held or 0, (found.source_s, found.text_s), found.texts)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("requests", 64), ("sources", 16), ("rows", 256), ("tokens", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kv", default="bf16")
    parser.add_argument("--weights", default="f32")
    options = parser.parse_args()
    model = tiny(options.weights)
    g = torch.Generator().manual_seed(1)
    sources = [torch.randint(3, VOCAB, (options.rows,), generator=g).tolist() for _ in range(options.sources)]
    ways: dict[str, list[Outcome]] = {"shared": [], "alone": [], "again": []}
    for _ in range(options.rounds):
        ways["shared"].append(load(model, sources, options, True))
        ways["alone"].append(load(model, sources, options, False))
        ways["again"].append(again(model, sources, options))
    once, each = ways["shared"][0], ways["alone"][0]
    assert once.answers == each.answers, "what is shared changes no token"
    assert (once.encoded, each.encoded) == (min(options.sources, options.requests), options.requests)
    print(
        f"{options.requests} requests about {options.sources} sources of {options.rows} tokens, {options.tokens} new "
        f"tokens each · cache {options.kv}, weights {model.weights}, medians of {options.rounds} rounds\n"
    )
    print(f"{'':8}{'encoder runs':>14}{'source rows computed':>22}{'held at the end':>17}{'fill':>10}{'answer':>10}")
    for name, found in ways.items():
        fill, answer = (statistics.median(each.seconds[i] for each in found) for i in (0, 1))
        mib = [f"{x / 2**20:.1f} MiB" for x in (found[0].filled, found[0].held)]
        print(f"{name:8}{found[0].encoded:>14}{mib[0]:>22}{mib[1]:>17}{fill:>8.2f} s{answer:>8.2f} s")
    fills = statistics.median(b.seconds[0] / a.seconds[0] for a, b in zip(ways["shared"], ways["alone"], strict=True))
    answers = statistics.median(b.seconds[1] / a.seconds[1] for a, b in zip(ways["shared"], ways["again"], strict=True))
    print(
        f"\nalone : shared  bytes {each.held / once.held:.2f} ×, encoder runs {each.encoded / once.encoded:.0f} ×, "
        f"fill {fills:.1f} ×\nagain : shared  answer {answers:.1f} ×"
    )


if __name__ == "__main__":
    main()
