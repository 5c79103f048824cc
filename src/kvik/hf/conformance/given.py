"""What a case gets: one cache class, and tiny models that were built once."""

from __future__ import annotations

from typing import Any

from transformers import EncoderDecoderCache

from kvik.hf.conformance.caches import Contender
from kvik.hf.conformance.models import SOURCE, text
from kvik.hf.conformance.subject import Subject, figure, off
from kvik.hf.conformance.verdicts import UnfitError, demand, first_line

EXACT = 1e-4  # f32 in another order of additions stays far below; logits have a spread of about 1
ROOM = 96  # tokens that a cache of fixed size is made for
LOSS = 4.0  # a lossy cache may be off so many times as far as it was on texts alone


class Given:
    """One cache class and the models it is tried in.

    Attributes:
        contender: the class.
    """

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self._subjects: dict[str, Subject] = {}
        self._slack: dict[str, float] = {}
        self._made: list[Any] = []

    def subject(self, name: str) -> Subject:
        """A tiny model of models.MODELS with its twin, built at the first use."""
        if name not in self._subjects:
            self._subjects[name] = Subject(name)
        return self._subjects[name]

    def cache(self, subject: Subject, room: int = ROOM) -> Any:
        """An empty cache for a model.

        Raises:
            UnfitError: the class refuses this model.
        """
        try:
            cache = self.contender.make(subject.model, room)
        except Exception as refusal:
            raise UnfitError(f"refuses such a model: {first_line(refusal)}") from refusal
        return self.made(cache)

    def made(self, cache: Any) -> Any:
        """Takes over a cache that must be closed."""
        self._made.append(cache)
        return cache

    def pair(self, subject: Subject, source: int = SOURCE) -> Any:
        """An empty cache for a model with an encoder: one for its own rows, one for the source's."""
        own = self.cache(subject)
        return own if isinstance(own, EncoderDecoderCache) else EncoderDecoderCache(own, self.cache(subject, source))

    def close(self) -> None:
        """Closes what was made, where the class can."""
        while self._made:
            self.end(self._made.pop())

    @staticmethod
    def end(cache: Any) -> None:
        """Closes one, where its class can."""
        if "close" in dir(cache):
            cache.close()

    def slack(self, subject: Subject) -> float:
        """How far logits of this model may be off: rounding, or what a lossy class loses on texts alone.

        Of a model with an encoder: twice what it loses in a plain one, as there are two kinds of rows.
        """
        if not self.contender.lossy:
            return EXACT
        if subject.model.config.is_encoder_decoder:
            return 2 * self.slack(self.subject("plain"))
        if subject.name not in self._slack:
            found = [self.alone(subject, text(length, seed=length)) for length in (9, 21, 104)]
            self._slack[subject.name] = max(EXACT, LOSS * max(found))
        return self._slack[subject.name]

    def near(self, subject: Subject, difference: float, what: str = "logits") -> str:
        """A remark, where logits of this model are no further off than they may be.

        Raises:
            BrokenError: they are.
        """
        limit = self.slack(subject)
        demand(difference <= limit, f"{what} off by {figure(difference)} (allowed: {figure(limit)})")
        return f"off by {figure(difference)}"

    def alone(self, subject: Subject, ids: list[int]) -> float:
        """How far logits are off where the first half of a text is read in one call, and the rest token by token."""
        cache, half = self.cache(subject, max(ROOM, len(ids))), len(ids) // 2
        want = subject.exact(ids)
        found = off(subject.feed(cache, [ids[:half]])[0], want[:half])
        for at in range(half, len(ids)):
            found = max(found, off(subject.feed(cache, [[ids[at]]])[0, 0], want[at]))
        return found
