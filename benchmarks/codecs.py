"""What each codec costs in quality: KL divergence of SmolLM2's predictions from those over f32 rows, weights in f32.

    python benchmarks/codecs.py [--tokens 2048] [CODEC …]

Text: `pydoc_data.topics`, which every Python has. A row of the table is one spec: bytes a row and lane, mean and 99 %
KL in nats, share of tokens whose likeliest successor stays the same.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import torch

import kvik

DEFAULT = ["bf16", "f16", "int8", "int8-rot", "k8v4", "k4v8", "int4", "int4-plain", "int4-row"]


def log_probabilities(model: kvik.Model, tokens: list[int], kv: str) -> torch.Tensor:
    """f32 [tokens, vocabulary], by teacher forcing in chunks of 256."""
    parts = []
    with model.cache(kv, shares=False).open() as sequence:
        for start in range(0, len(tokens), 256):
            logits = model.run([(sequence, tokens[start : start + 256])], every=True)
            parts.append(torch.log_softmax(logits, dim=-1))
            sequence.settle()
    return torch.cat(parts)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("specs", nargs="*", default=DEFAULT)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=1, help="texts, from different places")
    options = parser.parse_args()
    model = kvik.load("smollm2", weights="f32")
    text = "\n".join(topics[name] for name in sorted(topics))
    everything = model.tokenizer.encode(text)
    step = len(everything) // options.samples
    texts = [everything[i * step : i * step + options.tokens] for i in range(options.samples)]
    want = [log_probabilities(model, tokens, "f32") for tokens in texts]
    print(f"{'spec':16} {'B/row':>6} {'mean KL':>9} {'99 % KL':>9} {'same top':>9}")
    for spec in options.specs:
        kl, same = [], []
        for tokens, reference in zip(texts, want, strict=True):
            got = log_probabilities(model, tokens, spec)
            kl.append((reference.exp() * (reference - got)).sum(dim=-1))
            same.append((reference.argmax(-1) == got.argmax(-1)).float())
        values, agree = torch.cat(kl), torch.cat(same).mean()
        size = model.spec(spec).groups[0].layout.row_bytes
        print(f"{spec:16} {size:6} {values.mean():9.2e} {values.quantile(0.99):9.2e} {agree:9.1%}", flush=True)


if __name__ == "__main__":
    main()
