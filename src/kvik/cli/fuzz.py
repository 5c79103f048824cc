"""`kvik fuzz`: whether answers are the same alone and in any mix, on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvik.cli.common import (
    KV_HELP,
    BackendOption,
    DeviceOption,
    JsonOption,
    WeightsOption,
    app,
    budget,
    check_backend,
    check_spec,
    load_model,
    progress,
    stderr,
    stdout,
)
from kvik.cli.files import check_target, model_name
from kvik.errors import UsageError

if TYPE_CHECKING:
    from kvik.fuzz import Report, Trace
    from kvik.models.model import Model

REQUESTS, MOST_REQUESTS = 200, 100_000
FAILED = 1  # the exit code where something is wrong
WHERE = Path("fuzz-failed.jsonl")
STOPS = (".", "\n", " the", "a")


@app.command()
def fuzz(
    model: Annotated[
        str | None, typer.Argument(help="smollm2, a safetensors folder, a .gguf file, or a hub id; or the trace's own.")
    ] = None,
    kv: Annotated[
        list[str] | None, typer.Option("--kv", help=f"{KV_HELP}; can be given several times. By default bf16.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, max=MOST_REQUESTS, help="How many the trace has.")] = REQUESTS,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of the trace.")] = 0,
    memory: Annotated[
        str,
        typer.Option(help="Budget of the cache, such as 64MiB; auto = once ample, once so little that it hurts."),
    ] = "auto",
    trace: Annotated[Path | None, typer.Option(help="Replay this trace instead of making one.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the trace here.")] = None,
    guesses: Annotated[
        int | None, typer.Option(min=0, help="Tokens of each answer that are guessed from its text. By default 0.")
    ] = None,
    bound: Annotated[
        float, typer.Option(min=0.0, help="How far log-probabilities may differ; 0 = not in a single bit.")
    ] = 0.0,
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    backend: BackendOption = "kvik",
    as_json: JsonOption = False,
) -> None:
    """Many requests at once, hurried, aborted, preempted: each must be told what it is told alone, bit for bit.

    It takes one to three minutes for each spec. Exit code 1: something is wrong, and the smallest trace that shows it
    was written.
    """
    from kvik.fuzz import facts, read, render, write
    from kvik.fuzz import fuzz as run

    check_backend(backend)
    size = None if memory == "auto" else budget(memory)
    if trace is not None and (requests, seed) != (REQUESTS, 0):
        raise UsageError(f"--trace {trace} has requests of its own; leave --requests and --seed out")
    if save is not None:
        check_target("--save", save)
    given = None if trace is None else read(trace)
    failed = None if given is None else given.failed
    if failed is not None:  # as it failed, but for what is asked for
        model, weights = model or failed.model, failed.weights if weights == "auto" else weights
        kv, guesses = kv or [failed.kv], failed.guesses if guesses is None else guesses
        size = failed.memory if memory == "auto" else size
    specs = tuple(dict.fromkeys(kv or ["bf16"]))
    for spec in specs:
        check_spec(spec, allow_none=False)
    name = model or "smollm2"
    loaded = load_model(name, weights, device, backend=backend)
    replayed = given or _made(loaded, requests, seed)
    if save is not None:
        write(replayed, save)
    with progress() as show:
        report = run(loaded, replayed, specs, memory=size, guesses=guesses or 0, bound=bound, name=name, show=show)
    told = None if given is not None else seed
    if as_json:
        print(json.dumps(facts(report, replayed, model=model_name(name), seed=told), indent=2))
    else:
        render(report, replayed, stdout(), model=model_name(name), seed=told)
    if report.wrong:
        _tell(report, save)
        raise typer.Exit(FAILED)


def _made(model: Model, requests: int, seed: int) -> Trace:
    """A trace for a model."""
    from kvik.fuzz import Sizes, make

    config = model.config
    longest = min(model.longest(), 1024)
    if longest < 64:
        raise UsageError(f"{config.name} has {longest} positions, too few for requests that share any; use another")
    texts = STOPS if model.tokenizer is not None else ()
    return make(requests, seed, config.vocab_size, Sizes(longest, waiting=max(8, requests // 4)), texts)


def _tell(report: Report, save: Path | None) -> None:
    """Writes what fails, and says how to see it again."""
    from kvik.fuzz import write

    where = WHERE if save is None else save.with_name(f"{save.stem}-failed.jsonl")
    failure = report.failure
    assert failure is not None, "something is wrong"
    write(failure, where)
    count = len(failure.asks)
    stderr().print(
        f"kvik: {report.wrong[0]}; {count} request{'s' * (count != 1)} that show it: {where}; replay them with "
        f"kvik fuzz --trace {where}",
        style="red", highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
