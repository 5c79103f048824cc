"""Rows in pages, in plain torch: the only place, beside the native kernels, that knows where a page's bytes lie.

`ops/layout.py` draws a page. A slot number is page · N + slot in the page.

Legend: P pages, N slots a page, S slots, B bytes of one row's codes in one stream, X further axes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvik.ops.codecs import decode_stream, encode_stream
from kvik.ops.layout import GRANULE, RowLayout, Stream

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def write(pages: Tensor, layout: RowLayout, size: int, slots: Tensor, rows: Mapping[str, Tensor]) -> None:
    """Encodes rows, each by itself, into their slots.

    Args:
        pages: uint8 [P, page bytes]; modified.
        size: slots a page.
        slots: int64 [S].
        rows: f32 [S, W] for each stream.
    """
    for stream in layout.streams:
        codes, scales = encode_stream(stream, rows[stream.name])
        _put(pages, layout, stream, size, slots, codes, scales)


def decoded(pages: Tensor, layout: RowLayout, size: int) -> dict[str, Tensor]:
    """Whole pages, uint8 [X, page bytes] → f32 [X, N, W] by stream, still rotated where their codec rotates."""
    out = {}
    for stream in layout.streams:
        codes, scales = _taken(pages, layout, stream, size)
        out[stream.name] = decode_stream(stream, codes, scales)
    return out


def rows(pages: Tensor, layout: RowLayout, size: int, slots: Tensor) -> dict[str, Tensor]:
    """Chosen slots, int64 [S] → f32 [S, W] by stream, still rotated where their codec rotates."""
    used, which = torch.unique(slots // size, return_inverse=True)
    return {name: x[which, slots % size] for name, x in decoded(pages[used], layout, size).items()}


def packed(pages: Tensor, layout: RowLayout, size: int) -> Tensor:
    """Whole pages as rows one after another, bytes verbatim: uint8 [X, page bytes] → [X, N, row bytes]."""
    out = pages.new_zeros((*pages.shape[:-1], size, layout.row_bytes))
    for stream in layout.streams:
        start, scales_at = layout.offsets[stream.name]
        codes, scales = _taken(pages, layout, stream, size)
        out[..., start : start + stream.code_bytes] = codes
        out[..., scales_at : scales_at + scales.shape[-1]] = scales
    return out


def move(pages: Tensor, layout: RowLayout, size: int, source: Tensor, target: Tensor) -> None:
    """Moves rows, bytes verbatim, as if all were read before any is written: int64 [S] slots to int64 [S] slots."""
    rows = packed(pages.index_select(0, source // size), layout, size)[torch.arange(len(source)), source % size]
    for stream in layout.streams:
        start, scales_at = layout.offsets[stream.name]
        codes = rows[:, start : start + stream.code_bytes].contiguous()
        scales = rows[:, scales_at : scales_at + stream.codec.scale_bytes(stream.width)].contiguous()
        _put(pages, layout, stream, size, target, codes, scales if stream.groups else None)


def blank(pages: Tensor, layout: RowLayout, size: int, numbers: Tensor, first: int) -> None:
    """Zeroes the rows from slot `first` on of some pages, int64 [P']: a stroke or two a section."""
    for stream in layout.streams:
        start, scales_at = (size * at for at in layout.offsets[stream.name])
        codes = pages[:, start : start + size * stream.code_bytes]
        if stream.by == "dot":
            _zero(torch.unflatten(codes, 1, (-1, size, GRANULE)), numbers, (slice(None), slice(first, None)))
        else:
            r = GRANULE // stream.element
            granules = torch.unflatten(codes, 1, (size // r, -1, r, stream.element))
            if first % r:
                _zero(granules, numbers, (first // r, slice(None), slice(first % r, None)))
            _zero(granules, numbers, (slice(-(-first // r), None),))
        if stream.groups:
            scales = torch.unflatten(pages[:, scales_at : scales_at + size * 2 * stream.groups], 1, (-1, size, 2))
            _zero(scales, numbers, (slice(None), slice(first, None)))


def _zero(view: Tensor, numbers: Tensor, place: tuple[int | slice, ...]) -> None:
    """Zeroes one place in some pages of a view [P, …]: on a CPU by numpy, in a tenth of torch's time."""
    if view.device.type == "cpu":
        view.numpy()[(numbers.numpy(), *place)] = 0
    else:
        view[(numbers, *place)] = 0


def _taken(pages: Tensor, layout: RowLayout, stream: Stream, size: int) -> tuple[Tensor, Tensor]:
    """One stream of whole pages: (codes uint8 [X, N, B], scales uint8 [X, N, 2·groups]), contiguous."""
    start, scales_at = (size * at for at in layout.offsets[stream.name])
    element = stream.element
    codes = pages[..., start : start + size * stream.code_bytes].contiguous().view(_WORDS[element])
    if stream.by == "dot":
        codes = torch.unflatten(codes, -1, (-1, size)).transpose(-1, -2)
    else:
        codes = torch.unflatten(codes, -1, (-1, stream.code_bytes // element, GRANULE // element))
        codes = codes.transpose(-1, -2).flatten(-3, -2)
    codes = codes.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # strides too, where an axis is 1
    if not stream.groups:
        return codes, codes[..., :0]
    scales = pages[..., scales_at : scales_at + size * 2 * stream.groups].contiguous().view(torch.int16)
    scales = torch.unflatten(scales, -1, (stream.groups, size)).transpose(-1, -2)
    return codes, scales.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _put(
    pages: Tensor, layout: RowLayout, stream: Stream, size: int, slots: Tensor, codes: Tensor, scales: Tensor | None
) -> None:
    """Codes uint8 [S, B] and scales uint8 [S, 2·groups] of one stream into their slots."""
    start, scales_at = (size * at for at in layout.offsets[stream.name])
    page, slot = (slots // size).unsqueeze(-1), (slots % size).unsqueeze(-1)
    element = stream.element
    words, r = codes.view(_WORDS[element]), GRANULE // element
    column = torch.arange(words.shape[-1], device=pages.device)
    if stream.by == "dot":
        inside = column * size + slot
    else:
        inside = (slot // r * words.shape[-1] + column) * r + slot % r
    pages.view(_WORDS[element])[page, start // element + inside] = words
    if scales is not None:
        group = torch.arange(stream.groups, device=pages.device)
        pages.view(torch.int16)[page, scales_at // 2 + group * size + slot] = scales.view(torch.int16)
