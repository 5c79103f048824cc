"""Activation functions whose bits don't depend on how many rows stand side by side (law 1).

torch's own fused silu and gelu use one formula for whole vectors and another for what is left over, so that a value's
last bit depends on where it lies in its tensor; its exp, tanh and arithmetic don't.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x)), elementwise."""
    return x / x.neg().exp_().add_(1)


def gelu_tanh(x: Tensor) -> Tensor:
    """x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), elementwise: GPT-2's GELU."""
    inner = torch.addcmul(x, x * x, x, value=0.044715).mul_(math.sqrt(2 / math.pi))
    return inner.tanh_().add_(1).mul_(x).mul_(0.5)
