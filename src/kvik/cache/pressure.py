"""When the budget is full: what leaves, in which order, and what moves together.

Whoever holds the most gives way (`cache/owners.py`): its least recently used block that nobody uses goes first, then
pages that every window has passed; then pages are moved together, so that empty slabs can serve another size. A request
that can never fit empties nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvik import events
from kvik.cache.books import in_use
from kvik.cache.owners import Wanted
from kvik.cache.prefix import Block
from kvik.cache.tidying import defragment
from kvik.errors import BudgetError

if TYPE_CHECKING:
    from kvik.cache.cache import Cache


def make_room(cache: Cache, wanted: Wanted, tables: int = 0) -> None:
    """Evicts unreferenced blocks until the pages fit; moves pages together before it gives up."""
    sizes = {size for each in wanted.values() for size in each}
    pages = {size: sum(each.get(size, 0) for each in wanted.values()) for size in sizes}
    if cache.arena.fits(pages, tables):
        return
    more = {owner: sum(size * count for size, count in each.items()) for owner, each in wanted.items()}
    firm = cache.owners.firm
    hopeless = least(cache, more, tables, firm=firm) > cache.arena.room(tables)
    tidied = False
    while not cache.arena.fits(pages, tables):
        if hopeless or not evict(cache, more, tables, firm=firm):
            if not (tidied or hopeless):
                tidied = True
                defragment(cache)
                continue
            cost, left = cache.arena.cost(pages, tables), max(cache.budget - cache.arena.held, 0)
            spared = least(cache, more, tables, firm=firm) - least(cache, more, tables, firm=False)
            others = f" and {spared:,} are within others' shares" if spared else ""
            raise BudgetError(
                f"the cache needs {cost:,} more bytes and its budget of {cache.budget:,} has {left:,} left{others}; "
                "raise the budget, close sequences, or choose a smaller spec",
                needed=cost, available=left,
            )  # fmt: skip


def least(cache: Cache, more: Mapping[str, int], tables: int = 0, *, firm: bool) -> int:
    """Bytes of pages that would be held if `more` came, by owner, and all that may leave had left.

    Args:
        firm: what is within a share may not.
    """
    used, held = in_use(cache), cache.owners.held(more)
    share = cache.owners.share(held, tables) if firm else 0
    return sum(max(used[owner] + more.get(owner, 0), min(size, share)) for owner, size in held.items())


def evict(cache: Cache, more: Mapping[str, int] | None = None, tables: int = 0, *, firm: bool = False) -> bool:
    """Drops a block of whoever would hold the most if `more` came; where it has none that can go, of the next.

    Args:
        more: bytes by owner.
        firm: but of nobody who is within its share; of the first alone where all are, and pages fill no slabs.
    """
    held = cache.owners.held(more)
    order = sorted(held, key=held.__getitem__, reverse=True)
    share = cache.owners.share(held, tables) if firm else 0
    over = [owner for owner in order if held[owner] > share]
    return any(give_way(cache, owner) for owner in over or order[:1])


def give_way(cache: Cache, owner: str) -> bool:
    """Drops an owner's least recently used block that nobody uses and nothing stands on. Where there is none: the pages
    of a block that nobody else holds, since every window has passed them; it stays as a link of its chain. Returns
    False if there is neither."""
    passed: tuple[Block, list[int]] | None = None
    used, found = list[bytes](), None
    for block in cache.index.of(owner):
        held = [i for i, pages in enumerate(block.pages) if pages is not None]
        idle = [
            i for i in held if (cache.arena.page_class(cache.spec.groups[i].page_bytes).refs[block.pages[i]] == 1).all()
        ]
        if block.children <= 0 and idle == held:
            found = block, idle
            break
        if idle and passed is None:
            passed = block, idle
        if idle != held:
            used.append(block.key)
    for key in used:
        cache.index.touch([key])  # in use: not the next to be asked
    if found is not None:
        cache.index.remove(found[0])
    going = passed if found is None else found
    return going is not None and drop(cache, *going)


def drop(cache: Cache, block: Block, groups: list[int]) -> bool:
    count = 0
    for index in groups:
        pages, block.pages[index] = block.pages[index], None
        assert pages is not None, "only what is held is dropped"
        cache.arena.release(cache.spec.groups[index].page_bytes, pages)
        count += pages.size
    cache.emit(events.Evicted(block.start, block.start + len(block.tokens), count, block.owner))
    return True
