"""What the engine's thread does: it heeds wishes, lets requests begin, and takes step after step.

    heed      what was asked meanwhile: requests, aborts, looks at the cache
    admit     who may begin gets a sequence, with what can be found of its prompt
    step      one chunk of tokens for each, through the model together
    advance   from logits to tokens: choose, check guesses, settle, tell

Room is a ladder: blocks that nobody uses are dropped by the cache, but of no owner who is within its share; then the
youngest gives its rows back and waits, to go on from what is found of it then; then requests wait in the queue, and
those that don't fit there are refused.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvik import events
from kvik.cache.cache import Cache
from kvik.engine.job import Job, Known, Likely, Stage, Task, Update
from kvik.engine.reread import Repetition
from kvik.engine.scheduler import Feed, Scheduler
from kvik.errors import BudgetError, EngineError, KvikError
from kvik.models.model import Model


@dataclass
class Counts:
    """What an engine has done since it began.

    Attributes:
        evicted: pages that were dropped to make room, by owner.
    """

    steps: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    evicted_pages: int = 0
    evicted: Counter[str] = field(default_factory=Counter)
    aborted: int = 0
    refused: int = 0


class Loop:
    """Runs in one thread, which alone touches the cache.

    Attributes:
        jobs: those that are not over, by number; others may look with `lock`.
        counts: what was done so far.
        inbox: what to do between two steps; None = end.
        broken: what went wrong, if anything did.
        listeners: called after every step.
    """

    def __init__(self, model: Model, cache: Cache, scheduler: Scheduler, lock: threading.Lock) -> None:
        self.model, self.cache, self.scheduler = model, cache, scheduler
        self.jobs: dict[int, Job] = {}
        self.counts = Counts()
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.broken: BaseException | None = None
        self.listeners: list[Callable[[], None]] = []
        self._lock = lock
        cache.listen(self._heard)

    def run(self) -> None:
        """Until None comes in. Whoever is left then hears why."""
        try:
            with torch.inference_mode():
                while self._heed():
                    self._admit()
                    self._step()
                    for listener in self.listeners:
                        listener()
        except BaseException as error:
            with self._lock:  # no request comes in behind the last look at `jobs`
                self.broken = error
            raise
        finally:
            why = EngineError("the engine was closed before the answer was complete")
            if self.broken is not None:
                why = EngineError(f"the engine has broken down ({type(self.broken).__name__}: {self.broken})")
            for job in list(self.jobs.values()):
                self._fail(job, why)

    def _heed(self) -> bool:
        """Does what was asked meanwhile; waits where there is nothing else to do. False: to be closed."""
        idle = not self.scheduler.running and not self.scheduler.waiting
        while True:
            try:
                wish = self.inbox.get(block=idle)
            except queue.Empty:
                return True
            if wish is None:
                return False
            wish()
            idle = not self.scheduler.running and not self.scheduler.waiting

    def _admit(self) -> None:
        while (job := self.scheduler.next_waiting()) is not None:
            self.scheduler.begin(job)
            try:
                self._open(job.live[0])  # the others fork off where the prompt ends
            except BudgetError as error:  # it waits itself: who has no sequence would never be in a step
                self._squeeze(error, job)
                return
            except KvikError as error:  # its source can't be read
                self._fail(job, error)

    def _open(self, task: Task) -> None:
        """Gives an answer a sequence that knows what can be found of it."""
        request, job = task.job.request, task.job
        self._stand_firm()
        every = request.prompt_logprobs is not None and not job.begun  # cached rows hold no logits
        policies = any(group.retention.policy is not None for group in self.cache.spec.groups)
        # A policy chooses at the prompt's own end, and other answers fork there.
        text = list(request.prompt) if policies or len(job.live) > 1 else task.tokens
        source, owner = None, request.owner
        if request.source is not None:
            source = self.model.fill(self.cache, request.source, request.salt, owner)
        task.sequence = self.cache.open([] if every else text, request.salt, source, owner)
        task.sequence.prompt = len(request.prompt)
        if job.known is None:
            why = "log-probabilities of the prompt were asked for, so all of it was computed" if every else ""
            known = Known(len(request.prompt), len(task.sequence), why)
            job.known, job.began = known, time.monotonic()
            self.counts.prompt_tokens += known.tokens
            self.counts.cached_tokens += known.cached

    def _step(self) -> None:
        began = time.perf_counter()
        feeds = self.scheduler.plan()
        if not feeds:
            return
        comings = [feed for feed in feeds if not feed.task.answer or len(feed.tokens) - feed.guesses > 1]
        prompts, mixed = sum(len(feed.tokens) for feed in comings), len(comings) < len(feeds)
        started = time.perf_counter()
        self._stand_firm()
        try:
            logits = self.model.run(
                [(feed.task.sequence, feed.tokens) for feed in feeds if feed.task.sequence is not None],
                last=[feed.wanted for feed in feeds],
            )
        except BudgetError as error:
            self._squeeze(error)
            return
        parts = torch.split(logits, [feed.wanted for feed in feeds])
        for feed, rows in zip(feeds, parts, strict=True):
            if feed.task.sequence is None:  # preempted by one before it
                continue
            try:
                self._advance(feed, rows)
            except EngineError as error:  # its grammar can't be followed
                self._fail(feed.task.job, error)
        self.counts.steps += 1
        ended = time.perf_counter()
        self.scheduler.pace.saw(ended - started, prompts, mixed)
        if not prompts:
            self.scheduler.guesser.took(ended - began, len(feeds), sum(feed.guesses for feed in feeds))

    def _advance(self, feed: Feed, rows: Tensor) -> None:
        """What one answer makes of its logits, f32 [wanted, vocabulary]."""
        task, sequence = feed.task, feed.task.sequence
        assert sequence is not None, "it was in the step"
        fixed, ends = len(feed.tokens) - feed.guesses, feed.ends
        new: list[int] = []
        text, likely = "", list[Likely]()
        self._prompt_likely(feed, rows)
        if ends:
            first = len(rows) - 1 - feed.guesses
            for row in range(first, len(rows)):
                token = task.take(rows[row], self.model)
                if task.job.request.logprobs is not None:
                    likely.append(Likely.of(rows[row], token, task.job.request.logprobs))
                text += task.add(token)
                new.append(token)
                guess = fixed + row - first
                if task.finish is not None or guess >= len(feed.tokens) or feed.tokens[guess] != token:
                    break
            kept = min(len(new) - 1, feed.guesses)
            self.counts.guessed_tokens += feed.guesses
            self.counts.accepted_tokens += kept
            self.scheduler.guesser.checked(feed.guesses, kept)
            sequence.trim(len(sequence) - feed.guesses + kept)
        try:
            if not Repetition(shrinks=False).take(self.model, sequence, watch=None, stopping=lambda: False):
                raise AssertionError("nothing stops it")
            sequence.settle()
        except BudgetError as error:  # its rows go; what was chosen stands, and the rest is computed again
            self._tell(task, text, new, likely)
            if task.job.live:
                self._squeeze(error, task.job)
            return
        except KvikError as error:
            self._fail(task.job, error)
            return
        if len(sequence) == len(task.job.request.prompt):
            self._fan_out(task, rows[-1])
        self._tell(task, text, new, likely)

    def _prompt_likely(self, feed: Feed, rows: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that a chunk's logits speak of: each of the next one."""
        request, sequence = feed.task.job.request, feed.task.sequence
        assert sequence is not None, "it was in the step"
        if request.prompt_logprobs is None or feed.task.job.begun:
            return
        start = len(sequence) - len(feed.tokens)
        for offset, row in enumerate(rows):
            if start + offset + 1 < len(request.prompt):
                token = request.prompt[start + offset + 1]
                feed.task.job.prompt_likely.append(Likely.of(row, token, request.prompt_logprobs))

    def _fan_out(self, leader: Task, logits: Tensor) -> None:
        """The job's other answers go on where the prompt ends, as forks: each from its own tokens, or, where it has
        none yet, with a first one."""
        assert leader.sequence is not None, "it runs"
        others = [task for task in leader.job.live if task.sequence is None]
        for task in others:
            try:
                task.sequence = leader.sequence.fork()
            except BudgetError as error:
                self._squeeze(error, leader.job)
                return
        for task in others:
            if not task.answer:
                token = task.take(logits, self.model)
                count = task.job.request.logprobs
                likely = [] if count is None else [Likely.of(logits, token, count)]
                self._tell(task, task.add(token), [token], likely)

    def _tell(self, task: Task, text: str, new: Sequence[int], likely: Sequence[Likely]) -> None:
        """Sends what is new, and ends what has ended."""
        job = task.job
        self.counts.new_tokens += len(new)
        first = bool(new) and len(task.answer) == len(new)
        if first and job.first is None:
            job.first = time.monotonic()
        if new:
            job.tell(
                Update(
                    job.number, task.number, text, tuple(new), tuple(likely),
                    tuple(job.prompt_likely) if first else (), task.finish, job.known if first else None,
                )
            )  # fmt: skip
        if task.finish is not None:
            self._release(task)

    def _release(self, task: Task) -> None:
        """An answer gives its rows back, and with the last one its job leaves: the one place where that happens."""
        task.close()
        if not task.job.live and task.job.number in self.jobs:
            self.scheduler.drop(task.job)
            with self._lock:
                del self.jobs[task.job.number]
            self.counts.requests += 1

    def abort(self, number: int) -> None:
        """Ends a job's answers as they are; harmless where it has ended."""
        job = self.jobs.get(number)
        if job is None:
            return
        self.counts.aborted += 1
        for task in job.live:
            task.finish = "interrupted"
            job.tell(Update(number, task.number, "" if task.text is None else task.text.finish(), finish=task.finish))
            self._release(task)

    def _fail(self, job: Job, error: KvikError) -> None:
        for task in job.live:
            task.finish = "interrupted"
            job.tell(Update(job.number, task.number, error=error))
            self._release(task)

    def _stand_firm(self) -> None:
        """Nobody takes what is within another's share while there is somebody who can wait instead. Who runs alone
        takes it, unless it was promised."""
        owners = self.cache.owners
        owners.firm = owners.quota is not None or len(self.scheduler.running) > 1

    def _squeeze(self, error: BudgetError, job: Job | None = None) -> None:
        """There was no room, though every block that may go was dropped: the youngest waits, or `job`. One who is
        alone fits, as was checked; if not, it hears why."""
        running = self.scheduler.running
        if len(running) == 1 and (job is None or job is running[0]) and running[0].preempted > 3:
            self._fail(running[0], error)
            return
        self.counts.preemptions += 1
        self.scheduler.preempt(self.scheduler.youngest if job is None else job)

    def stage(self, number: int) -> Stage | None:
        """See `Engine.stage`."""
        job = self.jobs.get(number)
        if job is None:
            return None
        if job in self.scheduler.running:
            return "answer" if job.begun else "prompt"
        return "preempted" if job.preempted else "queued"

    def check(self) -> None:
        """See `Engine.check`."""
        self.cache.check()
        open_now = {id(task.sequence) for job in self.jobs.values() for task in job.tasks if task.sequence is not None}
        assert {id(sequence) for sequence in self.cache.sequences} == open_now, "a sequence is nobody's"
        assert self.jobs or not (self.scheduler.waiting or self.scheduler.running), "a job is left that is over"
        self.scheduler.check()

    def _heard(self, event: events.Event) -> None:
        if isinstance(event, events.Evicted):
            self.counts.evicted_pages += event.pages
            self.counts.evicted[event.owner] += event.pages
