"""What `examine` found as tables, for a terminal of 80 columns or a file."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvik.bench.machine import ISA, OPS, Machine, Measured, Rate, Setting
from kvik.bench.spread import Spread
from kvik.bench.words import three
from kvik.units import format_bytes


def render_machine(machine: Machine, console: Console) -> None:
    """Prints what is there, what was measured, and a line for each thing that costs speed."""
    console.print(_title(machine))
    console.print()
    console.print(_facts(machine))
    if machine.measured is not None:
        console.print()
        console.print(_measured(machine.measured))
        console.print()
        console.print(_paddings(machine.measured))
    console.print()
    for line in machine.warnings:
        console.print(Text.assemble(("! ", "bold yellow"), (line, "yellow")))
    if not machine.warnings:
        unsaid = "" if machine.measured else " (nothing was measured)"
        console.print(Text(f"nothing that costs speed was found{unsaid}", "green"))


def _title(machine: Machine) -> Text:
    it = machine.processor
    parts = [f"{it.cores} core{'' if it.cores == 1 else 's'} usable"]
    if it.quota is not None:
        parts.append(f"the container's limit is {three(it.quota)}")
    parts.append(f"{format_bytes(it.memory)} of memory, {format_bytes(it.free)} free · load {it.load:.1f}")
    return Text.assemble((f"kvik {machine.versions.kvik}", "bold"), f"  on {it.name}\n", (" · ".join(parts), "dim"))


def _facts(machine: Machine) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in facts(machine):
        table.add_row(label, text)
    return table


def facts(machine: Machine) -> Iterator[tuple[str, str]]:
    """What is there: (about what, in a line or two)."""
    versions = machine.versions
    yield "versions", f"torch {versions.torch} · transformers {versions.transformers} · Python {versions.python}"
    yield from _kernels(machine)
    threads = machine.threads
    own = "" if threads.kernels is None else f"kvik {threads.kernels}, idle ones sleep after {threads.spin} µs · "
    yield "threads", f"{own}torch {threads.torch}"
    label = "environment"
    for setting in machine.settings:
        if setting.value is not None or setting.name not in (OPS, ISA):
            yield label, _setting(setting)
            label = ""
    yield "CUDA", ", ".join(machine.cuda.devices) or "none that torch can use"
    models = machine.models
    count = f"{len(models.held)} prepared model{'' if len(models.held) == 1 else 's'}"
    yield "models", f"{models.home}: {count}, {format_bytes(models.nbytes)}"
    for each in models.held:
        yield "", f"{each.name}, {format_bytes(each.nbytes)}, from {each.source}"


def _kernels(machine: Machine) -> Iterator[tuple[str, str]]:
    kernels = machine.kernels
    if kernels.path is None:
        yield "kernels", "not built: plain torch is used, several times slower"
    else:
        yield "kernels", kernels.path
        others = [name for name in kernels.available if name != kernels.isa]
        absent = [name for name in kernels.built if name not in kernels.available]
        said = ["not in use" if kernels.isa is None else f"{kernels.isa} in use"]
        said += [f"also here: {', '.join(others)}"] * bool(others)
        said += [f"built, not here: {', '.join(absent)}"] * bool(absent)
        yield "", " · ".join(said)
    yield "served by", f"append, attend {kernels.rows} · products int4, int8 {kernels.products}, bf16, f32 torch"


def _setting(setting: Setting) -> str:
    if setting.value is None:
        return f"{setting.name} not set: {setting.meaning}"
    return f"{setting.name}={setting.value}, set by {setting.by}: {setting.meaning}"


def _measured(measured: Measured) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column("measured", no_wrap=True)
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("least to most", justify="right", no_wrap=True)
    table.add_column("by", no_wrap=True)
    for reading in measured.memory:
        threads = f"{reading.threads} thread{'' if reading.threads == 1 else 's'}"
        table.add_row(f"memory read, {threads}", *_giga(reading.figure, "GB/s"))
    for rate in measured.rates:
        rows = "1 row" if rate.rows == 1 else f"{rate.rows} rows"
        what = "weights read" if rate.unit == "B/s" else "products"
        table.add_row(f"{rate.format} {what}, {rows}", *_giga(rate.figure, _unit(rate)), rate.arithmetic)
    return table


def _unit(rate: Rate) -> str:
    if rate.unit == "B/s":
        return "GB/s"
    return "GFLOP/s" if rate.format in ("bf16", "f32") else "GOP/s"


def _giga(figure: Spread, unit: str) -> tuple[str, str, str]:
    median, least, most = (three(each / 1e9) for each in (figure.median, figure.least, figure.most))
    return median, unit, f"{least} to {most}"


def _paddings(measured: Measured) -> Text:
    """Law 1, in a line or two."""
    said: dict[str, list[str]] = {}
    for padding in measured.paddings:
        if padding.rows is None:
            what = "refused here, since no padding keeps a row's bits the same"
        else:
            what = "no padding needed" if padding.rows == 1 else f"rows are padded to {padding.rows}"
        said.setdefault(what, []).append(f"{padding.format} ({padding.arithmetic})")
    lines = " · ".join(f"{', '.join(formats)}: {what}" for what, formats in said.items())
    return Text(f"for the same bits beside any number of rows, {lines}")
