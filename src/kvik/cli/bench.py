"""`kvik bench`: what a cache saves and costs, and how fast kvik is, measured here."""

from __future__ import annotations

import json
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
from kvik.cli.files import TextOption, check_pictures, draw, model_name, read_text
from kvik.errors import UsageError

if TYPE_CHECKING:
    from kvik.models.model import Model

SHORTEST, MOST_SEQUENCES, MOST_TOKENS = 16, 1024, 10_000_000
CONTEXTS = "32,1024,4096,8192"

ABOUT = "What a cache saves and costs, and how fast kvik is, measured here."
group = typer.Typer(help=ABOUT, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="bench")

RoundsOption = Annotated[int, typer.Option(help="How often each time is taken; medians count.")]


@group.callback()
def _group() -> None:
    """What a cache saves and costs, and how fast kvik is, measured here."""


@group.command()
def cache(
    model: ModelOption = "smollm2",
    kv: KvOption = "bf16",
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    tokens: Annotated[int, typer.Option(help="The longest text; steps are measured from one token up to this.")] = 1024,
    batch: Annotated[str, typer.Option(help="Numbers of sequences at once, 128 tokens each.")] = "1,2,4,8",
    rounds: RoundsOption = 3,
    text: TextOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw all curves into this .png or .svg file.")] = None,
    plot_step: Annotated[Path | None, typer.Option(help="Draw the time of one more token, in one panel.")] = None,
    as_json: JsonOption = False,
) -> None:
    """A growing text, with a cache and without: what is computed, read and held, and the time.

    Counts and bytes stand beside their formulas, times beside what shorter texts predict. It takes a minute or two.
    """
    sizes = _numbers("--batch", batch, MOST_SEQUENCES, "1,2,4,8")
    if tokens < SHORTEST:
        raise UsageError(f"--tokens {tokens} shows no growth; use at least {SHORTEST}")
    _check(rounds, {"--plot": plot, "--plot-step": plot_step})
    check_spec(kv, allow_none=False)
    source = read_text(text)
    loaded = load_model(model, weights, device)
    loaded.check_attends("what a cache saves")
    most = loaded.config.max_positions
    if tokens > most:
        raise UsageError(
            f"--tokens {tokens:,} is more than the {most:,} positions of {loaded.config.name}; use at most {most}"
        )
    ids = _ids(loaded, source, tokens, text, "--tokens")[:tokens]
    from kvik.bench import curves, measure, render, slope

    name = model_name(model)
    with progress() as show:
        growth = measure(loaded, ids, kv=kv, batch=sizes, rounds=rounds, name=name, show=show)
    if as_json:
        print(json.dumps(growth.to_dict(), indent=2))
    else:
        render(growth, stdout(), pictures=plot is not None or plot_step is not None)
    draw(growth, (plot, curves), (plot_step, slope))


@group.command()
def speed(
    model: ModelOption = "smollm2",
    contexts: Annotated[
        str | None, typer.Option(help=f"Tokens of the prompts; by default {CONTEXTS}, as far as the model goes.")
    ] = None,
    kv: KvOption = "bf16",
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    tokens: Annotated[int, typer.Option(help="Steps after each prompt and round; as many more are timed inside.")] = 32,
    rounds: RoundsOption = 3,
    text: TextOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this .png or .svg file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """How fast kvik is on this machine: tokens a second by length, where the time goes, and what the machine allows.

    Steps stand beside two floors: their bytes at the speed of memory, their operations at that of long products. It
    takes a minute or two; close what else computes.
    """
    asked = _numbers("--contexts", contexts or CONTEXTS, MOST_TOKENS, CONTEXTS)
    if tokens < 1:
        raise UsageError(f"--tokens {tokens} measures no step; use at least 1")
    _check(rounds, {"--plot": plot})
    check_spec(kv, allow_none=False)
    source = read_text(text)
    loaded = load_model(model, weights, device)
    loaded.check_attends("where a step's time goes")
    asked, lengths = _fitted(loaded, asked, tokens, given=contexts is not None)
    ids = _ids(loaded, source, lengths[-1], text, "--contexts")
    from kvik.bench import draw_speed, measure_speed, render_speed

    with progress() as show:
        found = measure_speed(
            loaded, ids, lengths, kv=kv, tokens=tokens, rounds=rounds, asked=asked, name=model_name(model), show=show
        )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        render_speed(found, stdout(), picture=plot is not None)
    draw(found, (plot, draw_speed))


def _numbers(option: str, text: str, most: int, example: str) -> list[int]:
    """A list of numbers, sorted, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 9 and 1 <= int(part) <= most for part in parts):
        raise UsageError(
            f"{option} {text!r} is no list of numbers from 1 to {most:,}, so nothing can be measured; "
            f"write {option} {example}"
        )
    return sorted({int(part) for part in parts})


def _fitted(model: Model, asked: list[int], tokens: int, *, given: bool) -> tuple[list[int], list[int]]:
    """(lengths asked for, lengths that leave the model's positions for the steps). Those of the user must fit; those by
    default are cut to the longest that does."""
    from kvik.bench.speed_runs import room

    most, positions = room(model.config.max_positions, tokens), model.config.max_positions
    if most < 1 or (given and asked[-1] > most):
        what = f"--contexts {asked[-1]:,} with --tokens {tokens:,}" if given else f"--tokens {tokens:,}"
        least = asked[-1] if given else 1
        way = f"--contexts up to {most:,}" if most > 0 else "fewer --tokens"
        raise UsageError(
            f"{what} takes {least + 2 * tokens:,} positions, steps that are timed inside included, and "
            f"{model.config.name} has {positions:,}; use {way}"
        )
    fitted = {min(length, most): length for length in reversed(asked)}  # of several cut alike, the shortest
    return [fitted[length] for length in sorted(fitted)], sorted(fitted)


def _check(rounds: int, pictures: dict[str, Path | None]) -> None:
    if rounds < 1:
        raise UsageError(f"--rounds {rounds} measures nothing; use at least 1")
    check_pictures(pictures)


def _ids(model: Model, text: str, tokens: int, path: Path | None, option: str) -> list[int]:
    """The text's tokens: as many as an option asks for, at the least."""
    assert model.tokenizer is not None, "a model that was loaded has a tokenizer"
    ids = model.tokenizer.encode(text)
    if len(ids) < tokens:
        where = "Python's topics have" if path is None else f"--text {path} has"
        raise UsageError(
            f"{where} {len(ids):,} tokens, and {option} asks for {tokens:,}; give a longer text, or a smaller {option}"
        )
    return ids
