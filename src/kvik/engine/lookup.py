"""Prompt lookup decoding: what followed the last time that a text had the words it ends with is guessed again.

text    … the cat sat on the mat. Then the cat |        the last words came before:
guess                                           sat on  what followed them there
"""

from __future__ import annotations

from collections.abc import Sequence

from kvik.engine.guesses import Guesser
from kvik.engine.job import Task

LONGEST, SHORTEST = 4, 2  # tokens at the end of the text that are looked for


class Lookup(Guesser):
    """Looks the end of each text up in what came before it."""

    def __init__(self, most: int) -> None:
        """
        Args:
            most: tokens of an answer at once.
        """
        self.most = most

    def guess(self, asks: Sequence[tuple[Task, int]], reading: int) -> list[list[int]]:
        """See `Guesser`."""
        return [look_up(task.tokens, min(most, self.most)) if most > 0 else [] for task, most in asks]


def look_up(text: list[int], most: int) -> list[int]:
    """What followed the last time that the text had the tokens it ends with; the longest end that it had before."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        end = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start] == end[0] and text[start : start + size] == end:
                return text[start + size : start + size + most]
    return []
