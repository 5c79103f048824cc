"""`kvik trace`: one text through the cache, step by step."""

from __future__ import annotations

import json
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
    stderr,
    stdin,
    stdout,
)  # fmt: skip
from kvik.errors import UsageError

if TYPE_CHECKING:
    from kvik.models.model import Model
    from kvik.trace import Trace

# Over SmolLM2 this head looks for what is spoken of: in "The cat is on the mat" every later word looks at "cat".
LAYER, HEAD = 13, 8


@app.command()
def trace(
    text: Annotated[str, typer.Argument(help="What to feed, taken as it is; - reads it from standard input.")],
    model: ModelOption = "smollm2",
    layer: Annotated[
        int | None, typer.Option(help="Layer to show, counted from 0; by default 13, or the last.")
    ] = None,
    head: Annotated[int | None, typer.Option(help="Query head to show, from 0; by default 8, or the last.")] = None,
    kv: KvOption = "bf16",
    prefill: Annotated[int, typer.Option(help="Tokens of the prompt, one step; each later step takes one.")] = 1,
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page to step through; it needs only a browser.")
    ] = None,
) -> None:
    """Follow a text through the cache, step by step: what each asks, keeps, and need not compute again."""
    _check(layer, head, kv, prefill, html)
    given = stdin().read() if text == "-" else text
    if not given:
        raise UsageError("the text is empty, so there is nothing to trace; give at least one character")
    loaded = load_model(model, weights, device)
    loaded.check_attends("a trace")
    config = loaded.config
    layer = min(LAYER, config.layers - 1) if layer is None else layer
    head = min(HEAD, config.heads - 1) if head is None else head
    from kvik.trace import check_index, facts, make_page, render, write_page

    check_index("layer", layer, config.layers, model)
    check_index("head", head, config.heads, model)
    followed = _follow(loaded, given, model, kv, prefill, layer, every=html is not None)
    if html is not None:
        size = write_page(html, make_page(followed, layer=layer, head=head))
    if as_json:
        print(json.dumps(facts(followed, layer, head), ensure_ascii=False, indent=2))
    else:
        render(followed, stdout(), layer=layer, head=head)
    if html is not None:
        stderr().print(f"page: {html}, {size:,} B", style="dim", highlight=False, markup=False, soft_wrap=True)


def _check(layer: int | None, head: int | None, kv: str, prefill: int, html: Path | None) -> None:
    """Complains about what is wrong with any model, before one is loaded."""
    for what, number in (("layer", layer), ("head", head)):
        if number is not None and number < 0:
            raise UsageError(f"{what} {number}: {what}s are counted from 0; leave it out for a good one")
    if prefill < 1:
        raise UsageError(f"prefill {prefill}: the first step takes at least 1 token; use 1 or more")
    if kv == "none":
        raise UsageError("--kv none keeps no rows to look at; leave it out: a trace shows the work without a cache too")
    check_spec(kv, allow_none=False)
    if html is not None:
        from kvik.trace import check_target

        check_target(html)


def _follow(model: Model, text: str, name: str, kv: str, prefill: int, layer: int, *, every: bool) -> Trace:
    """Feeds the text with a progress bar on a terminal; `every` looks at all layers that a page can hold."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from kvik.engine.generation import encode_prompt
    from kvik.trace import collect, layers_that_fit

    tokens = encode_prompt(model, text, raw=True)
    layers = layers_that_fit(model.config, len(tokens), layer) if every else [layer]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=_work(len(tokens)))

        def show(done: int) -> None:
            bar.update(task, description=f"token {done} of {len(tokens)}", completed=_work(done))

        return collect(model, tokens, name=name, text=text, kv=kv, prefill=prefill, layers=layers, progress=show)


def _work(tokens: int) -> int:
    """For the bar: each step also computes the whole text so far again."""
    return tokens * (tokens + 1) // 2
