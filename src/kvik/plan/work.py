"""What writing a text of n tokens computes and reads, one token a step, with a cache and without. Needs no torch.

                            with a cache       without
rows of k and v, a lane     n                  n(n+1)/2            1 + 2 + … + n
query-key pairs, a head     n(n+1)/2           n(n+1)(n+2)/6       each step asks again for every earlier token
rows read, a lane           n(n+1)/2           n(n+1)/2            the same: kept rows are still read every step
weights read                n times            n times

(full attention; a window w puts min(length, w) for the length, a policy what stays of it.) A step without a cache is a
step whose chunk is the whole text: one function counts both.

A layer that reads the rows of another (`cache/sharing.py`) computes none, and reads them as if they were its own. The
last layer that keeps rows is the last that all tokens pass; then only those whose logits are wanted: one a sequence.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

from kvik.cache.retention import Retention
from kvik.cache.spec import Group, Spec

if TYPE_CHECKING:
    from kvik.models.model import Model


@dataclass(frozen=True)
class Work:
    """Counts over all layers, and all sequences of a batch.

    Attributes:
        rows: of k and of v, computed.
        pairs: of a query and a key that it sees.
        products: floating-point operations of projections, feed-forward parts and the head.
        attention: floating-point operations of scores and of mixing values.
        weights_read: bytes of weights, without tables of which a step takes single rows.
        rows_read: bytes of stored rows, scales included, each row once a step and layer that reads it.
    """

    rows: int = 0
    pairs: int = 0
    products: int = 0
    attention: int = 0
    weights_read: int = 0
    rows_read: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    @property
    def operations(self) -> int:
        """Floating-point operations in all; a multiplication and its addition are two."""
        return self.products + self.attention

    @property
    def bytes_read(self) -> int:
        """Bytes in all."""
        return self.weights_read + self.rows_read


@dataclass(frozen=True)
class Arithmetic:
    """A model's sizes, as far as its work follows from them.

    Attributes:
        spec: what the cache keeps.
        plain: the same with nothing compressed and the model's own windows: what a step without a cache goes through.
        shared: query heads that read one lane.
        row_weights: weights that every row is multiplied with; see `Model`.
        head_weights: weights that a row is multiplied with whose logits are wanted; see `Model`.
        weight_bytes: of all of them as they are held.
        read_bytes: of those that every step reads: embeddings only where they are the head too.
        prompt: tokens of the text that are its prompt, at whose end a policy may choose; None = all but a step's own.
    """

    spec: Spec
    plain: Spec
    shared: int
    row_weights: int
    head_weights: int
    weight_bytes: int
    read_bytes: int
    prompt: int | None = None

    @classmethod
    def of(cls, model: Model, kv: str = "bf16", prompt: int | None = None) -> Arithmetic:
        """A loaded model's."""
        plain = model.spec("f32")
        shared = model.config.heads // model.config.kv_heads
        products = model.row_weights, model.head_weights
        return cls(model.spec(kv), plain, shared, *products, model.nbytes, model.read_bytes, prompt)

    def step(self, tokens: int, *, cached: bool = True, chunk: int = 1, batch: int = 1) -> Work:
        """One step, at whose end each of `batch` sequences has `tokens` tokens.

        Args:
            tokens: length, the new tokens included.
            cached: whether the rows of the earlier tokens are kept; if not, the chunk is the whole text.
            chunk: new tokens of each sequence; none passes a position at which a policy chooses (`cuts`).
            batch: sequences; the weights are read once for all of them.
        """
        chunk = chunk if cached else tokens
        prompt = tokens - chunk if self.prompt is None else self.prompt
        rows = pairs = attention = read = 0
        for group, readings in self._groups[cached]:
            rows += len(group.lanes) * chunk
            for lanes, queries in zip(readings, (chunk, 1), strict=True):
                mine = lanes * self.shared * _pairs(group, tokens, queries, prompt)
                pairs += mine
                attention += 2 * mine * (sum(key.width for key in group.layout.keys) + group.layout.value.width)
                read += lanes * _read(group, tokens, queries, prompt) * group.layout.row_bytes
        products = 2 * (chunk * self.row_weights + self.head_weights)
        return Work(batch * rows, batch * pairs, batch * products, batch * attention, self.read_bytes, batch * read)

    @cached_property
    def _groups(self) -> dict[bool, list[tuple[Group, tuple[int, int]]]]:
        """With a cache and without: groups, and how often their lanes are read; counted once for all of a text."""
        specs = {True: self.spec, False: self.plain}
        return {cached: [(group, _readings(spec, group)) for group in spec.groups] for cached, spec in specs.items()}

    def text(self, tokens: int, *, cached: bool = True, prefill: int = 1) -> Work:
        """All steps of a text: a first one of `prefill` tokens at the most, then one for each further token."""
        prefill = min(prefill, tokens)
        work = self.step(prefill, cached=cached, chunk=prefill)
        for length in range(prefill + 1, tokens + 1):
            work += self.step(length, cached=cached)
        return work

    def cuts(self, tokens: int, most: int) -> list[tuple[int, int]]:
        """How a prompt goes in: (end, tokens) of chunks of so many at the most, cut where a policy chooses."""
        found, start = [], 0
        triggers = [group.retention.policy for group in self.spec.groups]
        while start < tokens:
            at = [it.next_trigger(start, tokens, self.spec.page_size) for it in triggers if it is not None]
            stop = min(start + most, tokens, *(each for each in at if each is not None))
            found.append((stop, stop - start))
            start = stop
        return found

    @property
    def equal_work(self) -> int | None:
        """The length at which a new token's attention takes as many operations as its products; None = never."""
        return self._first(lambda work: work.attention >= work.products)

    @property
    def equal_bytes(self) -> int | None:
        """The length at which the cache has as many bytes to read as the weights; None = never."""
        return self._first(lambda work: work.rows_read >= work.weights_read)

    @property
    def equal_held(self) -> int | None:
        """The length at which the cache's payload has as many bytes as all weights; None = never."""
        rows = [(group.retention, len(group.lanes) * group.layout.payload_bits) for group in self.spec.groups]
        return _first(lambda tokens: sum(kept.rows(tokens) * bits for kept, bits in rows) >= 8 * self.weight_bytes)

    def _first(self, reached: Callable[[Work], bool]) -> int | None:
        """See `_first`. Where rows leave at a prompt's end it may hold for a while before."""
        least = 0 if self.prompt is None or reached(self.step(self.prompt + 1)) else self.prompt
        return _first(lambda tokens: reached(self.step(tokens)), least)


def _first(reached: Callable[[int], bool], least: int = 0) -> int | None:
    """The first length above `least` from which on something holds; None = there is none."""
    high = least + 1
    while not reached(high):
        high *= 2
        if high > 1 << 40:
            return None
    return bisect_left(range(least + 1, high + 1), True, key=reached) + least + 1


def _readings(spec: Spec, group: Group) -> tuple[int, int]:
    """How often a group's lanes are read: by layers that all tokens pass, and by those that only wanted ones do."""
    late = max(layer for layer, owner in enumerate(spec.readers) if layer == owner)
    lanes = Counter(layer for layer, _ in group.lanes)
    early = sum(lanes[owner] for owner in spec.readers[: late + 1])
    return early, sum(lanes[owner] for owner in spec.readers[late + 1 :])


def _seen(retention: Retention, tokens: int) -> int:
    """Rows that the first `tokens` queries see, added up.

    >>> _seen(Retention(), 6), _seen(Retention(window=2), 6)
    (21, 11)
    """
    most = tokens if retention.window is None else min(tokens, retention.window + retention.sinks)
    return most * (most + 1) // 2 + (tokens - most) * most


def _pairs(group: Group, tokens: int, chunk: int, prompt: int) -> int:
    """Rows that a chunk's queries see, one query of each, added up. Each sees what is left of the tokens before it, and
    itself."""
    if group.retention.policy is None:
        return _seen(group.retention, tokens) - _seen(group.retention, tokens - chunk)
    return sum(group.rows(before, prompt) + 1 for before in range(tokens - chunk, tokens))


def _read(group: Group, tokens: int, chunk: int, prompt: int) -> int:
    """Rows of a lane that a chunk's queries see together."""
    if group.retention.policy is None:
        return min(tokens, group.rows(tokens) + chunk - 1)
    return group.rows(tokens - chunk, prompt) + chunk
