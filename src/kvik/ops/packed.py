"""4- and 8-bit weights as the native products read them, on the CPU (`native/linear.h`).

Both forms have a scale for each 32 inputs, int4 also a zero. Codes, scales and zeros of a file's own 4-bit and Q8_0
blocks are taken as they are; anything else is fitted. Rows of activations are rounded to 8 bits with a scale for each
32 channels; sums of products are whole numbers, and what is left is f32 in one order: a row's bits depend on it alone.

Legend: T rows, K inputs, N outputs, G groups of 32 inputs, both filled up with zeros to whole tiles of 16 and groups.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kvik.errors import WeightsError
from kvik.ops.grouped import GROUP, GroupQuantized, dense

TILE = 16  # outputs that lie together


class Packed:
    """A weight in 4 or 8 bits.

    Attributes:
        shape: (N, K).
        codes: uint8 [N / 16, G, bits, 16, 4].
        grid: f16 [N / 16, G, 2 or 1, 16], scale and zero.
        kernel: the native weight.
    """

    def __init__(self, module: ModuleType, weight: Tensor | GroupQuantized, bias: Tensor | None, bits: int) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        codes, *grid = _codes4(weight) if bits == 4 else _codes8(weight)
        factor = _factor(grid)
        self.codes, self.bias = _tiled_codes(codes, bits), bias
        self.grid = torch.stack([_tiled_grid(each / factor) for each in grid], dim=2).contiguous()
        assert self.grid.shape[:2] == self.codes.shape[:2], "a scale for each 32 inputs"
        assert bias is None or (bias.is_contiguous() and bias.dtype == torch.float32 and bias.shape == self.shape[:1])
        addresses = self.codes.data_ptr(), self.grid.data_ptr(), 0 if bias is None else bias.data_ptr()
        self.kernel: Any = module.Weight(bits, *addresses, factor, *self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.grid.nbytes

    def product(self, x: Tensor, function: Any, takes: int, onto: Tensor | None) -> Tensor:
        """f32 [T, takes · K] → f32 [T, N], added to `onto` where that is given.

        Args:
            function: a native function of rows that comes first, or None.
            takes: how many times wider it wants its rows.

        Raises:
            WeightsError: a gradient is wanted.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise WeightsError(
                "products with int4 and int8 weights have no gradient; load with weights 'f32' or 'bf16'"
            )
        (outputs, inputs), (rows, width) = self.shape, x.shape
        assert width == takes * inputs and x.dtype == torch.float32, f"{width} {x.dtype} for {inputs} inputs"
        x = x.contiguous()
        if onto is None:
            y = torch.empty((rows, outputs))
            self.kernel.product(function, x.data_ptr(), width, rows, y.data_ptr(), outputs, False)
            return y
        assert onto.shape == (rows, outputs) and onto.stride(1) == 1 and onto.dtype == torch.float32
        self.kernel.product(function, x.data_ptr(), width, rows, onto.data_ptr(), onto.stride(0), True)
        return onto

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight as f32 [len(index), K]."""
        index = index.to(torch.int64).contiguous()
        out = torch.empty((index.shape[0], self.shape[1]))
        self.kernel.lookup(index.data_ptr(), index.shape[0], out.data_ptr())
        return out


def _codes4(weight: Tensor | GroupQuantized) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, K], scale and zero f32 [N, G]: w = code · scale + zero."""
    if isinstance(weight, GroupQuantized) and weight.bits == 4 and weight.group == GROUP:
        return weight.unpacked(), weight.scale.float(), weight.zero.float()
    grouped = _grouped(weight)
    zero = grouped.amin(dim=-1)
    scale = ((grouped.amax(dim=-1) - zero) / 15).clamp_min(2.0**-126)
    factor = _factor([scale, zero])
    scale, zero = (_as_held(each, factor) for each in (scale, zero))
    codes = ((grouped - zero.unsqueeze(-1)) / _no_zeros(scale, factor).unsqueeze(-1)).round_().clamp_(0, 15)
    return codes.to(torch.uint8).flatten(1), scale, zero


def _codes8(weight: Tensor | GroupQuantized) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K] and scale f32 [N, G]: w = (code - 128) · scale."""
    if isinstance(weight, GroupQuantized) and weight.bits == 8 and weight.group == GROUP:
        scale = weight.scale.float()
        if torch.equal(weight.zero.float(), scale * -128):
            return weight.codes, scale
    grouped = _grouped(weight)
    scale = grouped.abs().amax(dim=-1) / 127
    factor = _factor([scale])
    scale = _as_held(scale, factor)
    codes = (grouped / _no_zeros(scale, factor).unsqueeze(-1)).round_().clamp_(-127, 127) + 128
    return codes.to(torch.uint8).flatten(1), scale


def _grouped(weight: Tensor | GroupQuantized) -> Tensor:
    full = dense(weight)
    return torch.unflatten(torch.nn.functional.pad(full, (0, -full.shape[1] % GROUP)), 1, (-1, GROUP))


def _factor(grid: list[Tensor]) -> float:
    """A power of two that brings the largest scale or zero into f16's range, and small ones up to 1 so that they keep
    their bits: whatever was f16 stays exact."""
    top = max((float(each.abs().max()) for each in grid if each.numel()), default=0.0)
    if not math.isfinite(top):
        raise WeightsError("a weight holds values that are not finite, so its products are NaN; get the file again")
    exponent = max(math.floor(math.log2(top)), -100) if top > 0 else 0
    return 2.0 ** (min(exponent, 0) + max(exponent - 14, 0))


def _as_held(x: Tensor, factor: float) -> Tensor:
    return (x / factor).to(torch.float16).float() * factor


def _no_zeros(scale: Tensor, factor: float) -> Tensor:
    """A scale that f16 rounds to 0 belongs to values that are all taken as its zero: any divisor serves."""
    return torch.where(scale == 0, factor, scale)


def _tiled_codes(codes: Tensor, bits: int) -> Tensor:
    """[N, K] → [N / 16, G, 8 runs of 4 inputs, 16, 4]; 4-bit codes of runs i and i + 4 share bytes."""
    outputs, inputs = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -inputs % GROUP, 0, -outputs % TILE))
    tiled = codes.view(codes.shape[0] // TILE, TILE, codes.shape[1] // GROUP, 8, 4).permute(0, 2, 3, 1, 4)
    return (tiled if bits == 8 else tiled[:, :, :4] | tiled[:, :, 4:] << 4).contiguous()


def _tiled_grid(x: Tensor) -> Tensor:
    """[N, G] → f16 [N / 16, G, 16]."""
    x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % TILE)).to(torch.float16)
    return torch.unflatten(x, 0, (-1, TILE)).transpose(1, 2)
