"""What a policy asked to see of a sequence's queries, in one group. Pending until the sequence settles.

A policy that must see the last w queries sees those from w positions before its next trigger on; one that must see all
sees the attention mass that every query gives to every row. What a pass of the model over the text has found is
remembered for good: rows don't change, so that a later turn's pass needs only what has come since.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvik.cache.methods import Needs
from kvik.cache.policy import Policy
from kvik.cache.spec import Group


def may_know(policy: Policy, tokens: int) -> int:
    """How many of a prompt's tokens may be taken as known: the last is always computed, for its logits."""
    return 0 if Needs.MASS in policy.needs else max(tokens - max(policy.last, 1), 0)


class Observed:
    """Queries by layer, and attention mass by row.

    Attributes:
        mass: f32 [lanes, slots]: of kept pages, then of the table's; None where the policy has no need of it.
        scale: of the scores, as attention was asked for; None while nothing was seen.
        repeated: f32 [lanes, positions]: what a pass found of each row so far; None where the policy has no need of it.
    """

    def __init__(self, policy: Policy, group: Group) -> None:
        self.policy = policy
        self.mass = torch.zeros((len(group.lanes), 0)) if Needs.MASS in policy.needs else None
        self.scale: float | None = None
        self.repeated = torch.zeros((len(group.lanes), 0)) if Needs.PASS in policy.needs else None
        # (layer of the rows, layer that reads them) -> (position of the first, [t, L, G, D])
        self._queries: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        self._pending: list[tuple[int, slice, Tensor]] = []  # (position of the first query, lanes, mass [L, slots])

    def wants(self, stop: int, trigger: int | None) -> bool:
        """Whether anything is to be seen of a chunk that ends before position `stop`."""
        near = trigger is not None and stop > trigger - self.policy.last
        return self.mass is not None or (self.policy.last > 0 and near)

    def see(
        self, owner: int, layer: int, lanes: slice, start: int, q: Tensor, scale: float, mass: Tensor | None
    ) -> None:
        """Takes a sequence's queries f32 [t, H, D] from position `start` on, and what its rows received, [L, slots].

        Args:
            owner: layer whose rows they are.
            layer: layer that reads them: its own, or another's.
        """
        self.scale = scale
        if self.policy.last:
            last = q[-self.policy.last :]
            grouped = torch.unflatten(last, 1, (lanes.stop - lanes.start, -1)).clone()
            self._queries.setdefault((owner, layer), []).append((start + len(q) - len(last), grouped))
        if self.mass is not None and mass is not None:
            self._pending.append((start, lanes, mass))

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
        for _, lanes, mass in self._pending:
            assert self.mass is not None, "only what was asked for is pending"
            missing = mass.shape[1] - self.mass.shape[1]
            self.mass = torch.nn.functional.pad(self.mass, (0, missing)) if missing > 0 else self.mass
            self.mass[lanes, : mass.shape[1]] += mass
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

    def done(self) -> None:
        """The policy has chosen: the queries have done their work."""
        self._queries.clear()

    def copy(self, group: Group) -> Observed:
        """For a fork."""
        twin = Observed(self.policy, group)
        twin.mass = None if self.mass is None else self.mass.clone()
        twin.scale, twin.repeated = self.scale, self.repeated
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
