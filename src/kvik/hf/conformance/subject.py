"""A tiny model twice: one that a cache works in, and a twin without any, which is the truth.

B texts, T tokens, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvik.hf.conformance.models import build, perturbed

Row = Sequence[int]
Rows = Sequence[Row]
NEW = 6  # tokens that are generated where nothing else is said


class Subject:
    """A model under test and its untouched twin, with the same weights.

    Attributes:
        name: of models.MODELS.
        model: what caches are made for and used with.
        twin: what no cache ever touches.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.model = build(name)
        self.twin = build(name)
        self._draft: Any = None

    @property
    def draft(self) -> Any:
        """A model whose guesses are right now and then."""
        if self._draft is None:
            self._draft = perturbed(self.name)
        return self._draft

    def exact(self, ids: Row) -> Tensor:
        """Logits [T, V] of one text alone, without a cache."""
        return _logits(self.twin(input_ids=torch.tensor([list(ids)]), use_cache=False))[0]

    def feed(self, cache: Any, rows: Rows) -> Tensor:
        """Logits [B, n, V] of the next n tokens of texts of equal length over what a cache holds."""
        ids = torch.tensor([list(row) for row in rows])
        return _logits(self.model(input_ids=ids, past_key_values=cache, use_cache=True))

    def generate(self, cache: Any, rows: Rows, *, pad: int = 0, new: int = NEW, **settings: Any) -> Any:
        """transformers' `generate` for texts of any lengths, padded on their left, with each step's logits."""
        ids, mask = padded(rows, pad)
        return self.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True, **{"do_sample": False, **settings},
        )  # fmt: skip

    def strays(self, output: Any, rows: Rows) -> float:
        """How far the logits of generated tokens are from those of each text alone, at the most.

        Args:
            output: what `generate` gave.
            rows: its texts; where each was continued several times, each of them repeated.
        """
        got = steps(output)
        worst = 0.0
        for index, row in enumerate(rows):
            told = output.sequences[index, -got.shape[1] :].tolist()
            want = self.exact([*row, *told])[len(row) - 1 : -1]
            worst = max(worst, off(got[index], want))
        return worst

    def regret(self, ids: Row, start: int) -> float:
        """By how much the best token's logit is above the one taken, at the most; 0 for a greedy text.

        Args:
            ids: a text.
            start: its first token that was generated.
        """
        logits = self.exact(ids)[start - 1 : -1]
        taken = logits.gather(1, torch.tensor(list(ids[start:]))[:, None])[:, 0]
        return float((logits.max(dim=1).values - taken).max())

    def score(self, ids: Row, start: int) -> float:
        """The mean log-probability of a text's tokens from `start` on: what beam search ranks by."""
        chances = self.exact(ids)[start - 1 : -1].log_softmax(dim=1)
        return float(chances.gather(1, torch.tensor(list(ids[start:]))[:, None]).mean())

    def greedy(self, ids: Row, new: int) -> list[int]:
        """A text and the likeliest tokens after it, without a cache."""
        text = list(ids)
        for _ in range(new):
            text.append(int(self.exact(text)[-1].argmax()))
        return text


def padded(rows: Rows, pad: int = 0) -> tuple[Tensor, Tensor]:
    """(ids [B, T], mask [B, T]) of texts with pads on their left."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(list(row))
        mask[index, longest - len(row) :] = 1
    return ids, mask


def steps(output: Any) -> Tensor:
    """Each step's logits [B, n, V] of what `generate` gave."""
    return torch.stack(list(output.logits), dim=1).float()


def off(got: Tensor, want: Tensor) -> float:
    """The largest difference; infinite where shapes differ or something is no number."""
    if got.shape != want.shape or not got.isfinite().all():
        return float("inf")
    return float((got - want).abs().max()) if got.numel() else 0.0


def figure(value: float) -> str:
    """A difference in two digits.

    >>> figure(0.000123), figure(1.5), figure(0.0)
    ('1.2e-04', '1.5', '0')
    """
    return f"{value:.1e}" if 0 < value < 0.01 else f"{value:.2g}"


def _logits(output: Any) -> Tensor:
    return torch.as_tensor(output.logits).float()
