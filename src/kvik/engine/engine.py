"""Many requests at once over one cache: a loop in a thread of its own, a queue towards it, and calls back from it.

    engine = Engine(model, kv="int8", memory="2GiB")
    for answer in engine.generate(["Name three rivers.", "Why is the sky blue?"], max_tokens=64):
        print(answer.text)
    async for update in engine.stream("Tell me a story.", max_tokens=256):
        print(update.text, end="")

Each step takes some tokens of every running request through the model together (continuous batching, Orca OSDI'22).
No request's tokens depend on what else is in a step (law 1), nor on what was guessed, preempted or found.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from kvik.cache.arena import device_memory
from kvik.cache.cache import Cache
from kvik.engine.answers import Answer, Stream
from kvik.engine.draft import Draft, check_pair, share
from kvik.engine.generation import encode_prompt
from kvik.engine.guesses import Guesser, most_guesses
from kvik.engine.job import Job, Stage, Update
from kvik.engine.lookup import Lookup
from kvik.engine.loop import Counts, Loop
from kvik.engine.needs import most_bytes
from kvik.engine.quota import Quota
from kvik.engine.request import Request
from kvik.engine.sampling import Sampling
from kvik.engine.scheduler import Pace, Scheduler
from kvik.errors import BudgetError, ContextError, EngineError, QueueError, UsageError
from kvik.models.model import Model
from kvik.units import parse_bytes

GUESSES = 8  # of a draft, at the most


class Engine:
    """See the module's docstring. Use as a context manager, or `close`.

    Attributes:
        model: of whose rows the cache is.
        cache: nobody else may touch it while the engine runs.
        draft_cache: the draft's, likewise; None where there is no draft, or nothing can be guessed.
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
        guesses: int | None = None,
        draft: Model | None = None,
        draft_kv: str = "int8",
        longest: int | None = None,
        quota: Quota | None = None,
        pace: Pace | None = None,
    ) -> None:
        """
        Args:
            kv: what the cache keeps, a spec string.
            memory: the cache's budget, such as "2GiB"; None = half of what is free. A draft's cache has its share of
                it: as much as it takes to keep the same texts, and half at the most.
            running: answers at once.
            step_tokens: tokens that go through the model at once.
            waiting: requests that may wait; more are refused.
            guesses: tokens of each answer that are guessed, to be checked all in one step: from what its text has had
                (prompt lookup decoding), or by the draft, which guesses as many as pay, up to so many. 0 = none; None =
                8 with a draft, and none without. No token is another for it. Where a policy adds up attention ("h2o")
                nothing is guessed.
            draft: a model with the same tokens that takes less time; see `engine/draft.py`.
            draft_kv: what the draft's cache keeps: rows in any codec, all or a window.
            longest: tokens of a prompt and its answer at the most; None = as many as the model can.
            quota: what each owner of requests keeps, whatever others do; None = fair shares, as far as nobody needs
                more for a request that runs alone. See `cache/owners.py`.
            pace: how many prompt tokens a step may have beside answers; None = by the time that steps take.
        """
        guesses = guesses if guesses is not None else 0 if draft is None else GUESSES
        if running < 1 or step_tokens < running or waiting < 0 or guesses < 0:
            raise UsageError(
                f"{running} answers of {step_tokens} tokens a step, {waiting} waiting, {guesses} guesses: give "
                "an answer or more, a token for each, and no number below 0"
            )
        self.model = model
        if draft is not None:
            check_pair(model, draft)
            if guesses == 0:
                raise UsageError("a draft and 0 guesses: a draft would have nothing to do; leave one of the two out")
        guesses = most_guesses(model.spec(kv), guesses)
        self.cache, self.draft_cache = _caches(model, kv, draft if guesses else None, draft_kv, memory)
        guesser: Guesser = Lookup(guesses)
        if draft is not None and self.draft_cache is not None:
            guesser = Draft(draft, self.draft_cache, model, guesses)
        self._quota = quota
        if quota is not None:
            self.cache.owners.quota = quota.bytes_of(self.cache.budget)
        most = model.longest(self.cache.spec)
        self.longest = most if longest is None else min(longest, most)
        self._most_waiting = waiting
        self._numbers, self._closed = itertools.count(), False
        self._lock = threading.Lock()  # of what askers' threads read and write: the loop's jobs, `_closed`
        scheduler = Scheduler(self.cache, running, step_tokens, guesser, pace=Pace() if pace is None else pace)
        self._loop = Loop(model, self.cache, scheduler, self._lock)
        self._thread = threading.Thread(target=self._loop.run, name="kvik engine", daemon=True)
        self._thread.start()

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
            if self._loop.broken is not None or self._closed:
                raise EngineError("the engine has broken down or was closed; make another")
            if len(self._loop.jobs) - len(self._loop.scheduler.running) >= self._most_waiting + 1:
                self._loop.counts.refused += 1
                raise QueueError(f"{self._most_waiting} requests wait already; try again later")
            job = Job.of(next(self._numbers), request, self.model, limit, tell or mail.put)
            self._loop.jobs[job.number] = job
        self._loop.inbox.put(lambda: self._loop.scheduler.add(job))
        return Stream(job.number, request.n, mail, self.abort)

    def abort(self, job: int) -> None:
        """Ends a request's answers as they are ("interrupted"); harmless where it has ended."""
        self._loop.inbox.put(lambda: self._loop.abort(job))

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
        streams = [self.submit(self._request(prompt, raw, options)) for prompt in prompts]
        if not progress:
            return [stream.answers()[0] for stream in streams]
        from rich.progress import track

        return [stream.answers()[0] for stream in track(streams, "answers")]

    async def stream(self, prompt: str | Sequence[int], *, raw: bool = False, **options: Any) -> AsyncIterator[Update]:
        """A prompt's updates as they come, for asyncio. Whoever leaves early (`break`, a cancelled task, `aclose`) ends
        the request.

        Args:
            prompt, raw, options: see `generate`.

        Raises:
            What `submit` raises, and the error that ended the request.
        """
        request = self._request(prompt, raw, options)
        loop, mail = asyncio.get_running_loop(), asyncio.Queue[Update]()

        def tell(update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the asker's loop is closed: nobody listens any more
                loop.call_soon_threadsafe(mail.put_nowait, update)

        asked, left = self.submit(request, tell), request.n
        try:
            while left:
                update = await mail.get()
                if update.error is not None:
                    raise update.error
                yield update
                left -= update.last
        finally:
            asked.abort()

    def close(self) -> None:
        """Ends what still runs, and the thread. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._loop.inbox.put(None)
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def asked(self, what: Callable[[], Any]) -> Any:
        """Calls a function in the engine's thread, between two steps, to look at the cache; returns what it gives.

        Raises:
            EngineError: the engine is closed, or has broken.
        """
        if threading.current_thread() is self._thread:
            return what()
        mail: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def look() -> None:
            try:
                mail.put((what(), None))
            except Exception as error:  # the asker's, not the engine's
                mail.put((None, error))

        self._loop.inbox.put(look)
        while True:
            with contextlib.suppress(queue.Empty):
                found, error = mail.get(timeout=0.5)
                if error is not None:
                    raise error
                return found
            if not self._thread.is_alive() and mail.empty():
                raise EngineError("the engine has broken down or was closed; nobody can look at its cache")

    def after_steps(self, listener: Callable[[], None]) -> None:
        """Calls a function in the engine's thread after every step from now on. It may submit and abort; it must be
        quick and not raise."""
        self._loop.inbox.put(lambda: self._loop.listeners.append(listener))

    def stage(self, job: int) -> Stage | None:
        """Where a request is; None = over. Exact in the engine's thread (`asked`, `after_steps`)."""
        return self._loop.stage(job)

    def check(self) -> None:
        """Conservation (law 5), and where nobody asks for anything, that nothing is left of those who did.

        Raises:
            AssertionError: names what does not add up. It would be a bug of kvik.
        """
        self.asked(self._loop.check)

    @property
    def counts(self) -> Counts:
        """What was done so far."""
        return self._loop.counts

    @property
    def broken(self) -> bool:
        """Whether it can take no more requests."""
        return self._closed or self._loop.broken is not None

    @property
    def running(self) -> int:
        """Requests that run."""
        return len(self._loop.scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return max(len(self._loop.jobs) - self.running, 0)

    def needs(self, request: Request) -> int:
        """Bytes of the cache that a request takes at the most; one that needs more than the budget is refused."""
        room = max(self.longest - len(request.prompt), 1)
        return self._alone(len(request.prompt), min(request.max_tokens or room, room), request.n)

    def _request(self, prompt: str | Sequence[int], raw: bool, options: dict[str, Any]) -> Request:
        ids = encode_prompt(self.model, prompt, raw=raw) if isinstance(prompt, str) else list(prompt)
        ours = {name: value for name, value in options.items() if name in Sampling.__dataclass_fields__}
        others = {name: value for name, value in options.items() if name not in ours}
        return Request(ids, sampling=Sampling(**ours), **others)

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
        available = self.cache.budget if self._quota is None else self._quota.left(self.cache.arena)
        if (needed := self._alone(prompt, limit, request.n)) > available:
            if request.max_tokens is None:
                while limit > 1 and self._alone(prompt, limit, request.n) > available:
                    limit //= 2
                needed = self._alone(prompt, limit, request.n)
            if needed > available:
                what, more = "all of it is", "--memory more"
                if self._quota is not None:
                    what, more = "what other tenants' quotas leave of it is", "--memory more, or --tenant-quota less"
                raise BudgetError(
                    f"{prompt:,} tokens and up to {limit:,} new ones, {request.n} times, take {needed:,} bytes of the "
                    f"cache, and {what} {available:,}; ask for fewer, or give {more}",
                    needed=needed, available=available,
                )  # fmt: skip
        return limit

    def check_room(self) -> None:
        """Raises BudgetError where the cache can't hold even a prompt of one token and its answer."""
        if (needed := self._alone(1, 1, 1)) > (left := self.cache.budget):
            raise BudgetError(
                f"a prompt of one token and its answer take {needed:,} bytes of the cache, and all of it is {left:,}, "
                "so that every request would be refused; give --memory more, or a smaller --kv",
                needed=needed, available=left,
            )  # fmt: skip

    def _alone(self, prompt: int, limit: int, n: int) -> int:
        """Bytes, in whole slabs, that a request takes at the most."""
        return most_bytes(self.model, self.cache, prompt, limit, n, self._loop.scheduler.step_tokens)


def _caches(
    model: Model, kv: str, draft: Model | None, draft_kv: str, memory: int | str | None
) -> tuple[Cache, Cache | None]:
    """The model's cache and the draft's, of one budget."""
    total = parse_bytes(memory, "memory") if isinstance(memory, str) else memory
    if draft is None:
        return model.cache(kv, memory=total), None
    total = device_memory(model.device) // 2 if total is None else total
    spec, other = model.spec(kv), draft.spec(draft_kv)
    theirs = share(total, spec, other, min(model.longest(spec), draft.longest(other)))
    return model.cache(kv, memory=total - theirs), draft.cache(draft_kv, memory=theirs)
