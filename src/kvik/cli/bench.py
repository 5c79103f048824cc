"""`kvik bench`: what a cache saves and costs, measured here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvik.cli.common import (
    DeviceOption,
    JsonOption,
    KvOption,
    ModelOption,
    WeightsOption,
    app,
    check_spec,
    load_model,
    progress,
    stdout,
)  # fmt: skip
from kvik.errors import StorageError, UsageError

if TYPE_CHECKING:
    from kvik.bench.growth import Growth
    from kvik.models.model import Model

SHORTEST, MOST_SEQUENCES = 16, 1024

group = typer.Typer(help="What a cache saves and costs, measured here.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="bench")


@group.callback()
def _group() -> None:
    """What a cache saves and costs, measured here."""


@group.command()
def cache(
    model: ModelOption = "smollm2",
    kv: KvOption = "bf16",
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    tokens: Annotated[int, typer.Option(help="The longest text; steps are measured from one token up to this.")] = 1024,
    batch: Annotated[str, typer.Option(help="Numbers of sequences at once, 128 tokens each.")] = "1,2,4,8",
    rounds: Annotated[int, typer.Option(help="How often each time is taken; medians count.")] = 3,
    text: Annotated[Path | None, typer.Option(help="A file to take the text from; by default Python's topics.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw all curves into this .png or .svg file.")] = None,
    plot_step: Annotated[Path | None, typer.Option(help="Draw the time of one more token, in one panel.")] = None,
    as_json: JsonOption = False,
) -> None:
    """A growing text, with a cache and without: what is computed, read and held, and the time.

    Counts and bytes stand beside their formulas, times beside what shorter texts predict. It takes a minute or two.
    """
    sizes = _sizes(batch)
    _check(tokens, rounds, plot, plot_step)
    check_spec(kv, allow_none=False)
    source = _read(text)
    loaded = load_model(model, weights, device)
    ids = _ids(loaded, source, tokens, text)
    from kvik.bench import measure, render

    name = Path(model).name if Path(model).exists() else model
    with progress() as show:
        growth = measure(loaded, ids, kv=kv, batch=sizes, rounds=rounds, name=name, show=show)
    if as_json:
        print(json.dumps(growth.to_dict(), indent=2))
    else:
        render(growth, stdout(), pictures=plot is not None or plot_step is not None)
    _draw(growth, plot, plot_step)


def _sizes(batch: str) -> list[int]:
    parts = [part.strip() for part in batch.split(",")]
    if not all(
        part.isascii() and part.isdecimal() and len(part) < 9 and 1 <= int(part) <= MOST_SEQUENCES for part in parts
    ):
        raise UsageError(
            f"--batch {batch!r} is no list of numbers from 1 to {MOST_SEQUENCES:,}, so no batch can be made; "
            "write --batch 1,2,4,8"
        )
    return sorted({int(part) for part in parts})


def _check(tokens: int, rounds: int, plot: Path | None, plot_step: Path | None) -> None:
    if tokens < SHORTEST:
        raise UsageError(f"--tokens {tokens} shows no growth; use at least {SHORTEST}")
    if rounds < 1:
        raise UsageError(f"--rounds {rounds} measures nothing; use at least 1")
    if plot is not None and plot_step is not None and plot.absolute() == plot_step.absolute():
        raise UsageError(f"--plot and --plot-step both name {plot}, so one would overwrite the other; name two files")
    for option, path in (("--plot", plot), ("--plot-step", plot_step)):
        if path is not None:
            _check_picture(option, path)


def _check_picture(option: str, path: Path) -> None:
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"{option} {path}: pictures are PNG or SVG, by the file's ending; name it {path.stem}.png")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent} to write to; make it, or name another")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option} {path}: can't be written to; name another file")


def _read(path: Path | None) -> str:
    """The text to measure with: of a file, or the topics that come with every Python."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"--text {path}: can't be read ({error.strerror}); name a text file") from None


def _ids(model: Model, text: str, tokens: int, path: Path | None) -> list[int]:
    most = model.config.max_positions
    if tokens > most:
        raise UsageError(
            f"--tokens {tokens:,} is more than the {most:,} positions of {model.config.name}; use at most {most}"
        )
    assert model.tokenizer is not None, "a model that was loaded has a tokenizer"
    ids = model.tokenizer.encode(text)
    if len(ids) < tokens:
        where = "Python's topics have" if path is None else f"--text {path} has"
        raise UsageError(
            f"{where} {len(ids):,} tokens, and --tokens asks for {tokens:,}; give a longer text, or fewer --tokens"
        )
    return ids[:tokens]


def _draw(growth: Growth, plot: Path | None, plot_step: Path | None) -> None:
    """Pictures last: the figures are printed, whatever becomes of the files."""
    from kvik.bench import curves, slope

    for path, picture in ((plot, curves), (plot_step, slope)):
        if path is None:
            continue
        try:
            picture(growth, path)
        except OSError as error:
            raise StorageError(f"{path}: can't be written ({error.strerror}); name another file") from None
        print(f"drawn: {path}", file=sys.stderr)
