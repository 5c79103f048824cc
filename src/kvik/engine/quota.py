"""What each owner of rows keeps, whatever the others do: `kvik serve --tenant-quota`.

Only this much of the cache is ever promised to several at once, so a promise can be kept: quotas together are no more
than the budget, and a request that needs more than the others' quotas leave is refused before it begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from kvik.cache.arena import Arena
from kvik.errors import UsageError


@dataclass(frozen=True)
class Quota:
    """
    Attributes:
        size: bytes for each, or a part of the budget.
        owners: how many there are.
    """

    size: int | Fraction
    owners: int

    def bytes_of(self, budget: int) -> int:
        """Bytes for each. Raises UsageError where together they are more than the budget."""
        each = int(self.size * budget) if isinstance(self.size, Fraction) else self.size
        if each * self.owners > budget:
            raise UsageError(
                f"a quota of {each:,} bytes for each of {self.owners} tenants is {each * self.owners:,} in all, more "
                f"than the cache's {budget:,}; {budget // self.owners:,} is the most, or give --memory more"
            )
        return each

    def left(self, arena: Arena) -> int:
        """Bytes, in whole slabs, that one owner can have at any time: what the others' quotas leave."""
        slab = arena.slab_bytes
        full = min((slab // size - (slab % size > 0)) * size for size in arena.classes)  # bytes of pages in any slab
        others = -(-self.bytes_of(arena.budget) * (self.owners - 1) // full) * slab
        return max(arena.budget - others, 0)
