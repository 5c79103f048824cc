"""How fast kvik answers on one machine, beside what the machine allows: figures, and the formulas that bound them.

    of a prompt of n tokens     prefill          n tokens in chunks of 512, each settled, as an answer does it
    then, in turn               a plain step     one more token: chosen, through the model, settled
                                a watched step   the same, its products, appends and attentions timed one by one

Plain steps give tokens a second, watched ones say where the time goes. A step can't be shorter than either of two
floors: the time to read its bytes (weights of all products, rows that are attended to) at the bandwidth that was
measured, and the time of its operations at the rate that the model's own products reach with 512 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvik.bench.growth import Environment
from kvik.bench.spread import Spread
from kvik.cache.spec import Bytes
from kvik.engine.generation import CHUNK
from kvik.plan.work import Arithmetic, Work


@dataclass(frozen=True)
class Parts:
    """Seconds of one watched step, the mean of a round.

    Attributes:
        products: of weights, each with the norm or activation that comes first in its call.
        attend: attention over the rows.
        append: encoding and storing the new rows.
        total: the whole step.
    """

    products: float
    attend: float
    append: float
    total: float

    @property
    def rest(self) -> float:
        """Turning by position, page tables, choosing a token, and all calls around."""
        return self.total - self.products - self.attend - self.append

    @property
    def shares(self) -> dict[str, float]:
        """Of the step, by part; their sum is 1."""
        parts = {"products": self.products, "attention": self.attend, "append": self.append, "rest": self.rest}
        return {name: seconds / self.total for name, seconds in parts.items()}


@dataclass(frozen=True)
class Floor:
    """What a step, or several, can't be faster than.

    Attributes:
        bytes_read: weights and rows, each once a step.
        operations: a multiplication and its addition are two.
        reading: seconds that reading takes at the measured bandwidth.
        computing: seconds that the operations take at the measured rate.
    """

    bytes_read: float
    operations: float
    reading: float
    computing: float

    @property
    def seconds(self) -> float:
        """The higher of the two."""
        return max(self.reading, self.computing)

    def reached(self, seconds: float) -> dict[str, float]:
        """Each floor as a share of the time that it really took: 1 is as fast as can be."""
        return {"reading": self.reading / seconds, "computing": self.computing / seconds}


@dataclass(frozen=True)
class Reached:
    """One length of prompt.

    Attributes:
        context: tokens of the prompt.
        asked: tokens that were asked for; more where the model has no positions for so many and the steps.
        prefill: seconds of the whole prompt.
        step: seconds of a plain step: each round's mean.
        parts: of the round whose watched steps took the median.
        peak: bytes of memory that the process had held at most when this length was done for the first time.
    """

    context: int
    asked: int
    prefill: Spread
    step: Spread
    parts: Parts
    peak: int

    @property
    def decode_tokens_per_s(self) -> Spread:
        """Of plain steps."""
        return self.step.per(1)

    @property
    def prefill_tokens_per_s(self) -> Spread:
        """Of the prompt."""
        return self.prefill.per(self.context)


@dataclass(frozen=True)
class Speed:
    """What `measure_speed` found.

    Attributes:
        model: its name.
        spec: what the cache keeps.
        weights: how weights are held.
        arithmetic: the formulas for this model.
        environment: where it was measured.
        rounds: how often everything was measured.
        tokens: plain steps, and as many watched ones, of each length and round.
        product_bytes: of the weights that a step multiplies with, as they are held.
        bandwidth: bytes a second that this machine reads.
        rate: operations a second of the layers' products with 512 rows.
        lengths: ascending.
        peak_before: bytes of memory that the process had held at most before the first prompt: Python, torch, loading.
    """

    model: str
    spec: str
    weights: str
    arithmetic: Arithmetic
    environment: Environment
    rounds: int
    tokens: int
    product_bytes: int
    bandwidth: Spread
    rate: Spread
    lengths: tuple[Reached, ...]
    peak_before: int

    @property
    def peak(self) -> int:
        """Bytes of memory that the process had held at most after the longest prompt."""
        return self.lengths[-1].peak

    def held(self, context: int) -> Bytes:
        """By formula: bytes of the rows after the last step of a length."""
        return self.arithmetic.spec.nbytes(context + 2 * self.tokens, prompt=context)

    def decode_floor(self, context: int) -> Floor:
        """Of a plain step, the mean of a round: steps 1, 3, 5 … after the prompt."""
        return self._floor(self._steps(context, first=1), self.tokens)

    def prefill_floor(self, context: int) -> Floor:
        """Of the whole prompt."""
        arithmetic = replace(self.arithmetic, prompt=context)
        return self._floor([arithmetic.step(end, chunk=chunk) for end, chunk in arithmetic.cuts(context, CHUNK)], 1)

    def attended(self, context: int) -> float:
        """Bytes of the rows that a watched step reads, the mean of a round: steps 2, 4, 6 … after the prompt."""
        return sum(work.rows_read for work in self._steps(context, first=2)) / self.tokens

    def attention_rate(self, reached: Reached) -> float:
        """Bytes of rows a second, of attention alone."""
        return self.attended(reached.context) / reached.parts.attend

    def product_rate(self, reached: Reached) -> float:
        """Bytes of weights a second, of the products alone."""
        return self.product_bytes / reached.parts.products

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values: bytes, seconds, tokens, bytes and operations a second."""
        return {
            "model": self.model,
            "spec": self.spec,
            "weights": {"format": self.weights, "bytes": self.arithmetic.weight_bytes, "read": self.product_bytes},
            "environment": asdict(self.environment),
            "rounds": self.rounds,
            "tokens": self.tokens,
            "read_bytes_per_s": asdict(self.bandwidth),
            "operations_per_s": asdict(self.rate),
            "contexts": [self._length(each) for each in self.lengths],
            "memory": {"peak": self.peak, "peak_before": self.peak_before},
        }

    def _length(self, reached: Reached) -> dict[str, Any]:
        context, held = reached.context, self.held(reached.context)
        decode, prefill = self.decode_floor(context), self.prefill_floor(context)
        return {
            "context": context,
            "asked": reached.asked,
            "decode_tokens_per_s": asdict(reached.decode_tokens_per_s),
            "prefill_tokens_per_s": asdict(reached.prefill_tokens_per_s),
            "decode": {
                "seconds": asdict(reached.step),
                "watched": asdict(reached.parts) | {"rest": reached.parts.rest},
                "shares": reached.parts.shares,
                "attention_bytes": self.attended(context),
                "attention_bytes_per_s": self.attention_rate(reached),
                "product_bytes_per_s": self.product_rate(reached),
                "floor": asdict(decode) | {"reached": decode.reached(reached.step.median)},
            },
            "prefill": {
                "seconds": asdict(reached.prefill),
                "floor": asdict(prefill) | {"reached": prefill.reached(reached.prefill.median)},
            },
            "peak_memory": reached.peak,
            "cache_formula": {"payload": held.payload, "overhead": held.overhead, "allocated": held.allocated},
        }

    def _steps(self, context: int, first: int) -> list[Work]:
        """Every second step after the prompt."""
        arithmetic = replace(self.arithmetic, prompt=context)
        return [arithmetic.step(context + first + 2 * number) for number in range(self.tokens)]

    def _floor(self, steps: Sequence[Work], over: int) -> Floor:
        bytes_read = sum(self.product_bytes + work.rows_read for work in steps) / over
        operations = sum(work.operations for work in steps) / over
        reading, computing = bytes_read / self.bandwidth.median, operations / self.rate.median
        return Floor(bytes_read, operations, reading, computing)
