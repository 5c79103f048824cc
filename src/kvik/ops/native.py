"""Append, attend and compact by the C++ kernels (`native/`), over pages of a CPU, exactly as `ops/reference.py` says.

What the kernels leave to the reference, so that they stay small: layouts of other streams than `k` and `v`; heads wider
than 512.

Addresses are handed over as integers, everything checked here: a tensor through DLPack costs more than a short product.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvik.ops import loader, reference
from kvik.ops import reads as described
from kvik.ops.fused import Fused
from kvik.ops.layout import MOST_POSITIONS, TOGETHER, RowLayout
from kvik.ops.reads import Kept, Member, Partial, Reads

_KINDS = {"f32": 0, "bf16": 1, "f16": 2}  # attend.h's Kind; int8 is 3, int4 is 4
_WIDEST = 512
_FAR = 1 << 60  # a window that hides nothing


class Plan:
    """See `ops.reads.Plan`."""

    def __init__(self, pages: Tensor, reads: Reads) -> None:
        module: Any = loader.built()
        _check_pages(pages, reads.layout, reads.page_size)
        self._key, self._value = reads.layout.streams
        self._pages, self._reads = pages, reads  # held: the plan below knows addresses only
        members = []
        for member in reads.members:
            table, logical = member.pages, member.logical
            assert table.dtype == logical.dtype == "int32", "tables are int32"
            assert table.flags.c_contiguous and logical.flags.c_contiguous, "tables lie without gaps"
            assert table.shape[1] == len(logical), "a page of each lane for each place in the text"
            for numbers in (table,) if member.kept is None else (table, member.kept.pages):
                assert not numbers.size or numbers.view(np.uint32).max() < len(pages), "pages that there are"
            end = member.start + member.count
            assert end <= MOST_POSITIONS, "positions fit 31 bits"
            there = len(logical) and (int(logical[-1]) + 1) * reads.page_size >= end
            assert there or member.kept is not None, "there are columns for all new tokens, or others to read"
            members += [table.ctypes.data, logical.ctypes.data, table.shape[1], member.start, member.count]
            members += [*_kept(member.kept, table.shape[0], reads.page_size), self._extremes(member)]
        self._lanes = min((member.pages.shape[0] for member in reads.members), default=_FAR)
        self._tokens = reads.tokens
        window = _FAR if reads.window is None else reads.window
        layout = _layout(reads.layout, reads.page_size)
        select = reads.select
        choice = [0, 0, 1, 0] if select is None else [select.pages, select.sinks, select.recent, select.dense]
        centre = 0 if reads.centre is None else self._centre(reads.centre)
        self._plan = module.Plan(pages.data_ptr(), layout, window, reads.sinks, centre, members, choice)
        self._append, self._attend = self._plan.append, self._plan.attend

    def _centre(self, centre: Tensor) -> int:
        lanes = max((member.pages.shape[0] for member in self._reads.members), default=0)
        assert centre.is_contiguous() and len(centre) >= lanes, "a centre for each lane, without gaps"
        assert centre.shape[1] == self._key.width, "a centre for each lane, without gaps"
        return _floats(centre).data_ptr()

    def append(self, lanes: slice, rows: Mapping[str, Tensor]) -> None:
        """See `ops.reads.Plan.append`."""
        k, v = _floats(rows[self._key.name]), _floats(rows[self._value.name])
        count = self._count(lanes)
        assert k.shape == (self._tokens, count, self._key.width), "a row of k for each token and lane"
        assert v.shape == (self._tokens, count, self._value.width), "a row of v for each token and lane"
        a, b = k.stride(), v.stride()
        self._append(lanes.start, count, k.data_ptr(), a[0], a[1], v.data_ptr(), b[0], b[1])

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
        self._reads.check(softcap)
        q = _floats(q)
        tokens, heads, width = q.shape
        count = self._count(lanes)
        assert tokens == self._tokens and heads % count == 0 and width == self._key.width, "queries of every token"
        if q.stride(1) != width:
            q = q.contiguous()
        out = torch.empty((tokens, heads, self._value.width))
        lse = torch.empty((tokens, heads)) if want_lse else None
        at, reach = 0, 0
        if want_mass or masses is not None:
            slots = [(count, member.columns * self._reads.page_size) for member in self._reads.members]
            masses = tuple(torch.zeros(shape) for shape in slots) if masses is None else masses
            assert all(_is_mass(mass, shape) for mass, shape in zip(masses, slots, strict=True)), "a mass for each slot"
            lse = torch.empty((tokens, heads))
        if bias is not None:
            bias = _floats(bias).contiguous()
            assert bias.shape[0] == heads and bias.shape[1] > 0, "a bias for each head"
            at, reach = bias.data_ptr(), bias.shape[1]
        self._attend(
            lanes.start, count, heads // count, q.data_ptr(), q.stride(0), scale, softcap or 0.0, at, reach,
            out.data_ptr(), 0 if lse is None else lse.data_ptr(), [mass.data_ptr() for mass in masses or ()],
        )  # fmt: skip
        whole = self._reads.whole(lanes, q, scale, lse) if want_lse and lse is not None else None
        return Partial(out, whole, masses)

    def through(self, lanes: slice, layer: Fused, x: Tensor, angles: Tensor | None) -> bool:
        """See `ops.reads.Plan.through`."""
        widths = self._key.width, self._value.width
        if (layer.lanes, layer.width, layer.width) != (self._count(lanes), *widths):
            return False
        tokens = self._tokens
        at, turns = layer.check(x, angles, tokens)
        layer.kernel.run(self._plan, lanes.start, at, tokens, turns)
        return True

    def _count(self, lanes: slice) -> int:
        """How many lanes these are."""
        assert 0 <= lanes.start < lanes.stop <= self._lanes, "lanes of the tables"
        return int(lanes.stop - lanes.start)

    def _extremes(self, member: Member) -> int:
        """Where they lie; 0: the member's queries read everything."""
        extremes, size = member.extremes, self._reads.page_size
        if extremes is None or self._reads.select is None:
            return 0
        assert extremes.dtype == "uint16" and extremes.flags.c_contiguous, "extremes are bits of bf16, without gaps"
        assert member.kept is None and int(member.logical[0]) == 0, "who chooses holds every page"
        assert (member.start + member.count - 1) // size == member.start // size, "tokens that choose lie in one page"
        blocks = -(-len(member.logical) // TOGETHER)
        assert extremes.shape == (len(member.pages), blocks, 2, self._key.width, TOGETHER), "room for all pages"
        return int(extremes.ctypes.data)


def plan(pages: Tensor, reads: Reads) -> described.Plan:
    """See `ops.reads.Backend.plan`."""
    return Plan(pages, reads) if _serves(reads.layout) else reference.plan(pages, reads)


def compact(pages: Tensor, layout: RowLayout, size: int, source: Tensor, target: Tensor) -> None:
    """See `ops.reads.Backend.compact`."""
    if not _serves(layout):
        reference.compact(pages, layout, size, source, target)
        return
    module: Any = loader.built()
    source, target = source.contiguous(), target.contiguous()
    assert source.dtype == target.dtype == torch.int64 and source.shape == target.shape, "a target for each source"
    _check_pages(pages, layout, size)
    assert _within(source, len(pages) * size) and _within(target, len(pages) * size), "slots of these pages"
    module.compact(pages.data_ptr(), _layout(layout, size), source.data_ptr(), target.data_ptr(), len(source))


def _serves(layout: RowLayout) -> bool:
    return [(s.name, s.by) for s in layout.streams] == [("k", "dot"), ("v", "mix")] and all(
        s.width <= _WIDEST for s in layout.streams
    )


@lru_cache(maxsize=256)
def _layout(layout: RowLayout, size: int) -> list[int]:
    """As bind_attend.cpp reads it: page size, page bytes, and eight integers a stream."""
    assert size in (16, 32, 64, 128, 256), "a tile is 256 slots, a vector up to 16"
    out = [size, size * layout.row_bytes]
    for stream in layout.streams:
        codes, scales = (size * at for at in layout.offsets[stream.name])
        kind = _KINDS.get(stream.codec.name, 3 if stream.codec.bits == 8 else 4)
        mixed = stream.by == "mix"
        out += [kind, stream.codec.rotated, mixed, stream.width, stream.code_bytes, stream.groups, codes, scales]
    return out


def _kept(kept: Kept | None, lanes: int, size: int) -> list[int]:
    if kept is None:
        return [0, 0, 0, 0]
    most = kept.pages.shape[1] * size
    assert len(kept.pages) == len(kept.counts) == lanes and kept.positions.shape == (lanes, most), "of each lane"
    assert kept.counts.max(initial=0) <= most, "pages for all kept rows"
    for each in (kept.pages, kept.counts, kept.positions):
        assert each.dtype == "int32" and each.flags.c_contiguous, "kept rows are int32, without gaps"
    return [kept.pages.ctypes.data, kept.counts.ctypes.data, kept.positions.ctypes.data, kept.pages.shape[1]]


def _check_pages(pages: Tensor, layout: RowLayout, size: int) -> None:
    assert pages.dtype == torch.uint8 and pages.is_contiguous() and pages.is_cpu, "pages are bytes"
    assert pages.shape[1] == size * layout.row_bytes, "pages of this layout"


def _within(numbers: Tensor, count: int) -> bool:
    if not numbers.numel():
        return True
    least, most = numbers.aminmax()
    return int(least) >= 0 and int(most) < count


def _is_mass(mass: Tensor, shape: tuple[int, int]) -> bool:
    return mass.shape == shape and mass.dtype == torch.float32 and mass.is_contiguous() and mass.device.type == "cpu"


def _floats(x: Tensor) -> Tensor:
    assert x.dtype == torch.float32 and x.device.type == "cpu", "f32 on the CPU"
    return x if x.stride(-1) == 1 else x.contiguous()
