"""Whose pages they are, and what each owner keeps when room is short.

Every page is on one owner's account: of the sequence that wrote it, later of whoever last opened a text that begins
with its block. An owner keeps what it holds up to its share: `quota` bytes, or where none was set the level at which
everything fits if only those above it give way (max-min fairness):

    holds, and wants      a ████████   b ████████████████████████   c ███         35, where there is room for 25
    after                 a ████████   b ██████████████             c ███         the level is 14

Who wants nothing takes nothing from others' shares, so whoever is alone has everything. The cache knows owners by name
only; each name that ever held pages costs an entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvik.cache.arena import Arena

if TYPE_CHECKING:
    from kvik.cache.cache import Cache
    from kvik.cache.prefix import Block

Wanted = Mapping[str, Mapping[int, int]]  # pages, by owner: {page bytes: how many}


class Owners:
    """A cache's accounts.

    Attributes:
        quota: bytes that each owner keeps; None = up to the level.
        firm: nothing within a share is dropped for others: they are refused. Else it is dropped last. For whoever can
            wait (`engine/loop.py`).
    """

    def __init__(self, arena: Arena) -> None:
        self.quota: int | None = None
        self.firm = False
        self._arena = arena
        self._names, self._numbers = [""], {"": 0}

    def account(self, owner: str) -> int:
        """The number under which the arena counts an owner's pages."""
        if owner not in self._numbers:
            self._numbers[owner] = len(self._names)
            self._names.append(owner)
        return self._numbers[owner]

    def owner(self, account: int) -> str:
        """Whose account that is."""
        return self._names[account]

    def held(self, more: Mapping[str, int] | None = None) -> dict[str, int]:
        """Bytes of the pages on each account, in use or kept; with `more` beside them."""
        found = {self._names[account]: size for account, size in self._arena.accounts.items()}
        for owner, size in (more or {}).items():
            found[owner] = found.get(owner, 0) + size
        return found

    def share(self, held: Mapping[str, int], tables: int = 0) -> int:
        """Bytes that each owner keeps of what all hold.

        Args:
            tables: bytes of page tables that are to come.
        """
        return level(held.values(), self._arena.room(tables)) if self.quota is None else self.quota


def level(held: Iterable[int], room: int) -> int:
    """The most that anybody can hold where all fit into `room`, and none gives way below another.

    >>> level([8, 24, 3], 25), level([8, 4], 25)
    (14, 25)
    """
    ordered, left = sorted(held), room
    for at, size in enumerate(ordered):
        if size * (len(ordered) - at) > left:
            return left // (len(ordered) - at)
        left -= size
    return room


def claim(cache: Cache, chain: Sequence[Block], owner: str) -> None:
    """Puts blocks, the first of a text first, on the account of whoever uses them."""
    account = cache.owners.account(owner)
    for block in reversed(chain):
        if block.owner != owner:
            for group, pages in zip(cache.spec.groups, block.pages, strict=True):
                if pages is not None:
                    cache.arena.assign(group.page_bytes, pages, account)
            cache.index.give(block, owner)
