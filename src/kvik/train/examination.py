"""How many held-out sentences a translator gets right, to the letter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from kvik.engine.translation import greedy
from kvik.models.model import Model
from kvik.train.phrases import LANGUAGES, Item, draw

BATCH, MOST_TOKENS = 64, 96


class Tokens(Protocol):
    """Text to ids and back: kvik's tokenizer, or the library's by the same names."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...


@dataclass(frozen=True)
class Answer:
    """One sentence's translation beside the right one."""

    item: Item
    language: str
    got: str

    @property
    def right(self) -> bool:
        return self.got == self.item.targets[self.language]


@dataclass(frozen=True)
class Exam:
    """All answers."""

    answers: tuple[Answer, ...]

    def share(self, language: str | None = None, kind: str | None = None) -> float:
        """Of sentences that are right to the letter; of a language, of a kind, or of all."""
        found = [
            answer.right for answer in self.answers
            if language in (None, answer.language) and kind in (None, answer.item.kind)
        ]  # fmt: skip
        return sum(found) / max(len(found), 1)


def examine(model: Model, tokenizer: Tokens, seed: int, count: int, kv: str = "f32") -> Exam:
    """Greedy translations of so many held-out sentences into each language, through kvik's cache."""
    asked = [(item, language) for item in islice(draw(seed, testing=True), count) for language in LANGUAGES]
    sources = [tokenizer.encode(LANGUAGES[language] + item.source, add_special_tokens=True) for item, language in asked]
    cache, texts = model.cache(kv, shares=False), list[str]()
    for start in range(0, len(sources), BATCH):
        sequences = [cache.open(source=model.fill(cache, source)) for source in sources[start : start + BATCH]]
        try:
            found = greedy(model, sequences, MOST_TOKENS)
        finally:
            for sequence in sequences:
                sequence.close()
        texts += [tokenizer.decode(ids) for ids in found]
    return Exam(tuple(Answer(item, language, got) for (item, language), got in zip(asked, texts, strict=True)))
