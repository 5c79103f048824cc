"""What is kept beside pages that queries choose from: each full page's extremes (Quest, arXiv:2406.10774).

They follow from the page's rows, so they are no facts of their own: a table works them out when it settles, and a
sequence that took pages from another works them out again. How queries choose: `ops/quest.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvik.cache.spec import Group
from kvik.cache.table import Table
from kvik.ops import pages as paged
from kvik.ops import quest
from kvik.ops.codecs import unrotated
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


def learn(cache: Cache, table: Table, tokens: int) -> None:
    """Works out the extremes of pages that are full, of a text of `tokens` tokens, and were not before."""
    assert table.extremes is not None, "asked only where queries choose"
    group, size = table.group, table.group.page_size
    each = max(AT_ONCE // (len(group.lanes) * size), 1)
    for first in range(table.known, tokens // size, each):
        pages = table.pages[:, first : min(first + each, tokens // size)].astype(np.int64)
        slots = torch.from_numpy((pages[..., None] * size + np.arange(size)).reshape(-1)).to(cache.device)
        rows = paged.rows(cache.pages(group), group.layout, size, slots)["k"]
        keys = unrotated(group.layout, "k", rows).view(*pages.shape, size, -1)
        quest.put(table.extremes, first, quest.extremes(keys))
    table.known = max(table.known, tokens // size)
