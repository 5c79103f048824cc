"""`kvik tune`: which spec to take for a model, a text and a limit; `--kv tuned` then takes it."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated

import typer

from kvik.cli.common import (
    DeviceOption,
    JsonOption,
    ModelOption,
    WeightsOption,
    app,
    budget,
    check_spec,
    load_model,
    progress,
    stdout,
)  # fmt: skip
from kvik.cli.eval import (
    DocumentsOption,
    ScoredOption,
    check_positions,
    check_sizes,
    encoded,
    text_name,
)  # fmt: skip
from kvik.cli.files import TextOption, model_name, read_text
from kvik.errors import UsageError

CONTEXT = 4096


@app.command()
def tune(
    memory: Annotated[
        str | None, typer.Option("--memory", help="Bytes that one sequence may take, such as 64MiB.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help=f"Tokens that it will have; by default {CONTEXT}, as far as the model goes.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", help="Mean KL divergence from full rows that is allowed, in nats.")
    ] = None,
    model: ModelOption = "smollm2",
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    text: TextOption = None,
    specs: Annotated[
        str | None, typer.Option(help="Candidates divided by |, such as 'int8|k8v4|int4; layers 0-1: int8'.")
    ] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Also try windows and policies, which drop rows.")] = False,
    prefix: Annotated[
        int | None, typer.Option(help="Tokens before the scored ones; by default 1024, or all where rows are dropped.")
    ] = None,
    scored: ScoredOption = 256,
    documents: DocumentsOption = 4,
    as_json: JsonOption = False,
) -> None:
    """Measure a few specs on a text, and keep the best that fits for --kv tuned.

    With --memory the lowest KL wins, without it the fewest bytes. Weights are held as for kvik run.
    """
    room = budget(memory)
    _check(room, max_kl, specs, lossy)
    check_sizes(context=context, prefix=prefix, scored=scored, documents=documents)
    wanted = None if specs is None else [part.strip() for part in specs.split("|")]
    for kv in wanted or ():
        check_spec(kv, allow_none=False)
    source = read_text(text)
    loaded = load_model(model, weights, device)
    positions = loaded.config.max_positions
    length = min(CONTEXT, positions) if context is None else context
    if length > positions:
        raise UsageError(
            f"--context {length:,} is more than the {positions:,} positions of {loaded.config.name}; "
            f"use at most {positions}"
        )
    check_positions(loaded, prefix or 1, scored)
    from kvik.eval import render_tuning
    from kvik.eval import tune as measure
    from kvik.eval.caches import fitting
    from kvik.eval.tuning import ladder
    from kvik.models.tuned import remember

    candidates = wanted or fitting(loaded, ladder(loaded.config.layers, length, lossy=lossy))
    with progress() as show:
        found = measure(
            loaded, encoded(loaded, source), candidates, context=length, memory=room, max_kl=max_kl, prefix=prefix,
            scored=scored, documents=documents, name=model_name(model), text=text_name(text), show=show,
        )  # fmt: skip
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        render_tuning(found, stdout())
    winner = found.winner
    if winner is None:
        raise UsageError(found.why_none)
    kept = remember(loaded.fingerprint, found.setup.model, loaded.weights, winner.spec, found.reasons())
    print(f"kept: {kept}; --kv tuned takes it", file=sys.stderr)


def _check(memory: int | None, max_kl: float | None, specs: str | None, lossy: bool) -> None:
    """Complains about limits that are none."""
    if memory is None and max_kl is None:
        raise UsageError("tune needs a limit; give --memory 64MiB, --max-kl 0.01, or both")
    if max_kl is not None and not (math.isfinite(max_kl) and max_kl > 0):
        raise UsageError(f"--max-kl {max_kl}: use a number of nats above 0, such as 0.01")
    if specs is not None and lossy:
        raise UsageError("--specs names all candidates, so --lossy has none to add; leave one of the two out")
