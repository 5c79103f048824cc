"""Attention without a cache: every row sees every row, so nothing computed for a part stays valid for the whole.

What encoders do. One text at a time: no padding, no neighbours, hence no mask.

Legend: S rows, H query heads, L key heads, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256  # queries at once: bounds the scores' memory


def attend_all(q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ · scale + bias) v for every head.

    Args:
        q: f32 [S, H, D]; head h reads key head h // (H / L).
        k, v: f32 [S, L, D].
        bias: f32 [H, 2 R + 1], added to the score of a row that stands r - R places behind the query, below 0 before
            it; the first and the last column serve all further ones. None = none.

    Returns:
        f32 [S, H · D].
    """
    shared = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(shared, 1).transpose(0, 1) for x in (k, v))  # [H, S, D]
    places, outs = torch.arange(len(k), device=q.device), []
    for start in range(0, len(q), ROWS):
        scores = torch.bmm(q[start : start + ROWS].transpose(0, 1) * scale, keys.transpose(1, 2))
        if bias is not None:
            reach = bias.shape[1] // 2
            away = places - places[start : start + ROWS, None]
            scores = scores + bias[:, away.clamp(-reach, reach) + reach]
        outs.append(torch.bmm(scores.softmax(-1), values).transpose(0, 1).flatten(1))
    return torch.cat(outs)
