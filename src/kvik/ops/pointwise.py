"""Norms and activation functions whose bits don't depend on how many rows stand side by side (law 1).

torch's own fused silu and gelu use one formula for whole vectors and another for what is left over, so that a value's
last bit depends on where it lies in its tensor; its exp, tanh and arithmetic don't.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RMSNorm:
    """x · weight / sqrt(mean(x²) + eps) over the last axis (arXiv:1910.07467), in five calls.

    Attributes:
        weight: f32 [width].
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self._eps = torch.full((1,), eps, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        """f32 [T, width], each row by itself."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * torch.addcmul(self._eps, length, length, value=1 / x.shape[-1]).rsqrt_()).mul_(self.weight)


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)), elementwise."""
    return x / x.neg().exp_().add_(1)


def gelu_tanh(x: Tensor) -> Tensor:
    """x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), elementwise: GPT-2's GELU."""
    inner = torch.addcmul(x, x * x, x, value=0.044715).mul_(math.sqrt(2 / math.pi))
    return inner.tanh_().add_(1).mul_(x).mul_(0.5)
