"""What is commonly said about KV caches, beside the formula, a measurement on a real model, and a verdict.

    python benchmarks/claims.py             measures everything on SmolLM2, writes docs/claims.md, docs/claims.json
                                            and the pictures docs/cache.png and docs/slope.png
    python benchmarks/claims.py --exact     only what no clock decides; the timed figures stay as they are

A verdict that its figures do not carry stops the script: each claim asserts what it says.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch loads: idle threads soon give their core back

import numpy as np
import torch
from lenses import Alone, BothWays, States, moved, seen
from verdicts import Figures, render

import kvik
from kvik.bench import curves, measure, slope
from kvik.bench.counting import Tally
from kvik.models.watch import Chunk
from kvik.plan import run_plan
from kvik.plan.work import Arithmetic
from kvik.trace.context import SENTENCE as SENTENCE_OF_IT
from kvik.trace.context import compare, split

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (
    "The cat is on the mat, and it sleeps there until the evening comes. Then it wakes, looks at the moon over the "
    "roofs, and goes out into the garden, where the mice have been waiting all day for a cat that never seems to be "
    "hungry. At midnight it comes back, lies down again, and dreams of fish."
)
SENTENCE = 64  # tokens of TEXT that the counted and compared runs take
TOKENS = 2048  # the longest text that is timed
SHOWN = (16, 64, 256, 1024, 2048)


def exact(model: kvik.Model) -> Figures:
    """What no clock decides: counts, bytes, and what moved bit for bit."""
    assert model.tokenizer is not None, "the claims are tried on text"
    tokens = model.tokenizer.encode(TEXT)[:SENTENCE]
    assert len(tokens) == SENTENCE, "the text is long enough"
    sizes = Arithmetic.of(model, "bf16")
    step = sizes.step(SENTENCE)
    gpt3, opt = run_plan("gpt3-175b", kv="f16"), run_plan("opt-30b", kv="f16", context=1024, batch=128)
    return {
        "tokens": SENTENCE,
        "vocabulary": model.config.vocab_size,
        "row_bytes": sizes.step(2).rows_read - sizes.step(1).rows_read,
        "weight_bytes": sizes.weight_bytes,
        "products": step.products,
        "attention_a_token": step.attention // SENTENCE,
        "equal_work": sizes.equal_work,
        "equal_bytes": sizes.equal_bytes,
        "gpt3_matrix": gpt3.shape.d_model * 2,
        "gpt3_layers": len(gpt3.shape.layers),
        "gpt3_token": gpt3.per_token.payload,
        "opt": opt.total.payload,
        "opt_token": opt.per_token.payload,
        "opt_weights": opt.weight_bytes,
        **_steps(model, tokens),
        **_causality(model, tokens),
        **_meeting(model, tokens),
        **_encoder(kvik.load("minilm", weights="f32")),
    }


def _steps(model: kvik.Model, tokens: list[int]) -> Figures:
    """One token at a time with a cache, and everything again at each step without: rows, pairs, logits."""
    config = model.config
    kept, whole = (Tally(len(tokens), config.layers, config.heads // config.kv_heads) for _ in range(2))
    last: dict[str, int] = {}
    different = 0
    with model.cache("bf16", shares=False).open() as sequence:
        for n in range(1, len(tokens) + 1):
            logits, passed = _counted(model, sequence, tokens[n - 1 : n], kept)
            with model.cache("bf16", shares=False).open() as fresh:
                again, _ = _counted(model, fresh, tokens[:n], whole)
            different += int((logits != again).sum())
            last = {stream: len(passed[0, stream]) for stream in "qkv"}
    out: Figures = {"last_step": last, "logits_different": different}
    for name, tally in (("with", kept), ("without", whole)):
        out[f"rows_{name}"] = int(tally.rows.sum()) // (config.layers * config.kv_heads)
        out[f"pairs_{name}"] = int(tally.pairs.sum()) // (config.layers * config.heads)
    return {**out, "rows_read_last": kept.step(len(tokens), cached=True).read // (config.layers * config.kv_heads)}


def _counted(
    model: kvik.Model, sequence: kvik.Sequence, chunk: list[int], tally: Tally
) -> tuple[torch.Tensor, dict[Any, Any]]:
    lens: list[States] = []

    def watch(step: Chunk) -> Chunk:
        lens.append(States(tally.watch(step)))
        return lens[0]

    logits = model.run([(sequence, chunk)], watch=watch)[0]
    return logits, lens[0].kept


def _causality(model: kvik.Model, tokens: list[int]) -> Figures:
    """Half of the text, then all of it: what of the first half is another, with the mask and without."""
    half = len(tokens) // 2
    rows = list(range(half))
    out: Figures = {"compared": 0}
    for name, lens in (("moved", States), ("moved_both_ways", BothWays)):
        before, after = seen(model, tokens[:half], lens), seen(model, tokens, lens)
        found = moved(before, after, rows)
        out["compared"] = half * len(before)
        out["compared_later"] = half * sum(name_ not in [(0, "q"), (0, "k"), (0, "v")] for name_ in before)
        out[name] = sum(found.values())
    with model.cache("bf16", shares=False).open() as sequence:
        model.run([(sequence, tokens[:half])])
        stored = [sequence.read(layer) for layer in range(model.config.layers)]
        for token in tokens[half:]:
            model.run([(sequence, [token])])
        now = [sequence.read(layer) for layer in range(model.config.layers)]
    pairs = [(a[s], b[s][:, :half]) for a, b in zip(stored, now, strict=True) for s in ("k", "v")]
    return {**out, "stored_numbers": sum(a.numel() for a, _ in pairs),
            "stored_changed": sum(int((a != b).sum()) for a, b in pairs)}  # fmt: skip


def _meeting(model: kvik.Model, tokens: list[int]) -> Figures:
    """Another token in one place: whose predictions change, with attention and with each token attending to itself."""
    place = len(tokens) // 4
    other = [*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]]
    earlier, later = list(range(place)), list(range(place + 1, len(tokens)))
    out: Figures = {"earlier": len(earlier), "later": len(later)}
    for name, lens in (("attending", States), ("alone", Alone)):
        before, after = seen(model, tokens, lens), seen(model, other, lens)
        out[f"later_changed_{name}"] = moved(before, after, later).get("logits", 0)
        out[f"earlier_changed_{name}"] = moved(before, after, earlier).get("logits", 0)
    return out


def _encoder(model: kvik.Model) -> Figures:
    """One more word to an encoder: how many earlier states, a token's at a layer, are others."""
    found = compare(model, *split(SENTENCE_OF_IT, None))
    return {"encoder_states": found.moved.size, "encoder_moved": int((found.moved > 0).sum())}


def timed(model: kvik.Model, rounds: int) -> Figures:
    """What the clock says: one more token with a cache and without, at growing lengths."""
    assert model.tokenizer is not None, "the claims are timed on text"
    ids = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics))[: TOKENS * 8])[:TOKENS]

    def show(what: str, done: int, total: int) -> None:
        print(f"\r{done / total:4.0%} {what:60}", end="", flush=True)

    growth = measure(model, ids, rounds=rounds, name="SmolLM2-135M-Instruct", show=show)
    print()
    curves(growth, DOCS / "cache.png")
    slope(growth, DOCS / "slope.png")
    place = growth.environment
    points = [
        {
            "tokens": length,
            "with_ms": growth.cached.medians[i] * 1e3,
            "without_ms": growth.without.medians[i] * 1e3,
            "speedup": growth.step_gain[i],
            "payload": growth.cached.held[i].payload,
            "overhead": growth.cached.held[i].overhead,
        }
        for i, length in enumerate(growth.lengths)
        if length >= SHOWN[0]
    ]
    each, _ = np.polyfit([p["tokens"] for p in points], [p["with_ms"] for p in points], 1)
    reached = {
        f"{name}{what}": ask(factor)
        for name, factor in (("twice", 2), ("four_times", 4))
        for what, ask in (("", growth.step_reaches), ("_text", growth.text_reaches))
    }
    where = f"{place.threads} threads of {place.cpu}, torch {place.torch}, medians of {growth.rounds} rounds"
    return {"where": where, "points": points, "shown": SHOWN, "slope_us": each * 1e6, **reached}


def main() -> None:
    """Measures, and writes both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--exact", action="store_true", help="leave the timed figures as they are")
    parser.add_argument("--rounds", type=int, default=5, help="how often each time is taken; medians count")
    options = parser.parse_args()
    model = kvik.load("smollm2", weights="int4")
    figures = exact(model)
    before = DOCS / "claims.json"
    figures["timed"] = json.loads(before.read_text())["timed"] if options.exact else timed(model, options.rounds)
    text = render(figures)
    before.write_text(json.dumps(figures, indent=1) + "\n")
    (DOCS / "claims.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
