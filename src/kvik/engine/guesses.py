"""Guesses at what an answer says next, to be checked in one step (speculative decoding, arXiv:2211.17192).

A guess costs a row of the step; a right one saves a step. The check takes the token that the answer would have taken
anyway, at every place, so no token is another for it, whatever the sampling.

    text    … the cat sat on the mat. Then the cat |        the last words came before:
    guess                                           sat on  what followed them there (prompt lookup decoding)
"""

from __future__ import annotations

from dataclasses import dataclass

from kvik.cache.spec import Spec
from kvik.engine.job import Task

LONGEST, SHORTEST = 4, 2  # tokens at the end of the text that are looked for


@dataclass(frozen=True)
class Guesses:
    """Looks the end of a text up in what came before it.

    Attributes:
        most: tokens at once; 0 = never.
        spec: of the cache: where a policy adds up attention, what a wrong guess looked at can't be taken back.
    """

    most: int
    spec: Spec

    def __call__(self, task: Task, most: int) -> list[int]:
        """Up to `most` tokens."""
        most = min(self.most, most)
        if most <= 0 or any(group.retention.policy is not None for group in self.spec.groups):
            return []
        return look_up(task.tokens, most)


def look_up(text: list[int], most: int) -> list[int]:
    """What followed the last time that the text had the tokens it ends with; the longest end that it had before."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        end = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start] == end[0] and text[start : start + size] == end:
                return text[start + size : start + size + most]
    return []
