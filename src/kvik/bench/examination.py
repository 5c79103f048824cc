"""Finds out what `kvik.bench.machine` describes, and measures it, in less than ten seconds."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from kvik import __version__
from kvik.bench import rates
from kvik.bench.machine import (
    VARIABLES,
    Cuda,
    Held,
    Kernels,
    Machine,
    Measured,
    Models,
    Padding,
    Rate,
    Reading,
    Setting,
    Threads,
    Versions,
)
from kvik.bench.processor import processor, stolen
from kvik.bench.spread import spread
from kvik.errors import WeightsError
from kvik.models.files.prepare import home_path, prepared
from kvik.ops import loader
from kvik.ops.backend import backend
from kvik.ops.linear import FORMATS, Format, Linear, row_multiple

Show = Callable[[str, int, int], None]
CPU = torch.device("cpu")
LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # of SmolLM2: qkv, o, gate and up, down
LAYERS, MANY = 6, 512  # layers that one row passes; rows that one product takes
MODEST = (1536, 576)
PACKED: tuple[Format, ...] = ("int4", "int8")


def examine(
    measure: bool = True, show: Show = lambda what, done, total: None, *, ours: Collection[str] = ()
) -> Machine:
    """What this machine and this installation have.

    Args:
        measure: also memory, products and paddings; some seconds.
        show: called with (what is measured next, steps done, steps in all), never while something is timed.
        ours: environment variables that the running command set for itself.

    Raises:
        UsageError: KVIK_OPS or KVIK_ISA has a value that it can't have, or asks for what is not there.
    """
    kernels = _kernels()
    module: Any = loader.built()
    pool, spin = (None, None) if module is None else (int(module.threads()), int(module.spin()))
    found = processor()
    return Machine(
        versions=Versions(__version__, platform.python_version(), torch.__version__, _version("transformers")),
        processor=found,
        kernels=kernels,
        threads=Threads(pool, spin, torch.get_num_threads()),
        settings=tuple(_setting(name, ours) for name in VARIABLES),
        cuda=Cuda(_devices()),
        models=_models(),
        measured=_measure(show, found.cores) if measure else None,
    )


def _kernels() -> Kernels:
    used: Any = loader.chosen()
    module: Any = loader.built()
    rows = backend(CPU).__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    products = "torch packed" if loader.native() is None else "native"
    if module is None:
        return Kernels(None, None, (), (), rows, products)
    isa = None if used is None else str(used.isa())
    return Kernels(str(module.__file__), isa, tuple(module.built()), tuple(module.available()), rows, products)


def _version(package: str) -> str:
    """Of an installed package: not imported, which would take a second."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _setting(name: str, ours: Collection[str]) -> Setting:
    value = os.environ.get(name)
    return Setting(name, value, "" if value is None else "kvik" if name in ours else "you")


def _devices() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _models() -> Models:
    held = tuple(Held(each.name, str(each.folder), each.source, each.nbytes) for each in prepared())
    return Models(str(home_path()), held)


def _measure(show: Show, cores: int) -> Measured:
    steps = 2 + 2 + len(FORMATS)
    before = stolen()
    buffer = rates.read_buffer(CPU)
    memory = []
    for done, count in enumerate(dict.fromkeys((1, cores))):
        show(f"memory, {count} thread{'' if count == 1 else 's'}", done, steps)
        memory.append(_reading(buffer, count))
    found: list[Rate] = []
    for done, fmt in enumerate(PACKED, start=2):
        show(f"{fmt} products, 1 row", done, steps)
        found.append(_one_row(fmt, buffer))
    paddings = []
    for done, fmt in enumerate(reversed(FORMATS), start=4):
        show(f"{fmt} products, {MANY} rows", done, steps)
        padding, rate = _many_rows(fmt)
        paddings.append(padding)
        found += [] if rate is None else [rate]
    taken, ticks = (after - first for after, first in zip(stolen(), before, strict=True))
    return Measured(buffer.numel(), tuple(memory), tuple(found), tuple(paddings), taken / ticks if ticks else 0.0)


def _reading(buffer: torch.Tensor, count: int) -> Reading:
    with rates.threads(count):
        return Reading(count, spread(rates.repeated(lambda: rates.bandwidth(buffer, time.perf_counter))))


def _one_row(fmt: Format, buffer: torch.Tensor) -> Rate:
    """Weights of a few layers, once each from memory: the buffer is read in between, so that no cache holds them."""
    linears = [_random(shape, fmt) for _ in range(LAYERS) for shape in LAYER]
    inputs = rates.product_inputs(linears, 1, CPU)

    def seconds() -> float:
        rates.bandwidth(buffer, time.perf_counter)
        return rates.product_seconds(linears, inputs, time.perf_counter)

    size = sum(linear.nbytes for linear in linears)
    return Rate(fmt, linears[0].arithmetic, 1, "B/s", spread(rates.repeated(seconds)).per(size))


def _many_rows(fmt: Format) -> tuple[Padding, Rate | None]:
    """The padding that a format needs, and how fast it multiplies many rows; None where it is refused."""
    try:
        linear = _random(MODEST, fmt)
    except WeightsError:
        return Padding(fmt, "torch", None), None
    padding = Padding(fmt, linear.arithmetic, 1 if linear.packed else row_multiple(linear))
    inputs = rates.product_inputs([linear], MANY, CPU)
    seconds = rates.repeated(lambda: rates.product_seconds([linear], inputs, time.perf_counter))
    figure = spread(seconds).per(rates.operations([linear], MANY))
    return padding, Rate(fmt, linear.arithmetic, MANY, "op/s", figure)


def _random(shape: tuple[int, int], fmt: Format) -> Linear:
    return Linear(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02, None, fmt, CPU)
