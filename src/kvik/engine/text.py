"""Tokens become text: pieces as soon as they are certain, and the end where a stop text or an end token says so."""

from __future__ import annotations

from collections.abc import Sequence

from kvik.models.text.tokenizer import Tokenizer


class Text:
    """An answer's text in the making.

    Attributes:
        stopped: whether a stop text ended it; that is not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = stops
        self._decoder = tokenizer.stream()
        self._held_back = ""

    def take(self, token: int) -> str:
        """What is certain after one more token: no stop text can begin in it."""
        self._held_back += self._decoder.step(token)
        for stop in self._stops:
            at = self._held_back.find(stop)
            if at >= 0:
                self._held_back, self.stopped = self._held_back[:at], True
        safe = len(self._held_back) - _overlap(self._held_back, self._stops)
        piece, self._held_back = self._held_back[:safe], self._held_back[safe:]
        return piece

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        rest = self._held_back + ("" if self.stopped else self._decoder.finish())
        self._held_back = ""
        return rest


def _overlap(text: str, stops: Sequence[str]) -> int:
    """How many last characters of the text may be the beginning of a stop text."""
    return max(
        (n for stop in stops for n in range(1, min(len(stop), len(text)) + 1) if text.endswith(stop[:n])), default=0
    )
