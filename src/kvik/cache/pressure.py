"""When the budget is full: what leaves, in which order, and what moves together.

The least recently used block that nobody uses goes first, then pages that every window has passed; then pages are moved
together, so that empty slabs can serve another size. A request that can never fit empties nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvik import events
from kvik.cache.books import bytes_in_use
from kvik.cache.prefix import Block
from kvik.cache.tidying import defragment
from kvik.errors import BudgetError

if TYPE_CHECKING:
    from kvik.cache.cache import Cache


def make_room(cache: Cache, wanted: dict[int, int], tables: int = 0) -> None:
    """Evicts unreferenced blocks until the pages fit; moves pages together before it gives up."""
    if cache.arena.fits(wanted, tables):
        return
    needed = sum(size * count for size, count in wanted.items()) + tables
    hopeless = bytes_in_use(cache) + needed > cache.budget
    tidied = False
    while not cache.arena.fits(wanted, tables):
        if hopeless or not evict(cache):
            if not (tidied or hopeless):
                tidied = True
                defragment(cache)
                continue
            cost, left = cache.arena.cost(wanted, tables), max(cache.budget - cache.arena.held, 0)
            raise BudgetError(
                f"the cache needs {cost:,} more bytes and its budget of {cache.budget:,} has {left:,} left; "
                "raise the budget, close sequences, or choose a smaller spec",
                needed=cost, available=left,
            )  # fmt: skip


def evict(cache: Cache) -> bool:
    """Drops the least recently used block that nobody uses and nothing stands on. Where there is none: the pages of
    a block that nobody else holds, since every window has passed them; it stays as a link of its chain. Returns
    False if there is neither."""
    passed: tuple[Block, list[int]] | None = None
    for block in cache.index:
        held = [i for i, pages in enumerate(block.pages) if pages is not None]
        idle = [
            i for i in held if (cache.arena.page_class(cache.spec.groups[i].page_bytes).refs[block.pages[i]] == 1).all()
        ]
        if block.children <= 0 and idle == held:
            cache.index.remove(block)
            return drop(cache, block, idle)
        if idle and passed is None:
            passed = block, idle
        if idle != held:
            cache.index.touch([block.key])  # in use: not the next to be asked
    return passed is not None and drop(cache, *passed)


def drop(cache: Cache, block: Block, groups: list[int]) -> bool:
    count = 0
    for index in groups:
        pages, block.pages[index] = block.pages[index], None
        assert pages is not None, "only what is held is dropped"
        cache.arena.release(cache.spec.groups[index].page_bytes, pages)
        count += pages.size
    cache.emit(events.Evicted(block.start, block.start + len(block.tokens), count))
    return True
