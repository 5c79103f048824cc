"""What a policy asked to see of a sequence's queries, in one group. Pending until the sequence settles.

A policy that must see the last w queries sees those from w positions before its next trigger on; one that must see all
sees the attention mass that every query gives to every row. What a pass of the model over the text has found is
remembered for good: rows don't change, so that a later turn's pass needs only what has come since.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvik.cache.methods import Needs
from kvik.cache.policy import Policy
from kvik.cache.spec import Group


def may_know(policy: Policy, tokens: int) -> int:
    """How many of a prompt's tokens may be taken as known: the last is always computed, for its logits. Nor does a hit
    reach the first position at which rows leave: who opened behind it would hold rows that others have let go."""
    first = policy.first(tokens)
    end = tokens if first is None else min(tokens, first)
    return 0 if Needs.MASS in policy.needs else max(end - max(policy.last, 1), 0)


class Observed:
    """Queries by layer, and attention mass by row.

    Attributes:
        adds: whether it adds up attention mass.
        scale: of the scores, as attention was asked for; None while nothing was seen.
        repeated: f32 [lanes, positions]: what a pass found of each row so far; None where the policy has no need of it.
    """

    def __init__(self, policy: Policy, group: Group) -> None:
        self.policy = policy
        self.adds, self._lanes = Needs.MASS in policy.needs, len(group.lanes)
        self.scale: float | None = None
        self.repeated = torch.zeros((len(group.lanes), 0)) if Needs.PASS in policy.needs else None
        # (layer of the rows, layer that reads them) -> (position of the first, [t, L, G, D])
        self._queries: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        # Layer that reads -> its lanes, and what their slots received from it. Each layer's queries add to its own, one
        # by one in their order, so that the cut can't show in a sum.
        self._mass: dict[int, tuple[slice, Tensor]] = {}
        self._pending: list[tuple[int, int, slice, Tensor]] = []  # (position of the first query; the same, with them)

    def wants(self, stop: int, trigger: int | None) -> bool:
        """Whether anything is to be seen of a chunk that ends before position `stop`."""
        near = trigger is not None and stop > trigger - self.policy.last
        return self.adds or (self.policy.last > 0 and near)

    @property
    def mass(self) -> Tensor | None:
        """What each slot received, f32 [lanes, slots]: of kept pages, then of the table's; None where the policy has no
        need of it."""
        if not self.adds:
            return None
        out = torch.zeros((self._lanes, max((mass.shape[1] for _, mass in self._mass.values()), default=0)))
        for _, (lanes, mass) in sorted(self._mass.items(), key=lambda each: each[0]):
            out[lanes, : mass.shape[1]] += mass
        return out

    def so_far(self, layer: int, lanes: slice, slots: int) -> Tensor:
        """What a layer's queries gave to so many slots until now, pending ones included: f32 [L, slots], a copy."""
        settled = [self._mass[layer][1]] if layer in self._mass else []
        last = [*settled, *(mass for _, at, _, mass in self._pending if at == layer)][-1:]
        out = torch.zeros((lanes.stop - lanes.start, slots))
        for mass in last:
            known = min(slots, mass.shape[1])
            out[:, :known] = mass[:, :known]
        return out

    def see(
        self, owner: int, layer: int, lanes: slice, start: int, q: Tensor, scale: float, mass: Tensor | None
    ) -> None:
        """Takes a sequence's queries f32 [t, H, D] from position `start` on, and what its slots have received from this
        layer so far, these queries included, f32 [L, slots].

        Args:
            owner: layer whose rows they are.
            layer: layer that reads them: its own, or another's.
        """
        self.scale = scale
        if self.policy.last:
            last = q[-self.policy.last :]
            grouped = torch.unflatten(last, 1, (lanes.stop - lanes.start, -1)).clone()
            self._queries.setdefault((owner, layer), []).append((start + len(q) - len(last), grouped))
        if self.adds and mass is not None:
            self._pending.append((start, layer, lanes, mass.cpu()))

    def forget(self, start: int) -> None:
        """What was seen of tokens from position `start` on leaves no trace."""
        self._pending = [each for each in self._pending if each[0] < start]
        for key, seen in self._queries.items():
            self._queries[key] = [(at, q[: start - at]) for at, q in seen if at < start]
        if self.repeated is not None:
            self.repeated = self.repeated[:, :start]

    def remember(self, received: Tensor, start: int) -> None:
        """Takes what a pass has found of the rows from position `start` on, f32 [lanes, positions]."""
        assert self.repeated is not None, "only a policy that asks for a pass is shown one"
        self.repeated = torch.cat((self.repeated[:, :start], received.float().cpu()), dim=1)

    def settle(self) -> None:
        """What is pending counts."""
        self._mass |= {layer: (lanes, mass) for _, layer, lanes, mass in self._pending}
        self._pending.clear()
        for key, seen in self._queries.items():
            self._queries[key] = _last(seen, self.policy.last)

    def queries(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """The last queries over a layer's rows, f32 [w, L, G, D], and their positions, int64 [w]. Where several layers
        read them, G counts the query heads of all."""
        readers = [seen for (owner, _), seen in self._queries.items() if owner == layer and seen]
        if not readers:
            return None
        asking = [torch.arange(at, at + len(q)) for at, q in readers[0]]
        return torch.cat([torch.cat([q for _, q in seen]) for seen in readers], dim=2), torch.cat(asking)

    def moved(self, move: Callable[[slice, Tensor], Tensor]) -> None:
        """Rows lie elsewhere: `move` gives the mass of some lanes' slots, f32 [L, slots], its new places."""
        self._mass = {layer: (lanes, move(lanes, mass)) for layer, (lanes, mass) in self._mass.items()}

    def done(self) -> None:
        """The policy has chosen: the queries have done their work."""
        self._queries.clear()

    def copy(self, group: Group) -> Observed:
        """For a fork."""
        twin = Observed(self.policy, group)
        twin.scale, twin.repeated, twin._mass = self.scale, self.repeated, dict(self._mass)
        twin._queries = {key: list(seen) for key, seen in self._queries.items()}
        twin._pending = list(self._pending)
        return twin


def _last(seen: list[tuple[int, Tensor]], count: int) -> list[tuple[int, Tensor]]:
    """Of pieces in order, the last `count` queries."""
    out: list[tuple[int, Tensor]] = []
    for at, q in reversed(seen):
        if count <= 0:
            break
        out.insert(0, (at + max(len(q) - count, 0), q[-count:]))
        count -= len(q)
    return out
