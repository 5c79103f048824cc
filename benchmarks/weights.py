"""What each weight format costs in quality: KL divergence of SmolLM2's predictions from f32 weights' over f32 rows.

python benchmarks/weights.py [--tokens 768] [--kv f32]
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import torch

import kvik
from kvik.ops.linear import FORMATS


def main() -> None:
    """Prints one line a format."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--kv", default="f32", help="what the rows are stored as, beside f32 weights over f32 rows")
    options = parser.parse_args()
    reference = torch.empty(0)
    for weights in FORMATS:
        model = kvik.load("smollm2", weights=weights)
        tokens = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))[: options.tokens]
        rows = "f32" if weights == "f32" else options.kv
        with model.cache(rows, shares=False).open() as sequence:
            got = torch.log_softmax(model.run([(sequence, tokens)], every=True), dim=-1)
        if weights == "f32":
            reference = got
        kl = (reference.exp() * (reference - got)).sum(dim=-1)
        print(f"{weights:5} {model.nbytes / 1e6:7.1f} MB  mean KL {kl.mean():.2e}  max {kl.max():.2e}", flush=True)


if __name__ == "__main__":
    main()
