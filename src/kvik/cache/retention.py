"""Which rows stay. A retention is a value: the two masks of the field and their sum, or a policy.

A *mask* hides rows from every later query by position alone, so that dropping them changes no result. Three runs:

    position   0 … s-1 | s … n-w-1 | n-w … n-1
               sinks   | dropped   | window         the next query, at n, sees the sinks and the w rows before it,
                                                    itself included: k ≤ q and (q - k < w or k < s)

`relative` hides no other rows: it says at which distance a query sees the sinks (`cache/relative.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvik.cache.policy import Policy


@dataclass(frozen=True)
class Retention:
    """Full attention (`window=None`), a sliding window, or attention sinks and a window (arXiv:2309.17453).

    Attributes:
        window: positions that a query sees, its own included; None = all.
        sinks: first positions that stay visible for good.
        policy: chooses at its triggers which rows stay, lane by lane; None = all that the mask shows.
        relative: sinks are seen as if they lay right before the window, as in the paper; else at their true distance.
    """

    window: int | None = None
    sinks: int = 0
    policy: Policy | None = None
    relative: bool = False

    @property
    def reach(self) -> int | None:
        """Distances that a query can see are below this, whatever the text's length; None = nothing bounds them."""
        return self.window + self.sinks if self.relative and self.window is not None else None

    def rows(self, tokens: int, prompt: int | None = None, page_size: int = 1) -> int:
        """Rows kept of a text of `tokens` tokens, on average over lanes; see `Policy.rows`."""
        if self.policy is not None:
            return self.policy.rows(tokens, prompt, page_size)
        return tokens if self.window is None else min(tokens, self.window + self.sinks)

    def live_pages(self, tokens: int, page_size: int) -> list[int]:
        """Which pages (page p holds positions p·N … p·N+N-1) hold a kept row, in order. Rows leave by whole pages:
        moving them would move the tiles that attention is cut into, and the cut would show (law 1).

        >>> Retention(window=64, sinks=4).live_pages(200, 32)
        [0, 4, 5, 6]
        """
        end = -(-tokens // page_size)
        if self.window is None or tokens <= self.window + self.sinks:
            return list(range(end))
        first = (tokens - self.window) // page_size
        sinks = min(-(-self.sinks // page_size), first)
        return [*range(sinks), *range(first, end)]

    def pages(self, tokens: int, page_size: int) -> int:
        """How many pages are live, without a list of them: a plan asks for texts of any length.

        >>> Retention(window=64, sinks=4).pages(200, 32), Retention().pages(10**12, 32)
        (4, 31250000000)
        """
        end = -(-tokens // page_size)
        if self.window is None or tokens <= self.window + self.sinks:
            return end
        first = (tokens - self.window) // page_size
        return end - first + min(-(-self.sinks // page_size), first)

    def __str__(self) -> str:
        if self.policy is not None:
            return str(self.policy)
        parts = [f"window:{self.window}"] if self.window is not None else []
        parts += [f"sinks:{self.sinks}"] if self.sinks else []
        return ",".join([*parts, *(["relative"] if self.relative else [])]) or "full"
