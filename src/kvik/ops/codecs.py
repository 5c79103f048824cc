"""Rows to stored bytes and back: the arithmetic of every codec, each row by itself (law 1).

Everything here is elementwise or reduces over one row's channels in a fixed order, so that a row's bytes do not depend
on which rows stand beside it. Rotations are butterflies (a fixed order of additions): a matrix product would round by
batch shape.

Legend: `…` any leading axes, W channels of a stream, B bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kvik.ops.layout import RowLayout, Stream

_FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_F16_MAX = 65504.0
_TINY = 2.0**-126  # the smallest normal bf16: keeps an all-zero row's division finite
_INT4_EDGES = (8.0, 7.0)  # the extreme channel's code under each scale that is tried


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh–Hadamard transform of the last axis, [… W] → [… W]; its own inverse.

    Where W is no power of two, each run of (largest power of two dividing W) channels is transformed by itself.
    """
    width = x.shape[-1]
    order = width & -width
    span = 1
    while span < order:
        pairs = torch.unflatten(x, -1, (-1, 2, span))
        low, high = pairs.unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        span *= 2
    scaled: Tensor = x * order**-0.5
    return scaled


def encode(layout: RowLayout, rows: Mapping[str, Tensor]) -> Tensor:
    """Rows to bytes.

    Args:
        layout: streams, codecs and offsets.
        rows: a float tensor [… W] for each stream of the layout.

    Returns:
        uint8 [… row_bytes].
    """
    encoded = [encode_stream(s, rows[s.name]) for s in layout.streams]
    parts = [codes for codes, _ in encoded] + [scales for _, scales in encoded if scales is not None]
    packed = torch.cat(parts, dim=-1)
    missing = layout.row_bytes - packed.shape[-1]
    return torch.nn.functional.pad(packed, (0, missing)) if missing else packed


def decode(layout: RowLayout, packed: Tensor) -> dict[str, Tensor]:
    """All streams of packed rows, still rotated where their codec rotates.

    Args:
        layout: streams, codecs and offsets.
        packed: uint8 [… row_bytes].

    Returns:
        f32 [… W] by stream.
    """
    out = {}
    for stream in layout.streams:
        start, scales_at = layout.offsets[stream.name]
        codes = packed[..., start : start + stream.code_bytes]
        scales = packed[..., scales_at : scales_at + stream.codec.scale_bytes(stream.width)]
        out[stream.name] = decode_stream(stream, codes.contiguous(), scales.contiguous())
    return out


def decode_stream(stream: Stream, codes: Tensor, scales: Tensor) -> Tensor:
    """(codes uint8 [… B], scales uint8 [… 2·groups]) → f32 [… W]; both contiguous."""
    codec, width = stream.codec, stream.width
    if codec.name in _FLOATS:
        return codes.view(_FLOATS[codec.name])[..., :width].to(torch.float32)
    scale = scales.view(torch.bfloat16).to(torch.float32)
    if codec.bits == 8:
        return codes[..., :width].view(torch.int8) * scale
    half = -(-width // 2)
    codes = codes[..., :half]
    values = torch.cat((codes & 15, (codes >> 4)[..., : width - half]), dim=-1).to(torch.float32) - 8.0
    grouped = torch.unflatten(values, -1, (scale.shape[-1], -1))
    return (grouped * scale.unsqueeze(-1)).flatten(-2)


def unrotated(layout: RowLayout, name: str, values: Tensor) -> Tensor:
    """Turns what `decode` gave, or an attention output made of it, back into the model's own channels: [… W]."""
    return hadamard(values) if next(s for s in layout.streams if s.name == name).codec.rotated else values


def encode_stream(stream: Stream, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """[… W] → (codes uint8 [… B], padded to whole granules; scales uint8 [… 2·groups] or None)."""
    codec = stream.codec
    if codec.name == "f16":
        x = x.clamp(-_F16_MAX, _F16_MAX)  # an infinity would poison rows that only mask it
    if codec.name in _FLOATS:
        codes, scales = x.contiguous().to(_FLOATS[codec.name]).view(torch.uint8), None
    else:
        x = x.to(torch.float32)
        if codec.rotated:
            x = hadamard(x)
        codes, scales = _int8(x) if codec.bits == 8 else _int4(x, codec.group_of(x.shape[-1]))
    missing = stream.code_bytes - codes.shape[-1]
    return torch.nn.functional.pad(codes, (0, missing)) if missing else codes, scales


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale a row: code = round(x / scale), scale = max|x| / 127 rounded to bf16."""
    peak = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
    scale = (peak * (1 / 127)).clamp_min(_TINY).to(torch.bfloat16)
    return (x / scale).round().to(torch.int8).view(torch.uint8), scale.view(torch.uint8)


def _int4(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes -8 … 7 (stored +8), a scale for each group of channels: of two candidates the one with the least squared
    error, the first where they tie. The extreme channel lands on the side that has the extra code.

    Measured on SmolLM2 (mean KL, k and v in 4 bits, two texts of 768 tokens, `benchmarks/codecs.py`): with both scales
    4.4e-2, with the first alone 5.3e-2, with nine 4.6e-2; 16 unevenly spaced codes for a normal distribution 4.5e-2 to
    4.9e-2; a tenth more or less is noise. On one text of 1,024: scales for 32 channels 5.1e-2, one scale a row 6.4e-2,
    32 channels without the rotation 18e-2.
    """
    grouped = torch.unflatten(x, -1, (-1, group))
    extreme = grouped.gather(-1, grouped.abs().argmax(dim=-1, keepdim=True))
    best_codes = best_scale = best_error = None
    for edge in _INT4_EDGES:
        scale = (extreme * (-1 / edge)).to(torch.bfloat16)
        scale = torch.where(scale == 0, _TINY, scale)
        wide = scale.to(torch.float32)
        codes = (grouped / wide).round().clamp(-8, 7)
        error = halved_sum((codes * wide - grouped).square())
        if best_codes is None or best_scale is None or best_error is None:
            best_codes, best_scale, best_error = codes, scale, error
        else:
            better = error < best_error
            best_codes = torch.where(better, codes, best_codes)
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.where(better, error, best_error)
    assert best_codes is not None and best_scale is not None, "there is at least one candidate"
    codes = (best_codes.flatten(-2) + 8).to(torch.uint8)
    half = -(-codes.shape[-1] // 2)
    low, high = codes[..., :half], codes[..., half:]
    if codes.shape[-1] % 2:
        high = torch.nn.functional.pad(high, (0, 1))
    return low | high << 4, best_scale.flatten(-2).view(torch.uint8)


def halved_sum(x: Tensor) -> Tensor:
    """[… n] → [… 1], in one fixed order: the second half is added to the first until one is left, so that any
    implementation gives the same bits."""
    while x.shape[-1] > 1:
        half = -(-x.shape[-1] // 2)
        rest = x[..., half:]
        x = x[..., :half] + (rest if rest.shape[-1] == half else torch.nn.functional.pad(rest, (0, 1)))
    return x
