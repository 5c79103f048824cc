"""What the families share: turning by position, and reading their weights in the form that is asked for.

Legend: T tokens of a step, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kvik.models.experts import Experts
from kvik.models.rope import Rope
from kvik.ops import pointwise
from kvik.ops.grouped import GroupQuantized, dense, stack
from kvik.ops.linear import Format, Linear

T = TypeVar("T")


class Rotation:
    """Rotary position embedding (RoFormer, arXiv:2104.09864) over neighbouring pairs of channels.

    Transformers pairs channel i with i + D/2; `paired` reorders a projection's outputs so that pairs are neighbours,
    which changes no score: queries and keys are reordered alike. A pair is then one complex number.
    """

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self.frequencies, self.factor = rope.frequencies()
        self.device = device

    def angles(self, positions: list[int]) -> Tensor:
        """complex64 [T, 1, D/2]; the angles themselves are computed in float64."""
        turns = torch.tensor(positions, dtype=torch.float64).unsqueeze(1) * self.frequencies
        return torch.polar(torch.full_like(turns, self.factor), turns).to(torch.complex64).unsqueeze(1).to(self.device)


def paired(weight: Tensor | GroupQuantized, heads: int) -> Tensor | GroupQuantized:
    """A projection [H·D, K] (or bias [H·D]) with each head's channels in the order 0, D/2, 1, D/2 + 1, …"""
    width = weight.shape[0] // heads
    index = torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).reshape(-1)
    return weight.rows(index) if isinstance(weight, GroupQuantized) else weight[index]


@dataclass(frozen=True)
class Source:
    """A model's tensors, and the form in which its linear weights are to be held."""

    tensors: Mapping[str, Tensor | GroupQuantized]
    format: Format
    device: torch.device

    def vector(self, name: str, turned: bool = False) -> Tensor:
        """A norm's weight, a bias or a small table, as f32: a copy, since a part of a mapped file keeps all of it.

        Args:
            turned: it goes with the channels of a head, which are `paired`.
        """
        weight = self.tensors[name]
        return dense(paired(weight, 1) if turned else weight).clone().to(self.device)

    def linear(self, *names: str, bias: bool = False, turned: tuple[int, ...] = (), flip: bool = False) -> Linear:
        """One product for several projections of the same inputs.

        Args:
            names: of modules; `.weight` and `.bias` are added.
            bias: whether they have one.
            turned: for the first len(turned) of them, how many heads their outputs are; those are `paired`.
            flip: they are stored [in, out] (GPT-2's Conv1D).
        """
        weights = [self.tensors[f"{name}.weight"] for name in names]
        biases = [dense(self.tensors[f"{name}.bias"]) for name in names] if bias else []
        for index, heads in enumerate(turned):
            weights[index] = paired(weights[index], heads)
            if bias:
                biases[index] = dense(paired(biases[index], heads))
        if flip:
            weights = [dense(weight).t() for weight in weights]
        return Linear(stack(*weights), torch.cat(biases) if bias else None, self.format, self.device)

    def held(self, weight: Tensor | GroupQuantized, fmt: Format | None = None) -> Linear:
        """A product by a weight [out, in] that is no tensor of its own, or has a format of its own."""
        return Linear(weight, None, fmt or self.format, self.device)

    def embedding(self, name: str) -> Linear:
        """A table that may also be the head: int4 is too coarse for it, int8 is used instead."""
        fmt: Format = "int8" if self.format == "int4" else self.format
        return Linear(self.tensors[f"{name}.weight"], None, fmt, self.device)


def nbytes(item: object) -> int:
    """Bytes of all tensors under an object, each counted once."""
    return sum(x.numel() * x.element_size() for x in _under(item, Tensor, set()))


def arithmetic(item: object, device: torch.device) -> str:
    """What computes the products and functions of rows under an object."""
    products = {linear.arithmetic for linear in _under(item, Linear, set())}
    return ", ".join([*sorted(products), pointwise.arithmetic(device)])


def products(item: object) -> int:
    """How many linear products lie under an object, each counted once."""
    return sum(1 for _ in _under(item, Linear, set()))


def multiplied(item: object) -> int:
    """Weights of the linear products under an object that a row passes: it costs twice as many floating-point
    operations. Of experts a row passes those that it takes."""
    every = sum(linear.outputs * linear.inputs for linear in _under(item, Linear, set()))
    idle = [(each, len(each.experts) - each.router.used) for each in _under(item, Experts, set())]
    return every - sum(count * multiplied(each.experts[0]) for each, count in idle)


def _under(item: object, kind: type[T], seen: set[int]) -> Iterator[T]:
    if id(item) in seen:
        return
    seen.add(id(item))
    if isinstance(item, torch.nn.Module):
        yield from _under(list(item.parameters()), kind, seen)
        return
    if isinstance(item, kind):
        yield item
    elif isinstance(item, list | tuple):
        for each in item:
            yield from _under(each, kind, seen)
    elif hasattr(item, "__dict__"):
        for each in vars(item).values():
            yield from _under(each, kind, seen)
