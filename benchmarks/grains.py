"""What it costs to drop the same share of rows at four grains: requests, layers, heads, tokens.

    python benchmarks/grains.py [--keep 50 25] [--prefix 1024] [--scored 256] [--documents 4] [--json FILE]

Text: `pydoc_data.topics`. Each line keeps about the same bytes of a prompt's bf16 rows, as the sequences themselves
account for them, and is held against the full cache: KL of the predictions that follow, in nats (`kvik.eval`).

    requests   so many of all requests keep every row, the others none of the prompt: the mean over both
    layers     so many layers keep every row, the others 4 sinks and 64 recent rows: which third is the best is tried
    heads      so many heads, those that look far back (`kvik heads`), keep every row; the others as above
    tokens     in every lane so many rows, as a policy chooses, or the most recent ones
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path
from pydoc_data.topics import topics

from rich.progress import Progress

import kvik
from kvik.eval import evaluate, measure_heads

SINKS, RECENT = 4, 64
NEAR = f"bf16+window:{RECENT},sinks:{SINKS}"
FULL, NOTHING = "bf16", "bf16+knorm:0.01%,sinks:0,recent:1"
TOKENS = ("keydiff", "ada(expected)", "kvzip")


def layers(model: kvik.Model, count: int) -> dict[str, str]:
    """Specs in which so many layers keep every row: the first, middle or last ones, or evenly spread."""
    most = model.config.layers
    first = (most - count) // 2
    chosen = {
        "the first": range(count),
        "the middle": range(first, first + count),
        "the last": range(most - count, most),
        "evenly spread": sorted({round(i * (most - 1) / max(count - 1, 1)) for i in range(count)}),
    }
    return {f"layers, {where}": f"{NEAR}; layers {','.join(map(str, them))}: bf16" for where, them in chosen.items()}


def grains(model: kvik.Model, ids: list[int], keep: int, prefix: int) -> dict[str, str]:
    """Specs by name that keep `keep` percent of a prompt's rows."""
    fixed = Fraction(SINKS + RECENT, prefix)
    far = max((Fraction(keep, 100) - fixed) / (1 - fixed), Fraction(0))  # of layers or heads: the others hold some too
    heads = measure_heads(model, ids[:2048], kv="bf16", far=far, window=RECENT, sinks=SINKS).spec
    window = prefix * keep // 100 - SINKS
    found = layers(model, round(far * model.config.layers)) | {"heads that look far": heads}
    found |= {f"tokens, {name}": f"bf16+{name}:{keep}%" for name in TOKENS}
    return found | {"tokens, the most recent": f"bf16+window:{window},sinks:{SINKS}"}


def main() -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, nargs="+", default=[50, 25], help="percent of the rows")
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--weights", default="f32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = kvik.load("smollm2", weights=options.weights)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    plans = {keep: grains(model, ids, keep, options.prefix) for keep in options.keep}
    specs = [FULL, NOTHING, *(spec for named in plans.values() for spec in named.values())]
    with Progress(transient=True) as progress:
        task = progress.add_task("measure")
        found = evaluate(
            model, ids, specs,
            prefix=options.prefix, scored=options.scored, documents=options.documents,
            show=lambda what, done, total: progress.update(task, description=what[:60], completed=done, total=total),
        )  # fmt: skip
    measured = {each.spec: each for each in found.measured}
    full, nothing = (measured[str(model.spec(spec))] for spec in (FULL, NOTHING))
    rows = []
    for keep, named in plans.items():
        part = keep / 100
        held = part * full.held.allocated + (1 - part) * nothing.held.allocated
        kl, delta = (part * a + (1 - part) * b for a, b in ((full.kl, nothing.kl), (full.delta, nothing.delta)))
        rows.append((keep, "requests", held, kl, delta))
        for name, spec in named.items():
            each = measured[str(model.spec(spec))]
            rows.append((keep, name, each.held.allocated, each.kl, each.delta))
    print(f"{options.documents} documents, {options.prefix} tokens each, then {options.scored} predictions")
    print("| kept | grain | bytes, of bf16 | mean KL | nats more than f32 |\n|---|---|---|---|---|")
    for keep, name, held, kl, delta in rows:
        print(f"| {keep} % | {name} | {held / full.held.allocated:.1%} | {kl:.3g} | {delta:+.3f} |")
    if options.json:
        keys = ("keep", "grain", "bytes", "kl", "delta")
        options.json.write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
