"""A long series: digits that move through thousands of frames, one token a frame, told apart as they go.

Each frame is the network's next token: most show nothing but noise, some the present digit, and now and then it becomes
another. What is asked at every frame is which digit it is at present: the frames before it know.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvik.cache.cache import Cache
from kvik.cache.shape import LayerShape
from kvik.cache.spec import Spec
from kvik.cache.step import Step
from kvik.models.operators import Form, Operator, geometry, make
from kvik.train.loop import Batch
from kvik.train.network import Block
from kvik.train.pictures import CLASSES, FIELD, SIDE, placed

SHOWN, CHANGED, NOISE = 0.3, 0.04, 0.05  # of frames that show the digit, and before which it changes; size of the noise


def drawn(given: Batch, frames: int, count: int, generator: torch.Generator) -> Batch:
    """Series: pictures f32 [count, frames, 256], and the present digit int64 [count, frames].

    The digit moves a pixel a frame in both directions, and turns back at the edges.
    """
    pictures, labels = given
    changes = torch.rand((count, frames), generator=generator) < CHANGED
    changes[:, 0] = True
    fresh = torch.randint(len(labels), (count, frames), generator=generator)
    since = torch.where(changes, torch.arange(frames), 0).cummax(1).values
    which = fresh.gather(1, since)
    room = FIELD - SIDE
    start = torch.randint(2 * room, (2, count, 1), generator=generator)
    places = room - ((start + torch.arange(frames)) % (2 * room) - room).abs()  # there and back
    shown = (torch.rand((count, frames), generator=generator) < SHOWN) | changes
    field = placed(pictures[which.flatten()], places.permute(1, 2, 0).flatten(0, 1))
    field = field.view(count, frames, -1) * shown.unsqueeze(-1)
    return field + NOISE * torch.randn(field.shape, generator=generator), labels[which]


class Watcher(nn.Module):
    """Frames in, digits out: a causal decoder whose tokens are pictures.

    Attributes:
        blocks: its layers.
    """

    def __init__(self, operator: str, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        form = Form.parse(operator)
        self.frame = nn.Sequential(nn.Linear(FIELD * FIELD, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        where = geometry(form, length)
        self.blocks = nn.ModuleList(
            Block(make(form, width, heads, width // heads, where), width, 4 * width, 1e-5) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, frames: Tensor) -> Tensor:
        """f32 [B, n, 256] → logits [B, n, 10], without a cache."""
        x = self.frame(frames)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x))
        return found

    def shapes(self) -> list[LayerShape]:
        """What a cache keeps of a frame."""
        return [shape for block in self.blocks for shape in _mixer(block).shapes()]

    def steps(self, frames: Tensor, kv: str) -> Iterator[tuple[Tensor, float, int]]:
        """One frame after another through a cache: logits [10], seconds, and bytes that are held.

        Args:
            frames: f32 [n, 256].
            kv: a spec string.
        """
        cache = Cache(Spec.parse(kv, self.shapes()), memory=256 << 20, shares=False)
        with cache.open() as sequence:
            for number, frame in enumerate(frames):
                began = time.perf_counter()
                logits = self._step(sequence.append([number]), frame)
                sequence.settle()
                yield logits, time.perf_counter() - began, sequence.nbytes.allocated

    @torch.inference_mode()
    def _step(self, step: Step, frame: Tensor) -> Tensor:
        """One frame's logits [10]."""
        at, x = 0, self.frame(frame[None])
        with step:
            for block in self.blocks:
                assert isinstance(block, Block), "all layers are"
                x = block.after(x, block.mixer.step(step, at, block.ln_1(x)))
                at += len(block.mixer.shapes())
        found: Tensor = self.head(self.norm(x))[0]
        return found


@dataclass(frozen=True)
class Course:
    """How a series went under one spec.

    Attributes:
        kv: the spec; "none" = without a cache.
        at: frames at which time was taken.
        ms: milliseconds a frame there, the fastest of those since the last place.
        held: bytes held there: of a cache, or of the largest scores that a pass without one computes.
        right: frames told right, 0 to 1, by the same places.
    """

    kv: str
    at: tuple[int, ...]
    ms: tuple[float, ...]
    held: tuple[int, ...]
    right: tuple[float, ...]


def follow(watcher: Watcher, frames: Tensor, labels: Tensor, specs: Sequence[str], every: int = 100) -> list[Course]:
    """A series through several caches side by side, frame by frame, so that what else the machine does meets all alike;
    and, where a spec is "none", every `every`-th frame by a pass over all frames so far."""
    watcher.eval()
    courses = {kv: watcher.steps(frames, kv) for kv in specs if kv != "none"}
    told: dict[str, list[tuple[Tensor, float, int]]] = {kv: [] for kv in specs}
    heads = _mixer(watcher.blocks[0]).heads
    for number in range(len(frames)):
        for kv, course in courses.items():
            told[kv].append(next(course))
        if (number + 1) % every == 0 and "none" in specs:
            end = number + 1
            taken = min(_recomputed(watcher, frames[:end]) for _ in range(3))
            told["none"].append((torch.zeros(0), taken, 4 * heads * end * end))
    at = tuple(range(every, len(frames) + 1, every))
    out = []
    for kv, found in told.items():
        if kv == "none":
            with torch.inference_mode():
                right = watcher(frames[None])[0].argmax(-1) == labels
            times, held = [seconds for _, seconds, _ in found], [size for *_, size in found]
        else:
            right = torch.stack([logits for logits, *_ in found]).argmax(-1) == labels
            times = [min(seconds for _, seconds, _ in found[end - every : end]) for end in at]
            held = [found[end - 1][2] for end in at]
        shares = [float(right[end - every : end].float().mean()) for end in at]
        out.append(Course(kv, at, tuple(1e3 * each for each in times), tuple(held), tuple(shares)))
    return out


def _recomputed(watcher: Watcher, frames: Tensor) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        watcher(frames[None])
    return time.perf_counter() - began


def _mixer(block: nn.Module) -> Operator:
    assert isinstance(block, Block), "all layers are"
    return block.mixer
