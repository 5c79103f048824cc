"""A timed trace: who asks what, when, and who leaves. Everything in it is data, so that a failure can be told again.

    {"kvik": "fuzz-1", "vocabulary": 49152, "answers": 8, "step_tokens": 64, "waiting": 24, "cuts": 0, "events": 3}
    {"at": 0, "ask": 0, "prompt": [{"stream": 5, "from": 0, "to": 96}, [17, 4]], "max_tokens": 9, "logprobs": 2}
    {"at": 4, "ask": 1, "prompt": [{"stream": 5, "from": 0, "to": 96}, {"answer": 0, "tokens": 3}], "max_tokens": 5}
    {"at": 6, "abort": 1, "when": "answer", "tokens": 2}

Time is the engine's steps, not seconds: a slow machine replays the same trace as a fast one. A prompt is spelled in
pieces: ids, a part of an endless stream that its number names, or the first tokens of what another request is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from kvik.engine.sampling import Sampling

When = Literal["", "queued", "prompt", "answer", "preempted"]
WHENS: tuple[When, ...] = ("", "queued", "prompt", "answer", "preempted")
_FEW, _MOTIFS, _LONG = 32, 6, 8  # a stream's own tokens, the phrases made of them, and a phrase's tokens


@dataclass(frozen=True)
class Part:
    """Tokens `start` to `end` of a stream."""

    stream: int
    start: int
    end: int


@dataclass(frozen=True)
class Said:
    """The first tokens of the first answer to an earlier request, as it is told alone."""

    ask: int
    tokens: int


Piece = tuple[int, ...] | Part | Said


@dataclass(frozen=True)
class Ask:
    """A request that comes in. What is not here is `Request`'s.

    Attributes:
        number: its name in the trace.
        at: when it comes.
        prompt: pieces.
        grammar: its answers follow one: token i is i modulo this; None = none.
        reads: its reader stops reading after so many updates, and reads on when all is over; None = reads them all.
    """

    number: int
    at: int
    prompt: tuple[Piece, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=lambda: Sampling(seed=0))
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    min_tokens: int = 0
    priority: int = 0
    salt: str = ""
    grammar: int | None = None
    reads: int | None = None


@dataclass(frozen=True)
class Abort:
    """A request's asker leaves.

    Attributes:
        at: from then on.
        ask: whose.
        when: as soon as it is at this stage; "" = at once, whatever it does.
        tokens: as soon as an answer has so many.
    """

    at: int
    ask: int
    when: When = ""
    tokens: int = 0


@dataclass(frozen=True)
class Failed:
    """Under what a trace has failed.

    Attributes:
        model, weights, kv: as on the command line.
        memory: of the cache, in bytes.
        guesses: see `Engine`.
        what: what was wrong.
    """

    model: str
    weights: str
    kv: str
    memory: int
    guesses: int
    what: str


@dataclass(frozen=True)
class Trace:
    """See the module's docstring.

    Attributes:
        vocabulary: tokens of streams are below this.
        answers: at once, in the engine.
        step_tokens, waiting: of the engine.
        cuts: seed of how many prompt tokens each step takes.
        asks, aborts: by the time of their coming.
        failed: where it is what is left of a failure.
    """

    vocabulary: int
    answers: int
    step_tokens: int
    waiting: int
    cuts: int
    asks: tuple[Ask, ...]
    aborts: tuple[Abort, ...] = ()
    failed: Failed | None = None

    def only(self, kept: set[int]) -> Trace:
        """Without all other requests."""
        asks = tuple(ask for ask in self.asks if ask.number in kept)
        return replace(self, asks=asks, aborts=tuple(abort for abort in self.aborts if abort.ask in kept))

    def apart(self) -> Trace:
        """The same requests, each when those before it are over; whoever leaves, does so as long after as before."""
        times = {ask.number: 100_000 * at for at, ask in enumerate(self.asks)}
        came = {ask.number: ask.at for ask in self.asks}
        asks = tuple(replace(ask, at=times[ask.number]) for ask in self.asks)
        aborts = (replace(each, at=times[each.ask] + max(each.at - came[each.ask], 0)) for each in self.aborts)
        return replace(self, asks=asks, aborts=tuple(sorted(aborts, key=lambda each: each.at)))

    @property
    def events(self) -> list[Ask | Abort]:
        """All of them in their order; at the same time, requests come first."""
        return sorted([*self.asks, *self.aborts], key=lambda event: event.at)


def stream(number: int, vocabulary: int) -> Iterator[int]:
    """A stream's tokens, without end: phrases come again and again, as in texts, so that guesses are sometimes right.

    >>> from itertools import islice
    >>> a, b = (list(islice(stream(number, 1000), 300)) for number in (1, 2))
    >>> a == b, len(set(a)) <= 32
    (False, True)
    """
    raw = np.random.Philox(key=[number, vocabulary])  # its raw numbers are the same in every version of numpy
    few = [int(x) % vocabulary for x in raw.random_raw(_FEW)]
    phrases = [[few[int(x) % _FEW] for x in raw.random_raw(_LONG)] for _ in range(_MOTIFS)]
    while True:
        drawn = int(raw.random_raw(1)[0])
        yield from phrases[drawn % _MOTIFS]
        yield few[(drawn >> 16) % _FEW]


@lru_cache(maxsize=64)
def _first(number: int, vocabulary: int, size: int) -> tuple[int, ...]:
    tokens = stream(number, vocabulary)
    return tuple(next(tokens) for _ in range(size))


def part_ids(part: Part, vocabulary: int) -> tuple[int, ...]:
    """The tokens of a part of a stream."""
    size = 1 << max(part.end - 1, 1).bit_length()  # few sizes, so that most are found
    return _first(part.stream, vocabulary, size)[part.start : part.end]
