"""`kvik train lm` and `kvik train images`: decoders and picture classifiers with an operator of choice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.common import INTERRUPTED, DeviceOption, JsonOption, stderr
from kvik.cli.files import check_pictures
from kvik.cli.train import group, stoppable
from kvik.errors import UsageError

if TYPE_CHECKING:
    from kvik.train.lessons import Done
    from kvik.train.loop import Now

OPERATORS = (
    "attention:rotary, attention:learned, translution:qkv (any of q, k, v), lor:qkv,8, bucketed:qkv,16 or "
    "convolution:5."
)
OF_PICTURES = (
    "attention:learned, attention (no positions), translution:qkv (any of q, k, v), lor:qkv,8, bucketed:qkv,4 or "
    "convolution:3."
)
OutOption = Annotated[Path | None, typer.Option(help="The folder to write; by default in trained/ of kvik's home.")]
StepsOption = Annotated[int, typer.Option(help="Steps of training.")]
BatchOption = Annotated[int, typer.Option(help="Texts or pictures a step.")]
RateOption = Annotated[float, typer.Option(help="The highest learning rate; it rises, then falls as a cosine does.")]
SeedOption = Annotated[int, typer.Option(help="Another seed gives other batches and other weights.")]
LayersOption = Annotated[int, typer.Option(help="Layers of the network.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with a training that was stopped.")]


@group.command()
def lm(
    text: Annotated[str, typer.Argument(help="A text file, or 'topics': Python's documentation of its language.")],
    operator: Annotated[str | None, typer.Option(help=f"attention:rotary if not given; {OPERATORS}")] = None,
    masked: Annotated[
        bool, typer.Option("--masked", help="Learn hidden tokens from both sides (an encoder) instead of the next one.")
    ] = False,
    named: Annotated[
        str | None,
        typer.Option("--like", help="Sizes of a well-known model, such as gpt-base, translution-tiny or minilm."),
    ] = None,
    out: OutOption = None,
    steps: StepsOption = 1000,
    batch: BatchOption = 16,
    length: Annotated[int | None, typer.Option(help="Tokens of a text: the model's context; 64 if not given.")] = None,
    pieces: Annotated[str, typer.Option(help="'bytes', or how many pieces of text to learn (byte pairs).")] = "bytes",
    width: Annotated[int | None, typer.Option(help="Channels of the network; 64 if not given.")] = None,
    layers: Annotated[int | None, typer.Option(help="Its layers; 2 if not given.")] = None,
    heads: Annotated[
        int | None, typer.Option(help="Its heads; the width is a multiple of twice as many; 2 if not given.")
    ] = None,
    share: Annotated[
        str | None, typer.Option(help="Layers read the rows of others: pairs, last-half or last:N (attention alone).")
    ] = None,
    rate: RateOption = 3e-3,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a decoder to continue a text, or an encoder to tell what is hidden in it; 'kvik run --raw -m FOLDER' runs a
    decoder.

    Ctrl-C keeps what was learnt, and --resume goes on. The last tenth of the text is held out.
    """
    from kvik.train.lessons import Text, learn
    from kvik.train.loop import Schedule
    from kvik.train.sizes import Sizes, like

    usual = Sizes() if named is None else like(named)
    given: dict[str, Any] = {"operator": operator, "width": width, "layers": layers, "heads": heads, "length": length}
    sizes = replace(usual, **{name: value for name, value in given.items() if value is not None})
    lesson = Text(
        schedule=Schedule(steps, batch, rate, seed=seed), operator=sizes.operator, width=sizes.width,
        layers=sizes.layers, heads=sizes.heads, source=text, length=sizes.length, pieces=pieces, share=share or "",
        masked=masked or sizes.masked, device=device,
    )  # fmt: skip
    folder = _folder(out, "lm")
    with stoppable() as stopping, _bar("tokens") as show:
        done = learn(lesson, folder, resume, show, stopping)
    hint = f'kvik run --raw -m {folder} --max-tokens 60 "The "'
    if lesson.masked:
        hint = f"python -c \"import kvik; print(kvik.load('{folder}').unmask('The [MASK]ord'))\""
    _tell(done, as_json, hint)


@group.command()
def images(
    pictures: Annotated[
        str, typer.Argument(help="digits, or moving: digits somewhere in a larger picture.")
    ] = "digits",
    operator: Annotated[str, typer.Option(help=OF_PICTURES)] = "attention:learned",
    out: OutOption = None,
    steps: StepsOption = 600,
    batch: BatchOption = 32,
    width: Annotated[int, typer.Option(help="Channels of the network.")] = 48,
    layers: LayersOption = 2,
    heads: Annotated[int, typer.Option(help="Its heads; the width is a multiple of twice as many.")] = 2,
    rate: RateOption = 3e-3,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a ViT to tell scikit-learn's handwritten digits apart; moving ones are also examined where none was learnt.

    Ctrl-C keeps what was learnt, and --resume goes on.
    """
    from kvik.train.lessons import Images, learn
    from kvik.train.loop import Schedule

    lesson = Images(
        schedule=Schedule(steps, batch, rate, seed=seed), operator=operator, width=width, layers=layers, heads=heads,
        source=pictures, device=device,
    )  # fmt: skip
    folder = _folder(out, "images")
    with stoppable() as stopping, _bar("pictures") as show:
        done = learn(lesson, folder, resume, show, stopping)
    _tell(done, as_json, f"python -c \"import kvik; print(kvik.load('{folder}').config)\"")


def _folder(out: Path | None, name: str) -> Path:
    from kvik.models.files.prepare import home, home_path

    if out is not None:
        return out
    home()
    return home_path() / "trained" / name


def _tell(done: Done, as_json: bool, hint: str) -> None:
    if as_json:
        print(json.dumps(done.report, indent=1))
    else:
        print(done.folder)
    figures = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in done.figures.items())
    stopped = " (stopped early; the same command with --resume goes on)" if done.stopped else ""
    lines = [
        f"{done.steps:,} steps{stopped} · {done.seconds / 60:.1f} min of processor time",
        f"held out: {figures}",
        hint,
    ]
    print("\n".join(lines), file=sys.stderr)
    if done.stopped:
        raise typer.Exit(INTERRUPTED)


@contextmanager
def _bar(items: str) -> Iterator[Callable[[Now], None]]:
    """How far it is; a line now and then where nobody looks at a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn(), TimeRemainingColumn())
    watched = sys.stderr.isatty()
    with Progress(*columns, console=stderr(), transient=True, disable=not watched) as bar:
        task, told = bar.add_task("training", total=1.0), 0

        def show(now: Now) -> None:
            nonlocal told
            what = f"step {now.step:,} of {now.steps:,} · loss {now.loss:.4f} · {now.items:,.0f} {items}/s"
            bar.update(task, description=what, completed=now.step / now.steps)
            if not watched and now.step * 10 >= (told + 1) * now.steps:
                told = now.step * 10 // now.steps
                print(what, file=sys.stderr, flush=True)

        yield show


@group.command()
def compare(
    results: Annotated[Path, typer.Option(help="Where finished trainings are written down, a line each.")] = Path(
        "compare.jsonl"
    ),
    text: Annotated[str, typer.Option(help="A text file, or 'topics'.")] = "topics",
    parts: Annotated[
        str, typer.Option(help="Some of text,moving,share,masked,digits.")
    ] = "text,moving,share,masked,digits",
    steps: StepsOption = 300,
    seeds: Annotated[int, typer.Option(help="Trainings of each kind, with another seed each.")] = 3,
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 48,
    batch: BatchOption = 16,
    widths: Annotated[str, typer.Option(help="Channels of the two sizes of networks.")] = "48,96",
    layers: LayersOption = 2,
    device: DeviceOption = "cpu",
    plot: Annotated[Path | None, typer.Option(help="A picture of what came out, PNG or SVG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train attention, Translution and convolution at equal width, equal parameters and equal operations.

    What is finished stands in a file, and is not done again: repeat the command to go on.
    """
    from kvik.models.model import check_device
    from kvik.train import compare as comparing
    from kvik.train import text as texts
    from kvik.train.compared import as_json as dumped
    from kvik.train.compared import draw, gather, table

    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: use at least 1")
    check_pictures({"--plot": plot})
    chosen = tuple(part.strip() for part in parts.split(","))
    comparing.check(chosen)
    sizes = comparing.sizes(widths, layers)
    check_device(device)
    corpus = texts.read(text)
    asked = list(comparing.questions(steps, seeds, length, batch, chosen, sizes))

    def show(number: int, count: int, question: comparing.Question) -> None:
        what = f"{question.part} · {question.size} · equal {question.equal} · {question.label}"
        print(f"{number + 1} of {count} · seed {question.trial.schedule.seed} · {what}", file=sys.stderr, flush=True)

    with stoppable() as stopping:
        known = comparing.answer(asked, corpus, results, show, stopping, device)
        stopped = stopping()
    rows = gather(asked, known, comparing.given(corpus, device))
    if not rows:
        raise UsageError(f"{results}: holds none of these trainings yet; let the command run on")
    print(dumped(rows) if as_json else table(rows))
    if plot is not None:
        draw(rows, plot)
        print(f"picture: {plot}", file=sys.stderr)
    if stopped:
        raise typer.Exit(INTERRUPTED)
