"""Weights as quantised files store them: codes with a scale and a zero for each group of inputs.

Shapes: K inputs, N outputs; weights are [N, K] as in `torch.nn.Linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
        codes = torch.unflatten(self.unpacked().to(torch.float32), 1, (-1, self.group))
        return (codes * self.scale.float().unsqueeze(-1) + self.zero.float().unsqueeze(-1)).flatten(1)

    def rows(self, index: Tensor) -> GroupQuantized:
        """The chosen outputs, codes verbatim."""
        return GroupQuantized(self.codes[index], self.scale[index], self.zero[index], self.bits)


def dense(weight: Tensor | GroupQuantized) -> Tensor:
    """The weight as f32 [N, K], whatever it is held as."""
    return weight.dequantize() if isinstance(weight, GroupQuantized) else weight.float()


def stack(*weights: Tensor | GroupQuantized) -> Tensor | GroupQuantized:
    """Several weights of the same inputs as one, outputs after outputs; codes verbatim where all are stored alike."""
    quantized = [w for w in weights if isinstance(w, GroupQuantized)]
    kinds = {(w.bits, w.group, w.scale.dtype) for w in quantized}
    if len(quantized) < len(weights) or len(kinds) > 1:
        return torch.cat([dense(w) for w in weights])
    codes, scale, zero = (torch.cat([getattr(w, field) for w in quantized]) for field in ("codes", "scale", "zero"))
    return GroupQuantized(codes, scale, zero, quantized[0].bits)
