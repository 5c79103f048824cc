"""Figures of quality as people read them."""

from __future__ import annotations


def nats(value: float) -> str:
    """Two figures of a KL divergence, 0 only for what is exactly 0.

    >>> [nats(each) for each in (0.0, 5.63e-5, 0.0123, 0.5, 3.14159)]
    ['0', '5.6e-5', '0.012', '0.50', '3.1']
    """
    if value == 0:
        return "0"
    if value < 0.00995:
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:.3f}" if value < 0.0995 else f"{value:.2f}" if value < 0.995 else f"{value:.1f}"


def share(value: float, digits: int = 0) -> str:
    """A part of a whole. Rounded to the whole only where it is the whole.

    >>> share(0.4567), share(0.99961, 1), share(0.99961), share(1.0, 1), share(0.0)
    ('46 %', '99.9 %', '99 %', '100 %', '0 %')
    """
    if value == 1:
        return "100 %"
    percent = 100 * value
    if round(percent, digits) >= 100 > percent:
        percent = 100 - 10.0**-digits
    return f"{percent:.{digits}f} %"


def change(value: float) -> str:
    """A signed difference in nats a token.

    >>> change(0.01234), change(-0.00001), change(1.5)
    ('+0.0123', '0.0000', '+1.5000')
    """
    text = f"{value:+.4f}"
    return "0.0000" if float(text) == 0 else text


def brief(spec: str, most: int = 56) -> str:
    """A spec for a picture: of a longer one the first rule, and how many there are besides.

    >>> brief("int4; layers 0-1: bf16"), brief("int8+window:256; layers 0-9,12: int8; layers 10-11 heads 0,2: int8")
    ('int4; layers 0-1: bf16', 'int8+window:256 and 2 more rules')
    """
    first, *rest = spec.split("; ")
    return spec if len(spec) <= most or not rest else f"{first} and {len(rest)} more rule{'s' * (len(rest) > 1)}"
