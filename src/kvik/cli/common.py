"""What the commands share: the app, the options that several have, and how input is checked and shown."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from kvik.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from kvik.models.model import Model

INTERRUPTED = 130
NO_KERNELS = "kvik: the native kernels were not built, so this is several times slower; see 'kvik doctor'"
Show = Callable[[str, int, int], None]  # (what is done next, steps done, steps in all)

app = typer.Typer(
    name="kvik",
    help="A KV cache for transformers: run a model through it, look into it, measure it, or plan what it costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="smollm2, a safetensors folder, a .gguf file, or a hub id.")
]
KV_HELP = (
    "What the cache keeps: bf16, int8, k8v4, int4+window:1024,sinks:4, int8+snapkv:25% …; "
    "int8+window:1024,sinks:4,relative goes on past the model's context"
)
KvOption = Annotated[str, typer.Option("--kv", help=f"{KV_HELP}; tuned.")]
WeightsOption = Annotated[str, typer.Option("--weights", help="How weights are held: auto, f32, bf16, int8 or int4.")]
ShareOption = Annotated[
    str | None,
    typer.Option(
        help="Let layers read the rows of others: pairs, last-half or last:N. Changes the model, and answers for the "
        "worse unless it was trained so.",
    ),
]
BackendOption = Annotated[
    str,
    typer.Option(
        "--backend",
        help="Whose code the model runs in: kvik, or transformers, for families that kvik has no code of (slower, and "
        "not the same to the last bit in every batch).",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu or cuda.")]
MemoryOption = Annotated[str | None, typer.Option("--memory", help="Budget of the cache, such as 64MiB.")]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more random.")]
TopPOption = Annotated[float, typer.Option(help="Only the likeliest tokens that together have this probability.")]
TopKOption = Annotated[int, typer.Option(help="Only so many of the likeliest tokens; 0 = all.")]
SeedOption = Annotated[int | None, typer.Option(help="Makes random choices repeatable.")]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(help="New tokens at the most; by default up to the model's context, a whole one under 'relative'."),
]
StopOption = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; can be given several times.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def budget(memory: str | None) -> int | None:
    from kvik.units import parse_bytes

    return None if memory is None else parse_bytes(memory, "memory")


def stdin() -> TextIO:
    if sys.stdin is None:
        raise UsageError("standard input is closed; give the prompt as an argument, or open it")
    return sys.stdin


def check_spec(kv: str, *, allow_none: bool, evaluates: bool = False) -> None:
    """Complains about a wrong spec before the model is loaded; about an oracle wherever nothing is evaluated."""
    from kvik.cache.spec import parse_rules

    if (allow_none and kv == "none") or kv == "tuned":  # what was tuned is known once the model is
        return
    policies = [rule.retention.policy for rule in parse_rules(kv)[0]]
    for policy in policies if not evaluates else ():
        if policy is not None:
            from kvik.engine.reread import refuse_foresight

            refuse_foresight(policy)


def check_share(rule: str | None) -> None:
    """Complains about a wrong rule before the model is loaded."""
    from kvik.cache.sharing import known

    if rule is not None:
        known(rule)


@contextmanager
def progress() -> Iterator[Show]:
    """A bar that is drawn between measurements only, so that it costs them nothing."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=stderr(), transient=True, disable=hidden, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total, refresh=True)

        yield show


def load_model(
    model: str,
    weights: str,
    device: str,
    share: str | None = None,
    *,
    reads: bool = False,
    encodes: bool = False,
    backend: str = "kvik",
) -> Model:
    """Loads with a progress bar where there is something to prepare. Says so if the kernels were not built.

    Args:
        share: layers read the rows of others, by a rule of `cache/sharing.py`.
        reads: whether the command knows models that read a source beside their text.
        encodes: whether it knows those that only encode.
        backend: whose code it runs in, kvik or transformers.
    """
    check_backend(backend, share)
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=stderr(),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        task = bar.add_task(f"loading {model}", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        loaded: Model
        if backend == "transformers":
            from kvik.hf.model import load as load_theirs
            from kvik.models.files.prepare import resolve

            loaded = load_theirs(resolve(model, show), weights=weights, device=device)  # type: ignore[arg-type]
        else:
            from kvik.models.model import load

            loaded = load(model, weights=weights, device=device, share=share, progress=show)  # type: ignore[arg-type]
    if loaded.reading is not None and not reads:
        from kvik.models.hearing import HearingConfig

        hears = isinstance(loaded.reading, HearingConfig)
        way = "kvik transcribe" if hears else "kvik run or kvik translate"
        raise UsageError(f"{loaded.config.name} answers a source and continues no text; this command can't, use {way}")
    if loaded.encoder is not None and not encodes:
        raise UsageError(
            f"{loaded.config.name} is an encoder: it sees both sides, so it continues no text and keeps no cache; "
            "use kvik compare-context, which shows why, or Model.encode in Python"
        )
    if device == "cpu":
        _tell_of_missing_kernels()
    return loaded


def check_backend(backend: str, share: str | None = None) -> None:
    """Raises UsageError: there is no such backend, or it can't do what else is asked for."""
    if backend not in ("kvik", "transformers"):
        raise UsageError(f"--backend {backend}: there are kvik and transformers; use one of them")
    if backend != "kvik" and share is not None:
        raise UsageError(
            f"--share {share}: layers share rows in kvik's own models alone; leave out --backend or --share"
        )


def _tell_of_missing_kernels() -> None:
    """One line on stderr, unless plain torch was asked for."""
    from kvik.ops.loader import built

    if built() is None and os.environ.get("KVIK_OPS") != "reference":
        print(NO_KERNELS, file=sys.stderr)


def stdout() -> Console:
    from rich.console import Console

    return Console()


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)
