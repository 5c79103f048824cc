"""Where a layer's heads lie: in one group, or some of them in one and some in another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvik.cache.spec import Spec
from kvik.ops.reads import Partial


@dataclass(frozen=True)
class Part:
    """One layer's lanes that lie in one group. `heads` is None where they are all of the layer's, in order."""

    group: int
    lanes: slice
    heads: tuple[int, ...] | None


def parts_of(spec: Spec) -> list[list[Part]]:
    """For each layer, where its lanes lie."""
    found: dict[int, list[tuple[int, slice, tuple[int, ...]]]] = {}
    for index, group in enumerate(spec.groups):
        layers = np.array([layer for layer, _ in group.lanes])
        for layer in dict.fromkeys(layers.tolist()):
            lanes = np.flatnonzero(layers == layer)
            where = slice(int(lanes[0]), int(lanes[-1]) + 1)
            found.setdefault(layer, []).append((index, where, tuple(group.lanes[i][1] for i in lanes)))
    out: list[list[Part]] = [[] for _ in range(max(max(found, default=-1) + 1, len(spec.readers)))]
    for layer, parts in found.items():
        out[layer] = [Part(index, where, heads if len(parts) > 1 else None) for index, where, heads in parts]
    return [out[owner] for owner in spec.readers] if spec.readers else out


def heads_of(parts: list[Part], heads: int) -> Iterator[tuple[Part, list[int] | None]]:
    """Each part of a layer, and which of so many query heads read it; None = all, in order."""
    shared = heads // sum(part.lanes.stop - part.lanes.start for part in parts)
    for part in parts:
        yield part, None if part.heads is None else [h * shared + i for h in part.heads for i in range(shared)]


def joined(results: list[tuple[list[int] | None, Partial]], heads: int) -> Partial:
    """What the parts gave, heads back in their order. Masses are given part by part."""
    first = results[0][1]
    if results[0][0] is None:
        return first
    out = first.out.new_empty((first.out.shape[0], heads, first.out.shape[2]))
    lse = None if first.lse is None else first.lse.new_empty((first.lse.shape[0], heads))
    for mine, result in results:
        out[:, mine] = result.out
        if lse is not None and result.lse is not None:
            lse[:, mine] = result.lse
    masses = None if first.mass is None else tuple(mass for _, result in results for mass in result.mass or ())
    return Partial(out, lse, masses)
