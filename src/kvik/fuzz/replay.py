"""A trace through an engine: every event happens in the engine's own thread, between two of its steps, so that the same
trace takes the same way each time.

    the engine's thread     step, step, step …          after each: the time is one later, and what is due then happens
    the caller's            asks now and then           lets time jump where nobody is left; notices where nothing moves
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from kvik.engine.answers import Answer
from kvik.engine.engine import Engine
from kvik.engine.job import Stage, Update
from kvik.engine.loop import Counts
from kvik.engine.request import Request
from kvik.engine.scheduler import Pace
from kvik.errors import BudgetError, EngineError, KvikError, QueueError
from kvik.fuzz.trace import Abort, Ask, Trace
from kvik.models.model import Model

RUNGS = ("dropped", "preempted", "queued", "refused")  # of the ladder of pressure
EVERY = 16  # steps between two looks at the books
STILL = 300  # steps without a token in which somebody must have been stuck
PATIENCE = 50  # looks without a step in which somebody must have been forgotten
_POLL = 0.01  # seconds between two looks at whether it is over


@dataclass
class Heard:
    """What one asker heard.

    Attributes:
        answers: as far as they came.
        refused: why it was not taken: "queue", "budget" or "unfit"; "" = it was.
        error: what ended it instead of an answer.
        left: the stage at which its asker left.
        preempted: whether it ever had to give its rows back.
        cached: tokens of its prompt that were known.
    """

    answers: list[Answer]
    refused: str = ""
    error: str = ""
    left: Stage | None = None
    preempted: bool = False
    cached: int = 0

    def take(self, update: Update) -> None:
        """Adds what came."""
        if update.error is not None:
            self.error = f"{type(update.error).__name__}: {update.error}"
            return
        self.answers[update.answer].take(update)
        if update.known is not None:
            self.cached = update.known.cached


@dataclass
class Run:
    """A trace's way through an engine.

    Attributes:
        heard: by request.
        counts: the engine's.
        steps: until all was over.
        queued: requests that had to wait before they began.
        problem: what is wrong with the engine itself; "" = nothing.
        budget: bytes of the cache.
        again: a request that was made once more when all was over, and what was heard then.
    """

    heard: dict[int, Heard]
    counts: Counts = field(default_factory=Counts)
    steps: int = 0
    queued: int = 0
    problem: str = ""
    budget: int = 0
    again: tuple[int, Heard] | None = None

    @property
    def resumed(self) -> int:
        """Requests that gave their rows back, went on later, and were answered to the end."""
        return sum(each.preempted and each.left is None and not each.error for each in self.heard.values())

    @property
    def rungs(self) -> tuple[bool, bool, bool, bool]:
        """Which of `RUNGS` were climbed."""
        refused = any(each.refused for each in self.heard.values())
        return self.counts.evicted_pages > 0, self.resumed > 0, self.queued > 0, refused


def replay(
    model: Model,
    trace: Trace,
    requests: Mapping[int, Request],
    kv: str,
    *,
    memory: int | None,
    guesses: int = 0,
) -> Run:
    """Takes a trace through an engine of its own, to its end, and looks whether anything is left behind.

    Args:
        requests: by number.
        memory: of the cache, in bytes; None = half of what is free.
        guesses: see `Engine`.
    """
    run = Run({ask.number: Heard([Answer() for _ in range(ask.n)]) for ask in trace.asks})
    with (
        _quiet(),
        Engine(
            model, kv, memory=memory, running=trace.answers, step_tokens=trace.step_tokens, waiting=trace.waiting,
            guesses=guesses, pace=_Drawn(trace.cuts),
        ) as engine,
    ):  # fmt: skip
        run.budget = engine.cache.budget
        director = _Director(engine, trace, requests, run)
        engine.after_steps(director.step)
        try:
            _to_the_end(engine, director)
            run.counts = replace(engine.counts)
            whole = [number for number, heard in run.heard.items() if not heard.refused and heard.left is None]
            if whole and not run.problem:
                engine.asked(lambda: director.ask_again(whole[0]))
                _to_the_end(engine, director)
            if not run.problem:
                engine.asked(director.nothing_left)
        except EngineError as error:
            director.read_all()
            run.problem = next((heard.error for heard in run.heard.values() if heard.error), str(error))
        except AssertionError as error:
            run.problem = f"the books do not add up: {error}"
    director.read_all()
    return run


def _to_the_end(engine: Engine, director: _Director) -> None:
    while not engine.asked(director.look):
        time.sleep(_POLL)


class _Drawn(Pace):
    """Chunks of prompts are drawn, not timed: the cut may not show, and a replay cuts as the first run did."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = random.Random(seed)

    def prompt_tokens(self, most: int) -> int:
        """See `Pace`."""
        return min(most, self._rng.choice([1, 2, 7, 16, 31, 32, 33, 64, most, most]))


class _Director:
    """Lets a trace's events happen when they are due. All but `read_all` in the engine's thread."""

    def __init__(self, engine: Engine, trace: Trace, requests: Mapping[int, Request], run: Run) -> None:
        self.engine, self.run, self.requests = engine, run, requests
        self._due = trace.events[::-1]  # the next one last
        self._asks = {ask.number: ask for ask in trace.asks}
        self._jobs: dict[int, int] = {}  # of those that may not be over
        self._mail: dict[int, queue.SimpleQueue[Update]] = {}
        self._reads: dict[int, int] = {}  # updates that each asker has read
        self._leaving: list[Abort] = []
        self._queued: set[int] = set()
        self._done, self._moved, self._still = (0, 0), 0, 0
        self._now = self._seen = 0

    def step(self) -> None:
        """After each of the engine's."""
        self._now += 1
        self.run.steps += 1
        self._look_around()
        self._happen()
        try:
            if self.run.steps % EVERY == 0:
                self.engine.check()
        except AssertionError as error:
            self._stop(f"the books do not add up after step {self.run.steps}: {error}")
        if self.run.steps - self._moved > STILL:
            self._stop(f"no token in {STILL} steps, and request {min(self._jobs, default=-1)} is not over")

    def look(self) -> bool:
        """Whether all is over. Where nobody is left, time jumps to what comes next."""
        while not self.run.problem and not self.engine.running and not self.engine.waiting:
            if not self._due:
                return True
            self._now = max(self._now, self._due[-1].at)
            self._happen()
        self._still = self._still + 1 if self.run.steps == self._seen else 0
        self._seen = self.run.steps
        if self._still > PATIENCE:  # steps follow one another while anybody waits
            self._stop(f"the engine rests, and request {min(self._jobs, default=-1)} was never answered")
        return bool(self.run.problem)

    def read_all(self) -> None:
        """What nobody has read."""
        for number, mail in self._mail.items():
            self._read(number, mail, None)

    def ask_again(self, number: int) -> None:
        """One more time the same request, when all is over."""
        self.run.again = number, Heard([Answer() for _ in range(self.requests[number].n)])
        self.engine.submit(self.requests[number], self.run.again[1].take)

    def nothing_left(self) -> None:
        """Free + reusable = all: no page is in use, and every other can be had. Raises AssertionError."""
        self.engine.check()
        cache = self.engine.cache
        assert not cache.sequences and not cache.books.in_use, "a sequence is left"
        try:
            cache.resize(0)
        except BudgetError as error:
            raise AssertionError(f"pages that nobody uses can't be had: {error}") from None
        assert cache.arena.held == 0, f"{cache.arena.held:,} bytes are held when every page was dropped"

    def _happen(self) -> None:
        """What is due."""
        while self._due and self._due[-1].at <= self._now:
            event = self._due.pop()
            if isinstance(event, Ask):
                self._submit(event)
            else:
                self._leaving.append(event)
        self._leaving = [abort for abort in self._leaving if not self._leaves(abort)]

    def _submit(self, ask: Ask) -> None:
        heard, mail = self.run.heard[ask.number], queue.SimpleQueue[Update]()
        try:
            self._jobs[ask.number] = self.engine.submit(self.requests[ask.number], mail.put).job
        except BudgetError:
            heard.refused = "budget"
        except QueueError:
            heard.refused = "queue"
        except KvikError as error:
            heard.refused = f"{type(error).__name__}: {error}"
        else:
            self._mail[ask.number] = mail

    def _leaves(self, abort: Abort) -> bool:
        """Lets an asker leave, if it is at its stage. True where there is nothing more to do."""
        job = self._jobs.get(abort.ask)
        stage = None if job is None else self.engine.stage(job)
        heard = self.run.heard[abort.ask]
        if job is None or stage is None or heard.left is not None:
            return True
        said = max(len(answer.token_ids) for answer in heard.answers)
        if (abort.when and stage != abort.when) or said < abort.tokens:
            return False
        heard.left = stage
        self.engine.abort(job)
        return True

    def _look_around(self) -> None:
        counts = self.engine.counts
        if self._done != (done := (counts.new_tokens, counts.requests)):
            self._done, self._moved = done, self.run.steps
        for number, job in list(self._jobs.items()):
            stage, reads = self.engine.stage(job), self._asks[number].reads
            self._read(number, self._mail[number], reads)
            if stage == "queued" and number not in self._queued:
                self._queued.add(number)
                self.run.queued += 1
            self.run.heard[number].preempted |= stage == "preempted"
            if stage is None:
                del self._jobs[number]

    def _read(self, number: int, mail: queue.SimpleQueue[Update], most: int | None) -> None:
        while most is None or self._reads.get(number, 0) < most:
            try:
                update = mail.get_nowait()
            except queue.Empty:
                return
            self._reads[number] = self._reads.get(number, 0) + 1
            self.run.heard[number].take(update)

    def _stop(self, problem: str) -> None:
        self.run.problem = self.run.problem or problem


@contextmanager
def _quiet() -> Iterator[None]:
    """An engine that breaks down is told of once, in the report, and not by its thread as well."""
    before = threading.excepthook

    def hook(given: threading.ExceptHookArgs) -> None:
        if given.thread is None or given.thread.name != "kvik engine":
            before(given)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
