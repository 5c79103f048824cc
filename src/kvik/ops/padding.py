"""To how many rows batched products are padded, found by trying."""

from __future__ import annotations

from functools import lru_cache

import torch

from kvik.errors import KvikError

TILE = 128  # slots that attention is cut into; a multiple of every page size


@lru_cache(maxsize=64)
def row_multiple(width: int, device: torch.device) -> int:
    """To how many query rows to pad, so that batched products give a row the same bits beside any number of others.

    Args:
        width: of a head.

    Raises:
        KvikError: no padding up to 64 rows does on this device.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((6, TILE, width), generator=generator).to(device) for _ in range(3))
    scores = torch.bmm(q, k.transpose(1, 2))
    mixed = torch.bmm(scores, v)

    def same(batch: int, rows: int) -> bool:
        s = torch.bmm(q[:batch, :rows].contiguous(), k[:batch].transpose(1, 2))
        o = torch.bmm(scores[:batch, :rows].contiguous(), v[:batch])
        return torch.equal(s, scores[:batch, :rows]) and torch.equal(o, mixed[:batch, :rows])

    for multiple in (4, 8, 16, 32, 64):
        if all(same(batch, multiple * times) for batch in (1, 2, 3, 6) for times in range(1, TILE // multiple, 3)):
            return multiple
    raise KvikError(f"batched products on {device} round differently with the number of rows; use another device")
