"""From logits to a token. The noise is a function of seed and position alone, never of a shared generator, so that a
request's text does not depend on what else is running.

    bias, penalties      change logits: by token, and by what the text has so far
    temperature          divides them; 0 = the likeliest token, at once
    min-p, top-k, top-p  leave some of the likeliest
    noise                Gumbel's: the largest of score + noise is a draw from the softmax of the scores
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvik.errors import UsageError

_FEW = 512  # likeliest tokens that are looked at first: more than that are rarely left


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 = always the likeliest token (greedy).
        top_p: only the likeliest tokens that together have this probability (nucleus, arXiv:1904.09751); 1 = all.
        top_k: only so many of the likeliest; 0 = all.
        seed: of the noise; drawn at random where none is given.
        min_p: only tokens at least so likely as this part of the likeliest one (arXiv:2407.01082); 0 = all.
        presence_penalty: taken from the logits of tokens that the answer has.
        frequency_penalty: the same, as often as it has them.
        repetition_penalty: logits of tokens that prompt or answer have are divided by it where they are above 0, and
            multiplied elsewhere (CTRL, arXiv:1909.05858); 1 = none.
        bias: added to the logits of these tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = field(default_factory=lambda: secrets.randbits(32))
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1e-3 <= self.temperature <= 100):
            raise UsageError(f"temperature {self.temperature}: use 0 (greedy), or 0.001 to 100, such as 0.7")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p}: use a probability above 0 and up to 1, such as 0.9")
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k}: use a number of tokens, or 0 for all")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed {self.seed}: use a whole number from 0 to 2^64 - 1")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min-p {self.min_p}: use a part of the likeliest token's probability, 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UsageError(f"{name.replace('_', '-')} {getattr(self, name)}: use -2 to 2; 0 is none")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UsageError(f"repetition-penalty {self.repetition_penalty}: use 0.01 to 100; 1 is none")
        if not all(-100 <= value <= 100 for value in self.bias.values()):
            raise UsageError("logit-bias: use numbers from -100 to 100")

    @property
    def changes(self) -> bool:
        """Whether logits are changed before anything is chosen."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1
        return any(penalties) or bool(self.bias)


def choose(logits: Tensor, sampling: Sampling, position: int) -> int:
    """One token.

    Args:
        logits: f32 [vocabulary].
        position: that the token will have.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores, ids = _likeliest(logits.double().cpu() / sampling.temperature, sampling)
    key = np.array([sampling.seed, position], dtype=np.uint64)
    noise = torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).gumbel(size=len(logits)))
    return int(ids[int((scores + noise[ids]).argmax())])


def changed(logits: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits after bias and penalties, f32 [vocabulary]; the same object where there are none.

    Args:
        prompt, answer: the text so far.
    """
    if not sampling.changes:
        return logits
    logits = logits.clone()
    if sampling.bias:
        ids, values = zip(*sampling.bias.items(), strict=True)
        logits[list(ids)] += torch.tensor(values, device=logits.device)
    if sampling.repetition_penalty != 1:
        said = list({*prompt, *answer})
        had = logits[said]
        logits[said] = torch.where(had > 0, had / sampling.repetition_penalty, had * sampling.repetition_penalty)
    if answer and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(answer)
        often = torch.tensor(list(counts.values()), dtype=torch.float32, device=logits.device)
        logits[list(counts)] -= sampling.presence_penalty + sampling.frequency_penalty * often
    return logits


def _likeliest(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The scores that may be chosen and their tokens; of equal ones at the end the lower tokens.

    Args:
        scores: f64 [vocabulary].
    """
    count = len(scores)
    if sampling.top_p == 1 and sampling.min_p == 0 and sampling.top_k == 0:
        return scores, torch.arange(count)
    for few in (min(count, max(_FEW, sampling.top_k + 1)), count):
        top = torch.topk(scores, few).values
        kept = _kept(top, scores, sampling)
        if kept < few:
            break
    ids = torch.nonzero(scores >= top[kept - 1]).squeeze(1)  # in the order of tokens; equal ones may be too many
    order = scores[ids].argsort(descending=True, stable=True)[:kept]
    return scores[ids[order]], ids[order]


def _kept(top: Tensor, scores: Tensor, sampling: Sampling) -> int:
    """How many of the likeliest scores, f64 [n], may be chosen."""
    kept = len(top) if sampling.top_k == 0 else min(len(top), sampling.top_k)
    least = top[0] + math.log(sampling.min_p) if sampling.min_p else -math.inf
    kept = int((top[:kept] >= least).sum())
    if sampling.top_p == 1:
        return kept
    left = scores if kept == len(top) else top[:kept]  # the sum goes over what the rules before it left
    before = (top[:kept] - torch.logsumexp(left[left >= least], 0)).exp().cumsum(0).roll(1)
    before[0] = 0.0
    return int((before < sampling.top_p).sum())
