"""What a cache holds between two steps, in numbers that add up."""

from __future__ import annotations

from kvik.engine.engine import Engine
from kvik.server.tenants import Tenants


def snapshot(engine: Engine, tenants: Tenants, *, each: bool) -> dict[str, object]:
    """Call in the engine's thread.

    Pages: free + in_use + kept = all. Bytes: payload + overhead = allocated, and allocated + unused = budget; each
    tenant's in_use and kept, tables and free = allocated.

    Args:
        each: list the open sequences one by one; else only how many there are, since they may be somebody else's.
    """
    cache = engine.cache
    books, held = cache.books, cache.nbytes
    mine = tenants.held(cache)
    sequences = [
        {
            "tokens": len(sequence),
            "cached": sequence.cached,
            "payload_bytes": sequence.nbytes.payload,
            "overhead_bytes": sequence.nbytes.overhead,
        }
        for sequence in cache.sequences
    ]
    return {
        "spec": str(cache.spec),
        "page_size": cache.spec.page_size,
        "budget_bytes": cache.budget,
        "allocated_bytes": held.allocated,
        "payload_bytes": held.payload,
        "overhead_bytes": held.overhead,
        "unused_bytes": cache.budget - held.allocated,
        "table_bytes": cache.arena.tables,
        "free_bytes": held.allocated - cache.arena.tables - sum(each.in_use + each.kept for each in mine.values()),
        "quota_bytes": cache.owners.quota,
        "tenants": {
            name: {"in_use_bytes": each.in_use, "kept_bytes": each.kept} for name, each in sorted(mine.items())
        },
        "pages": {"all": books.all, "free": books.free, "in_use": books.in_use, "kept": books.kept},
        "blocks": len(cache.index),
        "evicted_pages": engine.counts.evicted_pages,
        "running": engine.running,
        "waiting": engine.waiting,
        "sequences": len(sequences),
        "sequence_tokens": sum(len(sequence) for sequence in cache.sequences),
        "each": sequences if each else None,
        "draft": _draft(engine),
    }


def _draft(engine: Engine) -> dict[str, object] | None:
    """What a draft's cache holds; None where there is none."""
    cache = engine.draft_cache
    if cache is None:
        return None
    held = cache.nbytes
    return {
        "spec": str(cache.spec),
        "budget_bytes": cache.budget,
        "allocated_bytes": held.allocated,
        "payload_bytes": held.payload,
        "overhead_bytes": held.overhead,
        "sequences": len(cache.sequences),
    }
