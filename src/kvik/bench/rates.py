"""What this machine reads and multiplies in a second: the bounds that a model's steps are held against.

Reading: a buffer several times the largest cache, by the kernels' read loop; where they were not built, by a sum of
torch. Products: of a model's own weights, or of random ones; between two passes the buffer is read, so that weights
come from memory and not from a cache.

Legend: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvik.bench.processor import last_cache
from kvik.cache.limits import memory_available
from kvik.ops import loader
from kvik.ops.linear import Linear

Clock = Callable[[], float]
LEAST_BUFFER, MOST_BUFFER = 64 << 20, 1 << 30
PATIENCE, REPEATS = 0.3, 3  # a figure is taken for so many seconds, and so many times at the least
WARM = 0.05  # and not before it ran for so long: pages are touched, threads are awake


def clock_of(device: torch.device) -> Clock:
    """Seconds, once all that was asked of the device is done."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def read_buffer(device: torch.device) -> Tensor:
    """uint8, written once; see `buffer_bytes`."""
    size = buffer_bytes(last_cache() if device.type == "cpu" else None, memory_available())
    return torch.ones(size, dtype=torch.uint8, device=device)


def buffer_bytes(cache: int | None, free: int) -> int:
    """Four times the largest cache, 256 MiB where that is not known, and at most an eighth of the memory that is free.

    >>> buffer_bytes(32 << 20, 8 << 30) >> 20
    128
    """
    wanted = 256 << 20 if cache is None else 4 * cache
    size = min(max(wanted, LEAST_BUFFER), MOST_BUFFER, free // 8)
    return max(size, 1 << 20) >> 3 << 3  # whole 64-bit numbers, for torch's sum


def bandwidth(buffer: Tensor, clock: Clock) -> float:
    """Bytes a second of one pass over a buffer, read by all of kvik's threads."""
    module: Any = loader.built() if buffer.device.type == "cpu" else None
    if module is not None:
        return float(module.bandwidth(buffer.data_ptr(), buffer.numel(), 1))
    numbers = buffer.view(torch.int64)
    started = clock()
    numbers.sum()
    return buffer.numel() / (clock() - started)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside it the kernels and torch compute with so many threads."""
    module: Any = loader.built()
    before, kernels = torch.get_num_threads(), 0 if module is None else module.threads()
    torch.set_num_threads(count)
    if module is not None:
        module.set_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if module is not None:
            module.set_threads(kernels)


def product_inputs(linears: Sequence[Linear], rows: int, device: torch.device) -> list[Tensor]:
    """Random rows for each product, f32 [T, K]; products of the same K share them."""
    made: dict[int, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for linear in linears:
        if linear.inputs not in made:
            made[linear.inputs] = torch.randn((rows, linear.inputs), generator=generator).to(device)
    return [made[linear.inputs] for linear in linears]


@torch.inference_mode()
def product_seconds(linears: Sequence[Linear], inputs: Sequence[Tensor], clock: Clock) -> float:
    """Seconds of all products once, in order."""
    started = clock()
    for linear, x in zip(linears, inputs, strict=True):
        linear(x)
    return clock() - started


def operations(linears: Sequence[Linear], rows: int) -> int:
    """Of all products once; a multiplication and its addition are two."""
    return sum(2 * rows * linear.inputs * linear.outputs for linear in linears)


def repeated(figure: Callable[[], float], clock: Clock = time.perf_counter) -> list[float]:
    """A figure, taken for PATIENCE seconds and REPEATS times at the least, after it has run for WARM seconds."""
    taken: list[float] = []
    started = clock()
    figure()
    while clock() - started < WARM:
        figure()
    started = clock()
    while len(taken) < REPEATS or clock() - started < PATIENCE:
        taken.append(figure())
    return taken
