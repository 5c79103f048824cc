"""Where the server's event loop and the engine's thread meet: requests go in, updates come back, and nothing else.

The engine's thread never waits for a client: it puts updates into a queue, of which there are as many as the request
may have tokens. A client that goes away, or takes too long, ends its request; one that reads slowly slows itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from kvik.engine.engine import Engine
from kvik.engine.job import Update
from kvik.engine.request import Request
from kvik.errors import KvikError
from kvik.server.metrics import Metrics
from kvik.server.problems import ProblemError
from kvik.server.records import Record, Records
from kvik.server.settings import Settings

log = logging.getLogger("kvik.server")
GATHERED = 0.002  # seconds: about what the engine takes to tell all askers of one step


@dataclass
class Asked:
    """One HTTP request's: a request to the engine for each of its prompts.

    Attributes:
        deadline: on the event loop's clock.
        first: the update that came first, if it was waited for.
    """

    desk: Desk
    record: Record
    requests: Sequence[Request]
    deadline: float
    jobs: list[int] = field(default_factory=list)
    closed: bool = False
    _left: int = 0
    _mail: deque[tuple[int, Update]] = field(default_factory=deque)
    _waits: asyncio.Future[None] | None = None
    _ahead: list[tuple[int, Update]] = field(default_factory=list)

    def post(self, number: int, update: Update) -> None:
        """Something came for this request."""
        self._mail.append((number, update))
        _wake(self._waits)

    async def begin(self, seconds: float) -> bool:
        """Waits for the first update, so long at the most: whether it came. Raises ProblemError."""
        if await self._came(seconds):
            self._ahead.append(self._next())
        return bool(self._ahead)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(which prompt, what came), until all answers have ended. Raises ProblemError."""
        async for item in self.updates_or_none(math.inf):
            if item is not None:
                yield item

    async def updates_or_none(self, seconds: float) -> AsyncIterator[tuple[int, Update] | None]:
        """The same, and None wherever nothing came for so long."""
        while self._ahead:
            yield self._ahead.pop(0)
        while self._left:
            yield self._next() if await self._came(seconds) else None

    async def _came(self, seconds: float) -> bool:
        """Waits for an update, so long at the most, and not beyond the deadline: whether there is one. One future and
        one timer for each wait, since every token of everybody passes here."""
        if self._mail:
            return True
        loop = asyncio.get_running_loop()
        self._waits = loop.create_future()
        timer = loop.call_at(min(loop.time() + seconds, self.deadline), _wake, self._waits)
        try:
            await self._waits
        finally:
            timer.cancel()
            self._waits = None
        if not self._mail and loop.time() >= self.deadline:
            longest = self.desk.settings.limits.seconds
            self.close("timeout")
            raise ProblemError(408, f"the answer took longer than {longest:g} s; ask for fewer tokens", code="timeout")
        return bool(self._mail)

    def _next(self) -> tuple[int, Update]:
        """Takes the update that came. Raises ProblemError."""
        number, update = self._mail.popleft()
        if update.error is not None:
            self.close("error")
            raise ProblemError.of(update.error)
        if update.finish == "interrupted":
            self.close("aborted")
            raise ProblemError(503, "the server was shut down before the answer was complete", code="shutdown", wait=5)
        self._left -= update.last
        self._note(number, update)
        return number, update

    def _note(self, number: int, update: Update) -> None:
        record, now = self.record, time.monotonic()
        prompt = record.prompts[number]
        if update.known is not None and prompt.known is None:
            prompt.known = update.known
            prompt.evicted = self.desk.engine.counts.evicted[self.requests[number].owner]
            self.desk.metrics.known(record, update.known)
        seconds = now - record.arrived
        self.desk.metrics.tokens(record, len(update.token_ids), seconds)
        record.new_tokens += len(update.token_ids)
        record.first_s = seconds if record.first_s is None else record.first_s
        record.last_s, record.status = seconds, "running" if self._left else "done"
        if update.finish is not None:
            self.desk.metrics.finished(update.finish)
        if not self._left:
            self.desk.metrics.ended(record)

    def close(self, status: str = "aborted") -> None:
        """Ends what still runs; harmless where nothing does. The one place where a request leaves."""
        if self.closed:
            return
        self.closed = True
        if self._left:
            self.record.status = status
            self.desk.metrics.finished(status)
        for job in self.jobs:
            self.desk.engine.abort(job)
        self.desk.leave(self)


class Desk:
    """Takes requests in.

    Attributes:
        draining: no new ones are taken.
    """

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.records = Records(engine.cache.spec.page_size)
        self.draining = False
        self._at_once: Counter[str] = Counter()
        self._open: list[Asked] = []
        self._posted: deque[tuple[Asked, int, Update]] = deque()
        self._rings = False  # the event loop will look at `_posted`

    @property
    def busy(self) -> int:
        """HTTP requests that are arriving, in the making, or being answered."""
        return self._at_once.total()

    @contextlib.contextmanager
    def place(self, tenant: str) -> Iterator[None]:
        """A place for a request, from before it is read to after it is answered. Raises ProblemError where all are
        taken."""
        self.check()
        limits = self.settings.limits
        if tenant and self._at_once[tenant] >= limits.requests_per_key:
            self.metrics.refused("requests_per_key")
            raise ProblemError(
                429, f"{limits.requests_per_key} requests of this key run at once already; try again later",
                code="rate_limit_exceeded", wait=1,
            )  # fmt: skip
        if self.busy >= limits.requests:
            self.metrics.refused("requests")
            message = f"{limits.requests} requests run at once already; try again later"
            raise ProblemError(429, message, code="queue_full", wait=1)
        self._at_once[tenant] += 1
        try:
            yield
        finally:
            self._at_once[tenant] -= 1
            if not self._at_once[tenant]:
                del self._at_once[tenant]

    def check(self) -> None:
        """Raises ProblemError where no requests are taken."""
        if self.draining:
            raise ProblemError(503, "the server is shutting down and takes no more requests", code="draining", wait=5)
        if self.engine.broken:
            raise ProblemError(
                503, "the engine has broken down; the server must be restarted", code="engine_broken", wait=30
            )

    def ask(self, id: str, tenant: str, requests: Sequence[Request]) -> Asked:
        """Hands requests to the engine: all, or none. Raises ProblemError."""
        self.check()
        loop = asyncio.get_running_loop()
        record = self.records.add(id, tenant, [(request.prompt, request.salt) for request in requests])
        asked = Asked(self, record, requests, loop.time() + self.settings.limits.seconds)
        asked._left = sum(request.n for request in requests)
        self._open.append(asked)
        for number, request in enumerate(requests):

            def tell(update: Update, number: int = number) -> None:
                self._posted.append((asked, number, update))
                if not self._rings:
                    self._rings = True
                    with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is there to hear it
                        loop.call_soon_threadsafe(self._gather, loop)

            try:
                asked.jobs.append(self.engine.submit(request, tell).job)
            except KvikError as error:
                problem = ProblemError.of(error)
                asked.close(problem.code or "refused")
                if problem.status == 429:
                    self.metrics.refused("queue")
                raise problem from None
        return asked

    def _gather(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hands updates out, those of a step at once: while the engine still tells, each would take its thread's turn
        (Python has one turn for all threads); a little later it computes without one."""
        if len(self._open) > 1:
            loop.call_later(GATHERED, self._hand_out)
        else:
            self._hand_out()

    def _hand_out(self) -> None:
        self._rings = False  # before looking: what comes from now on rings again
        while self._posted:
            asked, number, update = self._posted.popleft()
            asked.post(number, update)

    def leave(self, asked: Asked) -> None:
        """A request is over."""
        self._open.remove(asked)

    def abort_all(self) -> None:
        """Ends all that run: their clients hear that the server was shut down."""
        for asked in self._open:
            for job in asked.jobs:
                self.engine.abort(job)


def _wake(waits: asyncio.Future[None] | None) -> None:
    if waits is not None and not waits.done():
        waits.set_result(None)


def new_id(prefix: str) -> str:
    """Of an answer; nobody can guess it."""
    return f"{prefix}-{secrets.token_hex(16)}"
