"""What a scorer may look at when a trigger fires.

A lane need not hold every row of the tensors: where it doesn't, its position is -1 and whatever else stands there says
nothing. Two lanes of three columns, of which the second dropped position 1 and has an open slot:

    positions  [[0, 1, 2],
                [0, 2, -1]]         held  [[True, True, True], [True, True, False]]
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What a scorer may look at: one layer's lanes of one group, when a trigger fires.

    L lanes, n rows (the most any lane holds), G queries that share a lane, D and E widths of keys and values, w
    observed queries. Scorers get it packed: each lane's rows stand first, in order, and everything behind them is zero.

    Attributes:
        keys: f32 [L, n, D], as attention sees them (turned by position).
        values: f32 [L, n, E].
        positions: int64 [L, n], ascending; rows that a lane does not hold: -1.
        tokens: seen so far: the next position.
        scale: of scores.
        queries: f32 [w, L, G, D], turned, of the last w tokens; None = not observed.
        asking: int64 [w], their positions; None = not observed.
        mass: f32 [L, n]: attention that each row received so far, summed over queries and G; None = not observed.
        frequencies: f64 [D/2], radians a position: the rotation of neighbouring pairs (2i, 2i+1); None = not rotary.
        seed: for what is random; each layer its own.
        repeated: f32 [L, n]: what a pass of the model found of each row, such as the most attention that it received
            while the text was repeated (`scorers.recalled`); None = there was no such pass.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    tokens: int
    scale: float
    queries: Tensor | None
    asking: Tensor | None
    mass: Tensor | None
    frequencies: Tensor | None
    seed: int
    repeated: Tensor | None = None

    @property
    def held(self) -> Tensor:
        """bool [L, n]: which rows a lane holds."""
        return self.positions >= 0

    @property
    def lengths(self) -> Tensor:
        """int64 [L]: rows that each lane holds."""
        return self.held.sum(1)

    def packed(self) -> tuple[Seen, Tensor]:
        """The same rows, a lane's own first and in order, zeros behind them; and int64 [L, n], where each stood.

        Modifies nothing. NaN in a slot that isn't held would pass through any product, hence the zeros.
        """
        held = self.held
        order = torch.sort(~held, dim=1, stable=True).indices
        missing = torch.arange(held.shape[1], device=held.device) >= self.lengths[:, None]
        stay = bool((held != missing).all())  # they mostly stand so already, and moving rows is most of the work

        def moved(rows: Tensor) -> Tensor:
            at = order if rows.dim() == 2 else order[..., None].expand(-1, -1, rows.shape[-1])
            gap = missing if rows.dim() == 2 else missing[..., None]
            return (rows if stay else rows.gather(1, at)).masked_fill(gap, 0)

        packed = replace(
            self,
            keys=moved(self.keys),
            values=moved(self.values),
            positions=self.positions.gather(1, order),
            mass=None if self.mass is None else moved(self.mass),
            repeated=None if self.repeated is None else moved(self.repeated),
        )
        return packed, order
