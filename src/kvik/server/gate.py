"""What every request passes first: its host, its key, and its size, before anything of it is read as JSON."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvik.server.desk import Desk, new_id
from kvik.server.problems import ProblemError
from kvik.server.stream import Json

log = logging.getLogger("kvik.server")
OPEN = frozenset(("/health", "/ready", "/readyz", "/ping", "/version", "/docs", "/openapi.json"))
_NAME = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """Stands before the app.

    Args:
        local: answers only requests that name this machine in their Host header, so that no web page can reach a
            server without keys by giving its own name this machine's address (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, desk: Desk, *, local: bool) -> None:
        self._app, self._desk, self._local = app, desk, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers, begun = Headers(scope=scope), False
        given = headers.get("x-request-id", "")
        scope.setdefault("state", {})["request"] = given if _NAME.fullmatch(given) else new_id("req")

        async def marked(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message).setdefault("x-request-id", scope["state"]["request"])
                self._desk.metrics.responded(message["status"])
            await send(message)

        try:
            scope["state"]["tenant"] = tenant = self._who(scope["path"], headers)
            if scope["method"] != "POST":
                await self._app(scope, receive, marked)
                return
            with self._desk.place(tenant):
                body = await self._body(headers, receive)
                await self._app(scope, _again(body, receive), marked)
        except ProblemError as problem:
            await Json(problem.body, problem.status, problem.headers)(scope, receive, marked)
        except Exception:
            log.exception("a request failed")
            if not begun:
                broken = ProblemError(500, "the server made a mistake; its log says more", code="internal_error")
                await Json(broken.body, broken.status)(scope, receive, marked)

    def _who(self, path: str, headers: Headers) -> str:
        """The tenant. Raises ProblemError."""
        if self._local and not is_local(_host(headers.get("host", ""))):
            raise ProblemError(
                403, "this server answers only under a name of its own machine, such as localhost; with --api-key it "
                "answers under any", code="host_not_allowed",
            )  # fmt: skip
        if path in OPEN:
            return ""
        tenant = self._desk.settings.keys.tenant(headers.get("authorization"))
        if tenant is None:
            raise ProblemError(
                401, "the API key is missing or unknown; send one as 'Authorization: Bearer …'", code="invalid_api_key"
            )
        return tenant

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """A request's body, whole. Raises ProblemError."""
        limits = self._desk.settings.limits
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ProblemError(
                415, "send JSON, with the header 'content-type: application/json'", code="unsupported_media"
            )
        too_large = ProblemError(
            413, f"the request has more than {limits.body_bytes:,} bytes; send less", code="request_too_large"
        )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > limits.body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(limits.upload_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ProblemError(400, "the client left before its request was whole")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > limits.body_bytes:
                        raise too_large
        except TimeoutError:
            raise ProblemError(
                408, f"the request took longer than {limits.upload_s:g} s to arrive", code="timeout"
            ) from None
        return bytes(body)


def is_local(host: str) -> bool:
    """Whether a name or address can only be this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{header}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
