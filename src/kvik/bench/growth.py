"""One more token, with a cache and without, as a text grows: what was measured, beside what the formulas say.

with a cache    the sequence holds n - 1 tokens; one token goes through the model and is settled
without         what `kvik run --kv none` does: a cache for this one step, f32, and the whole text again in chunks

The text's first half is its prompt: a policy that chooses at a prompt's end does so there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from kvik.bench.counting import Counts
from kvik.bench.fit import TimeModel, fit, reached, whole_text
from kvik.bench.spread import Spread
from kvik.cache.policy import When
from kvik.cache.spec import Bytes
from kvik.engine.generation import CHUNK
from kvik.plan.work import Arithmetic, Work

FACTORS = (2, 4)  # speed-ups whose lengths are looked for
STEPS = 5  # with a cache, so many are taken up to each length; the first, after a long chunk, is not counted


@dataclass(frozen=True)
class Environment:
    """Where it was measured.

    Attributes:
        device: cpu, or the accelerator's name.
        threads: that torch computes with.
    """

    cpu: str
    device: str
    threads: int
    torch: str
    python: str


@dataclass(frozen=True)
class Side:
    """With a cache, or without; one entry a length.

    Attributes:
        steps: counted in the step that adds the last token.
        texts: counted in all steps of the text.
        seconds: of that step.
        held: bytes that the cache holds after the step; without one: while the step runs.
    """

    steps: tuple[Counts, ...]
    texts: tuple[Counts, ...]
    seconds: tuple[Spread, ...]
    held: tuple[Bytes, ...]

    @property
    def medians(self) -> tuple[float, ...]:
        """Spread of a step."""
        return tuple(each.median for each in self.seconds)


@dataclass(frozen=True)
class Batch:
    """One step of several sequences at once.

    Attributes:
        sequences: how many.
        cached: seconds of a step with a cache.
        without: seconds of a step without.
        held: bytes of the cache.
    """

    sequences: int
    cached: Spread
    without: Spread
    held: Bytes


@dataclass(frozen=True)
class Growth:
    """What `measure` found.

    Attributes:
        model: its name.
        spec: what the cache keeps.
        weights: how weights are held.
        environment: where it was measured.
        rounds: how often each time was taken.
        lengths: of the text, ascending from 1.
        arithmetic: the formulas for this model.
        cached: with a cache.
        without: without.
        context: tokens of each sequence in `batches`.
        batches: by number of sequences.
    """

    model: str
    spec: str
    weights: str
    environment: Environment
    rounds: int
    lengths: tuple[int, ...]
    arithmetic: Arithmetic
    cached: Side
    without: Side
    context: int
    batches: tuple[Batch, ...]

    @property
    def tokens(self) -> int:
        """The longest text."""
        return self.lengths[-1]

    @property
    def windowed(self) -> bool:
        """Whether the cache drops rows that a step without one would see."""
        return self.cached.texts[-1].pairs < self.without.steps[-1].pairs

    @property
    def bounded(self) -> bool:
        """Whether rows of the longest text left: by a window, the cache's or the model's own, or by a policy."""
        prompt = self.arithmetic.prompt
        return any(group.rows(self.tokens, prompt) < self.tokens for group in self.arithmetic.spec.groups)

    def held(self, length: int) -> Bytes:
        """By formula: what the cache holds after a step."""
        return self.arithmetic.spec.nbytes(length, prompt=self.arithmetic.prompt)

    @property
    def chooses(self) -> list[str]:
        """Policies that choose at the prompt's end."""
        found = (group.retention.policy for group in self.arithmetic.spec.groups)
        return list(dict.fromkeys(str(it) for it in found if it is not None and it.trigger.when is When.PROMPT))

    def steps(self, *, cached: bool) -> tuple[Work, ...]:
        """By formula: the step that adds the last token of each length."""
        return tuple(self.arithmetic.step(length, cached=cached) for length in self.lengths)

    def texts(self, *, cached: bool) -> tuple[Work, ...]:
        """By formula: a text of each length, all of its steps."""
        each = accumulate(self.arithmetic.step(length, cached=cached) for length in range(1, self.tokens + 1))
        wanted = set(self.lengths)
        return tuple(work for length, work in enumerate(each, start=1) if length in wanted)

    def products(self, counts: Counts, steps: int) -> int:
        """Operations of projections, feed-forward parts and the head for the tokens that were counted."""
        return 2 * (counts.tokens * self.arithmetic.row_weights + steps * self.arithmetic.head_weights)

    def differences(self) -> Iterator[str]:
        """Where a count is not what its formula says. None is expected."""
        for cached, side in ((True, self.cached), (False, self.without)):
            found = (("step", side.steps, self.steps(cached=cached)), ("text", side.texts, self.texts(cached=cached)))
            for what, counts, works in found:
                for length, count, work in zip(self.lengths, counts, works, strict=True):
                    if (count.rows, count.pairs) != (work.rows, work.pairs):
                        where = f"{what} of {length:,} tokens {'with' if cached else 'without'} a cache"
                        yield (
                            f"{where}: {count.rows:,} rows and {count.pairs:,} pairs, "
                            f"by formula {work.rows:,} and {work.pairs:,}"
                        )

    @cached_property
    def cached_model(self) -> TimeModel:
        """What a step with a cache should take; see `kvik.bench.fit`."""
        lanes = sum(len(group.lanes) for group in self.arithmetic.spec.groups)
        terms = {"step": [1.0] * len(self.lengths), "row": [count.read / lanes for count in self.cached.steps]}
        return fit(terms, self.cached.medians, self.lengths)

    @cached_property
    def without_model(self) -> TimeModel:
        """What a step without a cache should take; see `kvik.bench.fit`."""
        steps = self.steps(cached=False)
        terms = {
            "chunk": [float(-(-length // CHUNK)) for length in self.lengths],
            "product": [float(work.products) for work in steps],
            "pair": [float(work.pairs) for work in steps],
        }
        return fit(terms, self.without.medians, self.lengths)

    @cached_property
    def cached_text(self) -> tuple[float, ...]:
        """Spread of a whole text with a cache, added up from measured steps."""
        return whole_text(self.lengths, self.cached.medians)

    @cached_property
    def without_text(self) -> tuple[float, ...]:
        """Spread of a whole text without a cache, added up from measured steps."""
        return whole_text(self.lengths, self.without.medians)

    @property
    def step_gain(self) -> tuple[float, ...]:
        """How many times faster one more token is with a cache, at each length."""
        return tuple(b / a for a, b in zip(self.cached.medians, self.without.medians, strict=True))

    @property
    def text_gain(self) -> tuple[float, ...]:
        """How many times faster the whole text is with a cache, at each length."""
        return tuple(b / a for a, b in zip(self.cached_text, self.without_text, strict=True))

    def step_reaches(self, factor: float) -> float | None:
        """The length from which on one more token is so many times faster; None = not within these."""
        return reached(self.lengths, self.step_gain, factor)

    def text_reaches(self, factor: float) -> float | None:
        """The length from which on the whole text is so many times faster; None = not within these."""
        return reached(self.lengths, self.text_gain, factor)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values: counts, bytes, seconds."""
        return {
            "model": self.model,
            "spec": self.spec,
            "weights": {
                "format": self.weights,
                "bytes": self.arithmetic.weight_bytes,
                "read": self.arithmetic.read_bytes,
            },
            "environment": asdict(self.environment),
            "tokens": self.tokens,
            "prompt": self.arithmetic.prompt,
            "rounds": self.rounds,
            "with_cache": self._side(cached=True),
            "without": self._side(cached=False),
            "speedup": {
                "one_more_token": _gains(self.lengths, self.step_gain),
                "whole_text": _gains(self.lengths, self.text_gain),
            },
            "equal_work_at_tokens": self.arithmetic.equal_work,
            "equal_bytes_at_tokens": self.arithmetic.equal_bytes,
            "batch": {"context": self.context, "sizes": [self._batch(each) for each in self.batches]},
        }

    def _side(self, *, cached: bool) -> dict[str, Any]:
        side, model = (self.cached, self.cached_model) if cached else (self.without, self.without_model)
        seconds = self.cached_text if cached else self.without_text
        steps, texts = self.steps(cached=cached), self.texts(cached=cached)
        held = self.held if cached else self.arithmetic.plain.nbytes
        lengths = [
            {
                "tokens": length,
                "step": self._counted(side.steps[i], steps[i], 1)
                | {"seconds": asdict(side.seconds[i])}
                | {"predicted_seconds": model.predicted[i], "fitted": not model.tested[i]},
                "text": self._counted(side.texts[i], texts[i], length) | {"seconds": seconds[i]},
                "held": _figures(side.held[i]),
                "held_formula": _figures(held(length)),
            }
            for i, length in enumerate(self.lengths)
        ]
        fitted = {"fitted_up_to_tokens": self.tokens // 2, "error_at_longest": model.errors[-1]}
        return {"time_model": {"constants": model.constant} | fitted, "lengths": lengths}

    def _counted(self, counts: Counts, work: Work, steps: int) -> dict[str, Any]:
        counted = asdict(counts) | {"products": self.products(counts, steps)}
        return {"counted": counted, "formula": asdict(work)}

    def _batch(self, batch: Batch) -> dict[str, Any]:
        sides: dict[str, Any] = {"sequences": batch.sequences}
        for name, cached, seconds in (("with_cache", True, batch.cached), ("without", False, batch.without)):
            arithmetic = replace(self.arithmetic, prompt=batch_prompt(self.context))
            work = arithmetic.step(self.context, cached=cached, batch=batch.sequences)
            sides[name] = {
                "seconds": asdict(seconds),
                "tokens_per_s": batch.sequences / seconds.median,
                "formula": asdict(work),
            }
        return {**sides, "held": _figures(batch.held)}


def batch_prompt(context: int) -> int:
    """The prompt of each sequence of a batch: all but the steps that are taken after it."""
    return max(context - STEPS, 1)


def _gains(lengths: tuple[int, ...], gains: tuple[float, ...]) -> dict[str, Any]:
    return {
        "by_tokens": {str(length): gain for length, gain in zip(lengths, gains, strict=True)},
        "reached_at_tokens": {str(factor): reached(lengths, gains, factor) for factor in FACTORS},
    }


def _figures(size: Bytes) -> dict[str, int]:
    return {"payload": size.payload, "overhead": size.overhead, "allocated": size.allocated}
