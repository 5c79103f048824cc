"""How many rows each lane keeps, and which: scores and a budget to masks.

Every allocator takes, a list entry for each layer,

    scores f32 [L, n], higher stays; NaN counts as lowest
    held bool [L, n], which rows a lane holds; scores of others are ignored
    protected bool [L, n], rows that stay whatever they score; those not held are ignored
    budget, rows a lane on average

and returns bool [L, n] for each layer: what is kept. Of all of them it holds that

    protected rows stay, and count;
    lanes · budget rows are kept at most, over all layers, unless more are protected;
    where no lane is longer than the budget, everything stays;
    of equal scores the row in the later column stays, between lanes the one in the earlier lane;
    nothing else decides: the same input gives the same masks.

Legend: L lanes of a layer, n rows (layers may differ), A lanes of all layers, one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor as whole

import torch
from torch import Tensor
from torch.nn import functional

Masks = list[Tensor]
Allocator = Callable[..., Masks]  # (scores, held, protected, budget, **options); options are keyword-only, as scorers'


def uniform(scores: Masks, held: Masks, protected: Masks, budget: int) -> Masks:
    """Every lane keeps its best `budget` rows. A shorter lane's unused rows are nobody's."""
    lanes = _Lanes.of(scores, held, protected)
    return lanes.split(lanes.best(lanes.fitted([budget] * len(lanes.least), budget)))


def pyramid(scores: Masks, held: Masks, protected: Masks, budget: int, *, steep: int = 20) -> Masks:
    """Lower layers keep more (PyramidKV, arXiv:2406.02069): budgets fall in a line over the layers, with mean `budget`.

    With p protected rows a lane and s = budget - p to share out, the last layer's lanes keep p + s / `steep`, the first
    layer's p + 2s - s / `steep`. Where the first would then keep more than it holds, it keeps all, and the line is less
    steep, so that nothing of the budget is lost.
    """
    lanes = _Lanes.of(scores, held, protected)
    layers, sure = len(scores), max(lanes.least, default=0)
    spare = max(budget - sure, 0)
    top = min(2 * spare - Fraction(spare, steep), Fraction(max(max(lanes.most, default=0) - sure, 0)))
    drop = 2 * (top - spare) / max(layers - 1, 1)
    ends = [whole((i * top - Fraction(i * (i - 1), 2) * drop) + Fraction(1, 2)) for i in range(layers + 1)]
    wanted = [sure + ends[i + 1] - ends[i] if layers > 1 else budget for i in range(layers)]
    quotas = [rows for rows, layer in zip(wanted, scores, strict=True) for _ in range(len(layer))]
    return lanes.split(lanes.best(lanes.fitted(quotas, budget)))


def ada(scores: Masks, held: Masks, protected: Masks, budget: int, *, floor: float = 0.2) -> Masks:
    """Within a layer, lanes share: its best L · `budget` rows stay, whoever holds them (AdaKV, arXiv:2407.11550).

    Args:
        scores, held, protected, budget: see the top of this file.
        floor: part of the budget that every lane keeps of its own best rows.
    """
    layers = [_Lanes.of(*([each] for each in layer)) for layer in zip(scores, held, protected, strict=True)]
    least, most = ([sum(rows) for rows in column] for column in zip(*((x.least, x.most) for x in layers), strict=True))
    wanted = [budget * len(layer.least) for layer in layers]
    totals = _fitted(wanted, least, most, sum(wanted))
    return [layer.shared(total, _part(floor, budget)) for layer, total in zip(layers, totals, strict=True)]


def everywhere(scores: Masks, held: Masks, protected: Masks, budget: int, *, floor: float = 0.0) -> Masks:
    """All lanes of all layers share: the best rows stay, wherever they are (KVzip, arXiv:2505.23416).

    `global` in a spec. Only for scores that mean the same in every layer, as attention does.

    Args:
        scores, held, protected, budget: see the top of this file.
        floor: part of the budget that every lane keeps of its own best rows.
    """
    lanes = _Lanes.of(scores, held, protected)
    return lanes.split(lanes.shared(budget * len(lanes.least), _part(floor, budget)))


ALLOCATORS: dict[str, Allocator] = {"uniform": uniform, "pyramid": pyramid, "ada": ada, "global": everywhere}


@dataclass(frozen=True)
class _Lanes:
    """All lanes, one below the other, as wide as the widest.

    Attributes:
        value: f64 [A, n]: scores, but inf where protected, -inf where nothing is held, NaN just above that.
        held: bool [A, n].
        sizes: (lanes, rows) of each layer.
        least: rows of each lane that stay in any case.
        most: rows that each lane holds.
    """

    value: Tensor
    held: Tensor
    sizes: list[tuple[int, int]]
    least: list[int]
    most: list[int]

    @classmethod
    def of(cls, scores: Sequence[Tensor], held: Sequence[Tensor], protected: Sequence[Tensor]) -> _Lanes:
        """Puts layers together."""
        widest = max(layer.shape[1] for layer in held)

        def stacked(layers: Sequence[Tensor]) -> Tensor:
            return torch.cat([functional.pad(layer, (0, widest - layer.shape[1])) for layer in layers])

        has = stacked(held)
        sure = stacked(protected) & has
        # f64 has room below the least f32 for NaN, and below that for what isn't there.
        value = stacked(scores).double().clamp(-1e300, 1e300).nan_to_num(-2e300)
        value = value.masked_fill(sure, torch.inf).masked_fill(~has, -torch.inf)
        sizes = [(layer.shape[0], layer.shape[1]) for layer in held]
        return cls(value, has, sizes, sure.sum(1).tolist(), has.sum(1).tolist())

    def fitted(self, wanted: list[int], budget: int) -> list[int]:
        """`wanted` rows for each lane, made to fit what lanes hold and protect, and the budget."""
        return _fitted(wanted, self.least, self.most, budget * len(wanted))

    def best(self, quotas: list[int]) -> Tensor:
        """bool [A, n]: each lane's best rows, as many as its quota says (at most those it holds)."""
        order = torch.sort(self.value.flip(1), dim=1, descending=True, stable=True).indices
        order = order.shape[1] - 1 - order  # flipped back: of equals the later column came first
        rank = torch.sort(order, dim=1).indices
        return rank < torch.tensor(quotas, dtype=torch.int64, device=rank.device)[:, None]

    def shared(self, total: int, floor: int) -> Tensor:
        """bool [A, n]: `floor` rows for each lane, its own best, and the best of the others up to `total` in all."""
        keep = self.best(_fitted([floor] * len(self.least), self.least, self.most, total))
        rest = total - int(keep.sum())
        if rest > 0:
            lane, column = (self.held & ~keep).nonzero(as_tuple=True)
            order = torch.sort(column, descending=True, stable=True).indices
            value = self.value[lane, column][order]
            order = order[torch.sort(value, descending=True, stable=True).indices[:rest]]
            keep[lane[order], column[order]] = True
        return keep

    def split(self, keep: Tensor) -> Masks:
        """bool [A, n] to a mask for each layer, as wide as it was."""
        parts = torch.split(keep, [lanes for lanes, _ in self.sizes])
        return [part[:, :rows] for part, (_, rows) in zip(parts, self.sizes, strict=True)]


def _fitted(wanted: list[int], least: list[int], most: list[int], total: int) -> list[int]:
    """Quotas between `least` and `most`, as wanted where possible, whose sum is at most `total`.

    Where they would be more, all above some level are cut to it; where even `least` is more, they are `least`.

    >>> _fitted([5, 5, 5], least=[0, 9, 0], most=[9, 9, 2], total=15)
    [4, 9, 2]
    """

    def cut(level: int) -> list[int]:
        return [max(low, min(want, high, level)) for want, low, high in zip(wanted, least, most, strict=True)]

    low, high = 0, max(wanted, default=0)
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if sum(cut(level)) <= total else (low, level - 1)
    return cut(low)


def _part(floor: float, budget: int) -> int:
    return whole(Fraction(str(floor)) * budget)  # 0.2 of 5 rows is one row, though 0.2 is less than a fifth as a float
