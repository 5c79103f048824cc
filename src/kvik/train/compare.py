"""Operators side by side: at equal width, at equal parameters, at equal operations of training.

The first operator of a list, rotary attention at a size's width, says how many parameters and operations that is; each
other one then also runs at the width that comes nearest to either. Trainings that several questions share are one. Each
finished training is a line of a file under a key of all that it depends on, so that a comparison goes on where it
ended.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kvik.errors import ConfigError, StorageError, UsageError
from kvik.models.operators import Form
from kvik.train.loop import Schedule
from kvik.train.text import Corpus
from kvik.train.trials import Trial, run

BASE = "attention:rotary"
TEXT = (BASE, "attention:learned", "translution:qkv", "translution:k", "lor:qkv,4", "bucketed:qkv,16", "convolution:5")
PICTURES = (
    "attention:learned", "attention", "translution:qkv", "translution:v", "lor:qkv,4", "bucketed:qkv,2",
    "convolution:3",
)  # fmt: skip
MASKED = (BASE, "translution:qkv", "bucketed:qkv,16", "convolution:5")
PICTURE_STEPS = 4  # of pictures, for each of texts: they are smaller, and learnt more slowly
SHARES = ("", "last-half", "last:2")
PARTS = ("text", "share", "masked", "moving", "digits")
Equal = Literal["width", "parameters", "operations"]
EQUALS: tuple[Equal, ...] = ("width", "parameters", "operations")


@dataclass(frozen=True)
class Size:
    """How large a comparison's networks are.

    Attributes:
        name: for people.
        width, layers, heads: of the first operator's network.
    """

    name: str
    width: int
    layers: int
    heads: int


SIZES = (Size("small", 48, 2, 2), Size("large", 96, 2, 2))
SHARED = Size("shared", 64, 4, 2)


@dataclass(frozen=True)
class Question:
    """One training's place in a comparison: several may ask for the same.

    Attributes:
        part: `text`, `masked`, `digits`, `moving` or `share`.
        size: its name.
        equal: what it has in common with the first operator.
        label: the operator, or how layers share.
    """

    part: str
    size: str
    equal: Equal
    label: str
    trial: Trial


def questions(
    steps: int, seeds: int, length: int, batch: int, parts: tuple[str, ...], sizes: tuple[Size, ...] = SIZES
) -> Iterator[Question]:
    """All of a comparison, in the order in which they are answered: what is small first, part by part. Pictures take
    `PICTURE_STEPS` times as many steps; layers that share are compared at one size, `SHARED`."""
    for size in sizes:
        for part in PARTS:
            if part in parts and (part != "share" or size is sizes[0]):
                for seed in range(seeds):
                    yield from _part(part, size, Schedule(_steps(part, steps), batch, seed=seed), length)


def _steps(part: str, steps: int) -> int:
    return steps * PICTURE_STEPS if part in ("digits", "moving") else steps


def _part(part: str, size: Size, schedule: Schedule, length: int) -> Iterator[Question]:
    if part == "share":
        whole = Trial("text", BASE, SHARED.layers, SHARED.width, SHARED.heads, length, schedule)
        for rule in SHARES:
            trial = replace(whole, share=rule)
            yield Question(part, SHARED.name, "width", rule or "none", trial)
            yield Question(part, SHARED.name, "parameters", rule or "none", fitted(trial, whole, "parameters"))
        return
    operators = {"text": TEXT, "masked": MASKED}.get(part, PICTURES)
    base = Trial(part, operators[0], size.layers, size.width, size.heads, length, schedule)
    for equal in EQUALS:
        for operator in operators:
            trial = replace(base, operator=operator)
            yield Question(part, size.name, equal, operator, trial if equal == "width" else fitted(trial, base, equal))


def fitted(trial: Trial, base: Trial, equal: Equal) -> Trial:
    """The trial at the width at which its parameters, or operations, come nearest to the base's."""

    def size(one: Trial) -> int:
        return one.parameters if equal == "parameters" else one.operations

    if (trial.operator, trial.share) == (base.operator, base.share):
        return base
    step, target = 2 * trial.heads, size(base)
    widths = [replace(trial, width=width) for width in range(step, 4 * base.width, step)]
    at = bisect.bisect_left(widths, target, key=size)  # both grow with the width
    return min(widths[max(at - 1, 0) : at + 1], key=lambda one: abs(size(one) / target - 1))


def answer(
    asked: list[Question],
    corpus: Corpus,
    path: Path,
    show: Callable[[int, int, Question], None],
    stopping: Callable[[], bool] = lambda: False,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Runs what the file lacks.

    Args:
        path: of the results, a line of JSON each.
        show: is told of each question (number, of how many) before it is answered.
        device: cpu or cuda; where it is trained.

    Returns:
        Results by key.

    Raises:
        StorageError: the file can't be read or written, or is none of ours.
    """
    known, data = read(path), given(corpus, device)
    for number, question in enumerate(asked):
        key = question.trial.key(data)
        if key not in known:
            if stopping():
                break
            show(number, len(asked), question)
            known[key] = run(question.trial, corpus, device)
            _append(path, {"key": key, "trial": asdict(question.trial), "result": known[key]})
    return known


def given(corpus: Corpus, device: str) -> str:
    """For `Trial.key`: what a result depends on beside the trial."""
    return corpus.digest if device == "cpu" else f"{corpus.digest} {device}"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results by key; none where there is no file. A last line that is incomplete is left out. Raises StorageError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError):
        raise StorageError(f"{path}: can't be read, so nothing is known of earlier trainings; name another") from None
    found = {}
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            found[str(entry["key"])] = dict(entry["result"])
        except (ValueError, KeyError, TypeError):
            if number < len(lines) - 1:
                raise StorageError(f"{path}: line {number + 1} is no result of a training; name another file") from None
    return found


def _append(path: Path, entry: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        with path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{path}: can't be written ({error.strerror or error}); name another file") from None


def sizes(widths: str, layers: int) -> tuple[Size, ...]:
    """Networks of so many channels, "48,96". Raises UsageError."""
    found = widths.split(",")
    if not 1 <= len(found) <= 2 or not all(each.strip().isdecimal() and 8 <= int(each) <= 4096 for each in found):
        raise UsageError(f"--widths {widths!r}: give one or two numbers of channels from 8 to 4,096, such as 48,96")
    if any(int(each) % 4 for each in found) or not 1 <= layers <= 96:
        raise UsageError(f"--widths {widths!r} --layers {layers}: widths are multiples of 4, layers 1 to 96")
    return tuple(Size(name, int(each), layers, 2) for name, each in zip(("small", "large"), found, strict=False))


def check(parts: tuple[str, ...]) -> None:
    """Raises UsageError for a part that there is none of."""
    for part in parts:
        if part not in PARTS:
            raise UsageError(f"--parts {part!r}: use some of {', '.join(PARTS)}")


def relative(label: str) -> str:
    """An operator's kind, for colours; a rule of sharing is attention's."""
    try:
        return Form.parse(label).kind
    except ConfigError:
        return "attention"
