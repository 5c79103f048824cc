"""Bytes by formula: what a text of any length takes under a spec, before a byte is allocated.

Pages and what finds them. A policy that has chosen left every lane kept rows in pages of their own, and columns of
pages from the one that was open then:

    tokens    0 ............ fired ..... tokens        kept rows lie together, with a position each
              kept rows    | every row                 columns begin at fired // N
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvik.cache.spec import Group, Spec

TABLE_BYTES = 4  # a page table's entry


@dataclass(frozen=True)
class Bytes:
    """Three figures whose sum is exact.

    Attributes:
        payload: codes of the kept rows, by the formula Σ lanes · rows · widths · bits / 8.
        overhead: scales, page tables (they hold the positions), open slots, rounding to pages; of a whole cache, also
            rounding to slabs.
        allocated: payload + overhead.
    """

    payload: int
    overhead: int

    @property
    def allocated(self) -> int:
        """What is really held: payload + overhead."""
        return self.payload + self.overhead

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.payload + other.payload, self.overhead + other.overhead)


def group_bytes(group: Group, tokens: int, prompt: int | None = None, *, settled: bool = True) -> Bytes:
    """Bytes of one sequence of `tokens` tokens in a group. Exact; under a policy whose lanes share their rows, to a
    page a lane.

    Args:
        tokens: of the sequence.
        prompt: how many of them are the prompt, at whose end a policy may choose; None = all.
        settled: False: before a policy has let go of what the last token makes it choose from.
    """
    prompt, lanes, size = tokens if prompt is None else prompt, len(group.lanes), group.page_size
    fired = _chosen(group, tokens if settled else tokens - 1, prompt)
    if group.source:  # all are kept rows
        rows, columns, kept = tokens, 0, -(-tokens // size)
    elif fired is None:
        rows = group.rows(tokens) if group.retention.policy is None else tokens
        columns, kept = group.retention.pages(tokens, size), 0
    else:
        left = group.rows(fired, prompt)
        rows, columns = left + tokens - fired, -(-tokens // size) - fired // size
        kept = -(-(left - fired % size) // size)
    apart = lanes * (kept + 1 + kept * size) if group.source or fired is not None else 0  # pages, counts, positions
    payload = lanes * rows * group.layout.payload_bits // 8
    held = lanes * (columns + kept) * group.page_bytes + group.table_bytes(columns) + apart * TABLE_BYTES
    return Bytes(payload, held - payload)


def _chosen(group: Group, tokens: int, prompt: int) -> int | None:
    """The last position up to `tokens` at which a policy let rows go; None = there was none."""
    policy = group.retention.policy
    fired = None if policy is None else policy.trigger.latest(tokens, prompt)
    return None if fired is None or group.rows(fired, prompt) == fired else fired


def moments(spec: Spec, tokens: int, prompt: int | None = None) -> set[tuple[int, bool]]:
    """(length, whether it has settled) of one sequence on its way to `tokens` tokens, when it may hold the most."""
    prompt, size = tokens if prompt is None else prompt, spec.page_size
    times = {tokens, tokens - (tokens - 1) % size, min(prompt, tokens)}
    for policy in (group.retention.policy for group in spec.groups):
        last = None if policy is None else policy.trigger.latest(tokens, prompt)
        if policy is not None and last is not None:  # and those before, until they lie alike in their pages
            every = policy.trigger.every or size
            times |= {last - back * every for back in range(size // gcd(every, size))}
    return {(at, settled) for at in times if at > 0 for settled in (False, True)}


def peak(spec: Spec, tokens: int, prompt: int | None = None) -> Bytes:
    """See `Spec.peak`."""
    found = [spec.nbytes(at, prompt=prompt, settled=settled) for at, settled in moments(spec, tokens, prompt)]
    return max(found, key=lambda size: size.allocated, default=Bytes(0, 0))
