"""What only an evaluation knows: which rows the text that comes after will look at. It bounds what a policy could keep,
and says how much of that attention falls on the rows that it did.

Both are one figure: the attention that the scored tokens give each row of the prefix when every row is there, summed
over these tokens and over the heads that share a lane (their mean gives the same order). `oracle:25%` keeps the rows
with the most of it. A sum, and not the most that one token gives: it is what a lane's recall counts, so that at an
equal budget, shared out evenly, no choice of rows recalls more. It knows nothing of what values are worth, and queries
differ once rows are missing, so that another choice may well have a lower KL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.cache.methods import Needs
from kvik.cache.recall import Weighed
from kvik.cache.sequence import Sequence as KVSequence
from kvik.engine.reread import PIECE, Repetition, Watched
from kvik.models.model import Model
from kvik.models.watch import Chunk, Watch
from kvik.ops.reads import Partial, visible

Lane = tuple[int, int]  # layer, KV head


class _Weighing(Watch):
    """Asks for the attention mass of every step."""

    def __init__(self, step: Chunk, weighed: Weighed) -> None:
        super().__init__(step)
        self._weighed = weighed

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        bias: Tensor | None = None,
        want_lse: bool = False,
        want_mass: bool = False,
    ) -> Partial:
        """See `Chunk.attend`."""
        found = super().attend(layer, q, scale=scale, softcap=softcap, bias=bias, want_lse=want_lse, want_mass=True)
        self._weighed.hear(layer, found)
        return found

    def only(self, rows: Sequence[int]) -> None:
        """Never: every query is looked at."""


def weighed(model: Model, sequence: KVSequence, continuations: Sequence[Sequence[int]]) -> list[Tensor]:
    """The attention that a sequence's rows receive from texts that go on from it, each by itself: for each group, f64
    [lanes, tokens], summed over all their tokens and over the heads that share a lane. The sequence stays as it is.

    Raises:
        ContextError, BudgetError: see `Model.run`.
    """
    with sequence.aside() as fork:
        end = len(fork)
        found = Weighed(fork)
        for tokens in continuations:
            for start in range(0, len(tokens), PIECE):
                chunk = tokens[start : start + PIECE]
                model.run([(fork, chunk)], watch=lambda step: _Weighing(step, found))
            fork.trim(end)
    return found.mass


class Future:
    """The pass that an oracle is shown; see `engine.reread.Pass`. Others get the repetition that they ask for.

    Attributes:
        continuations: texts that come after the prompt, each by itself.
    """

    def __init__(self, *continuations: Sequence[int]) -> None:
        self.continuations = continuations

    def check(self, model: Model, sequence: KVSequence, at: int) -> None:
        """Nothing: an evaluation's documents fit the model, and repetitions are checked when they begin."""

    def take(self, model: Model, sequence: KVSequence, *, watch: Watched | None, stopping: Callable[[], bool]) -> bool:
        """Shows oracles what comes after, and all others the text again."""
        oracles = [group for group, policy in sequence.asking().items() if Needs.FUTURE in policy.needs]
        if oracles:
            masses = weighed(model, sequence, self.continuations)
            for group in oracles:
                sequence.remember(group, masses[group])
        return Repetition().take(model, sequence, watch=watch, stopping=stopping)


def by_lane(sequence: KVSequence, masses: Sequence[Tensor]) -> dict[Lane, Tensor]:
    """What `weighed` gave, lane by lane: f64 [tokens]."""
    groups = zip(sequence.cache.spec.groups, masses, strict=True)
    return {lane: row for group, mass in groups for lane, row in zip(group.lanes, mass, strict=True)}


def recall(received: Mapping[Lane, Tensor], sequence: KVSequence) -> float:
    """Share of the attention that a text's rows receive from what comes after which falls on rows that a sequence still
    has, 0 to 1: the mean over lanes of each lane's share. Rows that a window hides from the next query are gone.

    Args:
        received: over full rows, f64 [tokens] for each lane.
        sequence: of the same tokens.
    """
    shares = []
    for lane, rows in _seen(sequence).items():
        mass = received[lane]
        # The sum of as many numbers in the same order, so that all rows are exactly all of it.
        kept, every = float(mass.where(torch.from_numpy(rows), 0).sum()), float(mass.sum())
        shares.append(kept / every if every > 0 else 1.0)
    return sum(shares) / len(shares)


def _seen(sequence: KVSequence) -> dict[Lane, NDArray[np.bool_]]:
    """bool [tokens] for each lane: rows that the next query sees."""
    end, found = len(sequence), {}
    for table in sequence.tables:
        positions, _ = table.rows(end)
        retention = table.group.retention
        there = (positions >= 0) & visible(np.array(end), positions, retention.window, retention.sinks)
        for lane, at, held in zip(table.group.lanes, positions, there, strict=True):
            found[lane] = np.isin(np.arange(end), at[held])
    return found
