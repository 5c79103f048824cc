"""Layers that read the rows of another and keep none: a rule says which, whatever the model was trained for.

| rule        | reads                                                             | bytes of L equal layers |
|-------------|-------------------------------------------------------------------|-------------------------|
| `pairs`     | layer 2i + 1 those of layer 2i (CLA-2, arXiv:2405.12981)          | ⌈L/2⌉ / L               |
| `last-half` | layers after the middle those of layer ⌊L/2⌋ (as YOCO's upper     | (⌊L/2⌋ + 1) / L         |
|             | half reads one layer's rows, arXiv:2405.05254)                    |                         |
| `last:n`    | the last n layers those of the last layer before them with their  | (L - n) / L             |
|             | own window (Gemma 3n)                                             |                         |

A layer that reads has no W_k and no W_v, so its queries must be made for keys that it doesn't make itself: a model that
was not trained so gives other, mostly worse answers (`kvik eval --share` measures how much worse).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from kvik.cache.shape import LayerShape
from kvik.errors import UsageError


def readers(layers: Sequence[LayerShape], rule: str) -> tuple[int, ...]:
    """For each layer, the layer whose rows it reads under a rule: its own, or another's.

    >>> half = [LayerShape(1, (("k", 4), ("v", 4)))] * 6
    >>> readers(half, "last-half"), readers(half, "pairs"), readers(half, "last:2")
    ((0, 1, 2, 3, 3, 3), (0, 0, 2, 2, 4, 4), (0, 1, 2, 3, 3, 3))

    Raises:
        UsageError: there is no such rule, or a layer would read rows that it can't: of another shape, or turned or
            hidden in another way.
    """
    count = len(layers)
    if rule == "pairs":
        found = [layer - layer % 2 for layer in range(count)]
    elif rule == "last-half":
        found = [min(layer, count // 2) for layer in range(count)]
    else:
        found = _last(layers, known(rule), rule)
    for layer, owner in enumerate(found):
        if layers[layer] != layers[owner]:
            mine, theirs = (_sight(layers[each]) for each in (layer, owner))
            raise UsageError(
                f"share {rule!r}: layer {layer} {mine} and can't read the rows of layer {owner}, which {theirs}; use "
                "last:N, which shares among layers that are alike"
            )
    return tuple(found)


def known(rule: str) -> int:
    """The number in a rule, 0 where there is none. Raises UsageError where there is no such rule."""
    match = re.fullmatch(r"pairs|last-half|last:([1-9]\d{0,4})", rule)
    if match is None:
        raise UsageError(f"share {rule!r}: use pairs, last-half or last:N")
    return int(match[1] or 0)


def shared(layers: Sequence[LayerShape], owners: Sequence[int]) -> tuple[LayerShape, ...]:
    """The layers as they are when each reads the rows of the one that `readers` names."""
    return tuple(
        shape if owner == layer else replace(shape, reads=owner)
        for layer, (shape, owner) in enumerate(zip(layers, owners, strict=True))
    )


def first_late(layers: Sequence[LayerShape]) -> int:
    """The first layer from which on none keeps rows: of a prompt, only the last token needs to pass these.

    >>> first_late([LayerShape(1, ()), LayerShape(1, ()), LayerShape(1, (), reads=1)])
    2
    """
    return max((layer + 1 for layer, shape in enumerate(layers) if shape.reads is None), default=0)


def _last(layers: Sequence[LayerShape], count: int, rule: str) -> list[int]:
    """Gemma 3n's rule: the last before them that is of the same kind."""
    first = len(layers) - count
    found = list(range(len(layers)))
    for layer in range(max(first, 0), len(layers)):
        alike = [each for each in range(first) if layers[each] == layers[layer]]
        if not alike:
            raise UsageError(
                f"share {rule!r}: layer {layer} {_sight(layers[layer])}, and none of the {max(first, 0)} layers before "
                "those that read is like it; use a smaller number"
            )
        found[layer] = alike[-1]
    return found


def _sight(layer: LayerShape) -> str:
    """What most often makes layers unlike one another."""
    seen = "all positions" if layer.window is None else f"the last {layer.window:,} positions"
    return f"sees {seen}, with {layer.heads} KV heads"
