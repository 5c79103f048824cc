"""Lines of text as sources: which language is asked for, and what a model can't read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvik.engine.generation import source_ids
from kvik.errors import ContextError, UsageError
from kvik.models.model import Model
from kvik.models.text.tokenizer import Tokenizer

CODES = {"zh": ("zho", "cmn_Hans", "zh"), "ko": ("kor", "ko")}  # what models call these languages, between >> and <<
_UNKNOWN = "<unk>"


@dataclass(frozen=True)
class Source:
    """A line to translate.

    Attributes:
        text: as it was given.
        to: the language that was asked for; None where the model knows but one, or the text says it itself.
        ids: token ids, of the language first.
    """

    text: str
    to: str | None
    ids: list[int]


def asked(model: Model, lines: Sequence[str], to: str | None) -> list[Source]:
    """Each line's sources, one for each language that is wanted.

    Args:
        to: zh, ko, both, or a model's own name of a language; None = both where the model knows both.

    Raises:
        UsageError: the model reads no source, knows no such language, or a line has a character that it doesn't know.
        ContextError: a line is too long.
    """
    reading, tokenizer = model.reading, model.tokenizer
    if reading is None:
        raise UsageError(f"{model.config.name} reads no source beside its text, so it translates nothing; use kvik run")
    assert tokenizer is not None, "text needs a tokenizer"
    marks, found = _marks(tokenizer, to, reading.name), []
    for number, line in enumerate(lines, 1):
        for language, mark in marks:
            ids = source_ids(model, mark + line)
            _check(model, tokenizer, f"line {number}", line, ids)
            found.append(Source(line, language, ids))
    return found


def limit(model: Model, max_tokens: int | None) -> int:
    """New tokens at the most: what was asked for, or as many as the model was made for."""
    assert model.reading is not None, "a model that reads"
    most = model.config.max_positions - 1
    if max_tokens is None:
        return most
    model.check_context(1 + max_tokens)
    return max_tokens


def _marks(tokenizer: Tokenizer, to: str | None, name: str) -> list[tuple[str | None, str]]:
    """(language, what is put before a line) for each that is wanted."""
    known = {code: mark for code in CODES if (mark := _mark(tokenizer, code))}
    if to is None:
        return [*known.items()] if len(known) == len(CODES) else [(None, "")]
    found: list[tuple[str | None, str]] = []
    for code in CODES if to == "both" else [to]:
        mark = _mark(tokenizer, code)
        if mark is None:
            others = f"--to {' or '.join(known)}" if known else "no --to, with what the model wants in the text itself"
            raise UsageError(f"--to {to}: {name} has no token >>{code}<<, so it knows no such language; use {others}")
        found.append((code, mark))
    return found


def _mark(tokenizer: Tokenizer, code: str) -> str | None:
    """The token that asks for a language; None where the model has none."""
    marks = [f">>{name}<<" for name in CODES.get(code, (code,))]
    return next((mark for mark in marks if tokenizer.token_id(mark) is not None), None)


def _check(model: Model, tokenizer: Tokenizer, where: str, line: str, ids: list[int]) -> None:
    unknown = tokenizer.token_id(_UNKNOWN)
    if unknown is not None and unknown in ids:
        named = [c for c in dict.fromkeys(line) if unknown in tokenizer.encode(c)]
        what = f"the character {named[0]!r}" if named else "something"
        raise UsageError(f"{where}: has {what}, which {model.config.name} doesn't know; write it another way")
    most = model.config.max_positions
    if len(ids) > most:
        raise ContextError(
            f"{where}: has {len(ids):,} tokens, more than the {most:,} that {model.config.name} was made for; give its "
            "sentences one a line"
        )
