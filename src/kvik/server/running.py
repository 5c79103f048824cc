"""A server's life: bound, ready, draining after the first SIGTERM, gone after the second. It leaves no files behind."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from types import FrameType

import uvicorn
from uvicorn.server import Server as Uvicorn

from kvik.engine.engine import Engine
from kvik.errors import UsageError
from kvik.server.app import create
from kvik.server.gate import is_local
from kvik.server.settings import Settings

log = logging.getLogger("kvik.server")


class Server(Uvicorn):
    """See the module's docstring.

    Attributes:
        interrupted: whether Ctrl-C ended it.
        banner: printed on stderr once it answers.
    """

    def __init__(self, engine: Engine, settings: Settings, *, host: str, log_level: str = "warning") -> None:
        """
        Args:
            host: that it will be bound to.
            log_level: uvicorn's.
        """
        app, self.desk = create(engine, settings, local=is_local(host))
        super().__init__(
            uvicorn.Config(
                app,
                log_level=log_level,
                timeout_graceful_shutdown=5,
                timeout_keep_alive=75,
                server_header=False,
                lifespan="off",
                ws="none",
            )
        )
        self.interrupted = False
        self.banner: str | None = None
        self._drain_until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first SIGTERM drains; a second one, or Ctrl-C, ends at once; Ctrl-C again doesn't wait for anything."""
        if sig == signal.SIGTERM and self._drain_until is None and not self.should_exit:
            self.desk.draining = True
            self._drain_until = time.monotonic() + self.desk.settings.drain_s
            return
        self.interrupted = self.interrupted or sig == signal.SIGINT
        self.force_exit = self.should_exit
        self._end()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says so."""
        await super().startup(sockets)
        if self.banner is not None and self.started:
            print(self.banner, file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._drain_until is not None and (not self.desk.busy or time.monotonic() > self._drain_until):
            self._end()
        return await super().on_tick(counter)

    def _end(self) -> None:
        self.desk.draining = True
        self.desk.abort_all()
        self.should_exit = True


def bound(host: str, port: int) -> socket.socket:
    """A socket that takes connections. Raises UsageError where it can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r} is no address of this machine ({error}); use 127.0.0.1") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1024)
    except OSError as error:
        made.close()
        raise UsageError(f"{host}:{port} can't be listened at ({error.strerror}); choose another --port") from None
    return made
