"""Functions of single rows: norms, activation functions, turning by position. Each row by itself, in the same bits
beside any number of others (law 1).

Natively on the CPU where that is built; in plain torch else, and where gradients are wanted. torch's own fused silu and
gelu use one formula for whole vectors and another for what is left over, so that a value's last bit depends on where it
lies in its tensor; its exp, tanh, erf and arithmetic don't.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvik.ops.loader import native


def arithmetic(device: torch.device) -> str:
    """What computes these functions on a device: it is part of what names a model's rows."""
    return "native rows" if device.type == "cpu" and native() is not None else "torch rows"


class RowFunction:
    """f32 [T, takes · width] → f32 [T, width], each row by itself.

    Attributes:
        takes: how many times wider a row is on its way in.
        width: of its rows; None = any.
    """

    takes = 1
    width: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """A new tensor."""
        kernel = self.kernel
        if kernel is None or not x.is_cpu or x.requires_grad:
            return self.plain(x)
        x, (rows, width) = x.contiguous(), x.shape
        assert x.dtype == torch.float32 and self.width in (None, width), "f32 rows of the function's width"
        out = torch.empty((rows, width // self.takes))
        kernel(x.data_ptr(), width, rows, width // self.takes, out.data_ptr())
        return out

    def plain(self, x: Tensor) -> Tensor:
        """The same in torch's operations."""
        raise NotImplementedError

    @cached_property
    def kernel(self) -> Any:
        """The native function, which a product can also take on its way; None where there is none."""
        module = native()
        return None if module is None else self._kernel(module.RowFunction)

    def _kernel(self, make: Any) -> Any:
        """The function as `native` makes it."""
        return None


class RMSNorm(RowFunction):
    """x · weight / sqrt(mean(x²) + eps) over the last axis (arXiv:1910.07467).

    Attributes:
        weight: f32 [width].
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps, self.width = weight.contiguous(), eps, len(weight)
        self._eps = torch.full((1,), eps, device=weight.device)

    def plain(self, x: Tensor) -> Tensor:
        """In five calls."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(self._eps, length, length, value=1 / x.shape[-1]).rsqrt_()).mul_(self.weight)

    def _kernel(self, make: Any) -> Any:
        return make.rms_norm(_floats(self.weight), self.eps) if self.weight.is_cpu else None


class LayerNorm(RowFunction):
    """(x - mean) · weight / sqrt(variance + eps) + bias over the last axis (arXiv:1607.06450).

    Attributes:
        weight, bias: f32 [width].
    """

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps, self.width = weight.contiguous(), bias.contiguous(), eps, len(weight)

    def plain(self, x: Tensor) -> Tensor:
        """torch's own: its rows don't depend on their number."""
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def _kernel(self, make: Any) -> Any:
        assert self.bias.shape == self.weight.shape and self.bias.device == self.weight.device, "as many of both"
        return make.layer_norm(_floats(self.weight), _floats(self.bias), self.eps) if self.weight.is_cpu else None


class SwiGLU(RowFunction):
    """silu(gate) · up of a row that is gate and up side by side; silu(x) = x / (1 + exp(-x)) (arXiv:2002.05202)."""

    takes = 2

    def plain(self, x: Tensor) -> Tensor:
        """See the class."""
        gate, up = x.chunk(2, dim=-1)
        return silu(gate) * up

    def _kernel(self, make: Any) -> Any:
        return make.swiglu()


class GeGLU(RowFunction):
    """gelu(gate) · up of a row that is gate and up side by side, gelu by way of tanh (arXiv:2002.05202)."""

    takes = 2

    def plain(self, x: Tensor) -> Tensor:
        """See the class."""
        gate, up = x.chunk(2, dim=-1)
        return gelu_tanh(gate) * up


class ReLU(RowFunction):
    """max(x, 0)."""

    def plain(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.clamp(min=0)


class GELU(RowFunction):
    """GPT-2's GELU, by way of tanh (arXiv:1606.08415)."""

    def plain(self, x: Tensor) -> Tensor:
        """See `gelu_tanh`."""
        return gelu_tanh(x)

    def _kernel(self, make: Any) -> Any:
        return make.gelu()


class Activation(RowFunction):
    """Any function of single values; where it is gated, f(gate) · up of a row that is gate and up side by side."""

    def __init__(self, function: Callable[[Tensor], Tensor], gated: bool) -> None:
        self.function, self.takes = function, 2 if gated else 1

    def plain(self, x: Tensor) -> Tensor:
        """See the class."""
        if self.takes == 1:
            return self.function(x)
        gate, up = x.chunk(2, dim=-1)
        return self.function(gate) * up

    def _kernel(self, make: Any) -> Any:
        return None


def activation(name: str, gated: bool = False) -> RowFunction:
    """What config.json names: one of `ACTIVATIONS`, natively where there is a kernel."""
    function = ACTIVATIONS[name]
    if function is gelu_tanh and not gated:
        return GELU()
    return SwiGLU() if function is silu and gated else Activation(function, gated)


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)), elementwise."""
    return x / (x.neg().exp() + 1)


def gelu_tanh(x: Tensor) -> Tensor:
    """x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), elementwise."""
    inner = torch.addcmul(x, x * x, x, value=0.044715).mul_(math.sqrt(2 / math.pi))
    return (inner.tanh() + 1).mul(x).mul_(0.5)


def gelu(x: Tensor) -> Tensor:
    """x / 2 · (1 + erf(x / √2)), elementwise."""
    return ((x * math.sqrt(0.5)).erf_() + 1).mul(x).mul_(0.5)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu, "gelu": gelu, "gelu_new": gelu_tanh, "silu": silu, "swish": silu
}  # fmt: skip


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Neighbouring pairs of channels, turned by position.

    Args:
        x: f32 [T, H, D]; may be overwritten.
        angles: complex64 [T, 1, D/2], of length 1 each but for a model's own factor.

    Returns:
        f32 [T, H, D].
    """
    module = native()
    tokens, heads, width = x.shape
    within = x.stride(2) == 1 and (x.stride(1) == width or heads == 1)
    if module is None or not x.is_cpu or x.requires_grad or not within:
        return torch.view_as_real(torch.view_as_complex(torch.unflatten(x, -1, (-1, 2))) * angles).flatten(-2)
    assert x.dtype == torch.float32, "f32 on the CPU"
    check_angles(angles, tokens, width)
    module.turn(x.data_ptr(), x.stride(0), tokens, heads, width, angles.data_ptr())
    return x


def check_angles(angles: Tensor, tokens: int, width: int) -> None:
    """That they are as the kernels read them: complex64 [tokens, 1, width / 2] without gaps."""
    assert width % 2 == 0 and angles.shape == (tokens, 1, width // 2), "an angle for each token and pair of channels"
    assert angles.dtype == torch.complex64 and angles.is_cpu and angles.is_contiguous(), "complex64, without gaps"


def _floats(x: Tensor) -> int:
    """The address of f32 numbers."""
    assert x.dtype == torch.float32, "weights of norms are f32"
    return x.data_ptr()
