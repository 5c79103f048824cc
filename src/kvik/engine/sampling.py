"""From logits to a token. The noise is a function of seed and position alone, never of a shared generator, so that a
request's text does not depend on what else is running."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvik.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 = always the likeliest token (greedy).
        top_p: only the likeliest tokens that together have this probability (nucleus, arXiv:1904.09751); 1 = all.
        top_k: only so many of the likeliest; 0 = all.
        seed: of the noise; drawn at random where none is given.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = field(default_factory=lambda: secrets.randbits(32))

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 1e-3 <= self.temperature <= 100):
            raise UsageError(f"temperature {self.temperature}: use 0 (greedy), or 0.001 to 100, such as 0.7")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p}: use a probability above 0 and up to 1, such as 0.9")
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k}: use a number of tokens, or 0 for all")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed {self.seed}: use a whole number from 0 to 2^64 - 1")


def choose(logits: Tensor, sampling: Sampling, position: int) -> int:
    """One token.

    Args:
        logits: f32 [vocabulary].
        position: that the token will have.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scores, order = (logits.double() / sampling.temperature).sort(descending=True, stable=True)
    kept = len(scores) if sampling.top_k == 0 else min(sampling.top_k, len(scores))
    if sampling.top_p < 1:
        before = torch.softmax(scores[:kept], dim=0).cumsum(0).roll(1)
        before[0] = 0.0
        kept = int((before < sampling.top_p).sum())
    key = np.array([sampling.seed, position], dtype=np.uint64)
    noise = np.random.Generator(np.random.Philox(key=key)).gumbel(size=len(scores))
    noisy = scores[:kept].cpu() + torch.from_numpy(noise)[order[:kept].cpu()]
    return int(order[int(noisy.argmax())])
