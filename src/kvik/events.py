"""What a cache did, as frozen dataclasses. `Cache.listen(callback)` sends each, in order, in the caller's thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Opened:
    """A Sequence was opened; `cached` of its `asked` tokens were already known."""

    sequence: int
    asked: int
    cached: int


@dataclass(frozen=True)
class Filled:
    """A source's `rows` rows were computed and stored, in `pages` pages; whoever asks about it again finds them."""

    rows: int
    pages: int


@dataclass(frozen=True)
class Published:
    """Full pages of a Sequence can now be found by others: positions `start` to `stop`."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True)
class Dropped:
    """A Sequence's retention gave `pages` pages back after `tokens` tokens."""

    sequence: int
    tokens: int
    pages: int


@dataclass(frozen=True)
class Compressed:
    """A Sequence of `tokens` tokens kept what its policy chose: `rows` rows left."""

    sequence: int
    tokens: int
    rows: int


@dataclass(frozen=True)
class Evicted:
    """A block that nobody used was dropped to make room: positions `start` to `stop`, `pages` pages of `owner`."""

    start: int
    stop: int
    pages: int
    owner: str = ""


@dataclass(frozen=True)
class Closed:
    """A Sequence of `tokens` tokens gave its pages back."""

    sequence: int
    tokens: int


@dataclass(frozen=True)
class Resized:
    """The budget became `budget` bytes."""

    budget: int


Event = Opened | Filled | Published | Dropped | Compressed | Evicted | Closed | Resized
