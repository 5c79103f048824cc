"""Places to stand between a decoder and its cache: to keep what passes, or to change what attention is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import kvik
from kvik.models.watch import Chunk, Watch
from kvik.ops.reads import Partial


class States(Watch):
    """Keeps what passes: for each layer q, each stream, and attention's result, f32 [T, heads, width].

    Queries, keys and values of a layer are functions of the hidden state that enters it: where none of them moved, no
    hidden state did.
    """

    def __init__(self, step: Chunk) -> None:
        super().__init__(step)
        self.kept: dict[tuple[int, str], Tensor] = {}

    def append(self, layer: int, **streams: Tensor) -> None:
        for name, rows in streams.items():
            self.kept[layer, name] = rows.clone()
        super().append(layer, **streams)

    def attend(self, layer: int, q: Tensor, **options: Any) -> Partial:
        result = super().attend(layer, q, **options)
        self.kept[layer, "q"], self.kept[layer, "out"] = q.clone(), result.out.clone()
        return result


class BothWays(States):
    """The same model without its causal mask: every token of the chunk attends to every other, as in an encoder."""

    def attend(self, layer: int, q: Tensor, *, scale: float, **_: Any) -> Partial:
        k, v = self.kept[layer, "k"], self.kept[layer, "v"]
        shared = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
        weights = torch.einsum("qhd,khd->hqk", q * scale, k).softmax(dim=-1)
        out = torch.einsum("hqk,khd->qhd", weights, v)
        self.kept[layer, "q"], self.kept[layer, "out"] = q.clone(), out
        return Partial(out)


class Alone(States):
    """The same model in which a token attends to itself only: its attention's result is its own value."""

    def attend(self, layer: int, q: Tensor, **_: Any) -> Partial:
        v = self.kept[layer, "v"]
        return Partial(v.repeat_interleave(q.shape[1] // v.shape[1], dim=1))


def seen(model: kvik.Model, tokens: list[int], lens: type[States] = States, kv: str = "f32") -> dict[Any, Tensor]:
    """A text in one chunk through a lens: what passed in every layer, and `"logits"` of every token."""
    lenses: list[States] = []

    def watch(step: Chunk) -> Chunk:
        lenses.append(lens(step))
        return lenses[0]

    with model.cache(kv, shares=False).open() as sequence:
        logits = model.run([(sequence, tokens)], every=True, watch=watch)
    return {**lenses[0].kept, "logits": logits}


def moved(before: dict[Any, Tensor], after: dict[Any, Tensor], rows: list[int]) -> dict[Any, int]:
    """For each thing that passed, how many of the given rows are not the same, bit for bit; what is 0 is left out."""
    count = {
        name: sum(not torch.equal(before[name][row], after[name][row]) for row in rows)
        for name in before
    }  # fmt: skip
    return {name: number for name, number in count.items() if number}
