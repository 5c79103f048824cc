"""What a model's makers ask of whoever chooses its tokens: what must come first or last, and what must never come.

How tokens are searched for (greedy, sampled, beams, temperature) is the caller's choice and is not read. What else
would change tokens is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kvik.models.fields import Fields

_REFUSED = {  # setting -> the value that changes nothing
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0, "sequence_bias": None, "exponential_decay_length_penalty": None,
    "forced_decoder_ids": None, "remove_invalid_values": False, "renormalize_logits": False,
}  # fmt: skip


@dataclass(frozen=True)
class Constraints:
    """Which tokens may come where. A text's length counts what it began with.

    Attributes:
        first: the token after a text's first one, or None.
        last: ids of which one ends a text that reaches the limit of its length; none = it just stops.
        never: runs of tokens that must not come.
        never_begin: tokens that must not be the first new one.
        least: tokens that a text has before an end token may come.
        least_new: the same without what it began with.
        repeats: no run of so many tokens comes twice; 0 = any may.
    """

    first: int | None = None
    last: tuple[int, ...] = ()
    never: tuple[tuple[int, ...], ...] = ()
    never_begin: tuple[int, ...] = ()
    least: int = 0
    least_new: int = 0
    repeats: int = 0

    @classmethod
    def read(cls, fields: Fields, ends: tuple[int, ...], last: int | None = None) -> Self:
        """From generation_config.json, or from config.json where there is none.

        Args:
            ends: end tokens, which may come though they stand among runs that must not.
            last: what a missing `forced_eos_token_id` means; None = nothing.

        Raises:
            ConfigError: a setting has a value that can't be used, or one that kvik doesn't know changes tokens.
        """
        ended = "forced_eos_token_id"
        for key, harmless in _REFUSED.items():
            fields.refuse_unless(key, (harmless,))
        never = [run for run in _runs(fields, "bad_words_ids") if not (len(run) == 1 and run[0] in ends)]
        never += [(token,) for token in fields.ids("suppress_tokens")]
        return cls(
            first=fields.integer("forced_bos_token_id", least=0) if fields.has("forced_bos_token_id") else None,
            last=fields.ids(ended) if ended in fields.values or last is None else (last,),
            never=tuple(never),
            never_begin=fields.ids("begin_suppress_tokens"),
            least=fields.integer("min_length", 0, least=0),
            least_new=fields.integer("min_new_tokens", 0, least=0),
            repeats=fields.integer("no_repeat_ngram_size", 0, least=0),
        )

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Self:
        """What `dataclasses.asdict` gave, checked again. Raises ConfigError."""
        fields = Fields(values, "prepared config.json (constraints)")
        fields.refuse_unknown(cls.__dataclass_fields__)
        return cls(
            first=fields.integer("first", least=0) if fields.has("first") else None,
            last=fields.ids("last"),
            never=tuple(_runs(fields, "never")),
            never_begin=fields.ids("never_begin"),
            **{key: fields.integer(key, least=0) for key in ("least", "least_new", "repeats")},
        )

    @property
    def tokens(self) -> tuple[int, ...]:
        """Every id that stands in it."""
        first = () if self.first is None else (self.first,)
        return (*first, *self.last, *self.never_begin, *(token for run in self.never for token in run))

    def apply(
        self, scores: Tensor, texts: Sequence[Sequence[int]], *, began: int, limit: int, ends: Sequence[int]
    ) -> Tensor:
        """Scores with what must not come at -inf; what alone may come has 0.

        Args:
            scores: f32 [texts, vocabulary]: logits, or their logarithms of probabilities; not modified.
            texts: all of one length, what they began with included.
            began: tokens that each began with.
            limit: tokens that a text can have.
            ends: end tokens.
        """
        if self == Constraints():
            return scores
        length, scores = len(texts[0]), scores.clone()
        for row, text in enumerate(texts):
            banned = [run[-1] for run in self.never if _ends_with(text, run[:-1])]
            scores[row, [*banned, *self._repeated(text)]] = -torch.inf
        if length < self.least or length - began < self.least_new:
            scores[:, list(ends)] = -torch.inf
        if self.first is not None and length == 1:
            scores = _only(scores, [self.first])
        if self.last and length == limit - 1:
            scores = _only(scores, self.last)
        if self.never_begin and length == began + (began == 1 and self.first is not None):
            scores[:, list(self.never_begin)] = -torch.inf
        return scores

    def _repeated(self, text: Sequence[int]) -> list[int]:
        """Tokens that would make a run come a second time."""
        size = self.repeats
        if not size or len(text) < size:
            return []
        tail = tuple(text[len(text) - size + 1 :])
        return [text[i + size - 1] for i in range(len(text) - size + 1) if tuple(text[i : i + size - 1]) == tail]


def _ends_with(text: Sequence[int], run: tuple[int, ...]) -> bool:
    return len(text) >= len(run) and tuple(text[len(text) - len(run) :]) == run


def _only(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    out = torch.full_like(scores, -torch.inf)
    out[:, list(tokens)] = 0.0
    return out


def _runs(fields: Fields, key: str) -> list[tuple[int, ...]]:
    """Lists of token ids."""
    runs = fields.values[key] if fields.has(key) else []
    if not isinstance(runs, list | tuple):
        fields.fail(key, "must be a list of lists of token ids")
    checked = [Fields({key: run}, fields.where).ids(key) if isinstance(run, list | tuple) else () for run in runs]
    if not all(checked):
        fields.fail(key, "must be a list of lists of token ids")
    return checked
