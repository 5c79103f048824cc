"""Who holds what, by numbers: keys are counted in the order in which they were given, and never named or hashed."""

from __future__ import annotations

from dataclasses import dataclass

from kvik.cache.books import in_use
from kvik.cache.cache import Cache
from kvik.server.keys import Keys

MOST = 64  # with a number of their own; further ones are one
ALL, OTHERS = "all", "others"


@dataclass(frozen=True)
class Held:
    """Bytes of pages on one account.

    Attributes:
        in_use: held by open sequences.
        kept: of blocks that nobody uses, to be found again.
    """

    in_use: int = 0
    kept: int = 0


class Tenants:
    """The keys' numbers.

    Args:
        apart: each key has an account of its own; else all have one.
    """

    def __init__(self, keys: Keys, *, apart: bool) -> None:
        self._numbers = {digest.hex(): str(at) for at, digest in enumerate(keys.digests[:MOST], 1)} if apart else {}

    def owner(self, tenant: str) -> str:
        """On whose account a tenant's rows are."""
        return tenant if self._numbers else ""

    def number(self, tenant: str) -> str:
        """What figures call it."""
        return self._numbers.get(tenant, OTHERS if self._numbers and tenant else ALL)

    def held(self, cache: Cache) -> dict[str, Held]:
        """By number. Call in the engine's thread."""
        used, found = in_use(cache), dict[str, Held]()
        for owner, size in cache.owners.held().items():
            before = found.get(name := self.number(owner), Held())
            found[name] = Held(before.in_use + used[owner], before.kept + size - used[owner])
        return found
