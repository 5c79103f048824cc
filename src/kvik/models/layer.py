"""The layer that most decoders are made of: a norm before each of its two parts.

x = x + W_o attention(turn(W_q n), turn(W_k n), W_v n)     n = norm(x)
x = x + W_down activation(W_up n)                          n = norm(x)

Some families have more: a norm of each head's queries and keys before they are turned (arXiv:2010.04245), and a norm
of what each part adds to x. A layer that reads the rows of another has no W_k and no W_v (`cache/sharing.py`).
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
        qkv: queries, keys and values in one product, each head by head; queries alone where it `reads` another's rows.
        heads, kv_heads, head_dim: how they are cut.
        q_norm, k_norm: of each head; None = none.
        attention_after, mlp_after: norms of what the parts add to x; None = none.
        scale, softcap: of the scores.
        attention_norm, o, mlp_norm, up, activation, down: as in the formula above.
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
        q_norm: RowFunction | None = None,
        k_norm: RowFunction | None = None,
        attention_after: RowFunction | None = None,
        mlp_after: RowFunction | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        reads: bool = False,
    ) -> None:
        self.attention_norm, self.qkv, self.o, self.attention_after = attention_norm, qkv, o, attention_after
        self.mlp_norm, self.up, self.activation, self.down, self.mlp_after = mlp_norm, up, activation, down, mlp_after
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_norm, self.k_norm = q_norm, k_norm
        self.scale, self.softcap, self.reads = scale or head_dim**-0.5, softcap, reads
        plain = not any((q_norm, k_norm, attention_after, mlp_after, softcap, reads))
        self.fused = fuse(
            (qkv, o, up, down), (attention_norm, mlp_norm, activation),
            heads=heads, lanes=kv_heads, width=head_dim, scale=self.scale,
        ) if plain else None  # fmt: skip

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
        if not self.reads:
            step.append(index, k=_placed(qkv[:, keys:values], self.k_norm, angles), v=qkv[:, values:])
        q = _placed(qkv[:, :keys], self.q_norm, angles)
        out = step.attend(index, q, scale=self.scale, softcap=self.softcap).out.flatten(1)
        x = _added(x, self.o, out, None, self.attention_after)
        return _added(x, self.down, self.up(x, after=self.mlp_norm), self.activation, self.mlp_after)


def _placed(x: Tensor, norm: RowFunction | None, angles: Tensor | None) -> Tensor:
    """Queries or keys f32 [T, heads, width], normed and turned; x may be overwritten."""
    if norm is not None:
        x = norm(x.reshape(-1, x.shape[-1])).view(x.shape)
    return x if angles is None else pointwise.turn(x, angles)


def _added(x: Tensor, product: Linear, inputs: Tensor, before: RowFunction | None, after: RowFunction | None) -> Tensor:
    """x + after(product(before(inputs)))."""
    return product(inputs, after=before, onto=x) if after is None else x + after(product(inputs, after=before))
