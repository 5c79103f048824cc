"""`kvik eval`: what a cache costs in quality, beside the bytes that it takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvik.cli.common import (
    DeviceOption,
    JsonOption,
    ModelOption,
    ShareOption,
    app,
    check_share,
    check_spec,
    load_model,
    progress,
    stdout,
)
from kvik.cli.files import TextOption, check_pictures, check_target, draw, model_name, read_text
from kvik.errors import UsageError

if TYPE_CHECKING:
    from kvik.models.model import Model

DocumentsOption = Annotated[int, typer.Option(help="Pieces of the text; differences are compared over them.")]
ScoredOption = Annotated[int, typer.Option(help="Predictions of each document that are scored.")]
PREFIX = 1536


@app.command("eval")
def evaluate(
    specs: Annotated[
        list[str] | None,
        typer.Argument(help="Specs to measure; by default bf16, int8, int8-rot, k8v4, int4 and int8 with a window."),
    ] = None,
    model: ModelOption = "smollm2",
    weights: Annotated[str, typer.Option(help="How weights are held: auto, f32, bf16, int8 or int4.")] = "f32",
    device: DeviceOption = "cpu",
    share: ShareOption = None,
    text: TextOption = None,
    prefix: Annotated[int, typer.Option(help="Tokens that are in the cache before anything is scored.")] = PREFIX,
    scored: ScoredOption = 256,
    documents: DocumentsOption = 8,
    protocol: Annotated[
        str, typer.Option(help="prompt: the prefix goes in as a prompt; stream: all in small chunks.")
    ] = "prompt",
    needles: Annotated[bool, typer.Option("--needles", help="Also hide keys in long texts, and ask for them.")] = False,
    no_baselines: Annotated[
        bool, typer.Option("--no-baselines", help="Don't hold policies against chance and an oracle.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw bytes against KL into this .png or .svg file.")] = None,
    map_: Annotated[Path | None, typer.Option("--map", help="Draw which rows stayed.")] = None,
    needle_plot: Annotated[Path | None, typer.Option(help="Draw which keys were found, by depth and length.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Keep what is done in this .jsonl file, and take from it what is there.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What a cache costs in quality: predictions beside those over full f32 rows, and the bytes and time it takes.

    A minute or so a spec; --resume goes on after an interruption.
    """
    wanted = specs or defaults(prefix)
    for kv in wanted:
        check_spec(kv, allow_none=False, evaluates=True)
    check_share(share)
    check_sizes(prefix=prefix, scored=scored, documents=documents)
    _check(protocol, needles, plot, map_, needle_plot, resume)
    source = read_text(text)
    from kvik.eval import Ledger, draw_frontier, draw_map, draw_needles, mapped, render_evaluation
    from kvik.eval import evaluate as measure
    from kvik.eval.caches import fitting

    ledger = Ledger(resume)
    loaded = load_model(model, weights, device, share)
    wanted = wanted if specs else fitting(loaded, wanted)
    plain = None if share is None else load_model(model, weights, device)
    check_positions(loaded, prefix, scored)
    with progress() as show:
        found = measure(
            loaded, encoded(loaded, source), wanted, prefix=prefix, scored=scored, documents=documents,
            protocol="stream" if protocol == "stream" else "prompt", needles=needles,
            baselines=not no_baselines, ledger=ledger, against=plain, mark="" if share is None else f"share {share}",
            name=model_name(model), text=text_name(text), show=show,
        )  # fmt: skip
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        render_evaluation(found, stdout(), pictures=any((plot, map_, needle_plot)))
    if map_ is not None and not mapped(found):
        print(f"not drawn: {map_}, no spec dropped a row", file=sys.stderr)
        map_ = None
    pictures = ((plot, draw_frontier), (map_, draw_map), (needle_plot, draw_needles))
    draw(found, *pictures)


def defaults(prefix: int) -> list[str]:
    """Specs to measure: codecs, and a window of a third of the prefix."""
    return ["bf16", "int8", "int8-rot", "k8v4", "int4", f"int8+window:{max(prefix // 3, 1)},sinks:4"]


def check_sizes(**sizes: int | None) -> None:
    """Complains about an amount of nothing."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} leaves nothing to measure; use at least 1")


def check_positions(model: Model, prefix: int, scored: int) -> None:
    """Complains about documents that are longer than the model's positions."""
    positions = model.config.max_positions
    if prefix + scored > positions:
        most = positions // 2
        way = f"--prefix and --scored of {most:,} at the most" if scored >= positions else "a smaller --prefix"
        raise UsageError(
            f"--prefix {prefix:,} and --scored {scored:,} take more than the {positions:,} positions of "
            f"{model.config.name}; use {way}"
        )


def encoded(model: Model, text: str) -> list[int]:
    """The text's tokens."""
    assert model.tokenizer is not None, "a model that was loaded has a tokenizer"
    return model.tokenizer.encode(text)


def text_name(text: Path | None) -> str:
    """What to call the text in a table."""
    return "Python's topics" if text is None else text.name


def _check(
    protocol: str, needles: bool, plot: Path | None, map_: Path | None, needle_plot: Path | None, resume: Path | None
) -> None:
    """Complains about what is wrong with any model, before one is loaded."""
    if protocol not in ("prompt", "stream"):
        raise UsageError(f"--protocol {protocol!r}: use prompt or stream")
    if needle_plot is not None and not needles:
        raise UsageError("--needle-plot draws what --needles finds; add --needles, or leave it out")
    check_pictures({"--plot": plot, "--map": map_, "--needle-plot": needle_plot})
    if resume is not None:
        check_target("--resume", resume)
