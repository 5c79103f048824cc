"""What a spec string says, rule by rule; `cache/spec.py` has examples."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from kvik.cache.methods import Needs
from kvik.cache.policy import Policy
from kvik.cache.retention import Retention
from kvik.cache.shape import LayerShape
from kvik.errors import SpecError
from kvik.ops.layout import CODECS, Codec, RowLayout, Stream, nearest_codec

PAGE_SIZE = 32
MOST_CHARACTERS = 10_000  # half of the heads of 80 layers of 64, drawn at random, take 7,000 (`kvik heads`)
_EXAMPLES = {"window": 1024, "sinks": 4}
_WORDS = {  # that are no codec, but mean something at some place
    "": "no codec; put one first, such as bf16 or int8",
    "none": "here rows must be kept: 'none' (no cache at all) is for 'kvik run' alone; give a codec, such as bf16",
    "tuned": "what was tuned is not known here; give the spec that 'kvik tune' printed as taken",
    "relative": "'relative' needs a codec and a window in front, as in 'int8+window:1024,sinks:4,relative'",
}
_SHORT = {"32": "f32", "16": "bf16", "8": "int8", "4": "int4"}


@dataclass(frozen=True)
class Rule:
    """One part of a spec string: which lanes, which codecs, which retention.

    Attributes:
        cross: it speaks of the source's rows alone.
    """

    codecs: tuple[tuple[str, Codec], ...]
    retention: Retention
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    cross: bool = False

    def covers(self, layer: int, head: int, shape: LayerShape) -> bool:
        """Whether the rule speaks of this lane."""
        if self.cross or self.layers is None:
            return shape.source or not self.cross
        return not shape.source and layer in self.layers and (self.heads is None or head in self.heads)

    def check(self, layers: Sequence[LayerShape]) -> None:
        """Raises SpecError where the rule names a layer or head that the model doesn't have or that keeps nothing,
        turns keys back that positions don't turn, or would drop rows of a source."""
        own = [shape for shape in layers if not shape.source]
        if self.cross and len(own) == len(layers):
            raise SpecError(
                "spec has a rule for 'cross', but this model reads no source (no cross-attention); leave it out"
            )
        if self.cross and self.retention != Retention():
            raise SpecError(
                f"spec has 'cross: …+{self.retention}', but rows of a source are given once, for every question that "
                "may come, and all stay; leave that out"
            )
        for layer in self.layers or ():
            if layer >= len(own):
                raise SpecError(f"spec names layer {layer}, but the model has layers 0-{len(own) - 1}")
            if (reads := layers[layer].reads) is not None:
                raise SpecError(
                    f"spec names layer {layer}, which keeps nothing and reads the rows of layer {reads}; name that"
                )
            for head in self.heads or ():
                if head >= layers[layer].heads:
                    known = layers[layer].heads - 1
                    raise SpecError(f"spec names head {head} of layer {layer}, but its KV heads are 0-{known}")
        if self.retention.relative and any(layers[i].frequencies is None for i in self.layers or range(len(own))):
            raise SpecError(
                f"spec has '{self.retention}', but positions don't turn this model's keys (no rotary), so that rows "
                f"can't be seen at another distance; use '{replace(self.retention, relative=False)}'"
            )

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
        """The rule's retention, unless the model's own window is the narrower one: it never saw sinks beyond that. A
        source's rows all stay."""
        if shape.source:
            return Retention()
        policy = self.retention.policy
        if shape.use != "attend" and policy is not None:
            raise SpecError(
                f"{policy}: this model's operator reads its rows back itself, so that nobody sees what they weigh; "
                "keep all rows, or use a window where the operator has no ranges of offsets"
            )
        if shape.use == "delay" and self.retention != Retention():
            raise SpecError(
                f"spec has '{self.retention}', but rows of this model's operator stand for earlier tokens than their "
                "own and leave by its ranges of offsets; give the codec alone"
            )
        if policy is not None and policy.pages is not None and "k" not in dict(shape.streams):
            have = " and ".join(n for n, _ in shape.streams)
            raise SpecError(f"{policy}: this model keeps {have}, no keys to choose pages by; use another method")
        if policy is not None and shape.biased and policy.needs & (Needs.QUERIES | Needs.PAGES):
            raise SpecError(
                f"{policy}: it weighs rows by queries and keys alone, and distance adds to this model's scores, which "
                "it would not see; use 'h2o' or 'observed', which add up attention itself, or a method of keys"
            )
        own, asked = shape.window, self.retention.window
        if own is None or (asked is not None and asked < own):
            return self.retention
        return Retention(own, relative=self.retention.relative)  # without sinks no distance is another

    def __str__(self) -> str:
        where = "cross" if self.cross else "" if self.layers is None else f"layers {_ranges(self.layers)}"
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
            if ":" in part.split("+")[0] and part.startswith(("layers", "cross")):
                raise SpecError(f"spec {text!r}: the first rule is for every layer, such as 'int8; {part}'")
            rules.append(_rule(part, text))
        else:
            rules.append(_selected(part, text))
    if not rules:
        raise SpecError(f"spec {text!r}: no codec; put one first, as in 'bf16; page {page_size}'")
    return rules, page_size


def _selected(part: str, text: str) -> Rule:
    if match := re.fullmatch(r"cross\s*:\s*(.+)", part):
        base = _rule(match[1], text)
        return Rule(base.codecs, base.retention, cross=True)
    match = re.fullmatch(r"layers?\s+([\d,\s-]+?)(?:\s+heads?\s+([\d,\s-]+?))?\s*:\s*(.+)", part)
    if match is None:
        raise SpecError(
            f"spec {text!r}: {part!r} is no rule; write 'layers 0-1: bf16', 'layers 2 heads 0: int8', 'cross: int8' or "
            "'page 64'"
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
        if name in _WORDS:
            raise SpecError(f"spec {text!r}: {_WORDS[name]}")
        near = "k8v4" if name.startswith("k") else nearest_codec(name.lower())
        close = near == "k8v4" or difflib.SequenceMatcher(a=name.lower(), b=near).ratio() > 0.5
        meant = f" (did you mean {near!r}?)" if close else ""
        raise SpecError(f"spec {text!r}: {name!r} is no codec; use {', '.join(CODECS)} or a pair like k8v4{meant}")
    return CODECS[name]


def _retention(part: str, text: str) -> Retention:
    values: dict[str, int] = {}
    items = [item.strip() for item in part.split(",")]
    if items == ["full"]:
        return Retention()
    if "+" in part:
        raise SpecError(f"spec {text!r}: {part!r} says twice which rows stay, and one can be done; leave one out")
    relative = "relative" in items
    if relative:
        items.remove("relative")
    if not any(difflib.get_close_matches(item.split(":")[0], _EXAMPLES, cutoff=0.7) for item in items[:1]):
        if relative:
            raise SpecError(
                f"spec {text!r}: 'relative' places sinks before a window, and rows that stay otherwise keep their own "
                "positions; write 'window:1024,sinks:4,relative', or leave it out"
            )
        return Retention(policy=Policy.parse(part.strip(), text))
    for item in items:
        name, _, number = (piece.strip() for piece in item.partition(":"))
        if name not in ("window", "sinks"):
            raise SpecError(
                f"spec {text!r}: {item!r} is no retention; use 'full', 'window:1024', 'window:1024,sinks:4', "
                "'window:1024,sinks:4,relative' or a method, such as 'snapkv:25%'"
            )
        if not number.isdecimal() or len(number) > 9 or (name == "window" and int(number) < 1) or name in values:
            raise SpecError(f"spec {text!r}: {item!r} needs one whole number of rows, as in '{name}:{_EXAMPLES[name]}'")
        values[name] = int(number)
    if "window" not in values:
        raise SpecError(
            f"spec {text!r}: sinks alone keep almost nothing; add a window, as in 'window:1024,sinks:{values['sinks']}'"
        )
    return Retention(values["window"], values.get("sinks", 0), relative=relative)


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
