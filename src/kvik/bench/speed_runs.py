"""Takes the measurements of `bench/speed.py`: every round visits all lengths, then reads memory and multiplies."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Callable, Sequence

from torch import Tensor

from kvik.bench import rates
from kvik.bench.rates import Clock
from kvik.bench.runs import environment
from kvik.bench.speed import Parts, Reached, Speed
from kvik.bench.spread import spread
from kvik.bench.stopwatch import Stopwatch
from kvik.engine.generation import CHUNK, prefill
from kvik.engine.sampling import Sampling, choose
from kvik.models.model import Model
from kvik.plan.work import Arithmetic

SOME = 16  # products whose rate with many rows is taken: those of a few layers
WARM, STEPS = 40, 4  # tokens of a prompt, and steps after it, that nobody times
COST = 8  # of a step, in tokens of a prompt: for the bar alone
Show = Callable[[str, int, int], None]
Visit = tuple[float, float, Parts]


def room(positions: int, tokens: int) -> int:
    """The longest prompt that leaves a model's positions for the steps: plain ones, and as many watched ones."""
    return positions - 2 * tokens


def measure_speed(
    model: Model,
    ids: Sequence[int],
    contexts: Sequence[int],
    *,
    kv: str = "bf16",
    tokens: int = 32,
    rounds: int = 3,
    asked: Sequence[int] | None = None,
    name: str = "",
    show: Show = lambda what, done, total: None,
    clock: Clock | None = None,
) -> Speed:
    """Measures prompts of several lengths, and steps after each.

    Args:
        model: loaded.
        ids: a text's tokens; every prompt begins elsewhere in it, and goes on at its beginning after its end.
        contexts: tokens of the prompts, ascending.
        kv: what the cache keeps.
        tokens: plain steps after a prompt, and as many watched ones.
        rounds: how often everything is measured; medians count.
        asked: the lengths that were asked for, where they were not these.
        name: what to call the model; by default its own name.
        show: called with (what is measured next, work done, work in all), never while something is timed.
        clock: seconds; by default the system's, once the device has done all.

    Raises:
        ContextError, BudgetError: the longest is too long for the model or the machine.
    """
    model.check_attends("where a step's time goes")
    model.check_context(contexts[-1] + 2 * tokens)
    total = rounds * sum(context + 2 * tokens * COST for context in contexts)
    runs = _Runs(model, list(ids), kv, tokens, show, total, clock or rates.clock_of(model.device))
    before, visits, peaks = _peak(), [], [0] * len(contexts)
    bandwidths, speeds = [], []
    for number in range(rounds):
        visits.append(runs.round(number, rounds, contexts, peaks))
        bandwidths.append(runs.bandwidth())
        speeds.append(runs.rate())
    lengths = [
        _reached(context, wanted, [visit[index] for visit in visits], peaks[index])
        for index, (context, wanted) in enumerate(zip(contexts, asked or contexts, strict=True))
    ]
    return Speed(
        model=name or model.config.name,
        spec=str(model.spec(kv)),
        weights=model.weights,
        arithmetic=Arithmetic.of(model, kv),
        environment=environment(model.device),
        rounds=rounds,
        tokens=tokens,
        product_bytes=sum(linear.nbytes for linear in runs.stopwatch.linears),
        bandwidth=spread(bandwidths),
        rate=spread(speeds),
        lengths=tuple(lengths),
        peak_before=before,
    )


def prompt(ids: Sequence[int], length: int, number: int, of: int) -> list[int]:
    """One of several prompts: each begins elsewhere in the text, and goes on at its beginning after its end.

    >>> [prompt([0, 1, 2, 3, 4, 5], 4, number, 3) for number in range(3)]
    [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 0, 1]]
    """
    start = number * len(ids) // of
    return [ids[(start + offset) % len(ids)] for offset in range(length)]


class _Runs:
    """The model, the text, and how far it all is."""

    def __init__(
        self, model: Model, ids: list[int], kv: str, tokens: int, show: Show, total: int, clock: Clock
    ) -> None:
        self.model, self.ids, self.tokens, self.clock = model, ids, tokens, clock
        self.stopwatch = Stopwatch(model, clock)
        self.cache = model.cache(kv, shares=False)
        self._show, self._done, self._total = show, 0, total
        self._buffer: Tensor | None = None

    def round(self, number: int, rounds: int, contexts: Sequence[int], peaks: list[int]) -> list[Visit]:
        """One visit to each length; the first round also notes the memory held at most so far."""
        visits = []
        if number == 0:
            self._warm()
        for index, context in enumerate(contexts):
            self._show(f"round {number + 1} of {rounds}: {context:,} tokens", self._done, self._total)
            which = number * len(contexts) + index
            visits.append(self._visit(prompt(self.ids, context, which, rounds * len(contexts))))
            self._done += context + 2 * self.tokens * COST
            if number == 0:
                peaks[index] = _peak()
        self._show(f"round {number + 1} of {rounds}: what the machine allows", self._done, self._total)
        return visits

    def bandwidth(self) -> float:
        """Bytes a second: the median of some readings. The buffer comes after the first prompts, so that it is no part
        of the memory that they are said to take."""
        if self._buffer is None:
            self._buffer = rates.read_buffer(self.model.device)
        buffer = self._buffer
        return statistics.median(rates.repeated(lambda: rates.bandwidth(buffer, self.clock), self.clock))

    def rate(self) -> float:
        """Operations a second of the first layers' products with as many rows as a chunk has."""
        linears = self.stopwatch.linears[:-1][:SOME]  # not the head: it takes one row of a chunk
        inputs = rates.product_inputs(linears, CHUNK, self.model.device)
        seconds = rates.repeated(lambda: rates.product_seconds(linears, inputs, self.clock), self.clock)
        return rates.operations(linears, CHUNK) / statistics.median(seconds)

    def _visit(self, ids: list[int]) -> Visit:
        """Seconds of the prompt, of a plain step, and the parts of a watched one."""
        with self.cache.open(ids) as sequence:
            started = self.clock()
            logits = prefill(self.model, [sequence], ids)
            took = self.clock() - started
            plain = watched = 0.0
            self.stopwatch.reset()
            for _ in range(self.tokens):
                started = self.clock()
                logits = prefill(self.model, [sequence], [self._chosen(logits, len(sequence))])
                between = self.clock()
                token = [self._chosen(logits, len(sequence))]
                logits = prefill(self.stopwatch.model, [sequence], token, watch=self.stopwatch.watch)
                watched += self.clock() - between
                plain += between - started
        it, each = self.stopwatch, self.tokens
        return took, plain / each, Parts(it.products / each, it.attend / each, it.append / each, watched / each)

    def _chosen(self, logits: Tensor, position: int) -> int:
        return choose(logits[0], Sampling(), position)

    def _warm(self) -> None:
        """A short prompt and some steps of both kinds, so that what is only done once is done."""
        most = self.model.config.max_positions - 2 * STEPS
        ids = prompt(self.ids, max(min(WARM, most), 1), 0, 1)
        with self.cache.open(ids) as sequence:
            prefill(self.model, [sequence], ids)
            for _ in range(min(STEPS, self.tokens)):
                for model in (self.model, self.stopwatch.model):
                    prefill(model, [sequence], [self.ids[0]], watch=self.stopwatch.watch)


def _reached(context: int, asked: int, visits: list[Visit], peak: int) -> Reached:
    median = statistics.median_low(parts.total for _, _, parts in visits)
    parts = next(parts for _, _, parts in visits if parts.total == median)
    prompts, steps = spread([visit[0] for visit in visits]), spread([visit[1] for visit in visits])
    return Reached(context, asked, prompts, steps, parts, peak)


def _peak() -> int:
    """Bytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
