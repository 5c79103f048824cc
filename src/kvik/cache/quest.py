"""What is kept beside pages that queries choose from: each full page's extremes (Quest, arXiv:2406.10774).

They follow from the page's rows, so they are no facts of their own: a table works them out when it settles, and a
sequence that took pages from another works them out again. How queries choose: `ops/quest.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvik.cache.reading import decoded
from kvik.cache.spec import Group
from kvik.cache.table import Table
from kvik.ops import quest
from kvik.ops.reads import Select

if TYPE_CHECKING:
    from kvik.cache.cache import Cache

AT_ONCE = 1 << 14  # rows decoded together: bounds the memory


def select_of(group: Group) -> Select | None:
    """How queries of a group's lanes choose; None where they read everything."""
    policy = group.retention.policy
    if policy is None or policy.pages is None:
        return None
    dense = int(policy.option("dense"))
    return Select(policy.pages, policy.sinks, policy.recent, sum(layer < dense for layer, _ in group.lanes))


def learn(cache: Cache, table: Table, number: int, tokens: int) -> None:
    """Works out the extremes of pages that are full, of a text of `tokens` tokens, and were not before.

    Args:
        table: of the group of this number.
    """
    assert table.extremes is not None, "asked only where queries choose"
    lanes, size = len(table.group.lanes), table.group.page_size
    each = max(AT_ONCE // (lanes * size), 1)
    for first in range(table.known, tokens // size, each):
        pages = table.pages[:, first : min(first + each, tokens // size)].astype(np.int64)
        slots = (pages[..., None] * size + np.arange(size)).reshape(lanes, -1)
        keys = decoded(cache, number, slice(0, lanes), slots)["k"]
        quest.put(table.extremes, first, quest.extremes(keys.view(*pages.shape, size, -1)))
    table.known = max(table.known, tokens // size)
