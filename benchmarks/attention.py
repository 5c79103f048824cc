"""Attention alone over SmolLM2's shapes (30 layers, 3 lanes of 3 queries, width 64), beside the read bandwidth.

    python benchmarks/attention.py [--contexts 1024,4096,8192] [--specs bf16,int8,k8v4,int4] [--prefill 2048]

Decode: batch 1, caches swept between repeats; a round measures every spec once, so that noise falls on all; medians;
beside them the best of each. GB/s are stored bytes of the rows that are read. The bandwidth is that of a read loop over
all threads, measured in the same rounds. Prefill: one chunk of a text, its own rows included; 4 · width operations
a (query head, row) pair.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

from kvik.cache.cache import Cache
from kvik.cache.sequence import Sequence
from kvik.cache.spec import LayerShape, Spec

LAYERS, LANES, SHARED, WIDTH = 30, 3, 3, 64
SHAPES = [LayerShape(LANES, (("k", WIDTH), ("v", WIDTH)))] * LAYERS


def rows(tokens: int, heads: int) -> torch.Tensor:
    """f32 [tokens, heads, width]."""
    return torch.randn(tokens, heads, WIDTH)


def filled(kv: str, context: int) -> Sequence:
    """A sequence of random rows, in a cache of its own."""
    sequence = Cache(Spec.parse(kv, SHAPES), memory=1 << 30, shares=False).open()
    for start in range(0, context, 512):
        with sequence.append([0] * min(512, context - start)) as step:
            k, v = rows(len(step.tokens), LANES), rows(len(step.tokens), LANES)
            for layer in range(LAYERS):
                step.append(layer, k=k, v=v)
    return sequence


def attended(sequence: Sequence, tokens: int) -> float:
    """Seconds that attention takes for a chunk, all layers; the sequence stays as it was."""
    length, q, new = len(sequence), rows(tokens, LANES * SHARED), rows(tokens, LANES)
    with sequence.append([0] * tokens) as step:
        for layer in range(LAYERS):
            step.append(layer, k=new, v=new)
        start = time.perf_counter()
        for layer in range(LAYERS):
            step.attend(layer, q, scale=WIDTH**-0.5)
        took = time.perf_counter() - start
    sequence.trim(length)
    return took


def bandwidth(buffer: torch.Tensor) -> float:
    """Bytes a second, read by all threads; sweeps the caches on its way."""
    from kvik import _native

    return float(_native.bandwidth(buffer.data_ptr(), buffer.numel(), 2))


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--contexts", default="1024,4096,8192")
    parser.add_argument("--specs", default="bf16,int8,k8v4,int4")
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--reference", action="store_true", help="the plain torch implementation")
    options = parser.parse_args()
    if options.reference:
        os.environ["KVIK_OPS"] = "reference"
    specs, buffer = options.specs.split(","), torch.ones(1 << 28, dtype=torch.uint8)
    for context in map(int, options.contexts.split(",")):
        sequences = {kv: filled(kv, context) for kv in specs}
        times: dict[str, list[float]] = {kv: [] for kv in specs}
        speeds: list[float] = []
        for _ in range(options.repeats):
            for kv in specs:
                speeds.append(bandwidth(buffer))
                times[kv].append(attended(sequences[kv], 1))
        bound = statistics.median(speeds)
        print(f"decode at {context}: read bandwidth {bound / 1e9:.1f} GB/s")
        for kv in specs:
            took = statistics.median(times[kv])
            size = LAYERS * LANES * (context + 1) * sequences[kv].cache.spec.groups[0].layout.row_bytes
            best = min(times[kv])
            print(f"  {kv:8} {took * 1e3:7.2f} ms {size / took / 1e9:6.1f} GB/s {size / took / bound:6.0%}", end="")
            print(
                f"   best {best * 1e3:7.2f} ms {size / best / 1e9:6.1f} GB/s {size / best / max(speeds):6.0%}",
                flush=True,
            )
    if options.prefill:
        print(f"prefill of {options.prefill} in chunks of 512")
        for kv in specs:
            took, pairs = 0.0, 0
            for start in range(0, options.prefill, 512):
                took += min(attended(filled(kv, start), 512) for _ in range(2))
                pairs += sum(range(start + 1, start + 513))
            work = 4 * WIDTH * pairs * LANES * SHARED * LAYERS
            print(f"  {kv:8} {took * 1e3:7.0f} ms {work / took / 1e9:6.0f} GFLOP/s", flush=True)


if __name__ == "__main__":
    main()
