"""Linear weights as they are held, each with one arithmetic for any number of rows (law 1: the cut cannot show).

| format | held as                                   | product                                    |
|--------|-------------------------------------------|--------------------------------------------|
| f32    | f32                                       | `linear`, rows padded (see `row_multiple`) |
| bf16   | bf16                                      | `linear`, activations rounded to bf16      |
| int8   | 8-bit codes, a bf16 scale an output       | torch's packed int8 product                |
| int4   | 4-bit codes, scale and zero per 32 inputs | torch's packed int4 product                |

Shapes: T rows (tokens), K inputs, N outputs; weights are [N, K] as in `torch.nn.Linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Format = Literal["f32", "bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("f32", "bf16", "int8", "int4")
GROUP = 32  # inputs that share a scale and zero in the int4 format; also the block of GGUF's Q4_0, Q4_1 and Q8_0


@dataclass(frozen=True)
class GroupQuantized:
    """A weight as a quantised file stores it: w = code * scale + zero, a scale and a zero for each group of inputs.

    Attributes:
        codes: uint8 [N, K] for 8 bits; uint8 [N, K / 2] for 4 bits, the even input in the low half of a byte.
        scale: f16 or f32 [N, K / group].
        zero: f16 or f32 [N, K / group].
        bits: 4 or 8.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as the dequantised weight has it."""
        outputs, width = self.codes.shape
        return outputs, width * 8 // self.bits

    @property
    def group(self) -> int:
        """How many inputs share a scale."""
        return self.shape[1] // self.scale.shape[1]

    def unpacked(self) -> Tensor:
        """The codes, one a byte: uint8 [N, K]."""
        if self.bits == 8:
            return self.codes
        return torch.stack((self.codes & 15, self.codes >> 4), dim=-1).flatten(1)

    def dequantize(self) -> Tensor:
        """The weight as f32 [N, K]."""
        codes = self.unpacked().to(torch.float32).unflatten(1, (-1, self.group))
        return (codes * self.scale.float().unsqueeze(-1) + self.zero.float().unsqueeze(-1)).flatten(1)

    def rows(self, index: Tensor) -> GroupQuantized:
        """The chosen outputs, codes verbatim."""
        return GroupQuantized(self.codes[index], self.scale[index], self.zero[index], self.bits)


def dense(weight: Tensor | GroupQuantized) -> Tensor:
    """The weight as f32 [N, K], whatever it is held as."""
    return weight.dequantize() if isinstance(weight, GroupQuantized) else weight.float()
