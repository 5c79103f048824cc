"""The products of SmolLM2's layers at several numbers of rows: native int4 and int8 beside torch's operators.

python benchmarks/products.py [--rows 1,4,16,64,512,1024] [--rounds 7]

Weights are random, in SmolLM2's shapes; few rows pass through 30 layers, so that no cache holds them, many through 3.
Every round runs each kind once, one after another; medians. GB/s are of weights as they are held, beside what a sum
over 256 MB reads; GOP/s are 2 · rows · inputs · outputs. `linear_dynamic` is a mark of speed only: it has one scale for
all rows, so that a neighbour moves a row, and a KL divergence of 0.43.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch

from kvik.ops import linear as ops
from kvik.ops.linear import Format, Linear

CPU = torch.device("cpu")
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # qkv, o, gate and up, down
LAYERS, FEW = 30, 3
READ = 256 << 20
Product = Callable[[torch.Tensor], Any]


def linears(fmt: Format, layers: int, native: bool) -> list[Linear]:
    """Random weights; without the native part, torch's packed form of them."""
    honest = ops.native
    ops.native = honest if native else lambda: None
    try:
        return [Linear(torch.randn(shape) * 0.02, None, fmt, CPU) for _ in range(layers) for shape in SHAPES]
    finally:
        ops.native = honest


def dynamic(shape: tuple[int, int]) -> Product:
    """torch's int8 product with one activation scale for the whole batch."""
    warnings.filterwarnings("ignore", message=".*deprecated.*")
    weight = torch.quantize_per_tensor(torch.randn(shape), 0.02, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed)


def kinds(layers: int) -> dict[str, tuple[list[Product], int]]:
    """Name → (products, bytes of their weights)."""
    found: dict[str, tuple[list[Product], int]] = {}
    named: tuple[tuple[str, Format, bool], ...] = (
        ("native int4", "int4", True),
        ("native int8", "int8", True),
        ("torch int4", "int4", False),
        ("torch int8", "int8", False),
        ("torch bf16", "bf16", False),
    )
    for name, fmt, native in named:
        made = linears(fmt, layers, native)
        found[name] = (list(made), sum(each.nbytes for each in made))
    found["linear_dynamic"] = ([dynamic(shape) for _ in range(layers) for shape in SHAPES], 0)
    return found


def timed(products: list[Product], inputs: dict[int, torch.Tensor]) -> float:
    """Seconds for each product once."""
    started = time.perf_counter()
    for index, product in enumerate(products):
        product(inputs[SHAPES[index % len(SHAPES)][1]])
    return time.perf_counter() - started


def bandwidth(data: torch.Tensor) -> float:
    """Bytes a second that a sum over memory reads."""
    started = time.perf_counter()
    data.sum()
    return data.nbytes / (time.perf_counter() - started)


@torch.inference_mode()
def main() -> None:
    """Prints a table for each number of rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="1,4,16,64,512,1024")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = torch.ones(READ // 8, dtype=torch.int64)
    made: dict[int, dict[str, tuple[list[Product], int]]] = {}
    for rows in map(int, options.rows.split(",")):
        layers = LAYERS if rows <= 16 else FEW
        if layers not in made:
            made = {layers: kinds(layers)}
        inputs = {width: torch.randn(rows, width) for _, width in SHAPES}
        times: dict[str, list[float]] = {name: [] for name in made[layers]}
        reads = []
        for turn in range(options.rounds + 1):
            reads.append(bandwidth(data))
            for name, (products, _) in made[layers].items():
                taken = timed(products, inputs)
                if turn:  # the first round warms up
                    times[name].append(taken)
        operations = 2 * rows * layers * sum(a * b for a, b in SHAPES)
        read = statistics.median(reads)
        print(f"{rows} rows, {layers} layers; memory reads {read / 1e9:.1f} GB/s")
        mark = statistics.median(times["torch int4"])
        for name, (_, size) in made[layers].items():
            taken = statistics.median(times[name])
            speed = f"{size / taken / 1e9:6.1f} GB/s ({size / taken / read:4.0%})" if rows == 1 and size else ""
            print(
                f"  {name:14} {taken * 1e3:8.2f} ms {operations / taken / 1e9:7.0f} GOP/s "
                f"{mark / taken:6.2f} x torch int4  {speed}"
            )


if __name__ == "__main__":
    main()
