"""`kvik plan`: what a cache costs, before a byte is allocated."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from kvik.cli.common import KV_HELP, JsonOption, ShareOption, app, check_share, stderr, stdout
from kvik.errors import UsageError


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="A well-known name (see --list), a config.json, a .gguf file, or a hub id.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a sequence; by default the model's own context.")] = None,
    source: Annotated[
        int | None, typer.Option(help="Rows of the source that each reads, of a model that reads one.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    kv: Annotated[str, typer.Option("--kv", help=f"{KV_HELP}.")] = "f16",
    weights: Annotated[
        str | None, typer.Option("--weights", help="How weights are held: f32, bf16, int8 or int4.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="What it should fit into, such as 8GiB; by default this machine.")
    ] = None,
    share: ShareOption = None,
    show_list: Annotated[bool, typer.Option("--list", help="A table of well-known models, smallest first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What a cache costs and what fits, before a byte is allocated."""
    from kvik.plan import list_plans, render_list, render_plan, render_refusals, run_plan

    if show_list and model is not None:
        raise UsageError(f"plan: --list is of all models, and {model} is one; leave one of the two out")
    if not show_list and model is None:
        raise UsageError("plan: name one model, such as 'kvik plan smollm2', or give --list")
    if model is None:
        if any(given is not None for given in (context, source, memory, share)) or batch != 1:
            raise UsageError(
                "plan --list takes no --context, --source, --batch, --memory or --share; name a model to use them"
            )
        plans, refused = list_plans(kv, weights)
        if as_json:
            print(json.dumps([each.to_dict() for each in plans], indent=2))
        else:
            render_list(plans, stdout())
        render_refusals(refused, stderr())
        return
    check_share(share)
    result = run_plan(
        model, context=context, batch=batch, kv=kv, weights=weights, memory=memory, source=source, share=share
    )
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        render_plan(result, stdout())
