"""kvik under load: eight ragged sequences at once, and one sequence while other processes take the cores.

    python benchmarks/loads.py [--kv int8] [--tokens 32] [--rounds 5]

Batch: tokens a second in all of 8 sequences with 200 to 2,000 tokens, beside one sequence of their mean length. Busy:
one process a core that does nothing but turn a loop, beside the same machine without them. Both alternate within a
round; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from pydoc_data.topics import topics

import kvik
from kvik.cache.sequence import Sequence
from kvik.engine.generation import prefill

LENGTHS = [200 + round(1800 * i / 7) for i in range(8)]
MEAN = sum(LENGTHS) // len(LENGTHS)


def decode(model: kvik.Model, sequences: list[Sequence], tokens: int) -> float:
    """Tokens a second of all sequences together, after a first step that is not timed; they are as long afterwards as
    before."""
    lengths, ids, start = [len(s) for s in sequences], [5] * len(sequences), 0.0
    for step in range(tokens + 1):
        if step == 1:
            start = time.perf_counter()
        logits = model.run([(s, [i]) for s, i in zip(sequences, ids, strict=True)])
        ids = logits.argmax(-1).tolist()
        for sequence in sequences:
            sequence.settle()
    took = time.perf_counter() - start
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.trim(length)
    return tokens * len(sequences) / took


@contextmanager
def busy_cores() -> Iterator[None]:
    """One process on each core that is always busy."""
    cores = len(os.sched_getaffinity(0))
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    """Prints medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", default="int8")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = kvik.load("smollm2", weights=options.weights)
    ids = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    cache = model.cache(options.kv, shares=False)

    def opened(length: int, at: int) -> Sequence:
        sequence = cache.open()
        prefill(model, [sequence], ids[at : at + length])
        return sequence

    one, eight = [opened(MEAN, 0)], [opened(n, 2000 * i) for i, n in enumerate(LENGTHS)]
    decode(model, one, 4), decode(model, eight, 4)
    alone, batch, quiet, busy = [], [], [], []
    for _ in range(options.rounds):
        alone.append(decode(model, one, options.tokens))
        batch.append(decode(model, eight, options.tokens))
        quiet.append(decode(model, one, options.tokens))
        with busy_cores():
            busy.append(decode(model, one, options.tokens))
    print(f"cache {options.kv}, weights {model.weights}, {options.rounds} rounds")
    a, b = statistics.median(alone), statistics.median(batch)
    ratio = statistics.median(y / x for x, y in zip(alone, batch, strict=True))
    print(f"one sequence of {MEAN:,} tokens: {a:.0f} tokens/s; eight of {LENGTHS[0]:,} to {LENGTHS[-1]:,}: {b:.0f}")
    print(f"ratio {ratio:.2f}")
    a, b = statistics.median(quiet), statistics.median(busy)
    print(f"one sequence: {a:.0f} tokens/s; with a busy process on each core: {b:.0f}, {b / a:.0%}")


if __name__ == "__main__":
    main()
