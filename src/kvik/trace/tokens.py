"""A token's text as it can be shown: what is invisible, or would move other text about, gets a sign."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """The text with spaces, line ends and control characters as signs.

    >>> visible(" cat"), visible("\\n\\t"), visible("a\\x1b\\u202eb")
    ('␣cat', '⏎⇥', 'a⟨U+001B⟩⟨U+202E⟩b')
    """
    alone = bool(text) and unicodedata.category(text[0])[0] == "M"  # a mark that has nothing to stand on
    return "◌" * alone + "".join(map(_sign, text))


def _sign(character: str) -> str:
    code, kind = ord(character), unicodedata.category(character)
    if character in _SIGNS:
        return _SIGNS[character]
    if kind[0] == "C" or kind in ("Zl", "Zp", "Zs"):
        return f"⟨U+{code:04X}⟩"
    return character


_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
