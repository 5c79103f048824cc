"""The bytes of single tokens, exactly: `decode` of one id drops a space before it, and shows no half character."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling:
    """How a tokenizer spells bytes: as letters of its own (byte-level BPE), or as `<0x0A>` and "▁" for a space."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        decoder = json.dumps(json.loads(backend.to_str()).get("decoder"), ensure_ascii=False)
        self._letters = _letters() if "ByteLevel" in decoder else None
        self._metaspace = "▁" in decoder or "Metaspace" in decoder
        self._added = {id: str(token.content) for id, token in backend.get_added_tokens_decoder().items()}

    def of(self, token: int) -> bytes:
        """See `Tokenizer.spelled`."""
        if token in self._added:
            return self._added[token].encode()
        text: str | None = self._backend.id_to_token(token)
        if text is None:
            return b""
        if self._letters is not None and all(letter in self._letters for letter in text):
            return bytes(self._letters[letter] for letter in text)
        byte = _BYTE.fullmatch(text)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return (text.replace("▁", " ") if self._metaspace else text).encode()


def _letters() -> dict[str, int]:
    """Byte-level BPE's letter for each byte (GPT-2): printable ones stand for themselves, others for 256 and up."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(256 + at): byte for at, byte in enumerate(others)}
