"""One forward of a model: which of a batch's new tokens are stored, and what its queries read.

A batch is a rectangle of columns, some of them padding. Rows are stored for real tokens alone:

    columns     0 1 2 3 4 | 5 6      of the batch: five were seen, two are new
    row 0       a b c d e | f g      sequence 0: positions 0 … 6
    row 1       · · · x y | z ·      sequence 1: x y z are its positions 0, 1, 2

A position is a place among a row's real tokens, a column one in the batch; transformers counts columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.cache.methods import Needs
from kvik.cache.sequence import Sequence
from kvik.cache.step import Step
from kvik.errors import SequenceError, UsageError
from kvik.hf.dense import spread_rows
from kvik.hf.places import Places
from kvik.models.watch import Chunk as Asked

Bools = NDArray[np.bool_]
NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}  # of the largest number


@dataclass(frozen=True)
class Query:
    """What a layer asks.

    Attributes:
        q: [B, H, n, D], as the model made them.
        width: of a value.
        scale, softcap: of the scores.
        sinks: [H]: scores of a row that is not there and gives nothing (gpt-oss); None = none.
        bias: [1 or B, H, n, columns], added to scores; None = nothing.
    """

    q: Tensor
    width: int
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None


class Reading(Protocol):
    """Who answers queries."""

    def attend(self, layer: int, query: Query) -> Tensor:
        """Attention over the stored form of all rows that each query sees: [B, n, H, E], in q's type."""

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, decoded: [B, heads, columns, width] each; 0 where no row is."""

    def check(self, layer: int, window: int | None) -> None:
        """Raises UsageError where the model's queries don't see what these rows were kept for.

        Args:
            window: columns that its mask lets a query see; None = all.
        """

    @property
    def causal(self) -> bool:
        """Whether a query sees the rows before it alone; else all of them, and masks say nothing more than padding."""

    @property
    def tried(self) -> bool:
        """Whether the model is being tried: what comes out is held against its own attention."""

    def compare(self, found: Tensor, expected: Tensor) -> None:
        """Raises UsageError where attention over pages is not what the model's own gives over decoded rows.

        Args:
            found, expected: [B, n, H, E].
        """


class Chunk:
    """A forward's step through the cache.

    Attributes:
        step: the cache's own; None where no token is new to it.
        count: new columns.
        real: bool [B, columns], new ones included.
        rows: each row's sequence. Rows of one input share one until the forward ends.
        twins: for each row the first that has the same input: itself, where there is none before it.
        tried: see `Reading`.
    """

    def __init__(self, step: Step | None, count: int, real: Bools, rows: list[Sequence], twins: list[int],
                 places: Places, windows: Mapping[int, int | None], tried: bool = False) -> None:  # fmt: skip
        self.step, self.count, self.real, self.rows, self.twins = step, count, real, rows, twins
        self._places, self._windows, self.tried = places, windows, tried
        self.dtype = torch.float32

    def compare(self, found: Tensor, expected: Tensor) -> None:
        """See `Reading`. What padding asks is nobody's business."""
        asking = torch.from_numpy(self.real[:, -self.count :]).to(found.device)
        mine, theirs = found[asking].float(), expected[asking].float()
        gap, most = float((mine - theirs).abs().max()), float(theirs.abs().max())
        if not gap <= NEAR[found.dtype] * most:
            raise UsageError(f"attention over its pages is {gap:.2g} of {most:.2g} away from its own")

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores a layer's new rows, [B, heads, n, width] each; those of padding are not."""
        self.dtype = v.dtype
        if self.step is not None:
            self.step.append(layer, k=self._taken(k), v=self._taken(v))

    def attend(self, layer: int, query: Query) -> Tensor:
        """See `Reading`. What padding asks gets 0."""
        q = query.q
        batch, heads, count, _ = q.shape
        if self.step is None:
            return q.new_zeros((batch, count, heads, query.width))
        return self._asked(layer, query, None if query.bias is None else self._by_distance(query.bias))

    def _asked(self, layer: int, query: Query, bias: Tensor | None) -> Tensor:
        q = query.q
        assert self.step is not None, "there are tokens"
        out = attended(self.step, layer, self._taken(q), query, bias)
        return self._places.given(out).to(q.dtype)

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `Reading`.

        Raises:
            UsageError: a policy would have to see what such queries attend to.
        """
        cache = self.rows[0].cache
        for part in cache.parts[layer]:
            policy = cache.spec.groups[part.group].retention.policy
            if policy is not None and policy.needs & (Needs.QUERIES | Needs.MASS):
                raise UsageError(
                    f"a mask of your own is obeyed over decoded rows, where {policy} sees no queries; leave the mask "
                    "out, or give a spec without that policy"
                )
        return spread_rows(self.rows, layer, self.real, self.dtype)

    def check(self, layer: int, window: int | None) -> None:
        """See `Reading`."""
        if window != self._windows[layer]:
            raise UsageError(
                f"a layer's window is {self._windows[layer]} by the configuration, and its mask says {window}"
            )

    @property
    def causal(self) -> bool:
        """See `Reading`."""
        return True

    def _taken(self, x: Tensor) -> Tensor:
        """[B, heads, n, width] → f32 [T, heads, width], the stored tokens' alone."""
        x = x.squeeze(2) if self.count == 1 else x.transpose(1, 2).flatten(0, 1)
        x = self._places.taken(x)
        return x if x.dtype is torch.float32 else x.float()

    def _by_distance(self, bias: Tensor) -> Tensor:
        """[1, H, n, columns] → f32 [H, columns] by distance.

        Raises:
            SequenceError: it differs by row, or is none of distance alone.
        """
        gaps = np.diff(self.real.astype(np.int8), axis=1)
        if bias.shape[0] != 1 or (gaps < 0).any():
            raise SequenceError("a bias that differs by row, or counts padding between tokens, is no bias by distance")
        if self.count > 1 and not torch.equal(bias[:, :, 1:, 1:], bias[:, :, :-1, :-1]):
            raise SequenceError("a bias that is more than one by distance can't be read over pages")
        return bias[0, :, -1].flip(-1).float()


def attended(step: Asked, layer: int, q: Tensor, query: Query, bias: Tensor | None) -> Tensor:
    """What a layer's queries see, f32 [T, H, E].

    Args:
        q: f32 [T, H, D], in the order of the step's tokens.
        bias: f32 [H, distances], added to scores; see `Step.attend`.
    """
    found = step.attend(layer, q, scale=query.scale, softcap=query.softcap, bias=bias, want_lse=query.sinks is not None)
    if query.sinks is None or found.lse is None:
        return found.out
    return found.out * torch.sigmoid(found.lse - query.sinks.float()).unsqueeze(-1)


def same_rows(batch: int, inputs: Mapping[str, Any]) -> list[int]:
    """For each row of a forward's inputs, the first row that has the same: beams and several answers to one prompt.

    >>> same_rows(3, {"input_ids": torch.tensor([[5, 6], [7, 8], [5, 6]])})
    [0, 1, 0]
    """
    tensors = [x for x in _tensors(inputs) if x.dim() > 0 and x.shape[0] == batch]
    first = list(range(batch))
    for row in range(1, batch):
        for other in range(row):
            if first[other] == other and all(torch.equal(x[row], x[other]) for x in tensors):
                first[row] = other
                break
    return first


def _tensors(inputs: object) -> list[Tensor]:
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        return [x for each in inputs.values() for x in _tensors(each)]
    if isinstance(inputs, list | tuple):
        return [x for each in inputs for x in _tensors(each)]
    return []
