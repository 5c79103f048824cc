"""What an evaluation asks of a cache: one for a text, all predictions of it, and an account of the rows left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.cache.cache import Cache
from kvik.cache.sequence import Sequence as KVSequence
from kvik.cache.spec import Spec
from kvik.cache.step import Step
from kvik.engine.generation import room
from kvik.errors import SpecError
from kvik.eval.results import FULL
from kvik.models.model import Model

CHUNK = 64  # tokens at once where all their predictions are wanted: 12 MB of SmolLM2's


def fitting(model: Model, specs: Sequence[str]) -> list[str]:
    """Those that the model can have: not every one keeps keys and values, or turns its keys by position."""
    found = []
    for kv in specs:
        with contextlib.suppress(SpecError):
            model.spec(kv)
            found.append(kv)
    return found


def distinct(model: Model, specs: Sequence[str]) -> list[Spec]:
    """The full cache, and after it every other spec once, in order.

    Raises:
        SpecError: one can't be read, or doesn't fit the model.
    """
    parsed = [model.spec(kv) for kv in (FULL, *specs)]
    return list({str(spec): spec for spec in parsed}.values())


def opened(model: Model, kv: str, tokens: int) -> Cache:
    """A cache for one text, from which no other takes rows. An accelerator allocates a budget at once, so there it is
    twice what all rows take."""
    memory = None
    if model.device.type == "cuda":
        groups = model.spec(kv).groups
        rows = sum(len(group.lanes) * (tokens + 2 * group.page_size) * group.layout.row_bytes for group in groups)
        memory = 2 * rows + (64 << 20)
    return model.cache(kv, memory=memory, shares=False)


def forced(model: Model, sequence: KVSequence, tokens: Sequence[int], most: int = CHUNK) -> Iterator[Tensor]:
    """Feeds tokens, `most` at once, each chunk settled; none passes a position at which a policy chooses.

    Yields:
        Logits after every token, f32 [tokens of the chunk, vocabulary].
    """
    start = 0
    while start < len(tokens):
        chunk = tokens[start : start + min(most, room(sequence))]
        logits = model.run([(sequence, chunk)], every=True)
        sequence.settle()
        start += len(chunk)
        yield logits


class Peak:
    """The most bytes that sequences held: looked at inside each step, when its pages are there and none has left."""

    def __init__(self) -> None:
        self.allocated = 0

    def watch(self, step: Step) -> Step:
        """For `prefill`: looks, and passes the step on as it is."""
        held = sum(sequence.nbytes.allocated for sequence in step.sequences)
        self.allocated = max(self.allocated, held)
        return step


def kept_share(sequence: KVSequence) -> float:
    """Share of all rows that a sequence still has, 0 to 1; lanes count by the bytes of their rows."""
    return sequence.nbytes.payload / every_row(sequence.cache.spec, len(sequence))


def rows_held(spec: Spec, tokens: int, payload: int) -> float:
    """Rows that a head holds of a text, on average; heads count by the bytes of their rows."""
    return tokens * payload / max(every_row(spec, tokens), 1)


def every_row(spec: Spec, tokens: int) -> int:
    """Bytes of payload if no row of a text were dropped."""
    return sum(len(group.lanes) * tokens * group.layout.payload_bits // 8 for group in spec.groups)


def kept_rows(sequence: KVSequence) -> list[NDArray[np.bool_]]:
    """Which rows each layer's heads still hold: bool [heads, tokens] for each layer that has rows.

    A window hides rows one by one and gives them back by the page, so up to a page more is held than is seen.
    """
    layers = sorted({layer for group in sequence.cache.spec.groups for layer, _ in group.lanes})
    found = []
    for layer in layers:
        rows = sequence.read(layer)
        positions = rows.pop("positions")
        stream = next(iter(rows.values()))
        held = torch.zeros(stream.shape[0], len(sequence), dtype=torch.bool)
        held[:, positions.cpu()] = ~stream.isnan().all(dim=-1).cpu()
        found.append(held.numpy())
    return found
