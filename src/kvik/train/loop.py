"""One training, whatever is learnt: AdamW (arXiv:1711.05101), warm-up and cosine, clipped gradients; it can be stopped
between any two steps and goes on from its file as if it never had been.

A step's batch is drawn from the seed and the step's number alone, so that a training that goes on draws what it would
have drawn.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kvik.errors import StorageError, UsageError, WeightsError
from kvik.models.files.weights import read_file

MOST_STEPS, MOST_BATCH = 10**8, 4096
WARM = 0.05  # of the steps, in which the rate rises


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps, batch: of the training, and texts or pictures in each.
        rate: the highest learning rate; it rises over the first steps and falls as a cosine does.
        decay: of matrices.
        clip: the gradients' longest norm.
        seed: of everything that is drawn.
    """

    steps: int
    batch: int = 16
    rate: float = 3e-3
    decay: float = 0.05
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise UsageError(f"--steps {self.steps}: use 1 to {MOST_STEPS:,}")
        if not 1 <= self.batch <= MOST_BATCH:
            raise UsageError(f"--batch {self.batch}: use 1 to {MOST_BATCH:,}")
        if not 0 < self.rate <= 1:  # not true of NaN either
            raise UsageError(f"--rate {self.rate}: use more than 0 and at most 1")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed {self.seed}: use a whole number from 0 to 2^31 - 1")

    def rate_at(self, step: int) -> float:
        """Of the step of this number, from 0 on."""
        warm, done = max(round(self.steps * WARM), 1), step / self.steps
        return self.rate * min(1.0, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * done))


@dataclass(frozen=True)
class Now:
    """Where a training is.

    Attributes:
        step, steps: made, and in all.
        loss: nats, of the last batch.
        items: tokens or pictures learnt from, a second.
    """

    step: int
    steps: int
    loss: float
    items: float


Batch = tuple[Tensor, Tensor]


class Loop:
    """A network on its way.

    Attributes:
        steps: that were made.
        losses: of each.
        seconds: of all of them: of processor time, or of time where another device computes.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        draw: Callable[[torch.Generator, int], Batch],
        loss: Callable[[nn.Module, Batch], Tensor],
        items: int,
    ) -> None:
        """
        Args:
            draw: a batch of so many, from a generator.
            loss: of a batch.
            items: tokens or pictures in a batch.
        """
        self.network, self.schedule, self._draw, self._loss, self._items = network, schedule, draw, loss, items
        matrices = [each for each in network.parameters() if each.ndim > 1]
        others = [each for each in network.parameters() if each.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": schedule.decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
        self.steps, self.seconds, self.losses = 0, 0.0, list[float]()
        on_cpu = next(network.parameters()).device.type == "cpu"
        self._clock = time.process_time if on_cpu else time.perf_counter

    def run(
        self,
        show: Callable[[Now], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
        keep: Callable[[], None] = lambda: None,
        every: float = 60.0,
    ) -> None:
        """Trains to the end, or until told to stop between two steps.

        Args:
            keep: is called every so many seconds, and at the end.
        """
        self.network.train()
        kept = time.monotonic()
        while self.steps < self.schedule.steps and not stopping():
            began, spent = time.perf_counter(), self._clock()
            loss = self._step()
            self.seconds += self._clock() - spent
            show(Now(self.steps, self.schedule.steps, loss, self._items / (time.perf_counter() - began)))
            if time.monotonic() - kept > every:
                keep()
                kept = time.monotonic()
        keep()
        self.network.eval()

    def _step(self) -> float:
        schedule = self.schedule
        for group in self.optimiser.param_groups:
            group["lr"] = schedule.rate_at(self.steps)
        generator = torch.Generator().manual_seed(schedule.seed << 32 | self.steps)
        loss = self._loss(self.network, self._draw(generator, schedule.batch))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), schedule.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.steps += 1
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise UsageError(f"the loss is {self.losses[-1]} at step {self.steps}: it diverged; use a smaller --rate")
        return self.losses[-1]

    def save(self, path: Path, what: str) -> None:
        """All that a training needs to go on, in one file, complete or not there at all.

        Args:
            what: model, data and schedule, as `settings` writes them; `resume` compares it.

        Raises:
            StorageError: it can't be written; what was there before stays.
        """
        from safetensors.torch import save_file

        tensors = {f"network.{name}": each for name, each in self.network.state_dict().items()}
        for number, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{name}": each for name, each in state.items()}
        head = {"what": what, "steps": self.steps, "seconds": self.seconds, "losses": self.losses}
        work = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            save_file({name: x.contiguous() for name, x in tensors.items()}, work, metadata={"kvik": json.dumps(head)})
            with work.open("rb") as file:
                os.fsync(file.fileno())
            work.replace(path)
        except OSError as error:
            raise StorageError(f"{path}: can't be written ({error.strerror or error}); free some room") from None
        finally:
            work.unlink(missing_ok=True)

    def resume(self, path: Path, what: str) -> None:
        """Goes back to where a file was kept.

        Raises:
            StorageError: it is of another training, or damaged.
        """
        try:
            tensors, metadata = read_file(path)
            head = json.loads(metadata["kvik"])
            if head["what"] != what:
                raise StorageError(
                    f"{path}: is of a training with other settings ({', '.join(_others(head['what'], what))}); repeat "
                    "those, or name another folder"
                )
            network = {n.removeprefix("network."): x for n, x in tensors.items() if n.startswith("network.")}
            self.network.load_state_dict(network)
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith("optimiser."):
                    _, number, part = name.split(".")
                    state.setdefault(int(number), {})[part] = tensor.clone()
            self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
            self.steps, self.seconds, self.losses = int(head["steps"]), float(head["seconds"]), list(head["losses"])
        except (KeyError, ValueError, TypeError, RuntimeError, WeightsError):
            raise StorageError(f"{path}: is no training that can go on; delete it and begin again") from None


def settings(**parts: object) -> str:
    """All that a training depends on, as JSON."""
    return json.dumps(parts, sort_keys=True, default=str)


def named(**parts: object) -> str:
    """A digest of all that a training depends on."""
    return hashlib.sha256(settings(**parts).encode()).hexdigest()


def _others(kept: str, given: str) -> list[str]:
    """Settings that differ, in words: those of the file first."""
    there, here = ({**each.pop("schedule"), **each} for each in (json.loads(kept), json.loads(given)))
    names = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
    return [
        "another text" if name == "text" else f"{name} {there.get(name)} there, {here.get(name)} here" for name in names
    ]
