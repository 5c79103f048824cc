"""Some of a step's tokens, for layers whose rows are all there already.

Where the last layers read the rows of one before them (`cache/sharing.py`), most of a prompt's tokens have nothing to
do there: only those whose logits are wanted go on, the last of each chunk.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from torch import Tensor

from kvik.cache.parts import heads_of, joined
from kvik.errors import SequenceError
from kvik.ops.fused import Fused
from kvik.ops.reads import Partial, Plan, Rows

if TYPE_CHECKING:
    from kvik.cache.step import Step


class Some:
    """A `Step` as some of its tokens see it. Made by `Step.only`; good while that is open."""

    def __init__(self, step: Step, rows: Seq[int]) -> None:
        """
        Args:
            rows: which of the step's tokens, by their place among all.
        """
        self._step, self._rows = step, list(rows)
        self._plans: dict[int, Plan] = {}

    @property
    def positions(self) -> list[int]:
        """Of these tokens."""
        every = self._step.positions
        return [every[row] for row in self._rows]

    def append(self, layer: int, **streams: Tensor) -> None:
        """Never: a layer that keeps rows keeps those of all tokens."""
        raise SequenceError(f"layer {layer} keeps rows, so that all of the step's tokens must pass it")

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
        """See `Step.attend`; of these tokens."""
        self._step.check_reading(layer)
        results = []
        for part, mine in heads_of(self._step.cache.parts[layer], q.shape[1]):
            if part.group not in self._plans:
                group = self._step.cache.spec.groups[part.group]
                self._plans[part.group] = self._step.plan_of(part.group, group, self._rows)
            found = self._plans[part.group].attend(
                part.lanes, q if mine is None else q[:, mine], scale=scale, softcap=softcap,
                bias=bias if mine is None or bias is None else bias[mine], want_lse=want_lse, want_mass=want_mass,
            )  # fmt: skip
            results.append((mine, found))
        return joined(results, q.shape[1])

    def rows(self, layer: int) -> list[Rows]:
        """Never: who reads rows back keeps some of its own."""
        raise SequenceError(f"layer {layer} reads rows back, so that all of the step's tokens must pass it")

    def through(self, layer: int, fused: Fused, x: Tensor, angles: Tensor | None) -> bool:
        """Never: nothing is appended here."""
        return False

    def only(self, rows: Seq[int]) -> Some:
        """Fewer of them."""
        return Some(self._step, [self._rows[row] for row in rows])
