"""What was known of each request's prompt, from where, and why not more: kept for the last requests, by key."""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvik.engine.job import Known

MOST = 1024  # requests
MOST_TOKENS = 4 << 20  # of their prompts in all: 16 MiB


@dataclass
class Prompt:
    """One prompt of a request.

    Attributes:
        tokens: its ids.
        known: once it has begun.
        evicted: pages on its key's account that had been dropped to make room when it began.
    """

    tokens: array[int]
    salt: str
    known: Known | None = None
    evicted: int = 0


@dataclass
class Record:
    """A request.

    Attributes:
        tenant: whose; nobody else may see it.
        status: "waiting", "running", "done", "aborted", or what went wrong.
        first_s, last_s: seconds from its arrival to its first and last new tokens.
    """

    id: str
    tenant: str
    prompts: list[Prompt]
    created: float = field(default_factory=time.time)
    arrived: float = field(default_factory=time.monotonic)
    status: str = "waiting"
    new_tokens: int = 0
    first_s: float | None = None
    last_s: float | None = None

    @property
    def cached(self) -> int:
        """Tokens of all prompts that were known."""
        return sum(prompt.known.cached for prompt in self.prompts if prompt.known is not None)

    @property
    def tokens(self) -> int:
        """Of all prompts."""
        return sum(len(prompt.tokens) for prompt in self.prompts)


class Records:
    """The last requests. Of one thread: the server's.

    Args:
        page: tokens of a page: only what is in full ones is found.
    """

    def __init__(self, page: int) -> None:
        self._page = page
        self._tokens = 0
        self._kept: OrderedDict[str, Record] = OrderedDict()

    def add(self, id: str, tenant: str, prompts: Sequence[tuple[Sequence[int], str]]) -> Record:
        """One more, from its prompts' tokens and salts; the oldest leave."""
        record = Record(id, tenant, [Prompt(array("i", tokens), salt) for tokens, salt in prompts])
        self._kept[id] = record
        self._tokens += record.tokens
        while len(self._kept) > MOST or (self._tokens > MOST_TOKENS and len(self._kept) > 1):
            self._tokens -= self._kept.popitem(last=False)[1].tokens
        return record

    def explain(self, id: str, tenant: str) -> dict[str, object] | None:
        """A request's facts, for its own key only; None for all others."""
        record = self._kept.get(id)
        if record is None or record.tenant != tenant:
            return None
        known = [prompt.known is not None for prompt in record.prompts]
        return {
            "id": record.id,
            "created": int(record.created),
            "status": record.status,
            "prompt_tokens": record.tokens,
            "cached_tokens": record.cached if any(known) else None,
            "new_tokens": record.new_tokens,
            "first_token_s": None if record.first_s is None else round(record.first_s, 4),
            "last_token_s": None if record.last_s is None else round(record.last_s, 4),
            "prompts": [
                {
                    "tokens": len(prompt.tokens),
                    "cached": None if prompt.known is None else prompt.known.cached,
                    "why": self._why(record, prompt),
                }
                for prompt in record.prompts
            ],
        }

    def _why(self, record: Record, prompt: Prompt) -> str:
        """Where the known tokens came from, and what kept the rest from being known."""
        if prompt.known is None:
            return "it has not begun"
        cached, page = prompt.known.cached, self._page
        if prompt.known.why:
            return prompt.known.why
        if cached >= len(prompt.tokens) - 1:
            return "all that can be known: the last token is always computed"
        other, shared = self._nearest(record, prompt)
        if other is None:
            return "none of your earlier requests that are remembered began with the same token"
        same = f"{other.id} shares the first {shared} tokens"
        if cached >= shared:
            return f"{same}; token {shared} is another"
        if cached >= shared // page * page:
            return f"{same}, {cached} of them in pages that were full; others ({page} tokens a page) are not found"
        if prompt.evicted > min((each.evicted for each in other.prompts), default=0):
            return f"{same}, but pages of them had been dropped to make room"
        return f"{same}, of which only {cached} had been computed and kept when this began"

    def _nearest(self, record: Record, prompt: Prompt) -> tuple[Record | None, int]:
        """The earlier request of the same key and salt that shares the longest beginning, and how long that is."""
        best, longest = None, 0
        mine = np.frombuffer(prompt.tokens, np.int32)
        for other in self._kept.values():
            if other is record:
                break
            for each in other.prompts if other.tenant == record.tenant else ():
                if each.salt == prompt.salt and each.known is not None:
                    theirs = np.frombuffer(each.tokens, np.int32)
                    size = min(len(mine), len(theirs))
                    differ = np.flatnonzero(mine[:size] != theirs[:size])
                    shared = int(differ[0]) if len(differ) else size
                    if shared >= longest and shared > 0:
                        best, longest = other, shared
        return best, longest
