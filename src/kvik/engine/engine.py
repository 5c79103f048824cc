"""Many requests at once over one cache: a loop in a thread of its own, a queue towards it, and calls back from it.

    engine = Engine(model, kv="int8", memory="2GiB")
    for answer in engine.generate(["Name three rivers.", "Why is the sky blue?"], max_tokens=64):
        print(answer.text)

Each step takes some tokens of every running request through the model together (continuous batching, Orca OSDI'22).
No request's tokens depend on what else is in a step (law 1), nor on what was guessed, preempted or found.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvik import events
from kvik.cache.sizes import group_bytes
from kvik.engine.generation import encode_prompt
from kvik.engine.guesses import Guesses
from kvik.engine.job import Job, Known, Likely, Task, Update
from kvik.engine.request import FinishReason, Request
from kvik.engine.reread import Repetition
from kvik.engine.sampling import Sampling
from kvik.engine.scheduler import Feed, Scheduler
from kvik.errors import BudgetError, ContextError, EngineError, KvikError, QueueError, UsageError
from kvik.models.model import Model
from kvik.units import parse_bytes


@dataclass
class Counts:
    """What an engine has done since it began."""

    steps: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    evicted_pages: int = 0
    aborted: int = 0
    refused: int = 0


@dataclass
class Answer:
    """A finished answer.

    Attributes:
        text, token_ids, logprobs, finish_reason: see `Update`.
        known: of the request's prompt.
        prompt_logprobs: of its tokens from the second on, if asked for.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Likely] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    known: Known | None = None
    prompt_logprobs: tuple[Likely, ...] = ()

    def take(self, update: Update) -> None:
        """Adds what came. Raises the error that ended it."""
        if update.error is not None:
            raise update.error
        self.text += update.text
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs
        self.finish_reason = update.finish
        self.known = update.known or self.known
        self.prompt_logprobs = update.prompt_logprobs or self.prompt_logprobs


class Stream:
    """A request's updates as they come; iterate once. `abort` ends it at any moment."""

    def __init__(self, engine: Engine, job: int, answers: int, mail: queue.SimpleQueue[Update]) -> None:
        self.job, self._engine, self._answers, self._mail = job, engine, answers, mail

    def __iter__(self) -> Iterator[Update]:
        """Raises the error that ended the request."""
        left = self._answers
        while left:
            update = self._mail.get()
            if update.error is not None:
                raise update.error
            yield update
            left -= update.last

    def abort(self) -> None:
        """Ends all its answers; harmless where they have ended."""
        self._engine.abort(self.job)

    def answers(self) -> list[Answer]:
        """Waits for all of them."""
        found = [Answer() for _ in range(self._answers)]
        for update in self:
            found[update.answer].take(update)
        return found


class Engine:
    """See the module's docstring. Use as a context manager, or `close`.

    Attributes:
        model: of whose rows the cache is.
        cache: nobody else may touch it while the engine runs.
        counts: what was done so far.
        longest: tokens of a prompt and its answer at the most.
    """

    def __init__(
        self,
        model: Model,
        kv: str = "bf16",
        *,
        memory: int | str | None = None,
        running: int = 32,
        step_tokens: int = 512,
        waiting: int = 256,
        guesses: int = 0,
        longest: int | None = None,
    ) -> None:
        """
        Args:
            kv: what the cache keeps, a spec string.
            memory: the cache's budget, such as "2GiB"; None = half of what is free.
            running: answers at once.
            step_tokens: tokens that go through the model at once.
            waiting: requests that may wait; more are refused.
            guesses: tokens of each answer that are guessed from what its text has had, to be checked all in one step
                (prompt lookup decoding); 0 = none. No token is another for it.
            longest: tokens of a prompt and its answer at the most; None = as many as the model can.
        """
        if running < 1 or step_tokens < running or waiting < 0 or guesses < 0:
            raise UsageError(
                f"{running} answers of {step_tokens} tokens a step, {waiting} waiting, {guesses} guesses: give "
                "an answer or more, a token for each, and no number below 0"
            )
        self.model = model
        self.cache = model.cache(kv, memory=parse_bytes(memory, "memory") if isinstance(memory, str) else memory)
        self.counts = Counts()
        most = model.longest(self.cache.spec)
        self.longest = most if longest is None else min(longest, most)
        self._most_waiting = waiting
        self._guesses = Guesses(guesses, self.cache.spec)
        self._scheduler = Scheduler(self.cache, running, step_tokens, self._guesses)
        self._numbers, self._jobs = itertools.count(), dict[int, Job]()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what askers' threads read and write: `_jobs`, `_closed`
        self._closed = False
        self._broken: BaseException | None = None
        self.cache.listen(self._heard)
        self._thread = threading.Thread(target=self._serve, name="kvik engine", daemon=True)
        self._thread.start()

    # What askers' threads call.

    def submit(self, request: Request, tell: Callable[[Update], None] | None = None) -> Stream:
        """Takes a request; returns at once.

        Args:
            tell: takes its updates in the engine's thread instead of the stream; must be quick and not raise.

        Raises:
            ContextError, UsageError: it can't be served by this model.
            BudgetError: it can never fit, even alone.
            QueueError: too many wait.
            EngineError: the engine is closed, or has broken.
        """
        limit = self._check(request)
        mail: queue.SimpleQueue[Update] = queue.SimpleQueue()
        with self._lock:
            if self._broken is not None or self._closed:
                raise EngineError("the engine has broken down or was closed; make another")
            if len(self._jobs) - len(self._scheduler.running) >= self._most_waiting + 1:
                self.counts.refused += 1
                raise QueueError(f"{self._most_waiting} requests wait already; try again later")
            job = Job.of(next(self._numbers), request, self.model, limit, tell or mail.put)
            self._jobs[job.number] = job
        self._inbox.put(lambda: self._scheduler.add(job))
        return Stream(self, job.number, request.n, mail)

    def abort(self, job: int) -> None:
        """Ends a request's answers as they are ("interrupted"); harmless where it has ended."""
        self._inbox.put(lambda: self._abort(job))

    def generate(
        self, prompts: Sequence[str | Sequence[int]], *, raw: bool = False, progress: bool = False, **options: Any
    ) -> list[Answer]:
        """Answers to all prompts, in their order.

        Args:
            prompts: texts, or token ids.
            raw: texts are the beginning of the answer's own, and no user's message.
            progress: shows a bar on stderr.
            options: `Request`'s other attributes; `temperature` and the like are `Sampling`'s.
        """
        streams = []
        for prompt in prompts:
            ids = encode_prompt(self.model, prompt, raw=raw) if isinstance(prompt, str) else list(prompt)
            streams.append(self.submit(_request(ids, options)))
        if not progress:
            return [stream.answers()[0] for stream in streams]
        from rich.progress import track

        return [stream.answers()[0] for stream in track(streams, "answers")]

    def close(self) -> None:
        """Ends what still runs, and the thread. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._inbox.put(None)
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def asked(self, what: Callable[[], Any]) -> Any:
        """Calls a function in the engine's thread, between two steps, to look at the cache; returns what it gives."""
        mail: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def look() -> None:
            try:
                mail.put((what(), None))
            except Exception as error:  # the asker's, not the engine's
                mail.put((None, error))

        self._inbox.put(look)
        while True:
            with contextlib.suppress(queue.Empty):
                found, error = mail.get(timeout=0.5)
                if error is not None:
                    raise error
                return found
            if not self._thread.is_alive() and mail.empty():
                raise EngineError("the engine has broken down or was closed; nobody can look at its cache")

    @property
    def broken(self) -> bool:
        """Whether it can take no more requests."""
        return self._closed or self._broken is not None

    @property
    def running(self) -> int:
        """Requests that run."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return max(len(self._jobs) - len(self._scheduler.running), 0)

    # The loop.

    def _serve(self) -> None:
        try:
            with torch.inference_mode():
                while self._heed():
                    self._admit()
                    self._step()
        except BaseException as error:
            with self._lock:  # no request comes in behind the last look at `_jobs`
                self._broken = error
            raise
        finally:
            why = EngineError("the engine was closed before the answer was complete")
            if self._broken is not None:
                why = EngineError(f"the engine has broken down ({type(self._broken).__name__}: {self._broken})")
            for job in list(self._jobs.values()):
                self._fail(job, why)

    def _heed(self) -> bool:
        """Does what was asked meanwhile; waits where there is nothing else to do. False: to be closed."""
        idle = not self._scheduler.running and not self._scheduler.waiting
        while True:
            try:
                wish = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if wish is None:
                return False
            wish()
            idle = not self._scheduler.running and not self._scheduler.waiting

    def _admit(self) -> None:
        while (job := self._scheduler.next_waiting()) is not None:
            self._scheduler.begin(job)
            try:
                for task in job.live if any(task.answer for task in job.tasks) else job.tasks[:1]:
                    self._open(task)
            except BudgetError as error:
                self._squeeze(error)
                return

    def _open(self, task: Task) -> None:
        """Gives an answer a sequence that knows what can be found of it."""
        request, job = task.job.request, task.job
        every = request.prompt_logprobs is not None and not task.answer  # cached rows hold no logits
        policies = any(group.retention.policy is not None for group in self.cache.spec.groups)
        text = list(request.prompt) if policies else task.tokens  # a policy chooses at the prompt's own end
        source = None if request.source is None else self.model.fill(self.cache, request.source, request.salt)
        task.sequence = self.cache.open([] if every else text, request.salt, source)
        task.sequence.prompt = len(request.prompt)
        if job.known is None:
            known = Known(len(request.prompt), len(task.sequence), "")
            job.known, job.began = known, time.monotonic()
            self.counts.prompt_tokens += known.tokens
            self.counts.cached_tokens += known.cached

    def _step(self) -> None:
        feeds = self._scheduler.plan()
        if not feeds:
            return
        comings = [feed for feed in feeds if not feed.task.answer or len(feed.tokens) - feed.guesses > 1]
        prompts, mixed = sum(len(feed.tokens) for feed in comings), len(comings) < len(feeds)
        started = time.perf_counter()
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
        self._scheduler.pace.saw(time.perf_counter() - started, prompts, mixed)

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
            sequence.trim(len(sequence) - feed.guesses + kept)
        try:
            if not Repetition().take(self.model, sequence, watch=None, stopping=lambda: False):
                raise AssertionError("nothing stops it")
            sequence.settle()
        except BudgetError as error:  # its rows go; what was chosen stands, and the rest is computed again
            self._tell(task, text, new, likely)
            self._squeeze(error, task.job)
            return
        except KvikError as error:
            self._fail(task.job, error)
            return
        if new and len(task.answer) == len(new) and task.number == 0:
            self._fan_out(task, rows[-1])
        self._tell(task, text, new, likely)

    def _prompt_likely(self, feed: Feed, rows: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that a chunk's logits speak of: each of the next one."""
        request, sequence = feed.task.job.request, feed.task.sequence
        assert sequence is not None, "it was in the step"
        if request.prompt_logprobs is None or feed.wanted != len(feed.tokens) or feed.guesses or feed.task.answer:
            return
        start = len(sequence) - len(feed.tokens)
        for offset, row in enumerate(rows):
            if start + offset + 1 < len(request.prompt):
                token = request.prompt[start + offset + 1]
                feed.task.job.prompt_likely.append(Likely.of(row, token, request.prompt_logprobs))

    def _fan_out(self, leader: Task, logits: Tensor) -> None:
        """The job's other answers begin where the prompt ends: as forks, each with a first token of its own."""
        assert leader.sequence is not None, "it runs"
        for task in leader.job.tasks[1:]:
            try:
                task.sequence = leader.sequence.fork()
            except BudgetError as error:
                self._squeeze(error, leader.job)
                return
        for task in leader.job.tasks[1:]:
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
        if task.sequence is not None:
            task.sequence.close()
            task.sequence = None
        if not task.job.live and task.job.number in self._jobs:
            self._scheduler.drop(task.job)
            with self._lock:
                del self._jobs[task.job.number]
            self.counts.requests += 1

    def _abort(self, number: int) -> None:
        job = self._jobs.get(number)
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

    def _squeeze(self, error: BudgetError, job: Job | None = None) -> None:
        """There was no room, though every block that nobody uses was dropped: the youngest waits, or `job`. One who is
        alone fits, as was checked; if not, it hears why."""
        running = self._scheduler.running
        if len(running) == 1 and (job is None or job is running[0]) and running[0].preempted > 3:
            self._fail(running[0], error)
            return
        self.counts.preemptions += 1
        self._scheduler.preempt(self._scheduler.youngest if job is None else job)

    def _heard(self, event: events.Event) -> None:
        if isinstance(event, events.Evicted):
            self.counts.evicted_pages += event.pages

    def _check(self, request: Request) -> int:
        """New tokens at the most. Raises what `submit` says."""
        model, spec, prompt = self.model, self.cache.spec, len(request.prompt)
        known = model.config.vocab_size
        if not all(0 <= token < known for token in request.prompt):
            raise UsageError(f"token ids must be 0 to {known - 1}; got {min(request.prompt)} to {max(request.prompt)}")
        model.check_context(prompt + 1, spec)
        if prompt >= self.longest:
            raise ContextError(
                f"{prompt:,} tokens leave no room for an answer: a text has {self.longest:,} at the most"
            )
        room = self.longest - prompt
        limit = min(request.max_tokens or model.config.max_positions, room)
        if (needed := self._alone(prompt, limit, request.n)) > self.cache.budget:
            if request.max_tokens is None:
                while limit > 1 and self._alone(prompt, limit, request.n) > self.cache.budget:
                    limit //= 2
                needed = self._alone(prompt, limit, request.n)
            if needed > self.cache.budget:
                raise BudgetError(
                    f"{prompt:,} tokens and up to {limit:,} new ones, {request.n} times, take {needed:,} bytes of the "
                    f"cache, and all of it is {self.cache.budget:,}; ask for fewer, or give --memory more",
                    needed=needed, available=self.cache.budget,
                )  # fmt: skip
        return limit

    def _alone(self, prompt: int, limit: int, n: int) -> int:
        """Bytes, in whole slabs, that a request takes at the most."""
        spec, arena = self.cache.spec, self.cache.arena
        held: dict[int, int] = {}
        for group in spec.groups:
            if group.source:
                continue
            most = max(
                group_bytes(group, at, min(prompt, at), settled=settled).allocated
                for at in {prompt, prompt + limit}
                for settled in (False, True)
            )
            more = most - group_bytes(group, prompt, settled=False).allocated if n > 1 else 0
            pages = n * len(group.lanes) * group.page_bytes  # copies of the last page
            held[group.page_bytes] = held.get(group.page_bytes, 0) + most + (n - 1) * max(more, 0) + pages
        return sum(-(-size // arena.slab_bytes) + 1 for size in held.values()) * arena.slab_bytes


def _request(ids: list[int], options: dict[str, Any]) -> Request:
    ours = {name: value for name, value in options.items() if name in Sampling.__dataclass_fields__}
    others = {name: value for name, value in options.items() if name not in ours}
    return Request(ids, sampling=Sampling(**ours), **others)
