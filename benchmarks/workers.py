"""Other engines as processes of their own, for `peers.py` and `serve.py`: all but the one that works are stopped, so
that none of their threads spins. Each is ended by its own id, whatever happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

HERE = Path(__file__).parent
PEERS = HERE.parent / ".peers"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
COLOURS = {"kvik": "#c0392b", "llama.cpp": "#2c6e91", "openvino": "#5a4a8a", "transformers": "#8a8a8a"}
TORCH = {"GOMP_SPINCOUNT": "3000"}  # for engines that use torch: its threads don't spin against others for long


class Worker:
    """A process, stopped but while it works.

    Attributes:
        talks: it answers lines on stdin with lines on stdout.
        name: says whose log it is.
        process: None before `start`.
    """

    talks = True

    def __init__(self, name: str, command: Sequence[str], defaults: dict[str, str] | None = None) -> None:
        """
        Args:
            defaults: environment variables, where they are not set already.
        """
        self.name, self._command = name, list(command)
        self._environment = {**(defaults or {}), **os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.log = Path(tempfile.gettempdir()) / f"contender-{name.replace(' ', '-')}.log"
        self.process: Any = None

    def start(self) -> None:
        """Runs it, in a session of its own: Ctrl-C is this script's alone, which then ends it."""
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE if self.talks else log, stderr=log,
                text=True, env=self._environment, start_new_session=True,
            )  # fmt: skip

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Runs within, is stopped after."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def ask(self, **task: Any) -> dict[str, Any]:
        """Sends a task, returns what it says to it."""
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that it says."""
        line = self.process.stdout.readline()
        return dict(json.loads(line)) if line else self.lost()

    def lost(self) -> Any:
        """Raises SystemExit: it is gone."""
        raise SystemExit(f"{self.name} ended, so there is nothing to compare; {self.log} says why")

    def peak(self) -> int:
        """Bytes that it held at most, so far."""
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

    def end(self) -> None:
        """Ends it, and waits for that. Idempotent."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()


def machine() -> dict[str, Any]:
    """What it all ran on."""
    with open("/proc/cpuinfo") as cpus:
        cpu = next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), "")
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}


def installed(peers: Path, gguf: Path | None = None) -> tuple[Path, Path]:
    """(the other engines' Python, the model). Raises SystemExit where they are not there."""
    python, model = peers / "bin" / "python", gguf or peers / GGUF
    if not (python.exists() and model.exists()):
        raise SystemExit(f"{peers} has no engines or no model to compare with; run benchmarks/peers_setup first")
    return python, model


def text() -> str:
    """Python's own help, which every machine with Python has."""
    return "\n".join(topics[name] for name in sorted(topics))
