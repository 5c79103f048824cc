"""Files that commands read and write: texts to measure with, and pictures of what was measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from kvik.errors import StorageError, UsageError

T = TypeVar("T")
TextOption = Annotated[Path | None, typer.Option(help="A file to take the text from; by default Python's topics.")]


def model_name(model: str) -> str:
    """What to call a model in a table: a path's last part."""
    return Path(model).name if Path(model).exists() else model


def read_text(path: Path | None) -> str:
    """The text to measure with: of a file, or the topics that come with every Python."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--text {path}: can't be read ({error.strerror}); name a text file") from None
    if b"\0" in data:  # no text in UTF-8 or its kin has one; pictures, weights and UTF-16 do
        raise UsageError(f"--text {path}: is no text in UTF-8, so figures over it would mean nothing; name a text file")
    return data.decode("utf-8", errors="replace")


def check_pictures(pictures: dict[str, Path | None]) -> None:
    """Complains about what can't be drawn into, before anything is measured. Takes paths by option."""
    wanted = {option: path for option, path in pictures.items() if path is not None}
    if len({path.absolute() for path in wanted.values()}) < len(wanted):
        both, path = " and ".join(wanted), next(iter(wanted.values()))
        raise UsageError(f"{both} both name {path}, so one would overwrite the other; name two files")
    for option, path in wanted.items():
        _check_picture(option, path)


def _check_picture(option: str, path: Path) -> None:
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"{option} {path}: pictures are PNG or SVG, by the file's ending; name it {path.stem}.png")
    check_target(option, path)


def check_target(option: str, path: Path) -> None:
    """Complains about a file that can't be written."""
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent} to write to; make it, or name another")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option} {path}: can't be written to; name another file")


def draw(found: T, *pictures: tuple[Path | None, Callable[[T, Path], None]]) -> None:
    """Pictures last: the figures are printed, whatever becomes of the files."""
    for path, picture in pictures:
        if path is None:
            continue
        try:
            picture(found, path)
        except OSError as error:
            raise StorageError(f"{path}: can't be written ({error.strerror}); name another file") from None
        print(f"drawn: {path}", file=sys.stderr)
