"""The layer that most decoders are made of: a norm before each of its two parts.

x = x + W_o attention(turn(W_q n), turn(W_k n), W_v n)     n = norm(x)
x = x + W_down activation(W_up n)                          n = norm(x)
"""

from __future__ import annotations

from torch import Tensor

from kvik.models.watch import Chunk
from kvik.ops import pointwise
from kvik.ops.fused import fuse
from kvik.ops.linear import Linear
from kvik.ops.pointwise import RowFunction


class Layer:
    """One layer's weights, and what it does with them.

    Attributes:
        qkv: queries, keys and values in one product, each head by head; and the others as in the formula above.
        heads, kv_heads, head_dim: how they are cut.
    """

    def __init__(
        self,
        *,
        attention_norm: RowFunction,
        qkv: Linear,
        o: Linear,
        mlp_norm: RowFunction,
        up: Linear,
        activation: RowFunction,
        down: Linear,
        heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        self.attention_norm, self.qkv, self.o = attention_norm, qkv, o
        self.mlp_norm, self.up, self.activation, self.down = mlp_norm, up, activation, down
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale = head_dim**-0.5
        self.fused = fuse(
            (qkv, o, up, down), (attention_norm, mlp_norm, activation),
            heads=heads, lanes=kv_heads, width=head_dim, scale=self.scale,
        )  # fmt: skip

    def __call__(self, step: Chunk, index: int, x: Tensor, angles: Tensor | None = None) -> Tensor:
        """Takes a step's tokens through the layer.

        Args:
            step: entered; its T tokens.
            index: which layer this is.
            x: f32 [T, width]; may be overwritten, use what is returned.
            angles: complex64 [T, 1, head_dim / 2]: queries and keys are turned by them.
        """
        if self.fused is not None and step.through(index, self.fused, x, angles):
            return x
        qkv = self.qkv(x, after=self.attention_norm).view(len(x), -1, self.head_dim)
        keys, values = self.heads, self.heads + self.kv_heads
        qk = qkv[:, :values] if angles is None else pointwise.turn(qkv[:, :values], angles)
        step.append(index, k=qk[:, keys:], v=qkv[:, values:])
        x = self.o(step.attend(index, qk[:, :keys], scale=self.scale).out.flatten(1), onto=x)
        return self.down(self.up(x, after=self.mlp_norm), after=self.activation, onto=x)
