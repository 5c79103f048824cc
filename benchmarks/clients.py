"""Servers that speak OpenAI's HTTP, each in a process of its own, and clients that `serve.py` plays against them.

A client is a thread and a connection, and reads server-sent events: one event with text is one token. What a server
says at the end about tokens must be what was asked for. Clients run in the script's own process, on the same cores,
alike for all servers; how much of a core they took is among the figures.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import workers
from batches import AT_ONCE, GIB, STEP, Heard
from workers import Worker

LONGEST = 5120  # tokens of a text: what a llama.cpp slot must hold
BLOCKS = 180  # of transformers, of 256 tokens: 1 GiB in bf16; by default it takes most of the machine's memory
PATIENCE = 600.0  # seconds for one answer
Command = Callable[[int], list[str]]  # from the port
SETTLING = 1.0  # seconds in which a server notices that its clients have gone


class Server(Worker):
    """A server at a free port of this machine.

    Attributes:
        port: where it listens.
        extra: fields of every request to it.
        said: how it was called.
    """

    talks = False

    def __init__(
        self, name: str, command: Command, extra: dict[str, Any], defaults: dict[str, str] | None = None
    ) -> None:
        self.port, self.extra = free_port(), extra
        super().__init__(name, command(self.port), defaults)
        self.said = shown(command(0))

    def ready(self, seconds: float = 180.0) -> None:
        """Waits until it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                self.lost()
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.2)
        raise SystemExit(
            f"{self.name} doesn't answer after {seconds:g} s, so it can't be compared; {self.log} says more"
        )


def shown(command: list[str]) -> str:
    """A command, without folders and the port."""
    at = command.index("--port")
    return " ".join(Path(word).name for word in command[:at] + command[at + 2 :])


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def kvik(gguf: Path, python: Path, setting: str) -> Server:
    """kvik's server, as installed for this Python."""

    def command(port: int) -> list[str]:
        return [
            sys.executable, "-m", "kvik.cli", "serve", str(gguf), "--kv", setting, "--memory", f"{GIB}GiB",
            "--port", str(port), "--max-num-seqs", str(AT_ONCE), "--max-num-batched-tokens", str(STEP),
        ]  # fmt: skip

    extra = {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    return Server(f"kvik serve {setting}", command, extra, workers.TORCH)


def llama(gguf: Path, python: Path, setting: str) -> Server:
    """llama-server, a slot for each client, each large enough for the longest text."""

    def command(port: int) -> list[str]:
        return [
            str(python.parent / "llama-server"), "-m", str(gguf), "-np", str(AT_ONCE), "-c", str(AT_ONCE * LONGEST),
            "-fa", "on", "-t", str(workers.machine()["cores"]), "-ctk", setting, "-ctv", setting,
            "--port", str(port), "--no-ui",
        ]  # fmt: skip

    extra = {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    return Server(f"llama-server {setting}", command, extra)


def transformers(gguf: Path, python: Path, setting: str) -> Server:
    """transformers' server with continuous batching, over the GGUF's weights unpacked, since it fails on a GGUF itself.
    It has no `ignore_eos`: the end's id is set to none instead."""

    def command(port: int) -> list[str]:
        return [
            str(python.parent / "transformers"), "serve", "--continuous-batching", "--dtype", setting,
            "--cb-num-blocks", str(BLOCKS), "--port", str(port), str(python.parent.parent / "dense"),
        ]  # fmt: skip

    never = {"eos_token_id": -1, "do_sample": False}
    return Server(f"transformers serve {setting}", command, {"generation_config": json.dumps(never)}, workers.TORCH)


class Client(threading.Thread):
    """Asks one prompt and notes when each token comes.

    Attributes:
        heard: what it notes.
        usage: what the server says of tokens at the end.
        error: what went wrong, if anything did.
    """

    def __init__(self, server: Server, prompt: str, tokens: int, mark: int, mail: queue.SimpleQueue[Client]) -> None:
        """
        Args:
            mark: it says so when it has so many tokens, and in any case when it has ended.
        """
        super().__init__(daemon=True)
        self.heard, self.usage, self.error = Heard(), dict[str, Any](), ""
        self._body = json.dumps({"prompt": prompt, "max_tokens": tokens, "stream": True, **server.extra})
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        self._mark, self._mail, self._left = mark, mail, False

    def run(self) -> None:
        """Until the answer has ended, or `leave`."""
        try:
            self._connection.connect()
            self.heard.sent = time.perf_counter()
            self._connection.request("POST", "/v1/completions", self._body, {"content-type": "application/json"})
            response = self._connection.getresponse()
            if response.status != 200:
                raise ValueError(f"{response.status} {response.read()[:500].decode(errors='replace')}")
            rest = b""
            while data := response.read1(1 << 16):
                self.heard.ended = time.perf_counter()
                *events, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
                for event in events:
                    self._take(event)
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            self.error = "" if self._left else f"{type(error).__name__}: {error}"
        finally:
            self._connection.close()
            if len(self.heard.times) < self._mark:
                self._mail.put(self)

    def leave(self) -> None:
        """Hangs up."""
        self._left = True
        if (sock := self._connection.sock) is not None:
            with contextlib.suppress(OSError):  # it has ended just now
                sock.shutdown(socket.SHUT_RDWR)

    def _take(self, event: bytes) -> None:
        if not event.startswith(b"data: {"):
            return  # a comment, or the end
        told = json.loads(event[6:])
        if told.get("error"):
            raise ValueError(told["error"])
        self.usage = told.get("usage") or self.usage
        if any(choice["text"] for choice in told.get("choices", ())):
            self.heard.times.append(self.heard.ended)
            if len(self.heard.times) == self._mark:
                self._mail.put(self)


def play(server: Server, prompts: list[str], tokens: int, newcomer: str | None, after: int) -> list[Client]:
    """What `batches.py` says, with texts for prompts. Raises SystemExit where an answer fails."""
    mail: queue.SimpleQueue[Client] = queue.SimpleQueue()
    clients = [Client(server, prompt, tokens, after, mail) for prompt in prompts]

    def heard_from(count: int) -> None:
        for _ in range(count):
            check(mail.get(timeout=PATIENCE))

    def check(client: Client) -> None:
        if client.error:
            raise SystemExit(f"{server.name} failed an answer ({client.error}); {server.log} may say more")

    for client in clients:
        client.start()
    if newcomer is not None:
        heard_from(len(clients))
        clients.append(Client(server, newcomer, tokens, 1, mail))
        clients[-1].start()
        heard_from(1)
        for client in clients:
            client.leave()
    for client in clients:
        client.join(PATIENCE)
        check(client)
    for client in clients:
        if newcomer is None and client.usage.get("completion_tokens") != tokens:
            raise SystemExit(f"{server.name} wrote {client.usage} where {tokens} tokens were asked for")
    if newcomer is not None:
        time.sleep(SETTLING)
    return clients
