"""`kvik doctor`: what this machine and installation have, and what of it costs speed."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kvik.cli.common import JsonOption, app, progress, stdout


@app.command()
def doctor(
    context: typer.Context,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Only look; measure nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What this machine and this installation have, how fast they are, and what costs speed. It takes some seconds."""
    from kvik.bench import examine, render_machine

    with progress() as show:
        machine = examine(not no_measure, show, ours=context.obj or ())
    if as_json:
        print(json.dumps(machine.to_dict(), ensure_ascii=False, indent=2))
    else:
        render_machine(machine, stdout())
