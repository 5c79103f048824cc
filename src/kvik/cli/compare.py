"""`kvik compare-context`: what one more word changes, where tokens see one side and where they see both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvik.cli.common import DeviceOption, JsonOption, WeightsOption, app, load_model, stdout
from kvik.cli.files import check_pictures, draw

MODELS = ["smollm2", "minilm"]


@app.command("compare-context")
def compare_context(
    sentence: Annotated[
        str | None, typer.Argument(help="A sentence; by default one whose “it” only the last word explains.")
    ] = None,
    word: Annotated[
        str | None, typer.Option(help="What is added to it; by default the sentence's own last word is.")
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="As for kvik run; can be given several times; by default smollm2, minilm."),
    ] = None,
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Draw tokens and layers into this .png or .svg file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Add a word to a sentence, and see which earlier states move: why a decoder can be cached and an encoder can't."""
    check_pictures({"--plot": plot})
    from kvik.trace.context import SENTENCE, compare, split

    text, added = split(SENTENCE if sentence is None else sentence, word)
    found = [compare(load_model(model, weights, device, encodes=True), text, added) for model in models or MODELS]
    from kvik.trace.context_view import draw_moved, render_moved

    if as_json:
        told = {"sentence": text, "word": added, "models": [each.to_dict() for each in found]}
        print(json.dumps(told, ensure_ascii=False, indent=2))
    else:
        render_moved(found, text, added, stdout())
    draw(found, (plot, lambda moved, path: draw_moved(moved, text, added, path)))
