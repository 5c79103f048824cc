"""Sizes as people write and read them: `8GiB` to bytes, bytes to `168.0 GiB`."""

from __future__ import annotations

import re
from fractions import Fraction

from kvik.errors import UsageError

BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
DECIMAL = ("B", "kB", "MB", "GB", "TB", "PB")
_FACTORS = {
    **{unit.lower(): 1024**power for power, unit in enumerate(BINARY)},
    **{unit.lower(): 1000**power for power, unit in enumerate(DECIMAL)},
    "": 1,
}


def parse_bytes(text: str, what: str = "size") -> int:
    """Bytes in a size such as `8GiB`, `512 MiB`, `2GB`, `1.5GiB` or `4096`; KiB is 1024 bytes, kB is 1000.

    Args:
        text: the size.
        what: the option it came from, for the message.

    Raises:
        UsageError: the text is no size, or less than one byte.

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,12})?)\s*([a-z]{0,3})\s*", text, flags=re.IGNORECASE | re.ASCII)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{what} {text!r} is no size; write 8GiB, 512MiB, 2GB or a number of bytes")
    whole, _, fraction = match[1].partition(".")
    size: int = int(whole + fraction) * factor // 10 ** len(fraction)
    if size < 1:
        raise UsageError(f"{what} {text!r} is less than one byte; write 8GiB, 512MiB, 2GB or a number of bytes")
    return size


def parse_part(text: str, what: str = "size") -> int | Fraction:
    """Bytes, or a part of a whole that is known later: `64MiB`, `20%`.

    Raises:
        UsageError: the text is neither, or the part is nothing or more than all.

    >>> parse_part("64MiB"), parse_part("12.5%")
    (67108864, Fraction(1, 8))
    """
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,12})?)\s*%\s*", text, flags=re.ASCII)
    if match is None:
        return parse_bytes(text, what)
    part = Fraction(match[1]) / 100
    if not 0 < part <= 1:
        raise UsageError(f"{what} {text!r} is no part of a whole; write more than 0% and up to 100%")
    return part


def format_bytes(count: int, *, decimal: bool = False, digits: int = 1) -> str:
    """A size in the largest unit that leaves at least 1: `168.0 GiB`, or `180.4 GB` with `decimal`; whole below 1 KiB.

    >>> format_bytes(180_388_626_432), format_bytes(180_388_626_432, decimal=True, digits=2)
    ('168.0 GiB', '180.39 GB')
    """
    step, units = (1000, DECIMAL) if decimal else (1024, BINARY)
    power = 0
    while power + 1 < len(units) and round(abs(count) / step**power, digits) >= step:
        power += 1
    return f"{count} B" if power == 0 else f"{count / step**power:.{digits}f} {units[power]}"


def format_count(count: int, *, digits: int = 1) -> str:
    """A count of parameters or tokens in three figures or so: `135M`, `7.2B`, `1.0T`.

    >>> format_count(134_515_008), format_count(174_604_259_328), format_count(950)
    ('134.5M', '174.6B', '950')
    """
    units = ("", "k", "M", "B", "T")
    power = 0
    while power + 1 < len(units) and round(count / 1000**power, digits) >= 1000:
        power += 1
    return str(count) if power == 0 else f"{count / 1000**power:.{digits}f}{units[power]}"
