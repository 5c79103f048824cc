"""Linear weights as they are held, each with one arithmetic for any number of rows (law 1: the cut cannot show).

| format | native, on the CPU (`ops/packed.py`)          | else                                                  |
|--------|-----------------------------------------------|-------------------------------------------------------|
| f32    | -                                             | `linear` over f32, rows padded (see `row_multiple`)   |
| bf16   | -                                             | `linear` over bf16, activations rounded to bf16       |
| int8   | 8-bit codes, a scale per 32 inputs, f16       | 8-bit codes, a bf16 scale an output; torch's packed   |
| int4   | 4-bit codes, scale and zero per 32 inputs, f16| 4-bit codes, scale and zero per 32, bf16; torch's     |

Shapes: T rows (tokens), K inputs, N outputs; weights are [N, K] as in `torch.nn.Linear`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kvik.errors import WeightsError
from kvik.ops.grouped import GROUP, GroupQuantized, dense
from kvik.ops.loader import native
from kvik.ops.packed import Packed
from kvik.ops.pointwise import RowFunction

Format = Literal["f32", "bf16", "int8", "int4"]
FORMATS: tuple[Format, ...] = ("f32", "bf16", "int8", "int4")


class Linear:
    """y = x Wᵀ + b for any number of rows, each row's bits independent of the others beside it.

    Attributes:
        format: how the weight is held.
        arithmetic: what multiplies: results differ from one to another in their last bits. "native" has the same bits
            on every instruction set.
        nbytes: bytes held, scales and padding included.
    """

    def __init__(self, weight: Tensor | GroupQuantized, bias: Tensor | None, fmt: Format, device: torch.device) -> None:
        """
        Args:
            weight: [N, K].
            bias: [N] or None.
            fmt: how to hold it.
            device: where.

        Raises:
            WeightsError: the format has no product on this device, or the weight holds values that are not finite.
        """
        if fmt in ("int8", "int4") and device.type != "cpu":
            raise WeightsError(f"{fmt} weights are for the CPU; on {device.type} use --weights bf16 or f32")
        self.format = fmt
        self.outputs, self.inputs = weight.shape[0], weight.shape[1]
        self.bias = None if bias is None else bias.float().contiguous().to(device)
        self.held: tuple[Tensor, ...] = ()
        module = native() if fmt in ("int8", "int4") else None
        self.packed = None if module is None else Packed(module, weight, self.bias, 4 if fmt == "int4" else 8)
        self.arithmetic = "native" if self.packed else "torch packed" if fmt in ("int8", "int4") else "torch"
        if self.packed is None:
            held = {"f32": _hold_f32, "bf16": _hold_bf16, "int8": _hold_int8, "int4": _hold_int4}[fmt](weight)
            self.held = tuple(t.to(device) for t in held)
            self._wide = self._padded_inputs() - self.inputs
            self._multiple = row_multiple(self)
            self._exact = self._multiple == 1 and not self._wide and self.held[0].shape[0] == self.outputs

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is held."""
        return self.packed.nbytes if self.packed else sum(t.nbytes for t in self.held)

    def __call__(self, x: Tensor, *, after: RowFunction | None = None, onto: Tensor | None = None) -> Tensor:
        """f32 [T, K] → f32 [T, N].

        Args:
            after: a function of rows that comes first: the product is of after(x).
            onto: f32 [T, N], to which the product is added. It may be overwritten; use what is returned.
        """
        if self.packed is not None:
            if after is not None and after.kernel is not None:
                assert after.width in (None, self.inputs), f"a function of {after.width} inputs before {self.inputs}"
                return self.packed.product(x, after.kernel, after.takes, onto)
            return self.packed.product(x if after is None else after(x), None, 1, onto)
        y = self._product_of_rows(x if after is None else after(x))
        return y if onto is None else onto + y

    def _product_of_rows(self, x: Tensor) -> Tensor:
        if self._exact:
            y = _product(self.format, self.held, x)
            return y if self.bias is None else y + self.bias
        rows = x.shape[0]
        missing = -rows % self._multiple
        if missing or self._wide:
            x = torch.nn.functional.pad(x, (0, self._wide, 0, missing))
        y = _product(self.format, self.held, x)
        if missing or y.shape[1] != self.outputs:
            y = y[:rows, : self.outputs]
        return y if self.bias is None else y + self.bias

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight as f32 [len(index), K]: an embedding that is also the head looks up here."""
        if self.packed is not None:
            return self.packed.rows(index)
        if self.format == "int8":
            codes, scale = self.held
            return (codes[index].to(torch.float32) * scale[index].to(torch.float32).unsqueeze(-1))[:, : self.inputs]
        assert self.format != "int4", "an embedding is held as int8 at the least"
        return self.held[0][index].to(torch.float32)

    def _padded_inputs(self) -> int:
        return -(-self.inputs // 64) * 64 if self.format in ("int8", "int4") else self.inputs


def _product(fmt: Format, held: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """x Wᵀ in the format's one arithmetic: f32 [T, K] → f32 [T, N]."""
    if fmt == "f32":
        return torch.nn.functional.linear(x, held[0])
    x = x.to(torch.bfloat16)
    if fmt == "bf16":
        y = torch.nn.functional.linear(x, held[0])
    elif fmt == "int8":
        y = torch._weight_int8pack_mm(x, held[0], held[1])
    else:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, held[0], GROUP, held[1])
    return y.to(torch.float32)


def _hold_f32(weight: Tensor | GroupQuantized) -> tuple[Tensor, ...]:
    return (dense(weight).contiguous(),)


def _hold_bf16(weight: Tensor | GroupQuantized) -> tuple[Tensor, ...]:
    return (dense(weight).to(torch.bfloat16).contiguous(),)


def _hold_int8(weight: Tensor | GroupQuantized) -> tuple[Tensor, ...]:
    """Symmetric codes with a bf16 scale an output, padded with zeros to 64 by 64 (torch's kernels read whole tiles)."""
    full = _padded(dense(weight))
    scale = (full.abs().amax(dim=1) / 127).clamp_min(2.0**-126).to(torch.bfloat16)
    codes = (full / scale.float().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
    return codes.contiguous(), scale


def _hold_int4(weight: Tensor | GroupQuantized) -> tuple[Tensor, ...]:
    """Codes 0 … 15 with scale and zero for each 32 inputs: w = (code - 8) · scale + zero, scale and zero in bf16.

    A file's own 4-bit codes in groups of 32 are taken as they are; anything else is fitted to its range.
    """
    if isinstance(weight, GroupQuantized) and weight.bits == 4 and weight.group == GROUP and weight.shape[1] % 64 == 0:
        codes, scale, zero = weight.unpacked(), weight.scale.float(), weight.zero.float()
        codes, scale, zero = (_padded(t, columns=False) for t in (codes, scale, zero))
    else:
        grouped = torch.unflatten(_padded(dense(weight)), 1, (-1, GROUP))
        zero = grouped.amin(dim=-1)
        scale = ((grouped.amax(dim=-1) - zero) / 15).clamp_min(2.0**-126)
        codes = ((grouped - zero.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 15).flatten(1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    grid = torch.stack((scale, zero + 8 * scale), dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    return packed, grid


def _padded(x: Tensor, columns: bool = True) -> Tensor:
    """Zeros up to a multiple of 64 outputs, and of 64 inputs."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 64 if columns else 0, 0, -x.shape[0] % 64))


_multiples: dict[tuple[object, ...], int] = {}


def row_multiple(linear: Linear) -> int:
    """The number of rows to pad to, so that a row's bits don't depend on how many are beside it: found by trying.

    Raises:
        WeightsError: no padding up to 64 rows gives that on this machine.
    """
    key = (linear.format, linear.outputs, linear.inputs, linear.held[0].device)
    if key not in _multiples:
        _multiples[key] = _probe(linear)
    return _multiples[key]


def _probe(linear: Linear) -> int:
    """Compares a product of many rows with the same rows in pieces of many sizes, twice: with the weight itself, and,
    for float weights, with one whose sums cancel, so that any other order of additions shows even in a bf16 result."""
    generator = torch.Generator().manual_seed(0)
    device, wide = linear.held[0].device, linear.inputs + linear._wide
    total = 320 if linear.outputs * linear.inputs < 4_000_000 else 64
    x = torch.randn((total, wide), generator=generator)
    trials = [(linear.held, x.to(device))]
    if len(linear.held) == 1:
        half = torch.randn((min(linear.outputs, 1024), wide - wide // 2), generator=generator)
        cancelling = torch.cat((half, -half[:, : wide // 2]), dim=1).to(linear.held[0])
        trials.append(((cancelling,), torch.cat((x[:, : wide - wide // 2], x[:, : wide // 2]), dim=1).to(device)))
    for multiple in (1, 2, 4, 8, 16, 32, 64):
        sizes = sorted({-(-rows // multiple) * multiple for rows in (1, 2, 3, 5, 9, 13, 33, 100, 256)})
        if all(_same_in_pieces(linear.format, held, rows, size) for held, rows in trials for size in sizes):
            return multiple
    raise WeightsError(
        f"{linear.format} products of {linear.inputs} x {linear.outputs} round differently with the number of rows "
        "on this machine, so that answers would depend on batching; use another --weights format"
    )


def _same_in_pieces(fmt: Format, held: tuple[Tensor, ...], x: Tensor, size: int) -> bool:
    if size > x.shape[0]:
        return True
    full = _product(fmt, held, x)
    starts = range(0, x.shape[0] - size + 1, size)
    return all(torch.equal(_product(fmt, held, x[i : i + size].contiguous()), full[i : i + size]) for i in starts)
