"""From a budget in bytes to a spec."""

from __future__ import annotations

from kvik.cache.arena import SLAB
from kvik.cache.spec import Spec
from kvik.errors import BudgetError
from kvik.hf.finding import Found
from kvik.units import format_bytes, parse_bytes

LADDER = ("bf16", "int8", "k8v4", "int4")  # below the model's own precision, the most exact first


def memory_of(size: int | str | None) -> int | None:
    """Bytes, from a number or from text such as "512MiB"."""
    return parse_bytes(size, "memory") if isinstance(size, str) else size


def spec_within(found: Found, budget: int, tokens: int, batch: int) -> str:
    """The most exact spec that keeps every row of so many texts of so many tokens within a budget.

    Raises:
        BudgetError: not even 4 bits fit.
    """
    needed = 0
    for text in (found.codec, *(codec for codec in LADDER if codec != found.codec)):
        spec = Spec.parse(text, found.layers)
        peak, kinds = spec.peak(tokens), {group.page_bytes for group in spec.groups}
        needed = batch * (peak.payload + peak.overhead) + len(kinds) * SLAB  # pages of a size share slabs
        if needed <= budget:
            return text
    raise BudgetError(
        f"{batch} texts of {tokens:,} tokens need {format_bytes(needed)} in 4 bits, and the budget is "
        f"{format_bytes(budget)}; give a spec that drops rows, such as 'int4+snapkv:25%', or fewer tokens",
        needed=needed, available=budget,
    )  # fmt: skip
