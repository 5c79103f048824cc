"""Pages that lie apart are moved together, so that their slabs go back to the system.

before   | a . . b . . | . c . . . d | . . e . . . |      a slab goes back when its last page has left
after    | a c d b e . |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvik.cache.cache import Cache

LEAST = 4  # slabs' worth of free pages: 1 MiB is left alone


def tidy(cache: Cache) -> None:
    """After rows have left: moves pages together where more than a quarter of what is held is free. Less is left for
    the pages that come next. Nothing moves while a step of any sequence is open."""
    arena = cache.arena
    free = sum(size * owner.free_pages for size, owner in arena.classes.items())
    if cache.active is None and free > max(arena.slabs_used // 4, LEAST) * arena.slab_bytes:
        defragment(cache)


def defragment(cache: Cache) -> None:
    """Empties slabs by moving pages together, codes verbatim, and rewrites every table and block."""
    for page_bytes in cache.arena.classes:
        moved = cache.arena.defragment(page_bytes)
        if moved is None:
            continue
        for sequence in cache.sequences:
            for table in sequence.tables:
                if table.group.page_bytes == page_bytes:
                    table.renumber(moved)
        for block in cache.index:
            for index, (group, pages) in enumerate(zip(cache.spec.groups, block.pages, strict=True)):
                if group.page_bytes == page_bytes and pages is not None:
                    block.pages[index] = moved[pages]
