"""Traces as files: one JSON object a line, each checked when it is read. A file that says anything else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from kvik.engine.request import Request
from kvik.engine.sampling import Sampling
from kvik.errors import KvikError, StorageError
from kvik.fuzz.trace import WHENS, Abort, Ask, Failed, Part, Piece, Said, Trace

FORMAT = "fuzz-1"
MOST_TOKENS, MOST_LINES = 1 << 24, 1 << 20
_HEAD = ("vocabulary", "answers", "step_tokens", "waiting", "cuts")
Fields = Mapping[str, Any]
T = TypeVar("T")


class _WrongError(Exception):
    """What a line has that it can't have."""


def write(trace: Trace, path: Path) -> None:
    """Writes a trace. Raises StorageError: the file can't be written."""
    head = {"kvik": FORMAT}
    head |= {name: getattr(trace, name) for name in _HEAD}
    lines = [head | {"events": len(trace.events)} | ({} if trace.failed is None else {"failed": vars(trace.failed)})]
    lines += [_ask_line(event) if isinstance(event, Ask) else _abort_line(event) for event in trace.events]
    try:
        path.write_text("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: can't be written ({error.strerror}); name another file") from None


def read(path: Path) -> Trace:
    """Reads a trace. Raises StorageError: the file can't be read, or is no trace of this format, or is damaged."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StorageError(f"{path}: can't be read ({error.strerror}); name a trace that was saved") from None
    if lines[-1:] == [b""]:
        lines.pop()
    found: list[Fields] = []
    for number, line in enumerate(lines[:MOST_LINES], 1):
        try:
            found.append(_object(json.loads(line)))
        except (ValueError, RecursionError, _WrongError):
            _refuse(path, number, "is no JSON object")
    if not found or found[0].get("kvik") != FORMAT:
        _refuse(path, 1, f"is not the head of a trace in the format {FORMAT}")
    number = 1
    try:
        events: list[Ask | Abort] = []
        head = _head(found[0])
        for line_fields in found[1:]:
            number += 1
            events.append(_ask(line_fields) if "ask" in line_fields else _abort(line_fields))
        number = 1
        return _whole(head, found[0]["events"], events)
    except (_WrongError, KvikError, LookupError, TypeError, ValueError, OverflowError) as error:
        _refuse(path, number, " ".join(str(error).split())[:200])


def _refuse(path: Path, number: int, what: str) -> NoReturn:
    raise StorageError(f"{path}, line {number}: {what}, so it can't be replayed; name a trace that 'kvik fuzz' saved")


def _head(line: Fields) -> Trace:
    vocabulary, answers, step_tokens = (_number(line, name, 1) for name in ("vocabulary", "answers", "step_tokens"))
    waiting, cuts = (_number(line, name, 0) for name in ("waiting", "cuts"))
    if step_tokens < answers:
        raise _WrongError("has fewer tokens in a step than answers")
    failed = None
    if "failed" in line:
        given = _object(line["failed"])
        texts = {name: _text(given, name) for name in ("model", "weights", "kv", "what")}
        failed = Failed(memory=_number(given, "memory", 1), guesses=_number(given, "guesses", 0), **texts)
        _only(given, [each.name for each in fields(Failed)])
    _only(line, ["kvik", "events", "failed", *_HEAD])
    return Trace(vocabulary, answers, step_tokens, waiting, cuts, (), failed=failed)


def _whole(head: Trace, count: Any, events: list[Ask | Abort]) -> Trace:
    """Checks what no line shows alone."""
    if count != len(events):
        raise _WrongError(f"names {count} events, and {len(events)} follow")
    asks = tuple(event for event in events if isinstance(event, Ask))
    numbers = {ask.number for ask in asks}
    aborts = tuple(event for event in events if isinstance(event, Abort))
    if len(numbers) < len(asks) or not asks:
        raise _WrongError("is the head of a trace without requests, or with two of one number")
    for ask in asks:
        for piece in ask.prompt:
            if isinstance(piece, Said) and (piece.ask >= ask.number or piece.ask not in numbers):
                raise _WrongError(f"has request {ask.number} go on from {piece.ask}, which does not come before it")
            if isinstance(piece, tuple) and max(piece, default=0) >= head.vocabulary:
                raise _WrongError(f"has a token in request {ask.number} beyond its {head.vocabulary}")
    if strangers := {abort.ask for abort in aborts} - numbers:
        raise _WrongError(f"aborts request {min(strangers)}, which nobody makes")
    return Trace(**{**vars(head), "asks": asks, "aborts": aborts})


_OPTIONAL: dict[str, Callable[[Fields, str], Any]] = {
    "n": lambda line, name: _number(line, name, 1),
    "logprobs": lambda line, name: _number(line, name, 0),
    "prompt_logprobs": lambda line, name: _number(line, name, 0),
    "stop": lambda line, name: tuple(_string(text) for text in _list(line[name])),
    "stop_ids": lambda line, name: _ids(line[name]),
    "ignore_end": lambda line, name: _flag(line[name]),
    "min_tokens": lambda line, name: _number(line, name, 0),
    "priority": lambda line, name: _number(line, name, -(1 << 31)),
    "salt": lambda line, name: _string(line[name]),
    "grammar": lambda line, name: _number(line, name, 2),
    "reads": lambda line, name: _number(line, name, 0),
}


def _ask(line: Fields) -> Ask:
    _only(line, ["at", "ask", "prompt", "max_tokens", "sampling", *_OPTIONAL])
    given: dict[str, Any] = {name: take(line, name) for name, take in _OPTIONAL.items() if name in line}
    if "sampling" in line:
        given["sampling"] = _sampling(_object(line["sampling"]))
    ask = Ask(
        _number(line, "ask", 0), _number(line, "at", 0), tuple(_piece(each) for each in _list(line["prompt"])),
        _number(line, "max_tokens", 1), **given,
    )  # fmt: skip
    if not any(isinstance(piece, Part) or (isinstance(piece, tuple) and piece) for piece in ask.prompt):
        raise _WrongError("is a request without a prompt")
    Request(
        [0], ask.max_tokens, ask.stop, n=ask.n, min_tokens=ask.min_tokens,
        grammar=None if ask.grammar is None else lambda: NotImplemented,
    )  # fmt: skip
    return ask


def _piece(given: Any) -> Piece:
    if isinstance(given, list):
        return _ids(given)
    piece = _object(given)
    if "stream" in piece:
        _only(piece, ["stream", "from", "to"])
        part = Part(_number(piece, "stream", 0), _number(piece, "from", 0), _number(piece, "to", 1))
        if not part.start < part.end <= MOST_TOKENS:
            raise _WrongError(f"names tokens {part.start} to {part.end} of a stream")
        return part
    _only(piece, ["answer", "tokens"])
    return Said(_number(piece, "answer", 0), _number(piece, "tokens", 1))


def _sampling(given: Fields) -> Sampling:
    known = {each.name for each in fields(Sampling)}
    _only(given, known)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name == "bias":
            values[name] = {int(token): _real(each) for token, each in _object(value).items()}
        else:
            values[name] = _number(given, name, 0) if name in ("seed", "top_k") else _real(value)
    return Sampling(**{"seed": 0, **values})


def _abort(line: Fields) -> Abort:
    _only(line, ["at", "abort", "when", "tokens"])
    when = line.get("when", "")
    if when not in WHENS:
        raise _WrongError(f"aborts at the stage {when!r}, which there is not")
    tokens = _number(line, "tokens", 0) if "tokens" in line else 0
    return Abort(_number(line, "at", 0), _number(line, "abort", 0), when, tokens)


def _ask_line(ask: Ask) -> dict[str, Any]:
    line: dict[str, Any] = {"at": ask.at, "ask": ask.number, "prompt": [_piece_line(piece) for piece in ask.prompt]}
    line |= {"max_tokens": ask.max_tokens, "sampling": {"seed": ask.sampling.seed, **_own(ask.sampling)}}
    return line | {name: value for name, value in _own(ask).items() if name in _OPTIONAL}


def _abort_line(abort: Abort) -> dict[str, Any]:
    return {"at": abort.at, "abort": abort.ask, "when": abort.when, "tokens": abort.tokens}


def _piece_line(piece: Piece) -> list[int] | dict[str, int]:
    if isinstance(piece, Part):
        return {"stream": piece.stream, "from": piece.start, "to": piece.end}
    return {"answer": piece.ask, "tokens": piece.tokens} if isinstance(piece, Said) else list(piece)


def _own(value: object) -> dict[str, Any]:
    """Fields of a dataclass that are not as they are by default."""
    found = {}
    for each in fields(value):  # type: ignore[arg-type]
        mine = getattr(value, each.name)
        usual = each.default_factory() if each.default_factory is not MISSING else each.default
        if mine != usual:
            found[each.name] = mine
    return found


def _only(line: Fields, known: Any) -> None:
    if strange := [name for name in line if name not in known]:
        raise _WrongError(f"has {strange[0]!r}, which is not known")


def _object(given: Any) -> Fields:
    if not isinstance(given, dict):
        raise _WrongError("has something else where an object should be")
    return given


def _list(given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise _WrongError("has something else where a list should be")
    return given


def _number(line: Fields, name: str, least: int) -> int:
    value = line.get(name)
    if type(value) is not int or not least <= value < 1 << 64:
        raise _WrongError(f"needs a whole number from {least} as {name!r}")
    return value


def _real(value: Any) -> float:
    if type(value) not in (int, float):
        raise _WrongError("needs numbers in its sampling")
    return float(value)


def _ids(given: Any) -> tuple[int, ...]:
    if not all(type(each) is int and 0 <= each < 1 << 63 for each in _list(given)):
        raise _WrongError("needs token ids that are whole numbers")
    return tuple(given)


def _text(line: Fields, name: str) -> str:
    return _string(line.get(name))


def _string(given: Any) -> str:
    if not isinstance(given, str):
        raise _WrongError("has something else where a text should be")
    return given


def _flag(given: Any) -> bool:
    if type(given) is not bool:
        raise _WrongError("has something else where true or false should be")
    return given
