"""How many bytes of the cache a request takes at the most, alone: what it may be refused by, and what it can rely on.

the prompt comes      its rows, and under a window those of a whole chunk, before any is let go
a pass                a fork repeats a part of the prompt, where a policy asks for it
n answers             share what the prompt left; each has its own rows after that, and once a policy chooses again,
                      all of its rows
"""

from __future__ import annotations

from kvik.cache.cache import Cache
from kvik.cache.methods import Needs
from kvik.cache.sizes import group_bytes, moments
from kvik.cache.spec import Group
from kvik.engine.generation import CHUNK
from kvik.engine.reread import pass_tokens
from kvik.models.model import Model


def most_bytes(model: Model, cache: Cache, prompt: int, new: int, n: int, step_tokens: int) -> int:
    """In whole slabs.

    Args:
        prompt: its tokens.
        new: those of an answer, at the most.
        n: answers.
        step_tokens: of the prompt, that go through the model at once, at the most.
    """
    spec, arena = cache.spec, cache.arena
    policies = [group.retention.policy for group in spec.groups]
    asks = any(policy is not None and Needs.PASS in policy.needs for policy in policies)
    aside = pass_tokens(model, prompt) if asks else 0
    times = moments(spec, prompt + new, prompt)
    held: dict[int, int] = {}
    for group in spec.groups:
        if not group.source:
            most = _group_bytes(group, prompt, new, n, min(step_tokens, CHUNK), aside, times)
            held[group.page_bytes] = held.get(group.page_bytes, 0) + most
    return sum(_slabs(size, page, arena.slab_bytes) for page, size in held.items()) * arena.slab_bytes


def _group_bytes(
    group: Group, prompt: int, new: int, n: int, chunk: int, aside: int, times: set[tuple[int, bool]]
) -> int:
    def one(at: int, settled: bool) -> int:
        return group_bytes(group, at, prompt, settled=settled).allocated + uneven

    uneven = 0 if group.retention.policy is None else _own(group, 0)  # lanes that share rows end their pages apart
    found, after = [max(one(at, settled) for at, settled in times)], one(prompt, True)
    if group.retention.window is not None:
        found.append(found[0] + _own(group, min(chunk, prompt)))
    if aside:
        found.append(one(prompt, False) + group.table_bytes(-(-prompt // group.page_size)) + _own(group, aside))
    if n > 1 and _chooses_again(group, prompt, new):
        found.append(after + n * max(one(at, settled) for at, settled in times if at > prompt))
    elif n > 1:
        found.append(after + n * (group.table_bytes(-(-prompt // group.page_size)) + _own(group, new)))
    return max(found)


def _own(group: Group, tokens: int) -> int:
    """Bytes of so many tokens behind others: a page that they share a page with is copied."""
    columns = -(-tokens // group.page_size) + 1
    return len(group.lanes) * columns * group.page_bytes + group.table_bytes(columns)


def _chooses_again(group: Group, prompt: int, new: int) -> bool:
    """Whether a policy lets rows go after the prompt, so that answers have no page in common any more."""
    policy = group.retention.policy
    again = None if policy is None else policy.trigger.next(prompt, prompt)
    return again is not None and again <= prompt + new


def _slabs(size: int, page_bytes: int, slab_bytes: int) -> int:
    """Slabs of pages of one size, in the worst case: none lies across two slabs, and one slab is only begun."""
    pages = slab_bytes // page_bytes - (slab_bytes % page_bytes != 0)
    return -(-size // (pages * page_bytes)) + 1
