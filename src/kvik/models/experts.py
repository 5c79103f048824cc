"""Feed-forward parts of which each token takes a few (mixture of experts, DeepSeekMoE arXiv:2401.06066).

x → Σ over the chosen experts e of weight_e · W_down,e (silu(W_gate,e x) · W_up,e x)

Each expert's rows go through it by themselves and are added in the order of the experts, so that no row's bits depend
on which others chose the same. Which are chosen, and with what weight, is a `Router`'s affair:

    softmax    (DeepSeek-V2, arXiv:2405.04434) scores are a softmax; experts come from the groups whose best expert is
               best, where groups are limited; weights are the scores
    sigmoid    (DeepSeek-V3, arXiv:2412.19437) scores are sigmoids; the choice is made among scores + a learned
               correction, from the groups whose two best have the largest sum; weights are the scores without it

Legend: T rows, N experts, k chosen, g groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvik.ops.linear import Linear
from kvik.ops.pointwise import RowFunction

Scoring = Literal["softmax", "sigmoid"]


class FeedForward:
    """W_down activation(W_up x), the gate beside W_up."""

    def __init__(self, up: Linear, activation: RowFunction, down: Linear) -> None:
        self.up, self.activation, self.down = up, activation, down

    def __call__(self, x: Tensor, *, after: RowFunction | None = None, onto: Tensor | None = None) -> Tensor:
        """f32 [T, width] → f32 [T, width]; see `Linear`."""
        return self.down(self.up(x, after=after), after=self.activation, onto=onto)


@dataclass(frozen=True)
class Router:
    """Which experts a row takes.

    Attributes:
        gate: f32 [T, width] → [T, N].
        scoring: see the module.
        used: k.
        groups, used_groups: experts lie in groups of equal size, and come from so many of them; 1 and 1 = from any.
        normed: weights are divided by their sum.
        factor: weights are multiplied by it.
        correction: f32 [N], added to scores while choosing; sigmoid's.
    """

    gate: Linear
    scoring: Scoring
    used: int
    groups: int
    used_groups: int
    normed: bool
    factor: float
    correction: Tensor | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts int64 [T, k], and their weights f32 [T, k]."""
        logits = self.gate(x)
        scores = torch.softmax(logits, dim=-1) if self.scoring == "softmax" else 1 / (logits.neg().exp() + 1)
        worth = scores if self.correction is None else scores + self.correction
        if self.used_groups < self.groups:
            worth = worth.masked_fill(self._outside(worth), 0.0 if self.scoring == "softmax" else -torch.inf)
        chosen = worth.topk(self.used, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self.normed:
            weights = weights / (_sum(weights) + 1e-20)
        return chosen, weights * self.factor

    def _outside(self, worth: Tensor) -> Tensor:
        """bool [T, N]: experts whose group is not among the chosen ones."""
        grouped = torch.unflatten(worth, 1, (self.groups, -1))
        best = grouped.topk(1 if self.scoring == "softmax" else 2, dim=-1).values
        chosen = _sum(best).squeeze(-1).topk(self.used_groups, dim=-1).indices
        outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, chosen, False)
        return outside.unsqueeze(-1).expand_as(grouped).flatten(1)


class Experts:
    """A feed-forward part of which each row takes a few experts, and all rows the shared one.

    Attributes:
        router: who chooses.
        experts: N of them, of equal sizes.
        shared: what every row takes beside them.
    """

    def __init__(self, router: Router, experts: list[FeedForward], shared: FeedForward) -> None:
        self.router, self.experts, self.shared = router, experts, shared

    def __call__(self, x: Tensor, *, after: RowFunction, onto: Tensor) -> Tensor:
        """onto + what is made of after(x): f32 [T, width]; `onto` may be overwritten."""
        x = after(x)
        chosen, weights = self.router(x)
        mixed = torch.zeros_like(x)
        for number in sorted(set(chosen.flatten().tolist())):
            rows, places = torch.where(chosen == number)
            mixed[rows] += self.experts[number](x[rows]) * weights[rows, places].unsqueeze(1)
        return onto + (mixed + self.shared(x))


def _sum(x: Tensor) -> Tensor:
    """[… n] → [… 1], added one by one: the same bits for a row beside any others."""
    total = x[..., :1]
    for at in range(1, x.shape[-1]):
        total = total + x[..., at : at + 1]
    return total
