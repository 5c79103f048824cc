"""Beam search: the likeliest texts that a search which keeps `count` of them at each length can find.

    length 3      a b c   -1.2        candidates    a b c d  -1.3    goes on
                  a b e   -1.9        of length 4   a b e $  -2.0    ends: score / length ** penalty
                                                    a b c f  -2.4    goes on

Beams are forks: they share pages of what they have in common, and all read one source. Candidates, scores and the
moment to stop are those of transformers' `generate`, in f32 as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kvik.cache.cache import Cache
from kvik.cache.sequence import Sequence as KVSequence
from kvik.engine.generation import prefill
from kvik.errors import UsageError
from kvik.models.constraints import Constraints
from kvik.models.model import Model

_OUT = -1.0e9  # what is added to scores that may not be taken


@dataclass(frozen=True)
class Beam:
    """A text that was found.

    Attributes:
        token_ids: new ids, the end token included where it has one.
        score: sum of the tokens' logarithms of probability, divided by their number to the length penalty.
    """

    token_ids: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class Search:
    """How beams are searched for.

    Attributes:
        count: beams.
        max_tokens: new tokens at the most.
        length_penalty: above 0 favours long texts, below 0 short ones.
        early_stopping: True = when `count` texts have ended; False = when no text that goes on would be better at its
            present length; "never" = nor at any length.
        min_tokens: new tokens before a text may end.
    """

    count: int = 4
    max_tokens: int = 128
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.max_tokens < 1 or not 0 <= self.min_tokens <= self.max_tokens:
            raise UsageError(
                f"{self.count} beams of {self.min_tokens} to {self.max_tokens} tokens: give at least one beam, and one "
                "token"
            )
        if self.early_stopping not in (True, False, "never"):
            raise UsageError(f"early stopping {self.early_stopping!r}: use True, False or 'never'")


def beams(
    model: Model,
    cache: Cache,
    prompt: Sequence[int] = (),
    *,
    source: bytes | None = None,
    salt: str = "",
    ends: Sequence[int] | None = None,
    constraints: Constraints | None = None,
    **search: Any,
) -> list[Beam]:
    """The best texts, the best first.

    Args:
        model: of whose rows the cache is.
        prompt: token ids; may be empty where a model reads a source: its texts begin with a token of their own then.
        source: a digest from `Model.fill`, where the model reads one.
        salt: see `Cache.open`.
        ends: end tokens; None = the model's.
        constraints: which tokens may come where; None = the model's.
        search: `Search`'s attributes: count, max_tokens, length_penalty, early_stopping, min_tokens.

    Raises:
        UsageError: the vocabulary has too few tokens for so many beams, or there is no prompt.
        ContextError, BudgetError: see `Model.run`; nothing stays open.
    """
    how, reading = Search(**search), model.reading
    prompt = list(prompt) or ([] if reading is None else [reading.start_id])
    if not prompt:
        raise UsageError("the prompt is empty; give at least one token of text")
    if constraints is None:
        constraints = Constraints() if reading is None else reading.constraints
    constraints = replace(constraints, least_new=max(constraints.least_new, how.min_tokens))
    ends = model.config.eos_ids if ends is None else tuple(ends)
    candidates = max(2, 1 + len(ends)) * how.count  # so many that enough go on if all others end
    if candidates > model.config.vocab_size:
        raise UsageError(f"{how.count} beams are too many for {model.config.vocab_size} tokens; ask for fewer")
    model.check_context(len(prompt) + how.max_tokens, cache.spec)
    live = [cache.open(prompt, salt, source)]
    try:
        logits = prefill(model, live, prompt[len(live[0]) :])
        found = _Found(how, torch.tensor(ends, dtype=torch.int64))
        while True:
            texts = [[*prompt, *text] for text in found.texts]
            allowed = constraints.apply(
                torch.log_softmax(logits.cpu(), -1).expand(how.count, -1), texts,
                began=len(prompt), limit=len(prompt) + how.max_tokens, ends=ends,
            )  # fmt: skip
            parents = found.take(allowed, candidates)
            if found.over:
                return found.best
            _fork(live, parents)
            logits = model.run([(s, text[-1:]) for s, text in zip(live, found.texts, strict=True)])
            for sequence in live:
                sequence.settle()
    finally:
        for sequence in live:
            sequence.close()


class _Found:
    """Beams that go on, and texts that ended.

    Attributes:
        texts: new tokens of each beam that goes on, the likeliest first.
        scores: f32 [count], theirs.
        over: whether the search has ended.
    """

    def __init__(self, search: Search, ends: Tensor) -> None:
        self.search, self.ends, self.over = search, ends, False
        self.texts: list[list[int]] = [[]] * search.count  # all the same: the first alone may be taken
        self.scores = torch.full((search.count,), _OUT)
        self.scores[0] = 0.0
        self._done: list[tuple[int, ...]] = [()] * search.count
        self._values = torch.full((search.count,), _OUT)  # of texts that ended, with their penalty
        self._ended = torch.zeros(search.count, dtype=torch.bool)

    @property
    def best(self) -> list[Beam]:
        """Texts that ended, the best first."""
        rows = zip(self._done, self._values.tolist(), self._ended.tolist(), strict=True)
        return [Beam(text, value) for text, value, ended in rows if ended]

    def take(self, scores: Tensor, candidates: int) -> list[int]:
        """One more token for each beam, from the logarithms of its probabilities, f32 [count, vocabulary].

        Returns:
            Which beam each of the new ones continues.
        """
        count, length = self.search.count, len(self.texts[0]) + 1
        top, places = torch.topk((scores + self.scores[:, None]).flatten(), candidates)
        parents, tokens = places // scores.shape[1], places % scores.shape[1]
        texts = [[*self.texts[p], t] for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)]
        ending = torch.isin(tokens, self.ends) | (length >= self.search.max_tokens)
        going = top + ending * _OUT
        chosen = torch.topk(going, count).indices
        self._end(top, ending, texts, length)
        self.scores, self.texts = going[chosen], [texts[i] for i in chosen.tolist()]
        self.over = bool(ending.all()) or not self._may_improve(length)
        return parents[chosen].tolist()

    def _end(self, top: Tensor, ending: Tensor, texts: list[list[int]], length: int) -> None:
        """Texts that end among the likeliest `count` join those that ended before; the best stay."""
        count = self.search.count
        ended = ending & (torch.arange(len(top)) < count)
        values = torch.cat((self._values, top / length**self.search.length_penalty + ~ended * _OUT))
        order = torch.topk(values, count).indices
        everything = [*self._done, *(tuple(text) for text in texts)]
        self._done = [everything[i] for i in order.tolist()]
        self._values, self._ended = values[order], torch.cat((self._ended, ended))[order]

    def _may_improve(self, length: int) -> bool:
        """Whether some beam may end better than the worst of those that ended."""
        search = self.search
        if search.early_stopping is True and bool(self._ended.all()):
            return False
        far = search.early_stopping == "never" and search.length_penalty > 0
        best = self.scores[0] / (search.max_tokens if far else length) ** search.length_penalty
        worst = torch.where(self._ended, self._values.min(), _OUT)
        return bool((best > worst).any())


def _fork(live: list[KVSequence], parents: list[int]) -> None:
    """The sequences of the next beams take the place of `live`: a parent's own goes to the first beam that continues
    it, others are its forks, and those that nobody continues are closed."""
    parents = [0] * len(parents) if len(live) == 1 else parents  # before the first token all beams are one
    for index, sequence in enumerate(live):
        if index not in parents:
            sequence.close()
    following: list[KVSequence] = []
    for number, parent in enumerate(parents):
        if parent in parents[:number]:
            live.append(live[parent].fork())  # where the next one fails, this one can be closed
        following.append(live[-1] if parent in parents[:number] else live[parent])
    live[:] = following
