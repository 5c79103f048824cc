"""A whole layer as one native call (`native/layer.h`): the same operations in the same order as the single calls, hence
the same bits, without the way through Python between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvik.ops.linear import Linear
from kvik.ops.loader import native
from kvik.ops.pointwise import RowFunction, check_angles


class Fused:
    """x += o · attend(turn(qkv · norm(x))), then x += down · activation(up · norm(x)).

    Attributes:
        kernel: the native layer.
        lanes, width: of its keys and values.
        inputs: width of the model.
    """

    def __init__(self, kernel: Any, lanes: int, width: int, inputs: int) -> None:
        self.kernel, self.lanes, self.width, self.inputs = kernel, lanes, width, inputs

    def check(self, x: Tensor, angles: Tensor | None, tokens: int) -> tuple[int, int]:
        """The addresses of f32 x [T, inputs] and of complex64 angles [T, 1, width / 2], 0 where there are none."""
        assert x.is_contiguous() and x.shape == (tokens, self.inputs), "a row without gaps for each token"
        assert x.dtype == torch.float32 and x.is_cpu, "f32 on the CPU"
        if angles is None:
            return x.data_ptr(), 0
        check_angles(angles, tokens, self.width)
        return x.data_ptr(), angles.data_ptr()


def fuse(
    products: tuple[Linear, Linear, Linear, Linear],
    functions: tuple[RowFunction, RowFunction, RowFunction],
    *,
    heads: int,
    lanes: int,
    width: int,
    scale: float,
) -> Fused | None:
    """The layer of these products (qkv, o, up, down) and functions (both norms, activation); the caller keeps them.

    None where a part has no native form.
    """
    module: Any = native()
    kernels = [function.kernel for function in functions]
    packed = [product.packed for product in products]
    if module is None or None in kernels or not all(packed):
        return None
    inputs = products[0].inputs
    assert all(function.width in (None, inputs) for function in functions[:2]), "norms of the model's width"
    kernel = module.Layer(*(each.kernel for each in packed if each), *kernels, heads, lanes, width, scale)
    return Fused(kernel, lanes, width, inputs)
