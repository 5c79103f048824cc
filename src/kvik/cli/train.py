"""`kvik train`: small models that kvik trains itself."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvik.cli.common import INTERRUPTED, JsonOption, app, stderr
from kvik.errors import UsageError

if TYPE_CHECKING:
    from kvik.train.translator import Progress

ABOUT = "Small models that kvik trains itself."
group = typer.Typer(help=ABOUT, no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="train")


@group.callback()
def _group() -> None:
    """Small models that kvik trains itself."""


@group.command()
def dates(
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; by default trained/dates in kvik's home.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of training; by default those of the built-in one.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes of processor time, all cores together, instead of steps.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives other sentences and other weights.")] = 0,
    sentences: Annotated[int, typer.Option(help="Held-out sentences of the last examination.")] = 1000,
    as_json: JsonOption = False,
) -> None:
    """Train the translator of dates, times, prices and counts from English to Chinese and Korean.

    Ctrl-C ends the training early and keeps what was learnt. The same seed and steps give the same weights.
    """
    if steps is not None and minutes is not None:
        raise UsageError("--steps and --minutes both say when to end; leave one of the two out")
    if not 1 <= sentences <= 100_000:
        raise UsageError(f"--sentences {sentences}: use 1 to 100,000")
    from kvik.train.recipe import Recipe

    given = {} if steps is None else {"steps": steps}
    recipe = Recipe(minutes=minutes, seed=seed, **given)
    from kvik.models.files.prepare import home, home_path
    from kvik.train.checkpoint import check_folder, write
    from kvik.train.examination import examine
    from kvik.train.phrases import LANGUAGES
    from kvik.train.translator import Cuts, Training

    folder = home_path() / "trained" / "dates" if out is None else out
    if out is None:
        home()
    check_folder(folder)
    began, processor = time.perf_counter(), time.process_time()
    with stoppable() as stopping:
        training = Training(recipe)
        with _bar() as show:
            training.run(show, stopping)
        stopped = stopping()
        asked = min(sentences, 100) if stopped else sentences  # whoever stops it has no minute to wait
        exam = examine(training.as_kvik(), Cuts(training.tokenizer), seed, asked)
        elapsed, used = time.perf_counter() - began, time.process_time() - processor
        report = {
            "seconds": round(elapsed, 1),
            "processor_seconds": round(used, 1),
            "loss": round(training.losses[-1], 5) if training.losses else None,
            "stopped": stopped,
        }
        write(training, folder, exam, report)
    if as_json:
        print((folder / "training.json").read_text(encoding="utf-8"), end="")
    else:
        print(folder)
    shares = ", ".join(f"{to} {exam.share(to):.1%}" for to in LANGUAGES)
    lines = [
        f"{training.steps:,} steps{' (stopped early)' if stopped else ''} · {used / 60:.1f} min of processor time in "
        f"{elapsed / 60:.1f} min",
        f"right to the letter on {len(exam.answers) // len(LANGUAGES):,} held-out sentences: {shares}",
        f"kvik translate --model {folder} \"The meeting is on Monday at 4:30 pm.\"",
    ]  # fmt: skip
    print("\n".join(lines), file=sys.stderr)
    if stopped:
        raise typer.Exit(INTERRUPTED)


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Inside it, Ctrl-C only sets a flag, which is given to be asked for; a second one ends the process as ever."""
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """How far it is; a line now and then where nobody looks at a terminal."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn(), TimeRemainingColumn())
    watched = sys.stderr.isatty()
    with Bar(*columns, console=stderr(), transient=True, disable=not watched) as bar:
        task, told = bar.add_task("training", total=1.0), 0

        def show(now: Progress) -> None:
            nonlocal told
            exact = "" if now.exam is None else f" · held-out sentences right {now.exam.share():.0%}"
            what = f"step {now.step:,} · loss {now.loss:.4f}{exact}"
            bar.update(task, description=what, completed=now.done)
            if not watched and now.done * 20 >= told + 1:
                told = int(now.done * 20)
                print(f"{what} · {now.seconds:.0f} s of processor time", file=sys.stderr, flush=True)

        yield show
