"""Append, attend and compact in plain torch, on any device: the specification that every faster kernel must equal.

**The cut cannot show.** A query's result is a function of its position and the rows it may see, bit for bit, however a
text is cut into chunks, batches and pages, because

- slots are tiled at fixed multiples of `TILE`, whatever the batch; a tile is always computed whole, unseen slots with
  weight exactly 0, so that every product has the same inner length;
- query rows are padded to a multiple from where on the matrix product gives each row the same bits at any batch size;
  `row_multiple` finds it by trying;
- tiles merge in order, one addition at a time, and a tile in which nothing is seen merges as exactly nothing.

Worked example, page size N = 32, TILE = 64: a text has 70 tokens and appends 2, its window of 20 has dropped page 0.
    columns      logical [1, 2]            pages 1 (positions 32-63) and 2 (64-95)
    slots        page(2)·32 + [6, 7]       rows 70 and 71
    tiles read   0 and 1                   positions 0-63 and 64-127; of tile 0 page 0 is a hole: not visible

Legend: T tokens of the step, H query heads, L lanes (KV heads), G = H / L queries that share a lane, I items (blocks of
one sequence's queries) of equal shape, n tokens of an item, S slots of an item (a multiple of TILE), C = S / TILE
tiles, M = n·G padded to a multiple, D width of keys, E width of values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.ops import pages as paged
from kvik.ops import quest
from kvik.ops.codecs import hadamard
from kvik.ops.fused import Fused
from kvik.ops.layout import RowLayout
from kvik.ops.padding import TILE, row_multiple
from kvik.ops.reads import Member, Partial, Reads, merge

QUERY_BLOCK = 64  # tokens of one sequence that are attended at once: bounds the scores' memory, not the result
UNSEEN = -1e30  # finite, so that a tile in which nothing is seen gives weights of exactly 0 and never a NaN
_NOWHERE = 1 << 60  # the position of a slot that holds nothing: after every query


@dataclass(frozen=True)
class Block:
    """Which slots the queries of some items read: items of equal shape, so that one call serves them all.

    Attributes:
        tokens: int64 [I·n], the step's tokens these items are; None = all of them, in order.
        chunk: n, tokens an item.
        pages: int64 [lanes of the group, I·S/N]. A hole names any page of the item; its slots are not visible.
        visible: bool [V, I, n, S]; V is 1, or the lanes of the group where each holds rows of its own.
        asking: int64 [I, n], positions of the queries.
        held: int64 [V, I, S], positions of the slots; beyond every query's where nothing is held.
        members: int64 [I], whose they are.
        places: int64 [I, S], slots as the members' masses count them; 0 where nothing is held.
    """

    tokens: Tensor | None
    chunk: int
    pages: Tensor
    visible: Tensor
    asking: Tensor
    held: Tensor
    members: Tensor
    places: Tensor
    _hidden: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def items(self) -> int:
        """I."""
        return self.visible.shape[1]

    @property
    def tiles(self) -> int:
        """C."""
        return self.visible.shape[3] // TILE

    def alone(self) -> Iterator[Block]:
        """Each item by itself."""
        n, each = self.chunk, self.pages.shape[1] // self.items
        tokens = torch.arange(self.items * n, device=self.pages.device) if self.tokens is None else self.tokens
        for i in range(self.items):
            one = slice(i, i + 1)
            yield Block(
                tokens[i * n : (i + 1) * n], n, self.pages[:, i * each : (i + 1) * each], self.visible[:, one],
                self.asking[one], self.held[:, one], self.members[one], self.places[one],
            )  # fmt: skip

    def hidden(self, lanes: slice, shared: int, multiple: int) -> Tensor:
        """bool [1 or L, I, C, M, TILE]: the mask as the scores lie, for lanes that `shared` queries share."""
        if shared not in self._hidden:
            kinds, items, n, slots = self.visible.shape
            rows = (~self.visible).unsqueeze(3).expand(-1, -1, -1, shared, -1).reshape(kinds, items, n * shared, slots)
            rows = torch.nn.functional.pad(rows, (0, 0, 0, -n * shared % multiple), value=True)
            self._hidden[shared] = torch.unflatten(rows, 3, (-1, TILE)).transpose(2, 3).contiguous()
        every = self._hidden[shared]
        return every if len(every) == 1 else every[lanes]


class Plan:
    """See `ops.reads.Plan`."""

    def __init__(self, pages: Tensor, reads: Reads) -> None:
        self.pages = pages
        self.reads = reads
        self._slots: Tensor | None = None
        self.blocks = _blocks(reads, pages.device)
        self.kept = _kept_blocks(reads, pages.device)

    def append(self, lanes: slice, rows: Mapping[str, Tensor]) -> None:
        """See `ops.reads.Plan.append`."""
        if self._slots is None:
            self._slots = torch.from_numpy(self.reads.slots()).to(self.pages.device)
        flat = {name: x.flatten(0, 1) for name, x in self.reads.centred(lanes, rows).items()}
        paged.write(self.pages, self.reads.layout, self.reads.page_size, self._slots[lanes].t().reshape(-1), flat)

    def attend(
        self,
        lanes: slice,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        bias: Tensor | None = None,
        want_lse: bool = False,
        want_mass: bool = False,
        masses: tuple[Tensor, ...] | None = None,
    ) -> Partial:
        """See `ops.reads.Plan.attend`."""
        self.reads.check(softcap)
        if self.reads.chooses(lanes):
            assert masses is None, "who chooses what it reads adds up no mass"
            reads, origins = quest.narrowed(self.reads, lanes, q)
            found = Plan(self.pages, reads).attend(
                slice(0, lanes.stop - lanes.start), q,
                scale=scale, softcap=softcap, bias=bias, want_lse=want_lse, want_mass=want_mass,
            )  # fmt: skip
            whole = None if found.mass is None else quest.gathered(found.mass, origins, self.reads)
            return Partial(found.out, found.lse, whole)
        ask = _Ask(self.pages, self.reads, lanes, _rotated(q, self.reads.layout) * scale, softcap, bias)
        want_mass = want_mass or masses is not None
        found = self._over(self.blocks, ask, want_lse or want_mass or bool(self.kept))
        if self.kept:
            found = merge(found, self._over(self.kept, ask, True))
        if want_mass and found.lse is not None:
            size, members = self.reads.page_size, self.reads.members
            if masses is None:
                masses = tuple(q.new_zeros((ask.count, member.columns * size)) for member in members)
            self._weigh(ask, found.lse, masses)
        lse = self.reads.whole(lanes, q, scale, found.lse) if want_lse and found.lse is not None else None
        return Partial(found.out, lse, masses)

    def _weigh(self, ask: _Ask, lse: Tensor, masses: tuple[Tensor, ...]) -> None:
        """Adds what each slot received, query by query in their order."""
        items = [item for block in (*self.kept, *self.blocks) for item in block.alone()]
        for item in sorted(items, key=lambda item: int(item.asking[0, 0])):
            into, places = masses[int(item.members[0])], item.places[0]
            for received in _mass(ask, item, lse).unbind(1):
                into.index_add_(1, places, received)

    def _over(self, blocks: list[Block], ask: _Ask, want_lse: bool) -> Partial:
        """Attention over the rows of some blocks; of tokens that ask none of them, nothing."""
        value, (tokens, heads, _) = self.reads.layout.value, ask.q.shape
        out = ask.q.new_zeros((tokens, heads, value.width))
        lse = ask.q.new_full((tokens, heads), UNSEEN) if want_lse else None
        for block in blocks:
            rows = slice(None) if block.tokens is None else block.tokens
            part, found = _attend(ask, block, want_lse)
            out[rows] = hadamard(part) if value.codec.rotated else part
            if lse is not None and found is not None:
                lse[rows] = found
        return Partial(out, lse)

    def through(self, lanes: slice, layer: Fused, x: Tensor, angles: Tensor | None) -> bool:
        """See `ops.reads.Plan.through`: there is no shorter way here."""
        return False


def plan(pages: Tensor, reads: Reads) -> Plan:
    """See `ops.reads.Backend.plan`."""
    return Plan(pages, reads)


def compact(pages: Tensor, layout: RowLayout, size: int, source: Tensor, target: Tensor) -> None:
    """See `ops.reads.Backend.compact`."""
    paged.move(pages, layout, size, source, target)


@dataclass(frozen=True)
class _Ask:
    """What is asked in one layer: q f32 [T, H, D], rotated and scaled; bias f32 [H, R]."""

    pages: Tensor
    reads: Reads
    lanes: slice
    q: Tensor
    softcap: float | None
    bias: Tensor | None

    @property
    def count(self) -> int:
        """L."""
        return int(self.lanes.stop - self.lanes.start)


@dataclass(frozen=True)
class _Item:
    """A block of one sequence's queries: positions start … stop - 1, tokens first … of the step."""

    member: int
    first: int
    start: int
    stop: int
    tiles: tuple[int, ...]


def _blocks(reads: Reads, device: torch.device) -> list[Block]:
    """Blocks of queries, those of equal shape together."""
    shapes: dict[tuple[int, int], list[_Item]] = {}
    first = 0
    for number, member in enumerate(reads.members):
        start, end = member.start, member.start + member.count
        for begin in range(start, end if len(member.logical) else start, QUERY_BLOCK):
            stop = min(begin + QUERY_BLOCK, end)
            last = (stop - 1) // TILE
            held = int(member.logical[0]) * reads.page_size // TILE  # nothing is before it
            oldest = held if reads.window is None else max(begin - reads.window + 1, 0) // TILE
            sinks = range(min(-(-reads.sinks // TILE), oldest))
            item = _Item(number, first + begin - start, begin, stop, (*sinks, *range(oldest, last + 1)))
            tiles = len(item.tiles) if stop - begin > 1 else 1 << (len(item.tiles) - 1).bit_length()
            shapes.setdefault((stop - begin, tiles), []).append(item)
        first += member.count
    return [_block(reads, n, tiles, items, device) for (n, tiles), items in shapes.items()]


def _block(reads: Reads, n: int, tiles: int, items: list[_Item], device: torch.device) -> Block:
    size = reads.page_size
    of = [reads.members[item.member] for item in items]
    found = [_pages_of(member, size, item.tiles, tiles) for member, item in zip(of, items, strict=True)]
    pages = np.concatenate([pages for pages, _, _ in found], axis=1)
    logical = np.stack([logical for _, logical, _ in found])  # [I, S/N]
    columns = np.stack([columns for _, _, columns in found])
    within = np.arange(size)
    held = np.where(logical[..., None] < 0, _NOWHERE, logical[..., None] * size + within).reshape(len(items), -1)
    first = np.array([member.columns - len(member.logical) for member in of])[:, None, None]  # kept pages come before
    places = np.where(logical[..., None] < 0, 0, (first + columns[..., None]) * size + within).reshape(len(items), -1)
    asking = np.stack([np.arange(item.start, item.stop) for item in items])
    visible = reads.visible(asking[:, :, None], held[:, None, :])[None]
    return _made(reads, n, items, pages, visible, asking, held[None], places, device)


def _made(
    reads: Reads,
    n: int,
    items: list[_Item],
    pages: NDArray[np.int64],
    visible: NDArray[np.bool_],
    asking: NDArray[np.int64],
    held: NDArray[np.int64],
    places: NDArray[np.int64],
    device: torch.device,
) -> Block:
    rows = np.concatenate([np.arange(item.first, item.first + n) for item in items])
    whole = len(rows) == reads.tokens and bool((rows == np.arange(len(rows))).all())
    members = np.array([item.member for item in items])
    arrays = (pages, visible, asking, held, members, places)
    tensors = [torch.from_numpy(np.ascontiguousarray(each)).to(device) for each in arrays]
    return Block(None if whole else torch.from_numpy(rows).to(device), n, *tensors)


def _kept_blocks(reads: Reads, device: torch.device) -> list[Block]:
    """Blocks of queries over the rows that members kept."""
    out, first = [], 0
    for number, member in enumerate(reads.members):
        end = member.start + member.count
        for begin in range(member.start, end, QUERY_BLOCK):
            if member.kept is not None and member.kept.counts.any():
                stop = min(begin + QUERY_BLOCK, end)
                out.append(_kept_block(reads, _Item(number, first + begin - member.start, begin, stop, ()), device))
        first += member.count
    return out


def _kept_block(reads: Reads, item: _Item, device: torch.device) -> Block:
    kept, size, n = reads.members[item.member].kept, reads.page_size, item.stop - item.start
    assert kept is not None, "asked only where there is something"
    lanes, slots = kept.positions.shape
    whole = -(-slots // TILE) * TILE
    pages = np.zeros((lanes, whole // size), np.int64)
    used = np.arange(kept.pages.shape[1]) * size < kept.counts[:, None]
    pages[:, : slots // size] = np.where(used, kept.pages, kept.pages[:1, :1])
    there = np.arange(whole) < kept.counts[:, None]  # [lanes, S]
    held = np.full((lanes, 1, whole), _NOWHERE, np.int64)
    held[:, 0, :slots] = np.where(there[:, :slots], kept.positions, _NOWHERE)
    visible = np.broadcast_to(there[:, None, None, :], (lanes, 1, n, whole)).copy()
    asking, places = np.arange(item.start, item.stop)[None], np.minimum(np.arange(whole), slots - 1)[None]
    return _made(reads, n, [item], pages, visible, asking, held, places, device)


def _pages_of(
    member: Member, size: int, wanted: tuple[int, ...], tiles: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pages [lanes, tiles · TILE/N], their logical numbers [tiles · TILE/N], -1 where there is a hole, and columns."""
    each = TILE // size
    logical = np.full(tiles * each, -1, np.int64)
    logical[: len(wanted) * each] = (np.array(wanted)[:, None] * each + np.arange(each)).reshape(-1)
    columns = np.searchsorted(member.logical, logical)
    columns[columns == len(member.logical)] = 0
    logical[member.logical[columns] != logical] = -1
    columns[logical < 0] = 0
    return member.pages[:, columns].astype(np.int64), logical, columns


def _scores(ask: _Ask, read: Block) -> tuple[Tensor, Tensor]:
    """One Block: masked scores [L·I·C, M, TILE] and values [L·I·C, TILE, E]."""
    count, items, n, tiles = ask.count, read.items, read.chunk, read.tiles
    q = ask.q if read.tokens is None else ask.q[read.tokens]
    shared, multiple = q.shape[1] // count, row_multiple(q.shape[2], q.device)
    batch, used = count * items, n * shared
    stored = ask.pages.index_select(0, read.pages[ask.lanes].reshape(-1))
    layout, rows_of = ask.reads.layout, paged.decoded(stored, ask.reads.layout, ask.reads.page_size)
    k = torch.cat([rows_of[stream.name] for stream in layout.keys], dim=-1).reshape(batch * tiles, TILE, -1)
    v = rows_of[layout.value.name].reshape(batch * tiles, TILE, -1)
    rows = q.view(items, n, count, shared, -1).permute(2, 0, 1, 3, 4).reshape(batch, used, -1)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -used % multiple))
    if tiles > 1:
        rows = rows.unsqueeze(1).expand(-1, tiles, -1, -1).flatten(0, 1)
    scores = torch.bmm(rows, k.transpose(1, 2))  # [batch·C, M, TILE]
    if ask.softcap is not None:
        scores = (scores / ask.softcap).tanh_().mul_(ask.softcap)

    if ask.bias is not None:  # the scores of queries that are no padding, as [L, I, C, n, G, TILE]
        bias = _bias(ask.bias, read, ask.lanes)
        real = torch.unflatten(scores.view(count, items, tiles, -1, TILE)[:, :, :, :used], 3, (n, shared))
        real += torch.unflatten(bias, -1, (tiles, TILE)).permute(0, 1, 4, 2, 3, 5)
    scores.view(count, items, tiles, -1, TILE).masked_fill_(read.hidden(ask.lanes, shared, multiple), UNSEEN)
    return scores, v


def _attend(ask: _Ask, read: Block, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """One Block: out [I·n, H, E], lse [I·n, H]."""
    count, items, n, tiles = ask.count, read.items, read.chunk, read.tiles
    shared, batch = ask.q.shape[1] // count, count * items
    scores, v = _scores(ask, read)
    weights = torch.softmax(scores, dim=-1)
    out = torch.bmm(weights, v)
    lse = None
    if tiles > 1 or want_lse:  # a tile's log Σ exp(score), from its largest score and that one's weight
        lse = scores.amax(dim=-1, keepdim=True) - weights.amax(dim=-1, keepdim=True).log()
    if tiles > 1 and lse is not None:
        lse, out = (x.view(batch, tiles, -1, x.shape[-1]) for x in (lse, out))
        top = lse.amax(dim=1, keepdim=True)
        factor = (lse - top).exp_()
        total = _in_order(factor)
        lse, out = top.squeeze(1) + total.log(), _in_order(out * factor) / total
    lse = _by_token(lse, count, items, n, shared).squeeze(-1) if want_lse and lse is not None else None
    return _by_token(out, count, items, n, shared), lse


def _mass(ask: _Ask, read: Block, lse: Tensor) -> Tensor:
    """What each slot of one item received from each query, one of G after the other, once their log-sum-exp over all
    rows is known: [L, n·G, S]."""
    count, n, tiles = ask.count, read.chunk, read.tiles
    shared = ask.q.shape[1] // count
    scores, _ = _scores(ask, read)
    scores = scores.view(count, tiles, -1, TILE)[:, :, : n * shared]
    whole = lse[read.tokens].view(n, count, shared).permute(1, 0, 2).reshape(count, 1, n * shared, 1)
    return (scores - whole).exp_().transpose(1, 2).flatten(2)


def _rotated(q: Tensor, layout: RowLayout) -> Tensor:
    """Queries as the stored keys lie: rotated, stream by stream, where their codec rotates."""
    parts = torch.split(q, [stream.width for stream in layout.keys], dim=-1)
    turned = [hadamard(x) if s.codec.rotated else x for x, s in zip(parts, layout.keys, strict=True)]
    return turned[0] if len(turned) == 1 else torch.cat(turned, dim=-1)


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


def _bias(bias: Tensor, read: Block, lanes: slice) -> Tensor:
    """[H, R] by distance → [L, I, n, G, S] by slot."""
    held = read.held if len(read.held) == 1 else read.held[lanes]
    back = (read.asking.unsqueeze(-1) - held.unsqueeze(2)).clamp(0, bias.shape[1] - 1)  # [1 or L, I, n, S]
    lane = torch.unflatten(bias, 0, (lanes.stop - lanes.start, -1))
    table = torch.stack([of[:, back[i % len(back)]] for i, of in enumerate(lane)])  # [L, G, I, n, S]
    return table.permute(0, 2, 3, 1, 4)
