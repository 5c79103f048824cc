"""How far predictions are from those over full rows: each formula once, for one text that is fed token by token.

    p    over full rows in f32; p^ over the rows of a spec; x the token that really comes; all logarithms natural
    NLL  -log p^(x)                     KL   Σ_v p(v) · (log p(v) - log p^(v))          same   argmax p = argmax p^

Logits are f32; everything after them is computed in f64, so that equal logits give a KL of exactly 0.
Legend: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RESAMPLES, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Compared:
    """Some positions' predictions beside those over full rows.

    Attributes:
        nll: f64 [T], nats, of the token that really comes.
        full: the same over full rows.
        kl: f64 [T], nats.
        same: bool [T], whether the likeliest token is the same.
    """

    nll: Tensor
    full: Tensor
    kl: Tensor
    same: Tensor


class Reference:
    """One document's predictions over full rows.

    Attributes:
        logits: f32 [T, V]; 50 MB for 256 positions of SmolLM2, so one document's are held at a time.
        targets: int64 [T], the tokens that really come.
    """

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        assert len(logits) == len(targets), "one target a position"
        self.logits, self.targets = logits, targets

    def compare(self, start: int, logits: Tensor) -> Compared:
        """Predictions of the positions from `start` on: f32 [T, V]."""
        stop = start + len(logits)
        full, targets = self.logits[start:stop], self.targets[start:stop, None]
        p, q = log_probabilities(full), log_probabilities(logits)
        # A sum of rounded terms may fall below 0 by 1e-17; no KL does.
        kl = (p.exp() * (p - q)).sum(dim=-1).clamp(min=0)
        nll, over_full = (-each.gather(1, targets)[:, 0] for each in (q, p))
        return Compared(nll, over_full, kl, full.argmax(dim=-1) == logits.argmax(dim=-1))


def log_probabilities(logits: Tensor) -> Tensor:
    """f64 [T, V] of f32 [T, V]. Equal rows in chunks of equal shape give equal bits."""
    wide = logits.double()
    return wide - wide.logsumexp(dim=-1, keepdim=True)


def joined(parts: Sequence[Compared]) -> Compared:
    """Chunks that follow one another, as one."""
    names = ("nll", "full", "kl", "same")
    return Compared(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """Where the mean over documents lies in 95 of 100 cases: bootstrap by percentiles, the documents drawn again.

    Of differences between a spec and the full cache, each of one document, this is the paired bootstrap: what makes
    one document harder than another is gone from them before anything is drawn. Efron 1979, Ann. Statist. 7(1).

    Args:
        values: one of each document.
        seed: of the draws; equal seeds give equal intervals.

    Returns:
        (low, high), or None where a single document says nothing about others.
    """
    if len(values) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    means = np.asarray(values, np.float64)[draws].mean(axis=1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
