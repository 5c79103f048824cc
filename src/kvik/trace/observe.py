"""Standing between a model and a cache: rows computed and query-key pairs are counted where they pass, not by formula.

Legend: T new tokens of a step, n tokens of the text so far, H query heads, L lanes (KV heads), D width of keys, E width
of values.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.cache.relative import turned_back
from kvik.cache.retention import Retention
from kvik.cache.sequence import Sequence as KVSequence
from kvik.cache.spec import Group, Spec
from kvik.models.watch import Chunk, Watch
from kvik.ops.reads import Partial, visible


@dataclass(frozen=True)
class Counted:
    """What was computed since the beginning.

    Attributes:
        rows: int64 [layers, L], rows of k and v.
        pairs: int64 [layers, H], pairs of a query and a row that it sees.
    """

    rows: NDArray[np.int64]
    pairs: NDArray[np.int64]


@dataclass(frozen=True)
class Asked:
    """One layer's attention in one step, as it passed.

    Attributes:
        q: f32 [T, H, D].
        out: f32 [T, H, E].
        lse: f32 [T, H], log Σ exp(score).
        positions: int64 [T], of the queries.
        scale, softcap, bias: as `ops.reference.attend` takes them.
    """

    q: Tensor
    out: Tensor
    lse: Tensor
    positions: Tensor
    scale: float
    softcap: float | None = None
    bias: Tensor | None = None

    def weights(self, k: Tensor, seen: Tensor, groups: Sequence[Group]) -> Tensor:
        """What softmax gave each row: f32 [T, H, n], exactly 0 for a row that the query does not see.

        Query head h reads lane h // (H / L), and its weights are exp(q·k·scale - lse).

        Args:
            k: f32 [L, n, D], the rows of positions 0 … n - 1; anything where there is none.
            seen: bool [L, T, n].
            groups: of each lane.
        """
        shared = self.q.shape[1] // k.shape[0]
        q = torch.unflatten(self.q.double(), 1, (-1, shared))
        scores = torch.einsum("tlgd,lnd->tlgn", q, k.double())
        for lane, group in enumerate(groups):
            kept = group.retention
            if kept.reach is not None and group.frequencies:
                back = turned_back(q[:, lane].float(), self.positions, kept.reach, group.frequencies).double()
                sinks = k[lane, : kept.sinks].double()
                scores[:, lane, :, : kept.sinks] = back @ sinks.T
        scores = scores.flatten(1, 2) * self.scale
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh() * self.softcap
        if self.bias is not None:
            back = self.positions.unsqueeze(1) - torch.arange(k.shape[1])
            scores = scores + self.bias[:, back.clamp(0, self.bias.shape[1] - 1)].transpose(0, 1)
        weights = (scores - self.lse.unsqueeze(-1)).exp().float()
        return torch.where(seen.transpose(0, 1).repeat_interleave(shared, dim=1), weights, 0.0)


def grouped(spec: Spec) -> dict[tuple[int, int], Group]:
    """What each layer reads, and which rows of it, by (layer, lane)."""
    kept = {lane: group for group in spec.groups for lane in group.lanes}
    read = [(layer, lane) for layer, owner in enumerate(spec.readers) for lane in kept if lane[0] == owner]
    return {(layer, head): kept[owner, head] for layer, (owner, head) in read}


def retained(spec: Spec) -> dict[tuple[int, int], Retention]:
    """Which rows stay, by (layer, lane)."""
    return {lane: group.retention for lane, group in grouped(spec).items()}


class Tally:
    """Counts what passes for every lane and head; keeps what passes for some layers.

    Give `watch` to `Model.run`, with one sequence a step, and call `begin` before a text starts anew in another.

    Attributes:
        asked: by layer, of those that are kept: the last step's attention.
    """

    def __init__(self, spec: Spec, heads: int, keep: Collection[int]) -> None:
        """
        Args:
            heads: query heads of a layer.
            keep: layers whose attention is kept.
        """
        self.groups = grouped(spec)
        self.readers = spec.readers
        layers, lanes = (max(numbers) + 1 for numbers in zip(*self.groups, strict=True))
        self.keep = frozenset(keep)
        self.asked: dict[int, Asked] = {}
        self._rows = np.zeros((layers, lanes), np.int64)
        self._pairs = np.zeros((layers, heads), np.int64)
        self._held: dict[int, list[int]] = {}  # by layer, positions appended so far
        self._left: dict[tuple[int, int], NDArray[np.int64]] = {}  # by lane under a policy, what it has left of them

    @property
    def counted(self) -> Counted:
        """So far; what is counted later does not change it."""
        return Counted(self._rows.copy(), self._pairs.copy())

    def begin(self) -> None:
        """The next rows belong to another sequence; counts go on."""
        self._held.clear()
        self._left.clear()

    def settled(self, sequence: KVSequence) -> None:
        """The sequence has settled: what its policies let go is seen no more."""
        for table in sequence.tables:
            if table.kept is not None:
                positions, _ = table.rows(len(sequence))
                self._left |= dict(zip(table.group.lanes, positions, strict=True))

    def watch(self, step: Chunk) -> Observer:
        """For `Model.run(…, watch=tally.watch)`."""
        return Observer(step, self)

    def appended(self, layer: int, rows: Tensor, positions: list[int]) -> None:
        """Rows [T, L, width] of one stream were computed and handed to the cache."""
        self._rows[layer, : rows.shape[1]] += rows.shape[0]
        self._held.setdefault(layer, []).extend(positions)

    def attended(self, layer: int, heads: int, seen: dict[Retention, int], positions: list[int]) -> None:
        """Queries of so many heads were asked at these positions; `seen` is the step's, to count each mask once."""
        lanes = [lane for at, lane in self.groups if at == layer]
        shared = heads // len(lanes)
        asking, held = np.array(positions)[:, None], np.array(self._held[self.readers[layer]])[None, :]
        for lane in lanes:
            kept, left = self.groups[layer, lane].retention, self._left.get((layer, lane))
            if left is not None:  # lanes let go of different rows
                mine = np.concatenate((left[left >= 0], positions))[None, :]
                pairs = int(visible(asking, mine, kept.window, kept.sinks).sum())
            else:
                if kept not in seen:
                    seen[kept] = int(visible(asking, held, kept.window, kept.sinks).sum())
                pairs = seen[kept]
            self._pairs[layer, lane * shared : (lane + 1) * shared] += pairs


class Observer(Watch):
    """One step, seen through; everything it sees goes to a `Tally`."""

    def __init__(self, step: Chunk, tally: Tally) -> None:
        super().__init__(step)
        self.tally = tally
        self._seen: dict[Retention, int] = {}

    def only(self, rows: Sequence[int]) -> None:
        """Never: every token is looked at."""

    def append(self, layer: int, **streams: Tensor) -> None:
        """Counts one layer's new rows and passes them on."""
        super().append(layer, **streams)
        self.tally.appended(layer, next(iter(streams.values())), self.positions)

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
        """Counts the queries and passes them on; keeps what comes back where the layer is kept."""
        kept = layer in self.tally.keep
        result = super().attend(
            layer, q, scale=scale, softcap=softcap, bias=bias, want_lse=want_lse or kept, want_mass=want_mass
        )
        self.tally.attended(layer, q.shape[1], self._seen, self.positions)
        if kept:
            assert result.lse is not None, "it was asked for"
            self.tally.asked[layer] = Asked(
                q=q.to("cpu", copy=True),
                out=result.out.to("cpu", copy=True),
                lse=result.lse.to("cpu", copy=True),
                positions=torch.tensor(self.positions),
                scale=scale,
                softcap=softcap,
                bias=None if bias is None else bias.cpu(),
            )
        return result
