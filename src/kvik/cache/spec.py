"""What is kept, as frozen data that adds up its own bytes before anything is allocated.

A spec string is rules divided by `;`. The first is for every lane, later ones change some layers or some heads:

    int8                                      every row in 8 bits
    k8v4                                      keys in 8 bits, values in 4
    k:int8,v:bf16                             the same, written out: any codec for either
    int4+window:1024,sinks:4                  4 bits; the first 4 rows and the last 1024 stay
    int4+window:1024,sinks:4,relative         the 4 are seen as if right before the 1024: texts of any length
    int4; layers 0-1: bf16                    the first two layers in bf16
    int4; cross: int8                         rows of the source, where a model reads one (cross-attention), in 8 bits
    bf16; layers 2,5 heads 0-1: int8; page 64 pages of 64 rows
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kvik.cache import sizes
from kvik.cache.retention import Retention
from kvik.cache.rules import PAGE_SIZE, Rule, parse_rules
from kvik.cache.shape import LayerShape
from kvik.cache.sizes import TABLE_BYTES, Bytes
from kvik.errors import SpecError
from kvik.ops.layout import MOST_POSITIONS, RowLayout, extremes_bytes

__all__ = ["PAGE_SIZE", "TABLE_BYTES", "Bytes", "Group", "LayerShape", "Rule", "Spec", "parse_rules"]


@dataclass(frozen=True)
class Group:
    """The lanes that share streams, codecs and retention.

    Attributes:
        lanes: (layer, head) pairs, in order.
        layout: streams, codecs and their place in a row.
        retention: which rows stay.
        page_size: rows a page (N).
        frequencies, source: see `LayerShape`.
    """

    lanes: tuple[tuple[int, int], ...]
    layout: RowLayout
    retention: Retention
    page_size: int
    frequencies: tuple[float, ...] | None = None
    source: bool = False

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of one lane."""
        return self.page_size * self.layout.row_bytes

    @property
    def chooses(self) -> bool:
        """Whether queries choose which pages they read."""
        return self.retention.policy is not None and self.retention.policy.pages is not None

    @property
    def key_width(self) -> int:
        """Channels of a key."""
        return next(stream.width for stream in self.layout.streams if stream.name == "k")

    def table_bytes(self, columns: int) -> int:
        """Bytes of one sequence's page table, and of the extremes of keys where queries choose pages by them."""
        extremes = len(self.lanes) * extremes_bytes(columns, self.key_width) if self.chooses else 0
        return (len(self.lanes) + 1) * columns * TABLE_BYTES + extremes

    def rows(self, tokens: int, prompt: int | None = None) -> int:
        """Rows that a lane holds of a text of `tokens` tokens, on average, once settled; see `Policy.rows`."""
        return self.retention.rows(tokens, prompt, self.page_size)

    def nbytes(self, tokens: int, prompt: int | None = None, *, settled: bool = True) -> Bytes:
        """Bytes of one sequence of `tokens` tokens, or of a source of so many rows; see `sizes.group_bytes`."""
        return sizes.group_bytes(self, tokens, prompt, settled=settled)

    def __str__(self) -> str:
        streams = ", ".join(f"{s.name}[{s.width}] {s.codec.name}" for s in self.layout.streams)
        return f"{len(self.lanes)} lanes: {streams}; {self.retention}; {self.page_bytes} B a page of {self.page_size}"


@dataclass(frozen=True)
class Spec:
    """What a cache keeps of every token: groups of lanes, and how each is stored.

    `Spec.parse("k8v4", layers)` makes one; `str(spec)` gives the string back.

    Attributes:
        readers: for each layer, the layer whose rows it reads: its own, unless it shares another's.
    """

    text: str
    groups: tuple[Group, ...]
    page_size: int
    readers: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, layers: Sequence[LayerShape], page_size: int = PAGE_SIZE) -> Spec:
        """Reads a spec string for a model whose layers keep `layers`.

        Raises:
            SpecError: names the part that is wrong and what would be right there.
        """
        rules, page_size = parse_rules(text, page_size)
        for rule in rules:
            rule.check(layers)
        members: dict[tuple[RowLayout, Retention, tuple[float, ...] | None, bool], list[tuple[int, int]]] = {}
        for layer, shape in enumerate(layers):
            for head in range(shape.heads if shape.reads is None else 0):
                rule = next(r for r in reversed(rules) if r.covers(layer, head, shape))
                key = rule.layout(shape), rule.retained(shape), shape.frequencies, shape.source
                members.setdefault(key, []).append((layer, head))
        groups = tuple(Group(tuple(lanes), a, b, page_size, c, d) for (a, b, c, d), lanes in members.items())
        printed = "; ".join([str(r) for r in rules] + ([f"page {page_size}"] if page_size != PAGE_SIZE else []))
        readers = tuple(layer if shape.reads is None else shape.reads for layer, shape in enumerate(layers))
        assert all(readers[owner] == owner for owner in readers), "a layer reads one that keeps rows"
        return cls(printed, groups, page_size, readers)

    @property
    def source(self) -> bool:
        """Whether some rows are a source's."""
        return any(group.source for group in self.groups)

    def nbytes(
        self, tokens: int, batch: int = 1, *, source: int = 0, prompt: int | None = None, settled: bool = True
    ) -> Bytes:
        """Bytes of `batch` sequences of `tokens` tokens each; see `Group.nbytes`.

        Args:
            source: rows of the source that each reads, where the model reads one.
        """
        found = [
            group.nbytes(source) if group.source else group.nbytes(tokens, prompt, settled=settled)
            for group in self.groups
        ]
        each = sum(found, Bytes(0, 0))
        return Bytes(batch * each.payload, batch * each.overhead)

    def peak(self, tokens: int, prompt: int | None = None) -> Bytes:
        """The most bytes of one sequence on its way to `tokens` tokens, settled after each: at the first row of a page,
        or where a policy is about to choose, or has chosen: positions of kept rows take some too."""
        return sizes.peak(self, tokens, prompt)

    def longest(self, positions: int) -> int:
        """The most tokens that a sequence can have, of a model that was made for `positions`: only where every group is
        relative more than those.

        Raises:
            SpecError: a relative window and its sinks are more than the model's positions, so that it would leave them.
        """
        reaches = [group.retention.reach for group in self.groups if not group.source]
        widest = max((reach for reach in reaches if reach is not None), default=0)
        if widest > positions:
            raise SpecError(
                f"spec {self.text!r}: window and sinks are {widest:,} rows, more than the {positions:,} positions that "
                f"the model was made for; a relative window and its sinks must fit them, {positions:,} rows at the most"
            )
        return positions if None in reaches or not reaches else MOST_POSITIONS

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over everything that gives stored bytes their meaning: lanes, streams, codecs, retention, pages."""
        return hashlib.sha256(repr((self.groups, self.page_size, self.readers)).encode()).hexdigest()

    def __str__(self) -> str:
        return self.text
