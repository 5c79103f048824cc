"""Steps drawn at random, over several texts at once: what one step leaves must fit every other."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch

from kvik.hf.conformance.given import Given
from kvik.hf.conformance.models import VOCAB
from kvik.hf.conformance.subject import Subject, off
from kvik.hf.conformance.turns import says_croppable
from kvik.hf.conformance.verdicts import demand

STEPS = 60
LONGEST = 90  # tokens of a text
WIDEST = 6  # texts


def at_random(given: Given) -> str:
    """Sixty steps drawn at random (read, crop, reorder, select, repeat, copy): every text keeps its own logits."""
    return _walk(given, given.subject("plain"), crops=True)


def at_random_mixed(given: Given) -> str:
    """Sixty steps drawn at random, crops aside, in a model of layers with and without a window."""
    return _walk(given, given.subject("mixed"), crops=False)


def _walk(given: Given, subject: Subject, *, crops: bool) -> str:
    cache = given.cache(subject, LONGEST + 1)
    walk = Walk(given, subject, cache)
    kinds = [walk.read, walk.read, walk.reorder, walk.select, walk.repeat, walk.copied]
    if crops and says_croppable(cache):
        kinds += [walk.crop]
    for _ in range(STEPS):
        step = walk.draw.choice(kinds)
        step()
        seen, length = int(walk.cache.get_seq_length()), len(walk.rows[0])
        demand(seen == length, f"after {step.__name__} it counts {seen} tokens instead of {length}")
    return f"{given.near(subject, walk.worst)} in {walk.tokens} tokens"


class Walk:
    """Texts of one length, and a cache that has read them.

    Attributes:
        rows: the texts.
        cache: of all of them.
        worst: how far logits were off, at the most.
        tokens: that were read.
        draw: where chance comes from.
    """

    def __init__(self, given: Given, subject: Subject, cache: Any) -> None:
        self._given, self._subject = given, subject
        self.rows: list[list[int]] = [[] for _ in range(3)]
        self.cache = cache
        self.worst, self.tokens = 0.0, 0
        self.draw = random.Random(5)
        self.read()

    def read(self) -> None:
        """A few more tokens for each text, or as many as there is room for."""
        count = min(self.draw.choice([1, 1, 2, 9, 20]), LONGEST - len(self.rows[0]))
        self.rows = self._continued(self.cache, count)

    def crop(self) -> None:
        """Takes tokens back, not all."""
        if len(self.rows[0]) > 1:
            take = self.draw.randrange(1, min(40, len(self.rows[0])))
            self.cache.crop(-take)
            self.rows = [row[:-take] for row in self.rows]

    def reorder(self) -> None:
        """Any text in any place."""
        kept = [self.draw.randrange(len(self.rows)) for _ in self.rows]
        self.cache.reorder_cache(torch.tensor(kept))
        self.rows = [self.rows[each] for each in kept]

    def select(self) -> None:
        """Some texts, each once."""
        kept = self.draw.sample(range(len(self.rows)), self.draw.randint(1, len(self.rows)))
        self.cache.batch_select_indices(torch.tensor(kept))
        self.rows = [self.rows[each] for each in kept]

    def repeat(self) -> None:
        """Each text twice or three times, if they don't get too many."""
        times = self.draw.choice([2, 3])
        if times * len(self.rows) <= WIDEST:
            self.cache.batch_repeat_interleave(times)
            self.rows = [row for row in self.rows for _ in range(times)]

    def copied(self) -> None:
        """The copy stays; the original reads something else, and ends."""
        left, self.cache = self.cache, copy.deepcopy(self.cache)
        self._given.made(self.cache)
        self._continued(left, 1)
        self._given.end(left)

    def _continued(self, cache: Any, count: int) -> list[list[int]]:
        """The texts with tokens behind them that were drawn and read."""
        if count == 0:
            return self.rows
        rows = [[*row, *(self.draw.randrange(3, VOCAB) for _ in range(count))] for row in self.rows]
        got = self._subject.feed(cache, [row[-count:] for row in rows])
        for logits, row in zip(got, rows, strict=True):
            self.worst = max(self.worst, off(logits, self._subject.exact(row)[-count:]))
        self.tokens += count * len(rows)
        return rows
