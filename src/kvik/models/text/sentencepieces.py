"""Folders without a tokenizer.json whose text is cut by SentencePiece's unigram models (arXiv:1808.06226) and whose ids
stand in a table apart, as Marian's: source.spm cuts a source, vocab.json has the ids of both languages.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from kvik.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_SPACE, _END, _PADDING, _UNKNOWN = "\u2581", "</s>", "<pad>", "<unk>"
_NORMAL, _UNKNOWN_PIECE, _CONTROL = 1, 2, 3  # kinds of pieces
_UNIGRAM = 1


def serves(folder: Path) -> bool:
    """Whether a folder has such files."""
    return (folder / "source.spm").is_file() and (folder / "vocab.json").is_file()


@dataclass(frozen=True)
class Pieces:
    """What a SentencePiece file says.

    Attributes:
        pieces: (text, score, kind) in the order of their ids.
        characters: its table of normalised characters; empty where it changes none.
        begins: whether a space is put before a text.
        trims: whether spaces at its ends and beside others are left out.
    """

    pieces: tuple[tuple[str, float, int], ...]
    characters: bytes
    begins: bool
    trims: bool

    @classmethod
    def read(cls, path: Path) -> Pieces:
        """Raises TokenizerError: the file is damaged, or no unigram model."""
        try:
            return cls._parsed(path.read_bytes())
        except (OSError, ValueError, IndexError, struct.error, TypeError) as error:
            reason = " ".join(str(error).split())[:80]
            raise TokenizerError(f"{path}: is damaged or no SentencePiece model ({reason}); get it again") from None

    @classmethod
    def _parsed(cls, data: bytes) -> Pieces:
        pieces: list[tuple[str, float, int]] = []
        trainer: dict[int, int | bytes] = {}
        normaliser: dict[int, int | bytes] = {}
        for number, value in _fields(data):
            if number == 1:
                found = dict(_fields(_bytes(value)))
                (score,) = struct.unpack("<f", _bytes(found.get(2, bytes(4))))
                pieces.append((_bytes(found.get(1, b"")).decode(), score, int(found.get(3, _NORMAL))))
            elif number in (2, 3):
                (trainer if number == 2 else normaliser).update(_fields(_bytes(value)))
        if trainer.get(3, _UNIGRAM) != _UNIGRAM or not pieces:
            raise ValueError("it holds no unigram model")
        if not {kind for _, _, kind in pieces} <= {_NORMAL, _UNKNOWN_PIECE, _CONTROL}:
            raise ValueError("it has pieces of a kind that kvik doesn't know")
        if _UNKNOWN_PIECE not in {kind for _, _, kind in pieces}:
            raise ValueError("it has no piece for what it doesn't know")
        return cls(
            tuple(pieces), _bytes(normaliser.get(2, b"")), bool(normaliser.get(3, 1)), bool(normaliser.get(4, 1))
        )

    def backend(self) -> Backend:
        """What cuts text as the file says; what it doesn't know stays as it is written."""
        from tokenizers import Regex, models, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        unknown = [kind for _, _, kind in self.pieces].index(_UNKNOWN_PIECE)
        # Pieces that control something are no text: under a name that no text has they cut nothing.
        vocabulary = [(t if kind == _NORMAL else f"\0{i}", score) for i, (t, score, kind) in enumerate(self.pieces)]
        backend = Backend(models.Unigram(vocabulary, unknown, False))
        steps: list[object] = [normalizers.Precompiled(self.characters)] if self.characters else []
        if self.trims:
            steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        backend.normalizer = normalizers.Sequence(steps)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "always" if self.begins else "never", split=False)
        return backend


class TwoLanguages:
    """A source's text to ids, which are those of both languages, and ids to text.

    Attributes:
        backend: ids to text.

    Raises:
        TokenizerError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import AddedToken, decoders, models
        from tokenizers import Tokenizer as Backend

        self._ids = _vocabulary(folder / "vocab.json")
        special = [AddedToken(t, normalized=False, special=True) for t in (_END, _UNKNOWN, _PADDING) if t in self._ids]
        pieces = Pieces.read(folder / "source.spm")
        try:
            self._pieces = pieces.backend()
        except Exception as error:  # the library raises plain Exception
            _damaged(folder / "source.spm", " ".join(str(error).split())[:80])
        self._pieces.add_special_tokens(special)
        self.backend = Backend(models.WordLevel(self._ids, _UNKNOWN))
        self.backend.decoder = decoders.Metaspace(_SPACE, "always")
        self.backend.add_special_tokens(special)

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids; `special`: with the end token. A text may begin with the language that is wanted, such as >>fra<<."""
        cut = text.find("<<") + 2 if text.startswith(">>") and "<<" in text else 0
        tokens = [text[:cut]] if cut else []
        tokens += self._pieces.encode(text[cut:], add_special_tokens=False).tokens
        return [self._ids.get(token, self._ids[_UNKNOWN]) for token in tokens + [_END] * special]


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not all(type(i) is int and i >= 0 for i in table.values()):
        _damaged(path, "no table of ids")
    if missing := [token for token in (_END, _UNKNOWN) if token not in table]:
        _damaged(path, f"it has no {missing[0]}")
    return table


def _damaged(path: Path, what: str) -> NoReturn:
    raise TokenizerError(f"{path}: is damaged ({what}), so text can't be turned into tokens; get it again")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """A protobuf message's (number, value): whole numbers, or bytes."""
    at = 0
    while at < len(data):
        key, at = _number(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _number(data, at)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            length, at = _number(data, at)
        if length is None or at + length > len(data):
            raise ValueError("it breaks off")
        yield key >> 3, data[at : at + length]
        at += length


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where bytes should")
    return value
