"""`kvik heads`: which KV heads look far back, and the spec in which only those keep every row."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvik.cli.common import (
    DeviceOption,
    JsonOption,
    ModelOption,
    WeightsOption,
    app,
    check_spec,
    load_model,
    progress,
    stdout,
)  # fmt: skip
from kvik.cli.eval import check_sizes, encoded, text_name
from kvik.cli.files import TextOption, check_pictures, draw, model_name, read_text
from kvik.errors import UsageError

if TYPE_CHECKING:
    from kvik.models.model import Model

TOKENS = 4096


@app.command()
def heads(
    model: ModelOption = "smollm2",
    far: Annotated[str, typer.Option(help="The part of all heads that keeps every row.")] = "50%",
    window: Annotated[int, typer.Option(help="The last rows that the others keep.")] = 256,
    sinks: Annotated[int, typer.Option(help="And the first.")] = 4,
    kv: Annotated[str, typer.Option("--kv", help="How all rows are stored: bf16, int8, k8v4 …")] = "int8",
    text: TextOption = None,
    tokens: Annotated[
        int | None, typer.Option(help=f"Tokens to read; by default {TOKENS}, as far as the text and the model go.")
    ] = None,
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Draw all heads into this .png or .svg file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the KV heads that look far back, and print the spec in which the others keep a window.

    Scores come from one pass over a text (DuoAttention, arXiv:2410.10819). The last line is the spec, for --kv.
    """
    part = _part(far)
    check_sizes(window=window, tokens=tokens)
    if sinks < 0:
        raise UsageError(f"--sinks {sinks}: use 0 or more")
    check_spec(kv, allow_none=False)
    check_pictures({"--plot": plot})
    source = read_text(text)
    from kvik.eval import draw_heads, measure_heads, render_heads
    from kvik.eval.heads import stored

    stored(kv)
    loaded = load_model(model, weights, device)
    ids = _ids(loaded, source, tokens, text)
    with progress() as show:
        found = measure_heads(
            loaded, ids, kv=kv, far=part, window=window, sinks=sinks, name=model_name(model), text=text_name(text),
            show=show,
        )  # fmt: skip
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        render_heads(found, stdout())
    draw(found, (plot, draw_heads))


def _part(text: str) -> Fraction:
    """A part of all heads, from `50%`."""
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,4})?)\s*%", text.strip())
    if match is None or Fraction(match[1]) > 100:
        raise UsageError(f"--far {text!r} is no part of the heads; write --far 50%, from 0% to 100%")
    return Fraction(match[1]) / 100


def _ids(model: Model, source: str, tokens: int | None, path: Path | None) -> list[int]:
    """The text's first tokens: as many as were asked for, or as there are."""
    ids, positions, of = encoded(model, source), model.config.max_positions, model.config.name
    where = "Python's topics have" if path is None else f"--text {path} has"
    if tokens is not None and tokens > positions:
        raise UsageError(
            f"--tokens {tokens:,} is more than the {positions:,} positions of {of}; use at most {positions}"
        )
    if not ids or (tokens is not None and len(ids) < tokens):
        asked = "there must be" if tokens is None else f"--tokens {tokens:,} asks for"
        raise UsageError(f"{where} {len(ids):,} tokens, fewer than {asked}; give a longer text, or fewer --tokens")
    return ids[: tokens or min(TOKENS, positions)]
