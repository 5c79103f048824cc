"""Values out of a model's own metadata (config.json, GGUF fields), each checked before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Final, NoReturn

from kvik.errors import ConfigError


class _Required:
    """Marks a key that has no default."""


REQUIRED: Final = _Required()


def brief(value: object, width: int = 60) -> str:
    """`repr(value)`, on one line and cut to `width` characters, so that a hostile value can't flood a message."""
    text = repr(value[:width] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= width else text[: width - 1] + "…"


def _finite(value: object) -> float | None:
    """The value as a float, or None where it is no finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


class Fields:
    """A mapping of metadata and the name of what it came from; every getter raises ConfigError naming key and value.

    A key that holds None (JSON's null) counts as missing.
    """

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, key: str, expected: str) -> NoReturn:
        """Raises the ConfigError for a key whose value can't be used."""
        value = brief(self.values.get(key))
        raise ConfigError(f"{self.where}: {key} is {value}, but {expected}; use a file that kvik supports")

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than None."""
        return self.values.get(key) is not None

    def _value(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is not None:
            return value
        if isinstance(default, _Required):
            raise ConfigError(
                f"{self.where}: {key} is missing, so the model can't be built; get the file again from its source"
            )
        return default

    def integer(self, key: str, default: int | _Required = REQUIRED, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number in [least, most]; True and 3.0 are none."""
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.fail(key, f"must be a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | _Required = REQUIRED, *, above: float = 0.0) -> float:
        """A finite number greater than `above`."""
        value = _finite(self._value(key, default))
        if value is None or value <= above:
            self.fail(key, f"must be a number above {above:g}")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number greater than 0, or None where the key is missing."""
        return self.number(key) if self.has(key) else None

    def flag(self, key: str, default: bool | _Required = REQUIRED) -> bool:
        """True or False."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.fail(key, "must be true or false")
        return value

    def text(self, key: str, default: str | _Required = REQUIRED, *, among: Collection[str] | None = None) -> str:
        """A string, one of `among` where that is given."""
        value = self._value(key, default)
        if not isinstance(value, str) or (among is not None and value not in among):
            self.fail(key, f"must be one of {', '.join(sorted(among))}" if among is not None else "must be a text")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: a whole number or a list of them; none where the key is missing."""
        value = self._value(key, ())
        ids = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
            self.fail(key, "must be a token id or a list of them")
        return ids

    def numbers(self, key: str) -> tuple[float, ...] | None:
        """Finite numbers above 0, or None where the key is missing."""
        value = self._value(key, None)
        if value is None:
            return None
        numbers = [_finite(v) for v in value] if isinstance(value, list | tuple) else [None]
        kept = tuple(n for n in numbers if n is not None and n > 0)
        if len(kept) != len(numbers):
            self.fail(key, "must be a list of numbers above 0")
        return kept

    def refuse_unless(self, key: str, allowed: Collection[object]) -> None:
        """ConfigError where the key is there with a value that changes the model in a way that kvik does not know."""
        if self.has(key) and self.values[key] not in allowed:
            self.fail(key, "kvik does not know models of that kind")

    def refuse_unknown(self, known: Iterable[str], prefix: str = "") -> None:
        """ConfigError for the first key under `prefix` that is not in `known`: settings are never ignored."""
        unknown = sorted(k for k in set(self.values) - set(known) if k.startswith(prefix) and self.has(k))
        if unknown:
            self.fail(unknown[0], "kvik does not know this setting and never ignores one")
