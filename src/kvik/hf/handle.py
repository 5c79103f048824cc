"""What stands for a layer's keys or values on their way through a model: a name, not a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvik.hf.chunk import Reading


class Handle:
    """Given back by `Cache.update` where attention reads rows as they are stored. A model may ask for its shape and
    pass it on; whoever computes with it gets a TypeError or an AttributeError: `kvik.hf.finding` sees that beforehand.

    Attributes:
        reading: who answers queries over these rows.
        layer: whose rows they are.
        shape, dtype, device: as the tensor's would be, [batch, heads, columns, width].
    """

    __slots__ = ("device", "dtype", "layer", "reading", "shape")

    def __init__(self, reading: Reading, layer: int, like: Tensor, columns: int) -> None:
        self.reading, self.layer, self.dtype, self.device = reading, layer, like.dtype, like.device
        self.shape = torch.Size((*like.shape[:2], columns, like.shape[3]))

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def to(self, *_: object, **__: object) -> Handle:
        """Itself: rows are read where they are."""
        return self

    def contiguous(self) -> Handle:
        """Itself."""
        return self
