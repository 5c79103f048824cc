"""Who goes into the next step, and with how many tokens. Knows jobs and the cache's bytes; computes nothing.

    waiting ──admit──► running ──every step──►  answers that go on: one token each, and what is guessed after it
       ▲                  │                     prompts: what is left of the step's tokens
       └────preempt───────┘                     the oldest first, but a quarter for the one that lacks the least

A step with prompts takes at most RATIO times as long as one without: so no answer stalls while a long prompt comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvik.cache.cache import Cache
from kvik.cache.pressure import least
from kvik.engine.generation import room
from kvik.engine.guesses import Guesser
from kvik.engine.job import Job, Task

RATIO = 3.0
LEAST = 16  # prompt tokens in every step, however slow
_WEIGHT = 0.2  # of the newest measurement
_EVERY = 64  # tokens at once whose logits are all wanted: bounds memory


@dataclass(frozen=True)
class Feed:
    """What an answer puts into a step.

    Attributes:
        tokens: those that it lacks, then guesses.
        guesses: how many of them are guesses.
        wanted: logits of so many last tokens.
        ends: nothing is lacking after it: the next token can be chosen.
    """

    task: Task
    tokens: list[int]
    guesses: int
    wanted: int
    ends: bool


class Pace:
    """How many prompt tokens a step may have beside answers that go on, from how long steps took."""

    def __init__(self) -> None:
        self._plain: float | None = None  # seconds of a step without prompts
        self._token: float | None = None  # seconds that a prompt's token adds

    def saw(self, seconds: float, prompt_tokens: int, mixed: bool) -> None:
        """A step is over; `mixed`: answers were in it too."""
        if prompt_tokens == 0:
            self._plain = _mean(self._plain, seconds)
        elif not mixed or self._plain is not None:
            extra = seconds - (self._plain if mixed and self._plain is not None else 0.0)
            self._token = _mean(self._token, max(extra, 0.0) / prompt_tokens)

    def prompt_tokens(self, most: int) -> int:
        """Beside answers: so many, and `most` at the most."""
        if self._plain is None or not self._token:
            return min(most, 4 * LEAST)
        return max(LEAST, min(most, int((RATIO - 1) * self._plain / self._token)))


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)


@dataclass
class Scheduler:
    """Jobs that wait and that run.

    Attributes:
        most_running: answers at once.
        step_tokens: tokens in a step.
        guesser: says what may come next; see `engine/guesses.py`.
    """

    cache: Cache
    most_running: int
    step_tokens: int
    guesser: Guesser = field(default_factory=Guesser)
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)
    full: bool = False  # somebody had to go: nobody begins beside others until one of them has ended
    _keys: dict[int, list[bytes]] = field(default_factory=dict)  # of each job's prompt

    def add(self, job: Job) -> None:
        """One more, to wait."""
        self.waiting.append(job)
        self.waiting.sort(key=lambda each: each.order)

    def drop(self, job: Job) -> None:
        """It is over."""
        self._keys.pop(job.number, None)
        self.full = False
        for jobs in (self.waiting, self.running):
            if job in jobs:
                jobs.remove(job)

    def check(self) -> None:
        """Nothing is kept of who is over. Raises AssertionError."""
        assert self._keys.keys() <= {job.number for job in (*self.waiting, *self.running)}, "keys of a job that is over"

    def preempt(self, job: Job) -> None:
        """It gives its rows back and waits; what is known of it then, it will find again."""
        for task in job.tasks:
            task.close()
        if not job.begun:
            job.prompt_likely.clear()  # it begins anew
        job.preempted += 1
        self.running.remove(job)
        self.add(job)
        self.full = True

    @property
    def youngest(self) -> Job:
        """Who is preempted first: the last of the one whose rows are the most."""
        held = self.cache.owners.held()
        return max(self.running, key=lambda job: (held.get(job.request.owner, 0), job.order))

    def next_waiting(self) -> Job | None:
        """Who may begin now. The first in order, except that one whose prompt somebody is computing waits for that."""
        self.full = self.full and bool(self.running)
        if not self.waiting or self.full:
            return None
        free = self.most_running - sum(len(job.live) for job in self.running)
        coming = self._coming()
        for job in self.waiting:
            known, keys = self._known(job)
            if coming and known < len(keys) and keys[known] in coming:
                continue
            room = len(job.live) <= free or not self.running  # one with more answers than may run at once runs alone
            return job if room and self._fits(job, known) else None
        return None

    def begin(self, job: Job) -> None:
        """It runs from now on."""
        self.waiting.remove(job)
        self.running.append(job)
        self.running.sort(key=lambda each: each.order)

    def plan(self) -> list[Feed]:
        """The next step."""
        going, coming = list[Task](), list[Task]()
        for job in self.running:
            for task in job.live:
                if task.sequence is not None:
                    (going if task.answer and len(task.pending) == 1 else coming).append(task)
        feeds = self._going(going)
        left = self.step_tokens - sum(len(feed.tokens) for feed in feeds)
        if coming:
            feeds += self._prompts(coming, self.pace.prompt_tokens(max(left, LEAST)) if going else max(left, LEAST))
        return feeds

    def _going(self, tasks: Sequence[Task]) -> list[Feed]:
        """One token each, and guesses for which there is room."""
        asks, left = [], self.step_tokens - len(tasks)
        for task in tasks:
            assert task.sequence is not None, "it runs"
            ahead = min(room(task.sequence), task.job.limit - len(task.answer)) - 1
            asks.append((task, max(min(ahead, self.guesser.most, left), 0)))
            left -= asks[-1][1]
        guesses = self.guesser.guess(asks, self.pace.prompt_tokens(self.step_tokens))
        return [
            Feed(task, [*task.pending, *guessed], len(guessed), 1 + len(guessed), True)
            for task, guessed in zip(tasks, guesses, strict=True)
        ]

    def _prompts(self, tasks: Sequence[Task], tokens: int) -> list[Feed]:
        """Chunks of prompts, so many tokens in all."""
        shortest = min(tasks, key=lambda task: len(task.pending))
        kept = min(max(tokens // 4, 1), len(shortest.pending)) if len(tasks) > 1 else 0
        feeds = []
        for task in tasks:
            share = tokens - kept if task is not shortest else tokens
            feed = self._chunk(task, share)
            if feed is not None:
                feeds.append(feed)
                tokens -= len(feed.tokens)
                kept = 0 if task is shortest else kept
        return feeds

    def _chunk(self, task: Task, most: int) -> Feed | None:
        assert task.sequence is not None, "it runs"
        job, pending = task.job, task.pending
        every = job.request.prompt_logprobs is not None and not job.begun
        most = min(most, room(task.sequence), _EVERY if every else most)
        if any(each.sequence is None for each in job.live):  # others fork off where the prompt ends
            most = min(most, len(job.request.prompt) - len(task.sequence))
        tokens = pending[: max(most, 0)]
        if not tokens:
            return None
        return Feed(task, tokens, 0, len(tokens) if every else 1, len(tokens) == len(pending))

    def _known(self, job: Job) -> tuple[int, list[bytes]]:
        """How many of a prompt's first full pages can be found, and the keys of all."""
        keys = self._keys.get(job.number)
        if keys is None:
            alone = job.request.source is not None  # what stands before its prompt is not in these keys
            keys = [] if alone else self.cache.keys(job.request.prompt, job.request.salt)
            self._keys[job.number] = keys
        index = self.cache.index
        return next((at for at, key in enumerate(keys) if index.get(key) is None), len(keys)), keys

    def _coming(self) -> set[bytes]:
        """Keys of pages that running jobs will publish before they answer."""
        found: set[bytes] = set()
        for job in self.running:
            sequence = next((task.sequence for task in job.tasks if task.sequence is not None), None)
            if sequence is not None and len(sequence) < len(job.request.prompt):
                found.update(self._known(job)[1][len(sequence) // self.cache.spec.page_size :])
        return found

    def _fits(self, job: Job, known: int) -> bool:
        """Whether there is room for its first rows beside what is in use and what is within others' shares. Alone it
        begins in any case."""
        more = {job.request.owner: self._needs(job, known)}
        return not self.running or least(self.cache, more, firm=True) <= self.cache.budget - self.cache.arena.tables

    def _needs(self, job: Job, known: int) -> int:
        """Bytes that it will take at first, beside those of pages that are known."""
        spec, tokens = self.cache.spec, len(job.request.prompt) + max(len(task.answer) for task in job.tasks)
        held = spec.nbytes(known * spec.page_size).allocated
        return spec.nbytes(tokens + 1, prompt=len(job.request.prompt)).allocated - held + self.cache.arena.slab_bytes
