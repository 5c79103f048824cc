"""What a training depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvik.errors import UsageError

MOST_STEPS, MOST_MINUTES = 10**6, 10_000.0


@dataclass(frozen=True)
class Recipe:
    """The same recipe gives the same weights on the same machine, where steps end it.

    Attributes:
        steps: of training.
        minutes: of processor time, all cores together, after which it ends; it fits the learning rate to them. None =
            `steps` end it.
        seed: of the weights' beginning and of the sentences.
        pairs: sentences with a translation in a batch.
        rate: the highest learning rate; it rises over the first 4 % and falls as a cosine does.
        vocabulary: pieces of the tokenizer.
        width, heads, ffn, encoder_layers, decoder_layers: of the network.
    """

    steps: int = 8400
    minutes: float | None = None
    seed: int = 0
    pairs: int = 64
    rate: float = 2e-3
    vocabulary: int = 1200
    width: int = 128
    heads: int = 4
    ffn: int = 256
    encoder_layers: int = 3
    decoder_layers: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise UsageError(f"--steps {self.steps}: use 1 to {MOST_STEPS:,}")
        if self.minutes is not None and not 0.01 <= self.minutes <= MOST_MINUTES:  # not true of NaN either
            raise UsageError(f"--minutes {self.minutes}: use 0.01 to {MOST_MINUTES:,.0f} minutes of processor time")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed}: use a whole number from 0 to 2^63 - 1")

    def rate_at(self, done: float) -> float:
        """The learning rate after so much of the training, 0 to 1."""
        return self.rate * min(1.0, done / 0.04) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))
