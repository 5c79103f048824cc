"""Answers on their way to a client: whole, or as server-sent events; and a client that goes away ends its request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from kvik.errors import KvikError
from kvik.server.desk import Asked
from kvik.server.problems import ProblemError, encoded

log = logging.getLogger("kvik.server")
DONE = b"data: [DONE]\n\n"
ALIVE = b": still here\n\n"
GONE = 499  # nginx's number for a client that left; nobody reads it
_T = TypeVar("_T")


class Json(JSONResponse):
    """A body that can always be encoded."""

    def render(self, content: Any) -> bytes:
        """See `encoded`."""
        return encoded(content)


class EventStream(StreamingResponse):
    """Events until the answer ends, the client leaves, or the request's time is over."""

    def __init__(self, asked: Asked, events: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        plain = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers | plain)
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends. A client that stops reading stops only itself, until its time is over."""
        left = self._asked.deadline + 1 - asyncio.get_running_loop().time()  # a second to say so
        tasks = [asyncio.create_task(self.stream_response(send)), asyncio.create_task(left_by(receive))]
        try:
            await asyncio.wait(tasks, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._asked.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def left_by(receive: Receive) -> None:
    """Returns once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def begun(asked: Asked, receive: Receive) -> bool:
    """Waits for an answer to begin, but not for long: whether the client is still there. Raises ProblemError."""
    first = asyncio.ensure_future(asked.begin(asked.desk.settings.keep_alive_s))
    gone = asyncio.ensure_future(left_by(receive))
    try:
        await asyncio.wait({first, gone}, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            first.result()
        else:
            asked.close()
        return first.done()
    finally:
        for task in (first, gone):
            task.cancel()
        await asyncio.gather(first, gone, return_exceptions=True)


async def whole(asked: Asked, receive: Receive, made: Awaitable[_T], head: Callable[[], dict[str, str]]) -> Response:
    """The answer as one body. Raises ProblemError.

    Args:
        made: waits for all updates and makes the body.
        head: the headers, once it is there.
    """
    body, gone = asyncio.ensure_future(made), asyncio.ensure_future(left_by(receive))
    try:
        await asyncio.wait({body, gone}, return_when=asyncio.FIRST_COMPLETED)
        if body.done():
            return Json(body.result(), headers=head())
        return Response(status_code=GONE)
    finally:
        asked.close()
        for task in (body, gone):
            task.cancel()
        await asyncio.gather(body, gone, return_exceptions=True)


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + encoded(value) + b"\n\n"


async def guarded(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The chunks and [DONE]; what goes wrong midway is an event of its own, since the status is sent already."""
    try:
        async for chunk in chunks:
            yield chunk
    except ProblemError as problem:
        yield event(problem.body)
    except KvikError as error:
        yield event(ProblemError.of(error).body)
    except Exception:
        log.exception("an answer broke off")
        yield event(ProblemError(500, "the server made a mistake; its log says more").body)
    yield DONE
