"""A file of finished measurements, one JSON object a line, so that an interrupted evaluation goes on where it was.

    {"kvik": "eval-1", "key": "9f…", "about": "int8, document 3", "value": {…}, "check": "first digits of a SHA-256"}

The key names all that the value depends on, so a file may hold several models, texts and specs: what is not asked for
is left alone. A line that is not as it was written is an error, never skipped: a figure that can't be trusted is worse
than one that is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from kvik.cache.prefix import digest
from kvik.errors import StorageError

FORMAT = "eval-1"
_FIELDS = {"kvik", "key", "about", "value", "check"}


class Ledger:
    """Values by key, in memory and in a file. Only ever appends; two evaluations at once need two files."""

    def __init__(self, path: Path | None = None) -> None:
        """
        Args:
            path: of the file, made when the first value comes; None keeps nothing beyond this process.

        Raises:
            StorageError: it can't be read, or a line is damaged or no line of such a file.
        """
        self.path = path
        self._values: dict[str, dict[str, Any]] = {}
        if path is None or not path.exists():
            return
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise StorageError(f"{path}: can't be read ({error.strerror}); name another file with --resume") from None
        if lines[-1]:
            self._refuse(len(lines), "has no end")
        for number, line in enumerate(lines[:-1], 1):
            self._take(number, line)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> dict[str, Any] | None:
        """The value under a key, or None."""
        return self._values.get(key)

    def put(self, key: str, about: str, value: dict[str, Any]) -> None:
        """Keeps a value: it is in the file before this returns.

        Raises:
            StorageError: the file can't be written.
        """
        self._values[key] = value
        if self.path is None:
            return
        entry = {"kvik": FORMAT, "key": key, "about": about, "value": value, "check": _check(key, about, value)}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, allow_nan=False) + "\n")
        except OSError as error:
            raise StorageError(
                f"{self.path}: can't be written ({error.strerror}); name another file with --resume"
            ) from None

    def _take(self, number: int, line: bytes) -> None:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            self._refuse(number, "is no JSON")
        if not isinstance(entry, dict) or set(entry) != _FIELDS or entry["kvik"] != FORMAT:
            self._refuse(number, f"is no line of an evaluation in the format {FORMAT}")
        key, about, value = entry["key"], entry["about"], entry["value"]
        if not (isinstance(key, str) and isinstance(about, str) and isinstance(value, dict)):
            self._refuse(number, f"is no line of an evaluation in the format {FORMAT}")
        if entry["check"] != _check(key, about, value):
            self._refuse(number, "is not as it was written")
        self._values[key] = value

    def _refuse(self, number: int, what: str) -> NoReturn:
        raise StorageError(
            f"{self.path}, line {number}: {what}, so its figures can't be used; delete that line to measure it again, "
            "or name another file with --resume"
        )


def _check(key: str, about: str, value: dict[str, Any]) -> str:
    """The first digits of a SHA-256 over a line's content; a float's text is exact, so it survives being read."""
    content = json.dumps(value, sort_keys=True).encode()
    return digest(kvik=FORMAT.encode(), key=key.encode(), about=about.encode(), value=content).hex()[:16]
