"""What is kept, as frozen data that adds up its own bytes before anything is allocated.

A spec string is rules divided by `;`. The first is for every lane, later ones change some layers or some heads:

    int8                                      every row in 8 bits
    k8v4                                      keys in 8 bits, values in 4
    k:int8,v:bf16                             the same, written out: any codec for either
    int4+window:1024,sinks:4                  4 bits; the first 4 rows and the last 1024 stay
    int4; layers 0-1: bf16                    the first two layers in bf16
    bf16; layers 2,5 heads 0-1: int8; page 64 pages of 64 rows
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from kvik.cache import sizes
from kvik.cache.methods import Needs
from kvik.cache.policy import Policy
from kvik.cache.retention import Retention
from kvik.cache.sizes import TABLE_BYTES as TABLE_BYTES
from kvik.cache.sizes import Bytes as Bytes
from kvik.errors import SpecError
from kvik.ops.layout import CODECS, Codec, RowLayout, Stream, nearest_codec

PAGE_SIZE = 32
MOST_CHARACTERS = 10_000  # half of the heads of 80 layers of 64, drawn at random, take 7,000 (`kvik heads`)
_EXAMPLES = {"window": 1024, "sinks": 4}
_SHORT = {"32": "f32", "16": "bf16", "8": "int8", "4": "int4"}


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a token.

    Attributes:
        heads: KV heads (lanes).
        streams: names and widths, (("k", 64), ("v", 64)) for ordinary attention.
        window: the model's own sliding window in positions, None = all.
        frequencies: by which neighbouring pairs of a key's channels are turned per position; None = not turned.
    """

    heads: int
    streams: tuple[tuple[str, int], ...]
    window: int | None = None
    frequencies: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Group:
    """The lanes that share streams, codecs and retention.

    Attributes:
        lanes: (layer, head) pairs, in order.
        layout: streams, codecs and their place in a row.
        retention: which rows stay.
        page_size: rows a page (N).
        frequencies: see `LayerShape`.
    """

    lanes: tuple[tuple[int, int], ...]
    layout: RowLayout
    retention: Retention
    page_size: int
    frequencies: tuple[float, ...] | None = None

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one lane."""
        return self.page_size * self.layout.row_bytes

    def rows(self, tokens: int, prompt: int | None = None) -> int:
        """Rows that a lane holds of a text of `tokens` tokens, on average, once settled; see `Policy.rows`."""
        return self.retention.rows(tokens, prompt, self.page_size)

    def nbytes(self, tokens: int, prompt: int | None = None, *, settled: bool = True) -> Bytes:
        """Bytes of one sequence of `tokens` tokens; see `sizes.group_bytes`."""
        return sizes.group_bytes(self, tokens, prompt, settled=settled)

    def __str__(self) -> str:
        streams = ", ".join(f"{s.name}[{s.width}] {s.codec.name}" for s in self.layout.streams)
        return f"{len(self.lanes)} lanes: {streams}; {self.retention}; {self.page_bytes} B a page of {self.page_size}"


@dataclass(frozen=True)
class Spec:
    """What a cache keeps of every token: groups of lanes, and how each is stored.

    `Spec.parse("k8v4", layers)` makes one; `str(spec)` gives the string back.
    """

    text: str
    groups: tuple[Group, ...]
    page_size: int

    @classmethod
    def parse(cls, text: str, layers: Sequence[LayerShape], page_size: int = PAGE_SIZE) -> Spec:
        """Reads a spec string for a model whose layers keep `layers`.

        Raises:
            SpecError: names the part that is wrong and what would be right there.
        """
        rules, page_size = parse_rules(text, page_size)
        for rule in rules:
            rule.check(layers)
        members: dict[tuple[RowLayout, Retention, tuple[float, ...] | None], list[tuple[int, int]]] = {}
        for layer, shape in enumerate(layers):
            for head in range(shape.heads):
                rule = next(r for r in reversed(rules) if r.covers(layer, head))
                key = rule.layout(shape), rule.retained(shape), shape.frequencies
                members.setdefault(key, []).append((layer, head))
        groups = tuple(Group(tuple(lanes), a, b, page_size, c) for (a, b, c), lanes in members.items())
        printed = "; ".join([str(r) for r in rules] + ([f"page {page_size}"] if page_size != PAGE_SIZE else []))
        return cls(printed, groups, page_size)

    def nbytes(self, tokens: int, batch: int = 1, *, prompt: int | None = None, settled: bool = True) -> Bytes:
        """Bytes of `batch` sequences of `tokens` tokens each; see `Group.nbytes`."""
        each = sum((group.nbytes(tokens, prompt, settled=settled) for group in self.groups), Bytes(0, 0))
        return Bytes(batch * each.payload, batch * each.overhead)

    def peak(self, tokens: int, prompt: int | None = None) -> Bytes:
        """The most bytes of one sequence on its way to `tokens` tokens, settled after each: at the first row of a page,
        or where a policy is about to choose, or has chosen: positions of kept rows take some too."""
        return sizes.peak(self, tokens, prompt)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over everything that gives stored bytes their meaning: lanes, streams, codecs, retention, pages."""
        return hashlib.sha256(repr((self.groups, self.page_size)).encode()).hexdigest()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Rule:
    """One part of a spec string: which lanes, which codecs, which retention."""

    codecs: tuple[tuple[str, Codec], ...]
    retention: Retention
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def covers(self, layer: int, head: int) -> bool:
        """Whether the rule speaks of this lane."""
        return (self.layers is None or layer in self.layers) and (self.heads is None or head in self.heads)

    def check(self, layers: Sequence[LayerShape]) -> None:
        """Raises SpecError where the rule names a layer, head or stream that the model doesn't have."""
        for layer in self.layers or ():
            if layer >= len(layers):
                raise SpecError(f"spec names layer {layer}, but the model has layers 0-{len(layers) - 1}")
            for head in self.heads or ():
                if head >= layers[layer].heads:
                    known = layers[layer].heads - 1
                    raise SpecError(f"spec names head {head} of layer {layer}, but its KV heads are 0-{known}")

    def layout(self, shape: LayerShape) -> RowLayout:
        """The row that this rule makes of a layer's streams."""
        named = dict(self.codecs)
        streams = []
        for name in named:
            if name and name not in dict(shape.streams):
                have = " and ".join(n for n, _ in shape.streams)
                raise SpecError(f"spec gives a codec for {name!r}, but this model keeps {have}")
        for name, width in shape.streams:
            codec = named.get("", named.get(name))
            if codec is None:
                raise SpecError(f"spec gives no codec for {name!r}; write one codec for all, or add '{name}:int8'")
            streams.append(Stream.of(name, width, codec))
        return RowLayout(tuple(streams))

    def retained(self, shape: LayerShape) -> Retention:
        """The rule's retention, unless the model's own window is the narrower one: it never saw sinks beyond that."""
        own, asked = shape.window, self.retention.window
        return self.retention if own is None or (asked is not None and asked < own) else Retention(own)

    def __str__(self) -> str:
        where = "" if self.layers is None else f"layers {_ranges(self.layers)}"
        where += "" if self.heads is None else f" heads {_ranges(self.heads)}"
        codec = _codecs_text(self.codecs)
        kept = "" if self.retention == Retention() else f"+{self.retention}"
        return f"{where}: {codec}{kept}" if where else f"{codec}{kept}"


def parse_rules(text: str, page_size: int = PAGE_SIZE) -> tuple[list[Rule], int]:
    """Reads a spec string without a model: (rules, page size).

    Raises:
        SpecError: names the part that is wrong and what would be right there.
    """
    if len(text) > MOST_CHARACTERS:
        raise SpecError(f"spec {text[:40]!r}… has {len(text):,} characters; {MOST_CHARACTERS:,} are enough for any")
    rules: list[Rule] = []
    given = None
    parts = [p.strip() for p in text.split(";")]
    text = text if len(text) <= 200 else text[:200] + "…"  # from here on for messages
    _page_size(str(page_size), text)
    for part in parts:
        if match := re.fullmatch(r"page\s+(\S+)", part):
            if given is not None:
                raise SpecError(f"spec {text!r}: two page sizes, {given} and {match[1]}; give one")
            given = page_size = _page_size(match[1], text)
        elif not rules:
            if ":" in part.split("+")[0] and part.startswith("layers"):
                raise SpecError(f"spec {text!r}: the first rule is for every layer, such as 'int8; {part}'")
            rules.append(_rule(part, text))
        else:
            rules.append(_selected(part, text))
    if not rules:
        raise SpecError(f"spec {text!r}: no codec; put one first, as in 'bf16; page {page_size}'")
    return rules, page_size


def _selected(part: str, text: str) -> Rule:
    match = re.fullmatch(r"layers?\s+([\d,\s-]+?)(?:\s+heads?\s+([\d,\s-]+?))?\s*:\s*(.+)", part)
    if match is None:
        raise SpecError(
            f"spec {text!r}: {part!r} is no rule; write 'layers 0-1: bf16', 'layers 2 heads 0: int8' or 'page 64'"
        )
    base = _rule(match[3], text)
    heads = None if match[2] is None else tuple(_numbers(match[2], text))
    return Rule(base.codecs, base.retention, tuple(_numbers(match[1], text)), heads)


def _rule(part: str, text: str) -> Rule:
    codec, plus, kept = part.partition("+")
    try:
        codecs = _codecs(codec.strip(), text)
    except SpecError:
        if plus or not _keeps(codec.strip()):
            raise
        raise SpecError(
            f"spec {text!r}: {codec!r} says which rows stay, and not how they are stored; put a codec in front, as in "
            f"'int8+{codec}'"
        ) from None
    return Rule(codecs, _retention(kept, text) if plus else Retention())


def _keeps(part: str) -> bool:
    """Whether it reads as a retention."""
    try:
        return bool(_retention(part, part))
    except SpecError:
        return False


def _codecs(part: str, text: str) -> tuple[tuple[str, Codec], ...]:
    if match := re.fullmatch(r"k(\d+)v(\d+)", part):
        for bits in match.groups():
            if bits not in _SHORT:
                raise SpecError(
                    f"spec {text!r}: {part!r} has {bits} bits; k and v take {', '.join(_SHORT)}, as in 'k8v4'"
                )
        return _merged(("k", CODECS[_SHORT[match[1]]]), ("v", CODECS[_SHORT[match[2]]]))
    if ":" in part:
        pairs = [tuple(item.strip().split(":", 1)) for item in part.split(",")]
        if any(len(pair) != 2 or not pair[0] for pair in pairs) or len({name for name, *_ in pairs}) < len(pairs):
            raise SpecError(f"spec {text!r}: {part!r} names streams wrongly; write 'k:int8,v:int4'")
        return _merged(*((name, _codec(codec, text)) for name, codec in pairs))
    return (("", _codec(part, text)),)


def _codec(name: str, text: str) -> Codec:
    if name not in CODECS:
        hint = "k8v4" if name.startswith("k") else nearest_codec(name)
        raise SpecError(
            f"spec {text!r}: {name!r} is no codec; use {', '.join(CODECS)} or a pair like k8v4 (did you mean {hint!r}?)"
        )
    return CODECS[name]


def _retention(part: str, text: str) -> Retention:
    values: dict[str, int] = {}
    if part.strip() == "full":
        return Retention()
    if not difflib.get_close_matches(part.strip().split(":")[0], _EXAMPLES, cutoff=0.7):
        return Retention(policy=_policy(part.strip(), text))
    for item in part.split(","):
        name, _, number = (piece.strip() for piece in item.partition(":"))
        if name not in ("window", "sinks"):
            raise SpecError(
                f"spec {text!r}: {item.strip()!r} is no retention; use 'full', 'window:1024' or 'window:1024,sinks:4'"
            )
        if not number.isdecimal() or len(number) > 9 or (name == "window" and int(number) < 1) or name in values:
            raise SpecError(
                f"spec {text!r}: {item.strip()!r} needs one whole number of rows, as in '{name}:{_EXAMPLES[name]}'"
            )
        values[name] = int(number)
    if "window" not in values:
        raise SpecError(
            f"spec {text!r}: sinks alone keep almost nothing; add a window, as in 'window:1024,sinks:{values['sinks']}'"
        )
    return Retention(values["window"], values.get("sinks", 0))


def _policy(part: str, text: str) -> Policy:
    policy = Policy.parse(part, text)
    if policy.needs & (Needs.PASS | Needs.PAGES):
        raise SpecError(
            f"spec {text!r}: no cache runs {policy.method!r} yet, so nothing would leave; use a method that drops rows "
            "by what it has seen, such as 'snapkv:25%' or 'keydiff:1024rows'"
        )
    return policy


def _page_size(number: str, text: str) -> int:
    if number not in ("16", "32", "64", "128"):
        raise SpecError(f"spec {text!r}: a page of {number!r} rows; use 16, 32, 64 or 128")
    return int(number)


def _numbers(part: str, text: str) -> Iterator[int]:
    for item in part.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:\s*-\s*(\d{1,5}))?\s*", item)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise SpecError(f"spec {text!r}: {item.strip()!r} is no layer or range; write '0-1' or '0,5'")
        yield from range(int(match[1]), int(match[2] or match[1]) + 1)


def _merged(*pairs: tuple[str, Codec]) -> tuple[tuple[str, Codec], ...]:
    codecs = {codec for _, codec in pairs}
    return (("", pairs[0][1]),) if len(codecs) == 1 and {name for name, _ in pairs} == {"k", "v"} else pairs


def _codecs_text(codecs: tuple[tuple[str, Codec], ...]) -> str:
    if codecs[0][0] == "":
        return codecs[0][1].name
    short = {name: bits for bits, name in _SHORT.items()}
    if [n for n, _ in codecs] == ["k", "v"] and all(c.name in short for _, c in codecs):
        return "".join(f"{name}{short[codec.name]}" for name, codec in codecs)
    return ",".join(f"{name}:{codec.name}" for name, codec in codecs)


def _ranges(numbers: tuple[int, ...]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
