"""Text to learn from: the user's own or Python's own documentation, as bytes or as pieces that are learnt from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvik.errors import StorageError, UsageError
from kvik.models.text.spelling import Spelling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOPICS = "topics"  # the name of Python's documentation of its language, which every Python brings along
HELD_OUT = 0.1  # of a text, at its end
BYTES = "bytes"
_LEAST, _MOST_PIECES = 2000, 65_536


@dataclass(frozen=True)
class Corpus:
    """A text, cut into tokens.

    Attributes:
        name: for people.
        digest: SHA-256 of the text, in hex.
        tokenizer: of the `tokenizers` library.
        learnt, held: token ids int64, of the part that is learnt from and of the one that is not.
        held_bytes: of the text that `held` stands for.
    """

    name: str
    digest: str
    tokenizer: Tokenizer
    learnt: Tensor
    held: Tensor
    held_bytes: int

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return int(self.tokenizer.get_vocab_size())


def read(source: str, pieces: str = BYTES) -> Corpus:
    """A text and its tokens.

    Args:
        source: a file in UTF-8, or `TOPICS`.
        pieces: `BYTES`: a token is a byte; or how many pieces to learn, by byte pairs (arXiv:1508.07909).

    Raises:
        StorageError: the file can't be read, or is no UTF-8.
        UsageError: the text is too short, or `pieces` is neither.
    """
    name, text = _text(source)
    if len(text) < _LEAST:
        raise UsageError(f"{source}: has {len(text):,} characters; a text to learn from needs {_LEAST:,} or more")
    cut = int(len(text) * (1 - HELD_OUT))
    tokenizer = _tokenizer(text[:cut], pieces)
    parts = text[:cut], text[cut:]
    if pieces == BYTES:
        of_byte = _tokens_of_bytes(tokenizer)
        learnt, held = (of_byte[torch.tensor(list(part.encode()))] for part in parts)
    else:
        learnt, held = (torch.tensor(tokenizer.encode(part).ids) for part in parts)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Corpus(name, digest, tokenizer, learnt, held, len(text[cut:].encode()))


def save(tokenizer: Tokenizer, folder: Path, mask: str | None = None) -> None:
    """tokenizer.json and tokenizer_config.json. Raises OSError.

    Args:
        mask: how a text spells a hidden token; it is the one behind all others.
    """
    if mask is not None:
        tokenizer.add_special_tokens([mask])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {} if mask is None else {"mask_token": mask}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


def _text(source: str) -> tuple[str, str]:
    if source == TOPICS:
        from pydoc_data.topics import topics

        return "pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(source).name, Path(source).read_bytes().decode("utf-8")
    except OSError as error:
        raise StorageError(
            f"{source}: can't be read ({error.strerror or error}), so there is nothing to learn from; name a text "
            f"file, or {TOPICS!r}"
        ) from None
    except UnicodeDecodeError as error:
        raise StorageError(f"{source}: is no UTF-8 at byte {error.start:,}; convert it, or name another file") from None


def _tokens_of_bytes(tokenizer: Tokenizer) -> Tensor:
    """Which token each byte is, int64 [256]: a look instead of the tokenizer's way over half a million letters."""
    spelling, found = Spelling(tokenizer), torch.empty(256, dtype=torch.int64)
    for token in range(256):
        found[spelling.of(token)[0]] = token
    return found


def _tokenizer(text: str, pieces: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if pieces == BYTES:
        spelled = {character: number for number, character in enumerate(sorted(alphabet))}
        tokenizer = Tokenizer(models.BPE(vocab=spelled, merges=[]))
    elif pieces.isdecimal() and len(alphabet) < int(pieces) <= _MOST_PIECES:
        tokenizer = Tokenizer(models.BPE())
    else:
        raise UsageError(f"--pieces {pieces!r}: use {BYTES!r}, or a number from 257 to {_MOST_PIECES:,} (byte pairs)")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if pieces != BYTES:
        trainer = trainers.BpeTrainer(vocab_size=int(pieces), initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator([text], trainer)
    return tokenizer
