"""Decode speed of kvik alone at short context, beside the bound that its weight products set, in one run.

    python benchmarks/decode.py [--weights int4] [--kv bf16] [--context 32] [--tokens 64] [--rounds 7]

Each round decodes `tokens` tokens after a prompt of `context`; then the same number of steps does the packed products
alone. Medians of the rounds, and the torch calls of one layer's step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from pydoc_data.topics import topics

import torch
from torch.overrides import TorchFunctionMode

import kvik
from kvik.ops.linear import Linear


class Calls(TorchFunctionMode):
    """Counts torch calls: all, and those that compute rather than look at a tensor in another shape."""

    VIEWS = frozenset(
        {
            *(
                "__get__",
                "__getitem__",
                "view",
                "reshape",
                "unflatten",
                "flatten",
                "permute",
                "transpose",
                "t",
                "narrow",
            ),
            *("unbind", "chunk", "expand", "unsqueeze", "view_as_complex", "view_as_real"),
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.all = self.computing = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.computing += getattr(func, "__name__", "") not in self.VIEWS
        return func(*args, **(kwargs or {}))


def products(model: kvik.Model) -> list[Linear]:
    """Every linear product of one step, in order."""
    blocks = [[b.qkv, b.o, b.up, b.down] for b in model.decoder.blocks]
    return [linear for block in blocks for linear in block] + [model.decoder.head]


def main() -> None:
    """Prints medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--kv", default="bf16")
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model = kvik.load("smollm2", weights=options.weights)
    prompt = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))[: options.context]
    linears = products(model)
    inputs = [torch.randn(1, linear.inputs) for linear in linears]
    cache = model.cache(options.kv, shares=False)
    whole, bound = [], []
    for _ in range(options.rounds):
        with cache.open() as sequence:
            logits = model.run([(sequence, prompt)])
            started = time.perf_counter()
            for _ in range(options.tokens):
                sequence.settle()
                logits = model.run([(sequence, [int(logits[0].argmax())])])
            whole.append((time.perf_counter() - started) / options.tokens)
        with torch.inference_mode():
            started = time.perf_counter()
            for _ in range(options.tokens):
                for linear, x in zip(linears, inputs, strict=True):
                    linear(x)
            bound.append((time.perf_counter() - started) / options.tokens)
    with cache.open() as sequence, Calls() as calls:
        model.run([(sequence, prompt)])
        calls.all = calls.computing = 0
        model.run([(sequence, [1])])
    step, floor, layers = statistics.median(whole), statistics.median(bound), model.config.layers
    print(
        f"weights {options.weights}, cache {options.kv}, context {options.context}-{options.context + options.tokens}"
    )
    spread = f"{min(whole) * 1e3:.2f}-{max(whole) * 1e3:.2f}"
    print(f"decode    {1 / step:7.1f} tokens/s  {step * 1e3:.2f} ms a token (rounds: {spread})")
    print(f"products  {1 / floor:7.1f} steps/s   {floor * 1e3:.2f} ms: {floor / step:.0%} of the step")
    print(f"torch calls a layer: {calls.computing / layers:.0f} that compute, {calls.all / layers:.0f} with views")


if __name__ == "__main__":
    main()
