"""How rows and pages are laid out: plain arithmetic, no tensors, so that planning needs no torch.

A row by itself is its streams' codes, each padded to 4 bytes, in the order of the streams, then their scales:

    int8, head 64:   | k: 64 codes | v: 64 codes | k: 1 scale | v: 1 scale |   = 132 bytes
    k8v4, head 64:   | k: 64 codes | v: 32 bytes | k: 1 scale | v: 2 scales |  = 102 bytes

A page holds N rows in the same bytes, section by section, so that each section starts at N times its place in a row.
Inside a section rows are interleaved in granules of 4 bytes, so that one 64-byte load serves 16 rows or 16 channels and
the instructions for short dot products find their operands side by side:

    read by dot products (k)    [code bytes / 4][N][4]                  a granule: 4 bytes of one row
    mixed by weights (v)        [N / r][codes][r], r = 4 / code size    a granule: r rows' codes of one channel
    scales                      [groups][N], bf16

A 4-bit byte j holds channels j (low half) and j + ceil(W / 2) (high half): a mask gives neighbouring channels.

Only `ops` reads or writes these bytes. Scales are bf16: it has f32's range, so that no row is too small or too large
for it, and the codes are computed against the rounded scale, so that its rounding costs no accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

SCALE_BYTES = 2
MOST_POSITIONS = (1 << 31) - 1  # tokens of a sequence: positions are kept in 32 bits
GRANULE = 4  # bytes that stay together in a page
TOGETHER = 16  # pages whose extremes lie side by side


@dataclass(frozen=True)
class Codec:
    """What one stream's rows become. The arithmetic is in `ops/codecs.py`, under the row law: each row by itself.

    `int4` is what was measured to be best at 4 bits: rotated, a scale for each 32 channels (`int4-plain` leaves out the
    rotation, `int4-row` has one scale a row). `int8` is plain, since in 8 bits the rotation costs more time than most
    models need its accuracy; `int8-rot` has it (SmolLM2: mean KL 2e-4 instead of 9e-4, at the same size).

    Attributes:
        name: as it stands in a spec string.
        bits: of one code.
        group: channels that share a scale; 0 = no scales (the floats), -1 = the whole row.
        rotated: a Hadamard rotation stands in front (QuaRot, arXiv:2404.00456).
    """

    name: str
    bits: int
    group: int = 0
    rotated: bool = False

    @property
    def quantises(self) -> bool:
        """Whether codes stand for multiples of a scale, so that what all keys have in common costs accuracy."""
        return self.group != 0

    def group_of(self, width: int) -> int:
        """Channels a scale for a stream of this width: `group` where it divides the width, else the whole row."""
        return self.group if self.group > 0 and width % self.group == 0 else width

    def code_bytes(self, width: int) -> int:
        """Bytes of one row's codes."""
        return (width * self.bits + 7) // 8

    def scale_bytes(self, width: int) -> int:
        """Bytes of one row's scales."""
        return SCALE_BYTES * (width // self.group_of(width)) if self.group else 0


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("f32", 32),
        Codec("bf16", 16),
        Codec("f16", 16),
        Codec("int8", 8, group=-1),
        Codec("int8-rot", 8, group=-1, rotated=True),
        Codec("int4", 4, group=32, rotated=True),
        Codec("int4-plain", 4, group=32),
        Codec("int4-row", 4, group=-1, rotated=True),
    )
}


@dataclass(frozen=True)
class Stream:
    """One named part of a row: `k` or `v`, `latent`, `rope`, `x`.

    Attributes:
        by: how it is read, by dot products with a query or mixed by weights; decides how it lies in a page.
    """

    name: str
    width: int
    codec: Codec
    by: Literal["dot", "mix"]

    @classmethod
    def of(cls, name: str, width: int, codec: Codec) -> Stream:
        """Values (`v`) are mixed, everything else is read by dot products."""
        return cls(name, width, codec, "mix" if name == "v" else "dot")

    @property
    def code_bytes(self) -> int:
        """Bytes of one row's codes as they lie in a page: whole granules."""
        return -(-self.codec.code_bytes(self.width) // GRANULE) * GRANULE

    @property
    def groups(self) -> int:
        """Scales a row; 0 for the floats."""
        return self.codec.scale_bytes(self.width) // SCALE_BYTES

    @property
    def element(self) -> int:
        """Bytes of a granule that are one row's: all 4 for dot products, one code (or pair of 4-bit codes) to mix."""
        return GRANULE if self.by == "dot" else max(self.codec.bits // 8, 1)


@dataclass(frozen=True)
class RowLayout:
    """Where each stream's codes and scales lie inside a row.

    >>> RowLayout.of(("k", 64, CODECS["int8"]), ("v", 64, CODECS["int4"])).offsets
    {'k': (0, 96), 'v': (64, 98)}
    """

    streams: tuple[Stream, ...]

    @classmethod
    def of(cls, *streams: tuple[str, int, Codec]) -> RowLayout:
        """A layout from (name, width, codec) triples."""
        return cls(tuple(Stream.of(*stream) for stream in streams))

    @cached_property
    def keys(self) -> tuple[Stream, ...]:
        """What a query's products go over, side by side: all streams but `v`."""
        return tuple(stream for stream in self.streams if stream.name != "v")

    @cached_property
    def value(self) -> Stream:
        """What is mixed: `v`; where there is none the first, which is read both ways (latent attention,
        arXiv:2405.04434)."""
        return next((stream for stream in self.streams if stream.name == "v"), self.streams[0])

    @cached_property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """For each stream, the byte of a row at which its codes start and the byte at which its scales start."""
        codes, position = [], 0
        for stream in self.streams:
            codes.append(position)
            position += stream.code_bytes
        out = {}
        for stream, start in zip(self.streams, codes, strict=True):
            out[stream.name] = (start, position)
            position += stream.codec.scale_bytes(stream.width)
        return out

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row, scales and alignment included."""
        unit = 4 if any(s.codec.bits == 32 for s in self.streams) else 2
        total = sum(s.code_bytes + s.codec.scale_bytes(s.width) for s in self.streams)
        return -(-total // unit) * unit

    @cached_property
    def payload_bits(self) -> int:
        """Bits of one row by the formula: codes alone."""
        return sum(s.codec.bits * s.width for s in self.streams)


def extremes_bytes(pages: int, width: int) -> int:
    """Bytes of the extremes of one lane's keys in so many pages (`ops/quest.py`): two bf16 a channel and page."""
    return -(-pages // TOGETHER) * TOGETHER * 2 * 2 * width


def nearest_codec(name: str, known: Sequence[str] = tuple(CODECS)) -> str:
    """The known codec name that looks most like `name`, for error messages."""
    import difflib

    return (difflib.get_close_matches(name, known, n=1, cutoff=0.0) or [known[0]])[0]
