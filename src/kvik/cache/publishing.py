"""What a sequence lets others find, and takes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvik import events
from kvik.cache.arena import Pages
from kvik.cache.owners import claim
from kvik.cache.prefix import Block
from kvik.cache.pressure import drop

if TYPE_CHECKING:
    from kvik.cache.cache import Cache
    from kvik.cache.sequence import Sequence


def publish(cache: Cache, sequence: Sequence, block: Block, page: int) -> None:
    """Lets others find a full page of each group; a block that they can find already gets what it lacks."""
    known = cache.index.get(block.key)
    if known is not None:
        claim(cache, [known], sequence.owner)
    held: list[Pages | None] = [None for _ in sequence.tables] if known is None else known.pages
    for index, table in enumerate(sequence.tables):
        column = np.flatnonzero(table.logical == page)
        if held[index] is None and len(column):
            held[index] = pages = table.pages[:, column[0]].astype(np.int64)
            cache.arena.retain(table.group.page_bytes, pages)
    if known is not None:
        return
    block.pages = held
    cache.index.add(block)
    cache.emit(events.Published(sequence.number, block.start, block.start + len(block.tokens)))


def withdraw(cache: Cache, sequence: Sequence) -> bool:
    """Takes back what a sequence published and nobody builds on. Returns False if there is nothing of that."""
    block = next((b for key in reversed(sequence._keys) if (b := cache.index.get(key)) is not None), None)
    if block is None or block.children > 0:
        return False
    cache.index.remove(block)
    return drop(cache, block, [i for i, pages in enumerate(block.pages) if pages is not None])
