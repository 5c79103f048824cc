"""Takes the measurements: counts first, which warms up, then times, with a cache and without in turn."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

import torch

from kvik.bench.counting import Tally
from kvik.bench.fit import grid
from kvik.bench.growth import STEPS, Batch, Environment, Growth, Side, batch_prompt
from kvik.bench.processor import cpu_name
from kvik.bench.spread import spread
from kvik.cache.cache import Cache
from kvik.cache.sequence import Sequence
from kvik.cache.spec import Bytes
from kvik.cache.step import Step
from kvik.engine.generation import prefill
from kvik.models.model import Model
from kvik.models.watch import Chunk
from kvik.plan.work import Arithmetic

BATCH_CONTEXT = 128  # tokens of each sequence of a batch
Show = Callable[[str, int, int], None]


def measure(
    model: Model,
    ids: Seq[int],
    *,
    kv: str = "bf16",
    batch: Seq[int] = (1, 2, 4, 8),
    rounds: int = 3,
    name: str = "",
    show: Show = lambda what, done, total: None,
) -> Growth:
    """Measures texts up to `len(ids)` tokens.

    Args:
        model: loaded.
        ids: the text's tokens.
        kv: what the cache keeps.
        batch: numbers of sequences; each has min(len(ids), 128) tokens.
        rounds: how often each time is taken; medians count.
        name: what to call the model; by default its own name.
        show: called with (what is measured next, tokens done, tokens in all), never while something is timed.

    Raises:
        ContextError, BudgetError: the text is too long for the model or the machine.
    """
    model.check_attends("what a cache saves")
    lengths, context, prompt = grid(len(ids)), min(len(ids), BATCH_CONTEXT), max(len(ids) // 2, 1)
    model.check_context(len(ids))
    total = 2 * len(ids) + rounds * (len(ids) + sum(lengths) + 2 * context * sum(batch))
    runs = _Runs(model, list(ids), kv, prompt, show, total)
    cached, held = runs.count_with(lengths)
    without, held_without = runs.count_without(lengths)
    times = runs.rounds(lengths, rounds)
    return Growth(
        model=name or model.config.name,
        spec=str(model.spec(kv)),
        weights=model.weights,
        environment=environment(model.device),
        rounds=rounds,
        lengths=lengths,
        arithmetic=Arithmetic.of(model, kv, prompt),
        cached=_side(lengths, cached, times[0], held, cached=True),
        without=_side(lengths, without, times[1], held_without, cached=False),
        context=context,
        batches=runs.batches(batch, context, rounds),
    )


class _Runs:
    """The model, the text, and how far it all is."""

    def __init__(self, model: Model, ids: list[int], kv: str, prompt: int, show: Show, total: int) -> None:
        self.model, self.ids, self.kv, self.prompt = model, ids, kv, ids[:prompt]
        self._show, self._done, self._total = show, 0, total

    def count_with(self, lengths: Seq[int]) -> tuple[Tally, tuple[Bytes, ...]]:
        """One walk with a cache: what was counted; bytes held at each length."""
        tally, held = self._tally(), []
        cache = self.model.cache(self.kv, shares=False)
        with cache.open(self.prompt) as sequence:
            for length in lengths:
                self._say("counting with a cache")
                self._advance([sequence], length - 1, tally.watch)
                self._advance([sequence], length, tally.watch)
                held.append(cache.nbytes)
        return tally, tuple(held)

    def count_without(self, lengths: Seq[int]) -> tuple[Tally, tuple[Bytes, ...]]:
        """The longest step without a cache: what was counted; bytes held while a step of each length runs."""
        tally, held = self._tally(), []
        cache = self._for_one_step(lengths[-1], 1)
        with cache.open() as sequence:
            for length in lengths:
                self._say("counting without a cache")
                self._advance([sequence], length, tally.watch)
                held.append(cache.nbytes)
        return tally, tuple(held)

    def rounds(self, lengths: Seq[int], rounds: int) -> tuple[list[list[float]], list[list[float]]]:
        """Seconds of the step to each length, with a cache and without, in every round."""
        cached: list[list[float]] = [[] for _ in lengths]
        without: list[list[float]] = [[] for _ in lengths]
        cache = self.model.cache(self.kv, shares=False)
        for number in range(1, rounds + 1):
            with cache.open(self.prompt) as sequence:
                for index, length in enumerate(lengths):
                    where = f"round {number} of {rounds}: {length:,} tokens"
                    self._say(f"{where}, with a cache")
                    cached[index].append(self._last_step([sequence], length))
                    self._say(f"{where}, without")
                    without[index].append(self._again(length, 1))
        return cached, without

    def batches(self, sizes: Seq[int], context: int, rounds: int) -> tuple[Batch, ...]:
        """One step of each number of sequences, with a cache and without in turn."""
        cached: list[list[float]] = [[] for _ in sizes]
        without: list[list[float]] = [[] for _ in sizes]
        held: list[Bytes] = []
        for number in range(1, rounds + 1):
            for index, size in enumerate(sizes):
                where = f"round {number} of {rounds}: batch of {size} at {context:,} tokens"
                cache = self.model.cache(self.kv, shares=False)
                sequences = [cache.open(self.ids[: batch_prompt(context)]) for _ in range(size)]
                self._say(f"{where}, with a cache")
                cached[index].append(self._last_step(sequences, context))
                held.append(cache.nbytes)
                self._close(sequences)
                self._say(f"{where}, without")
                without[index].append(self._again(context, size))
        return tuple(
            Batch(size, spread(cached[index]), spread(without[index]), held[index]) for index, size in enumerate(sizes)
        )

    def _last_step(self, sequences: list[Sequence], length: int) -> float:
        """Seconds of one more token for each sequence: the median of the last steps up to `length`."""
        self._advance(sequences, max(length - STEPS, 0))
        times = []
        while (reached := len(sequences[0])) < length:
            times.append(self._timed(partial(self._advance, sequences, reached + 1)))
        return statistics.median(times[1:] or times)

    def _again(self, length: int, count: int) -> float:
        """Seconds of one more token for each of some sequences, when nothing was kept."""

        def step() -> None:
            cache = self._for_one_step(length, count)
            sequences = [cache.open() for _ in range(count)]
            self._advance(sequences, length)
            self._close(sequences)

        return self._timed(step)

    def _advance(self, sequences: list[Sequence], length: int, watch: Callable[[Step], Chunk] | None = None) -> None:
        """Takes all sequences to a length, as generation does."""
        chunk = self.ids[len(sequences[0]) : length]
        prefill(self.model, sequences, chunk, watch=watch)
        self._done += len(chunk) * len(sequences)

    def _timed(self, run: Callable[[], None]) -> float:
        self._finish()
        started = time.perf_counter()
        run()
        self._finish()
        return time.perf_counter() - started

    def _finish(self) -> None:
        """Waits for an accelerator."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _for_one_step(self, length: int, count: int) -> Cache:
        """The cache of a step that keeps nothing: f32. On an accelerator, which allocates the budget at once, it gets
        twice what all rows take, not half of the device."""
        memory = None
        if self.model.device.type == "cuda":
            groups = self.model.spec("f32").groups
            rows = sum(len(group.lanes) * (length + 2 * group.page_size) * group.layout.row_bytes for group in groups)
            memory = 2 * count * rows + (64 << 20)
        return self.model.cache("f32", memory=memory, shares=False)

    def _tally(self) -> Tally:
        config = self.model.config
        keeping = sum(layer.reads is None for layer in self.model.decoder.layers)
        return Tally(len(self.ids), keeping, config.heads // config.kv_heads)

    def _say(self, what: str) -> None:
        self._show(what, self._done, self._total)

    def _close(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.close()


def _side(lengths: Seq[int], tally: Tally, times: list[list[float]], held: tuple[Bytes, ...], *, cached: bool) -> Side:
    return Side(
        steps=tuple(tally.step(length, cached=cached) for length in lengths),
        texts=tuple(tally.text(length, cached=cached) for length in lengths),
        seconds=tuple(map(spread, times)),
        held=held,
    )


def environment(device: torch.device) -> Environment:
    """This machine, as far as times depend on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Environment(cpu_name(), name, torch.get_num_threads(), torch.__version__, platform.python_version())
