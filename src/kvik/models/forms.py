"""Which operator mixes a model's tokens, as one word of its configuration; and what each costs, by formula.

    attention               softmax over scores, no positions
    attention:learned       a learned vector for each position is added to the embedding (GPT-2)
    attention:rotary        queries and keys are turned by position (RoFormer, arXiv:2104.09864)
    translution:qkv         query, key and value matrices for each offset (arXiv:2510.10060); any of q, k, v
    lor:qkv,8               the same in low rank, 8 channels a head, beside ordinary attention
    bucketed:qkv,16         one matrix for each of 16 ranges of offsets
    convolution:3           fixed weights over a kernel of 3: no queries and keys at all

Symbols: d width of the model, m = heads · head width, H heads, n tokens seen, K sets of matrices (one an offset), R =
rank · H, S how many of q, k, v are relative. Operations are multiplications and additions, of a layer and a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvik.cache.shape import LayerShape
from kvik.errors import ConfigError

Kind = Literal["attention", "translution", "lor", "bucketed", "convolution"]
Positions = Literal["none", "learned", "rotary"]

EXAMPLES = "attention:rotary, translution:qkv, lor:qkv,8, bucketed:qkv,16 or convolution:3"
THETA = 10_000.0  # of rotary attention
MARKS = 2  # channels more in a key of a range, of which one is used: widths stay even
MOST = 4096  # channels a head of a low rank, buckets, or offsets of a kernel
_SUBSETS = ("q", "k", "v", "qk", "qv", "kv", "qkv")


@dataclass(frozen=True)
class Form:
    """An operator's kind and settings; `parse` reads one, `str` writes it.

    Attributes:
        positions: how attention knows them; other kinds need none.
        relative: which of q, k, v depend on the offset.
        number: `lor`: channels a head; `bucketed`: ranges of offsets; `convolution`: the kernel's side.
    """

    kind: Kind
    positions: Positions = "none"
    relative: str = ""
    number: int = 0

    @classmethod
    def parse(cls, text: str) -> Form:
        """Reads an operator's word. Raises ConfigError."""
        kind, _, rest = text.partition(":")
        if kind == "attention" and rest in ("", "learned", "rotary"):
            return cls("attention", positions=rest or "none")  # type: ignore[arg-type]
        if kind == "translution" and rest in _SUBSETS:
            return cls("translution", relative=rest)
        match = re.fullmatch(r"(?:([qkv]{1,3}),)?([1-9]\d{0,3})", rest)
        if match and int(match[2]) <= MOST:
            if kind in ("lor", "bucketed") and match[1] in _SUBSETS:
                return cls(kind, relative=match[1], number=int(match[2]))  # type: ignore[arg-type]
            if kind == "convolution" and match[1] is None:
                return cls("convolution", relative="v", number=int(match[2]))
        raise ConfigError(f"operator {text[:60]!r} is none that kvik has; use {EXAMPLES} (q, k, v in this order)")

    def __str__(self) -> str:
        if self.kind == "attention":
            return self.kind if self.positions == "none" else f"{self.kind}:{self.positions}"
        if self.kind == "convolution":
            return f"{self.kind}:{self.number}"
        return f"{self.kind}:{self.relative}" + (f",{self.number}" if self.number else "")

    def starts(self, length: int) -> tuple[int, ...]:
        """Where each range of offsets begins: of a bucketed operator exact ones, then as wide as those before them
        together allow, growing evenly by a factor (as T5, arXiv:1910.10683); the last has no end.

        >>> Form.parse("bucketed:k,8").starts(64)
        (0, 1, 2, 3, 4, 8, 16, 32)

        Args:
            length: positions that the model is made for; all ranges begin before it.
        """
        count = min(self.number, length)
        exact = count - count // 2
        rest, growth = count - exact, length / max(exact, 1)
        later = [int(exact * growth ** (i / rest)) for i in range(rest)]
        found = list(range(exact))
        for start in later:
            found.append(max(start, found[-1] + 1))
        return tuple(found)

    def sets(self, length: int, causal: bool = True) -> int:
        """Matrices of each relative projection, in a text of at most `length` tokens."""
        if self.kind == "attention":
            return 1
        if self.kind == "convolution":
            return min(self.number, length) if causal else 2 * min(self.number // 2 + 1, length) - 1
        each = min(self.number, length) if self.kind == "bucketed" else length
        return each if causal else 2 * each - 1  # offsets to the right have matrices of their own

    def reach(self) -> int | None:
        """In a grid, the offset in either direction from which on all share a set (of a kernel: are not seen)."""
        if self.kind == "bucketed":
            return max(self.number // 2, 1)
        return self.number // 2 if self.kind == "convolution" else None

    def sets_around(self, height: int, width: int) -> int:
        """Matrices of each relative projection, in a grid of patches and its class token, which has three."""
        if self.kind == "attention":
            return 1
        far = self.reach()
        down, right = (side - 1 if far is None else min(far, side - 1) for side in (height, width))
        return (2 * down + 1) * (2 * right + 1) + 3

    def layer_shapes(self, d: int, heads: int, width: int, length: int) -> list[LayerShape]:
        """What a layer's operator keeps of a token, in a causal text: its layers in a cache. Why: in each class.

        Args:
            d, heads, width: channels of the model, heads, and channels of a head.
        """
        m = heads * width
        if self.kind == "attention":
            turned = tuple(THETA ** (-2 * pair / width) for pair in range(width // 2))
            frequencies = turned if self.positions == "rotary" else None
            return [LayerShape(heads, (("k", width), ("v", width)), frequencies=frequencies)]
        if self.kind == "bucketed":
            return ranges(self.starts(length), d, heads, width)
        if self.kind == "convolution":
            return [LayerShape(1, (("x", d),), window=self.sets(length), use="read")]
        kept = [("k", m), ("v", m)]
        if self.kind == "translution":
            kept = [("x", d)] if set(self.relative) & {"k", "v"} else []
            kept += [(name, m) for name in "kv" if name not in self.relative]
        else:
            rank = self.number * heads
            kept += [("k_low", rank)] * bool(set(self.relative) & {"q", "k"})
            kept += [("v_low", rank)] * ("v" in self.relative)
        return [LayerShape(1, tuple(kept), use="read")]


def wide(starts: Sequence[int]) -> list[tuple[int, int | None]]:
    """Ranges of more than one offset: (number, width); None = without an end."""
    ends = [*starts[1:], None]
    widths = [(number, None if end is None else end - starts[number]) for number, end in enumerate(ends)]
    return [(number, width) for number, width in widths if width != 1]


def ranges(starts: Sequence[int], d: int, heads: int, width: int) -> list[LayerShape]:
    """What an operator with ranges keeps: x, if any range begins after 0, and a layer for each wide range."""
    kept = [LayerShape(1, (("x", d),), window=starts[-1] + 1, use="delay")] if starts[-1] else []
    rows = (("k", width + MARKS), ("v", width))
    return kept + [LayerShape(heads, rows, window=window, use="delay") for _, window in wide(starts)]


@dataclass(frozen=True)
class Cost:
    """What one layer's operator costs, W_o and norms aside.

    Attributes:
        d, m: widths of the model and of all heads together.
        heads: H.
        sets: K, matrices of each relative projection.
        form: the operator.
    """

    d: int
    m: int
    heads: int
    sets: int
    form: Form

    @property
    def rank(self) -> int:
        """R."""
        return self.form.number * self.heads if self.form.kind == "lor" else 0

    @property
    def parameters(self) -> int:
        """Of queries, keys and values: 3 d m, and (K - 1) d m more for each that is relative; in low rank d R twice for
        scores, d R + R m for values, and K R² for each."""
        base, relative = 3 * self.d * self.m, self.form.relative
        if self.form.kind == "convolution":
            return self.sets * self.d * self.m
        if self.form.kind != "lor":
            return base + len(relative) * (self.sets - 1) * self.d * self.m
        low = 2 * self.d * self.rank * bool(set(relative) & {"q", "k"})
        low += ("v" in relative) * self.rank * (self.d + self.m)
        return base + low + len(relative) * self.sets * self.rank**2

    @property
    def row(self) -> int:
        """Channels that one token leaves in the cache for good: see each operator's docstring."""
        relative, d, m = set(self.form.relative), self.d, self.m
        if self.form.kind == "convolution":
            return 0  # the last tokens of the kernel alone
        if self.form.kind == "translution":
            return (d if relative & {"k", "v"} else 0) + m * ("k" not in relative) + m * ("v" not in relative)
        if self.form.kind == "lor":
            return 2 * m + self.rank * (bool(relative & {"q", "k"}) + ("v" in relative))
        return 2 * m

    def step(self, n: int) -> int:
        """Operations of one new token that sees n, its own included."""
        s, d, m, r = len(self.form.relative), self.d, self.m, self.rank
        if self.form.kind == "convolution":
            return 2 * self.sets * d * m
        plain = 2 * d * m
        if self.form.kind == "translution":
            return (3 - s) * plain + 2 * s * n * d * m + 4 * n * m
        if self.form.kind == "lor":
            scores, values = bool(set(self.form.relative) & {"q", "k"}), "v" in self.form.relative
            low = 4 * d * r * scores + values * 2 * r * (d + m) + 2 * s * n * r * r + 2 * n * r * (scores + values)
            return 3 * plain + low + 4 * n * m
        if self.form.kind == "bucketed":
            return (3 - s) * plain + s * self.sets * plain + 4 * n * m
        return 3 * plain + 4 * n * m

    def whole(self, n: int) -> int:
        """Operations of a causal text of n tokens at once: each pair of tokens once."""
        if self.form.kind == "bucketed":
            s, plain = len(self.form.relative), 2 * self.d * self.m
            return n * ((3 - s) + s * self.sets) * plain + 2 * n * (n + 1) * self.m
        if self.form.kind == "convolution":
            return n * self.step(n)
        each = self.step(1) - (slope := self.step(2) - self.step(1))
        return n * each + slope * n * (n + 1) // 2
