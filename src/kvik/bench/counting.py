"""Counts what passes between a decoder and its cache, position by position.

Counted, not computed: rows when a layer appends them, pairs by asking the attention that runs. A query of zeros weighs
all rows that it sees alike, so that the log-sum-exp of its scores is the logarithm of their number. It costs a second
attention, so nothing is timed while it is counted.

No token's rows or pairs depend on later tokens (law 9). Step m without a cache computes positions 0 … m-1 again, so
one counted pass over a text tells what each of its steps does:

    at position          0     1     2     3
    pairs of a head      1     2     3     4        counted
    step of 4 tokens     with a cache 4, the last;  without 1 + 2 + 3 + 4 = 10
    text of 4 tokens     with a cache 10;           without 1 + 3 + 6 + 10 = 20
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvik.models.watch import Chunk, Watch
from kvik.ops.reads import Partial


@dataclass(frozen=True)
class Counts:
    """Over all layers, heads and sequences.

    Attributes:
        tokens: that passed all layers.
        rows: of k and of v, computed.
        pairs: of a query and a row that it sees.
        read: rows that the last token's queries see, each once for its lane.
    """

    tokens: int
    rows: int
    pairs: int
    read: int


class Tally:
    """What was counted so far, by position of the token.

    Attributes:
        passed: int64 [positions], layers that a token passed.
        rows: int64 [positions], rows of k and of v that it left.
        pairs: int64 [positions], rows that its queries saw, added up over heads.
    """

    def __init__(self, tokens: int, layers: int, shared: int) -> None:
        """
        Args:
            tokens: positions.
            layers: of the model, that keep rows.
            shared: query heads that read one lane.
        """
        self.layers, self.shared = layers, shared
        self.passed, self.rows, self.pairs = (np.zeros(tokens, np.int64) for _ in range(3))

    def watch(self, step: Chunk) -> Counting:
        """For `Model.run`: counts one step."""
        return Counting(step, self)

    def step(self, tokens: int, *, cached: bool) -> Counts:
        """The step that adds a text's token number `tokens`."""
        return self._counts(tokens, sums=0 if cached else 1)

    def text(self, tokens: int, *, cached: bool) -> Counts:
        """All steps of a text, one for each token."""
        return self._counts(tokens, sums=1 if cached else 2)

    def _counts(self, tokens: int, sums: int) -> Counts:
        read = int(self.pairs[tokens - 1]) // self.shared
        found = [each[:tokens] for each in (self.passed, self.rows, self.pairs)]
        for _ in range(sums):
            found = [np.cumsum(each) for each in found]
        passed, rows, pairs = (int(each[-1]) for each in found)
        return Counts(passed // self.layers, rows, pairs, read)


class Counting(Watch):
    """A step whose rows and pairs go into a Tally."""

    def __init__(self, step: Chunk, tally: Tally) -> None:
        super().__init__(step)
        self.tally = tally

    def append(self, layer: int, **streams: Tensor) -> None:
        """Passes one layer's rows on; a row is one lane's k and v."""
        super().append(layer, **streams)
        np.add.at(self.tally.passed, self.positions, 1)
        np.add.at(self.tally.rows, self.positions, next(iter(streams.values())).shape[1])

    def attend(self, layer: int, q: Tensor, **options: Any) -> Partial:
        """Passes the queries on, and then asks how many rows each of them sees."""
        result = super().attend(layer, q, **options)
        asked = super().attend(layer, torch.zeros_like(q), scale=1.0, want_lse=True)
        assert asked.lse is not None, "it was asked for"
        seen = asked.lse.double().exp().round().sum(dim=1)
        np.add.at(self.tally.pairs, self.positions, seen.long().cpu().numpy())
        return result
