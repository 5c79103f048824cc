"""Sentences about dates, times, prices and counts, in English with their Chinese and Korean.

A grammar draws them. What is in digits stays in digits, what is in words becomes words. The same English always has the
same translation, so that a translation is right or wrong. Which sentences are kept for testing follows from a hash of
the English alone: no training ever draws them (`held_out`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from kvik.train import moments, quantities
from kvik.train.parts import Phrase

LANGUAGES = {"zh": ">>zho<<", "ko": ">>kor<<"}
HELD_OUT = 50  # one of so many
KINDS: dict[str, tuple[int, Callable[[Random], Phrase]]] = {  # how often each is drawn
    "date": (3, moments.dated),
    "time": (3, moments.timed),
    "meeting": (4, moments.meeting),
    "year": (1, moments.yearly),
    "price": (2, quantities.price),
    "count": (4, quantities.counted),
    "number": (3, quantities.number),
    "measure": (2, quantities.measured),
    "ordinal": (2, quantities.ordered),
}


@dataclass(frozen=True)
class Item:
    """One sentence.

    Attributes:
        kind: which of `KINDS`.
        source: English.
        targets: its translations by language, as in `LANGUAGES`.
    """

    kind: str
    source: str
    targets: dict[str, str]


def held_out(source: str) -> bool:
    """Whether a sentence is kept for testing, whichever way it is capitalised or ended."""
    plain = source.casefold().rstrip(".")
    return int.from_bytes(hashlib.sha256(plain.encode()).digest()[:4], "big") % HELD_OUT == 0


def draw(seed: int, *, testing: bool = False) -> Iterator[Item]:
    """Sentences without an end: for training, or those that no training draws, each of these once."""
    rng, seen = Random(f"{seed} {testing}"), set[str]()
    kinds = [kind for kind, (often, _) in KINDS.items() for _ in range(often)]
    while True:
        kind = rng.choice(kinds)
        item = _written(rng, kind, KINDS[kind][1](rng))
        if held_out(item.source) != testing or (testing and item.source in seen):
            continue
        if testing:
            seen.add(item.source)
        yield item


def _written(rng: Random, kind: str, phrase: Phrase) -> Item:
    """Usually as a sentence; at times without its full stop, or in small letters, as people type."""
    source, zh, ko = phrase.en, phrase.zh, phrase.ko
    if not phrase.fragment:
        source = (source[0].upper() + source[1:]).replace(".m..", ".m.")
        if rng.random() < 0.1 and not source.endswith(".m."):
            source, zh, ko = source.removesuffix("."), zh.removesuffix("。"), ko.removesuffix(".")
    if rng.random() < 0.06:
        source = source.lower()
    return Item(kind, source, {"zh": zh, "ko": ko})
