"""What a model asks of a cache, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a token, or of a row of the source.

    Attributes:
        heads: KV heads (lanes).
        streams: names and widths, (("k", 64), ("v", 64)) for ordinary attention.
        window: the model's own sliding window in positions, None = all.
        frequencies: radians a position by which neighbouring pairs of a key's channels are turned; None = not turned;
            none at all = turned, but nobody asked by how much (plans).
        source: its rows are a source's (cross-attention): given once, seen by every token, the same for all who ask
            about that source. Such layers come after all others.
        reads: it keeps nothing of its own and reads what this earlier layer keeps (arXiv:2405.12981); None = its own.
        biased: distance alone adds to its scores (T5, ALiBi), so that queries and keys don't say what attention is.
        use: `attend`: queries read the rows by attention; `read`: the layer reads them back whole and does with them
            what it likes (`Step.rows`); `delay`: a row stands for an earlier token than its own. Of the last two only
            the layer knows what they weigh, so policies are refused; of the last, windows too.
    """

    heads: int
    streams: tuple[tuple[str, int], ...]
    window: int | None = None
    frequencies: tuple[float, ...] | None = None
    source: bool = False
    reads: int | None = None
    biased: bool = False
    use: Literal["attend", "read", "delay"] = "attend"
