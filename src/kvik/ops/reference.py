"""Append and attend in plain torch, on any device: the specification that every faster kernel must equal.

**The cut cannot show.** A query's result is a function of its position and the rows it may see, bit for bit, however a
text is cut into chunks, batches and pages, because

- slots are tiled at fixed multiples of `TILE`, whatever the batch; a tile is always computed whole, unseen slots with
  weight exactly 0, so that every product has the same inner length;
- query rows are padded to a multiple from where on the matrix product gives each row the same bits at any batch size;
  `row_multiple` finds it by trying;
- tiles merge in order, one addition at a time, and a tile in which nothing is seen merges as exactly nothing.

Legend: T tokens of the step, H query heads, L lanes (KV heads), G = H / L queries that share a lane, I items of one
`Reads`, n tokens of an item, S slots of an item (a multiple of TILE), C = S / TILE tiles, M = n·G padded to a multiple,
D width of keys, E width of values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from kvik.errors import KvikError
from kvik.ops.codecs import decode, encode, hadamard
from kvik.ops.layout import RowLayout

TILE = 128  # slots; a multiple of every page size
QUERY_BLOCK = 64  # tokens of one sequence that are attended at once: bounds the scores' memory, not the result
UNSEEN = -1e30  # finite, so that a tile in which nothing is seen gives weights of exactly 0 and never a NaN


@dataclass(frozen=True)
class Reads:
    """Which slots the queries of some items read: items of equal shape, so that one call serves them all.

    Attributes:
        tokens: int64 [I·n], the step's tokens these items are; None = all of them, in order.
        chunk: n, tokens an item.
        pages: int64 [lanes of the group, I·S/N]. A hole names any page of the item; its slots are not visible.
        visible: bool [I, n, S].
        asking: int64 [I, n], positions of the queries.
        held: int64 [I, S], positions of the slots; beyond every query's where nothing is held.
    """

    tokens: Tensor | None
    chunk: int
    pages: Tensor
    visible: Tensor
    asking: Tensor
    held: Tensor
    _hidden: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def items(self) -> int:
        """I."""
        return self.visible.shape[0]

    def hidden(self, shared: int, multiple: int) -> Tensor:
        """bool [1, I, C, M, TILE]: the mask as the scores lie, for lanes that `shared` queries share; made once."""
        if shared not in self._hidden:
            items, n, slots = self.visible.shape
            rows = (~self.visible).unsqueeze(2).expand(-1, -1, shared, -1).reshape(items, n * shared, slots)
            rows = torch.nn.functional.pad(rows, (0, 0, 0, -n * shared % multiple), value=True)
            self._hidden[shared] = torch.unflatten(rows, 2, (-1, TILE)).transpose(1, 2).contiguous().unsqueeze(0)
        return self._hidden[shared]


@dataclass(frozen=True)
class Partial:
    """Attention over some of the rows, ready to be merged with attention over others.

    Attributes:
        out: [T, H, E].
        lse: log Σ exp(score), [T, H]; None unless asked for.
        mass: weight that each slot received, summed over the queries that share its lane, one [L, I, S] for each
            Reads; None unless asked for.
    """

    out: Tensor
    lse: Tensor | None = None
    mass: tuple[Tensor, ...] | None = None


def append(pages: Tensor, layout: RowLayout, slots: Tensor, rows: Mapping[str, Tensor]) -> None:
    """Encodes rows, each by itself, and writes them where they belong.

    Args:
        pages: uint8 [pages, page bytes]; modified.
        layout: how a row is laid out.
        slots: int64 [T, L], page · N + slot of each row.
        rows: f32 [T, L, W] for each stream.
    """
    flat = pages.view(-1, layout.row_bytes)
    flat[slots.reshape(-1)] = encode(layout, rows).view(-1, layout.row_bytes)


def attend(
    pages: Tensor,
    layout: RowLayout,
    reads: list[Reads],
    lanes: slice,
    q: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    want_lse: bool = False,
    want_mass: bool = False,
) -> Partial:
    """Attention of every query over the stored form of the rows that it sees, its own included.

    Args:
        pages: uint8 [pages, page bytes].
        layout: how a row is laid out; streams `k` and `v`.
        reads: who reads which pages. Their tokens together are all T.
        lanes: the rows of `Reads.pages` that q's heads read.
        q: f32 [T, H, D]; head h reads lane h // G.
        scale: of the scores.
        softcap: scores become softcap · tanh(score / softcap) (Gemma 2, arXiv:2408.00118).
        bias: f32 [H, R], added to the score of a row that lies r positions back; the last column serves all further
            ones (ALiBi, arXiv:2108.12409; T5, arXiv:1910.10683).
        want_lse: also return the log-sum-exp.
        want_mass: also return the attention mass.
    """
    key, value = layout.streams
    heads, count = q.shape[1], lanes.stop - lanes.start
    q = (hadamard(q) if key.codec.rotated else q) * scale
    parts = []
    for read in reads:
        chosen = q if read.tokens is None else q[read.tokens]
        item_bias = None if bias is None else _bias(bias, read, count)
        part, lse, mass = _attend(pages, layout, read, lanes, chosen, softcap, item_bias, want_lse, want_mass)
        parts.append((hadamard(part) if value.codec.rotated else part, lse, mass))
    masses = tuple(mass for *_, mass in parts if mass is not None) if want_mass else None
    if reads[0].tokens is None:
        return Partial(parts[0][0], parts[0][1], masses)
    out = q.new_empty((q.shape[0], heads, value.width))
    joined = q.new_empty((q.shape[0], heads)) if want_lse else None
    for read, (part, lse, _) in zip(reads, parts, strict=True):
        out[read.tokens] = part
        if joined is not None and lse is not None:
            joined[read.tokens] = lse
    return Partial(out, joined, masses)


def _attend(
    pages: Tensor,
    layout: RowLayout,
    read: Reads,
    lanes: slice,
    q: Tensor,
    softcap: float | None,
    bias: Tensor | None,
    want_lse: bool,
    want_mass: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One Reads: q [I·n, H, D] → out [I·n, H, E], lse [I·n, H], mass [L, I, S]."""
    count, items, n = lanes.stop - lanes.start, read.items, read.chunk
    shared, tiles, multiple = q.shape[1] // count, read.visible.shape[2] // TILE, row_multiple(q.shape[2], q.device)
    batch, used = count * items, n * shared
    stored = pages.index_select(0, read.pages[lanes].reshape(-1)).view(batch * tiles, TILE, layout.row_bytes)
    k, v = decode(layout, stored).values()

    rows = q.view(items, n, count, shared, -1).permute(2, 0, 1, 3, 4).reshape(batch, used, -1)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -used % multiple))
    if tiles > 1:
        rows = rows.unsqueeze(1).expand(-1, tiles, -1, -1).flatten(0, 1)
    scores = torch.bmm(rows, k.transpose(1, 2))  # [batch·C, M, TILE]
    if softcap is not None:
        scores = (scores / softcap).tanh_().mul_(softcap)

    if bias is not None:  # the scores of queries that are no padding, as [L, I, C, n, G, TILE]
        real = torch.unflatten(scores.view(count, items, tiles, -1, TILE)[:, :, :, :used], 3, (n, shared))
        real += torch.unflatten(bias, -1, (tiles, TILE)).permute(0, 1, 4, 2, 3, 5)
    scores.view(count, items, tiles, -1, TILE).masked_fill_(read.hidden(shared, multiple), UNSEEN)
    weights = torch.softmax(scores, dim=-1)
    out = torch.bmm(weights, v)
    lse, share = None, None
    if tiles > 1 or want_lse:  # a tile's log Σ exp(score), from its largest score and that one's weight
        lse = scores.amax(dim=-1, keepdim=True) - weights.amax(dim=-1, keepdim=True).log()
    if tiles > 1 and lse is not None:
        lse, out = (x.view(batch, tiles, -1, x.shape[-1]) for x in (lse, out))
        top = lse.amax(dim=1, keepdim=True)
        factor = (lse - top).exp_()
        total = _in_order(factor)
        share = factor / total.unsqueeze(1)
        lse, out = top.squeeze(1) + total.log(), _in_order(out * factor) / total
    mass = None
    if want_mass:
        weights = weights.view(batch, tiles, -1, TILE) * (1.0 if share is None else share)
        mass = weights[:, :, :used].sum(dim=2).reshape(count, items, -1)
    lse = _by_token(lse, count, items, n, shared).squeeze(-1) if want_lse and lse is not None else None
    return _by_token(out, count, items, n, shared), lse, mass


def _in_order(parts: Tensor) -> Tensor:
    """[batch, C, M, X] → [batch, M, X]: added one tile at a time, so that trailing and skipped zeros change no bit."""
    first, *others = parts.unbind(1)
    for part in others:
        first = first + part
    return first


def _by_token(x: Tensor, count: int, items: int, n: int, shared: int) -> Tensor:
    """[L·I, M, X] → [I·n, H, X]."""
    x = x[:, : n * shared].reshape(count, items, n, shared, -1)
    return x.permute(1, 2, 0, 3, 4).reshape(items * n, count * shared, -1)


def _bias(bias: Tensor, read: Reads, count: int) -> Tensor:
    """[H, R] by distance → [L, I, n, G, S] by slot."""
    back = read.asking.unsqueeze(-1) - read.held.unsqueeze(1)
    table = bias[:, back.clamp(0, bias.shape[1] - 1)]  # [H, I, n, S]
    return torch.unflatten(table, 0, (count, -1)).permute(0, 2, 3, 1, 4)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over both parts' rows, from attention over each (flashinfer's cascade; arXiv:2501.01005).

    Both need their `lse`. A part in which a query saw nothing has lse ≤ UNSEEN and weighs nothing.
    """
    assert a.lse is not None and b.lse is not None, "merge needs log-sum-exp: attend(..., want_lse=True)"
    lse = torch.logaddexp(a.lse, b.lse)
    out = a.out * (a.lse - lse).exp().unsqueeze(-1) + b.out * (b.lse - lse).exp().unsqueeze(-1)
    return Partial(out, lse)


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
