"""Where a step's time goes: a model whose products, appends and attentions are timed one by one.

The model itself is left alone: a copy shares its weights and wraps its products. Each timing costs a fraction of a
microsecond, so steps that give tokens a second are not timed this way.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from kvik.bench.rates import Clock
from kvik.models.model import Model
from kvik.models.parts import products
from kvik.models.watch import Chunk, Watch
from kvik.ops.linear import Linear
from kvik.ops.reads import Partial


class Stopwatch:
    """Seconds so far.

    Attributes:
        model: as the one given, its products timed; run it with `watch=stopwatch.watch`.
        linears: its products, in order.
        products, append, attend: seconds; a product's include the norm or activation that comes first in its call.
    """

    def __init__(self, model: Model, clock: Clock) -> None:
        self.clock = clock
        self.products = self.append = self.attend = 0.0
        self.linears: list[Linear] = []
        decoder: Any = copy.copy(model.decoder)
        decoder.blocks = [self._timed(block) for block in model.decoder.blocks]
        decoder.head = self._timed(model.decoder.head)
        self.model = copy.copy(model)
        self.model.network = decoder
        assert len(self.linears) == products((model.decoder.blocks, model.decoder.head)), "every product is timed"

    def watch(self, step: Chunk) -> Watch:
        """For `Model.run`: times what passes between the decoder and this step."""
        return _Timing(step, self)

    def reset(self) -> None:
        """To zero."""
        self.products = self.append = self.attend = 0.0

    def _timed(self, part: Any) -> Any:
        """A copy of a part of the model, its products timed, however deep they lie."""
        if isinstance(part, Linear):
            self.linears.append(part)
            return _Product(part, self)
        if isinstance(part, list):
            return [self._timed(each) for each in part]
        if not products(part):
            return part
        twin = copy.copy(part)
        vars(twin).update({name: self._timed(value) for name, value in vars(part).items()})
        return twin


class _Product:
    """A product that adds its seconds."""

    def __init__(self, linear: Linear, stopwatch: Stopwatch) -> None:
        self._linear, self._stopwatch, self._clock = linear, stopwatch, stopwatch.clock

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        started = self._clock()
        y = self._linear(x, **options)
        self._stopwatch.products += self._clock() - started
        return y


class _Timing(Watch):
    """A step that adds the seconds of its appends and attentions."""

    def __init__(self, step: Chunk, stopwatch: Stopwatch) -> None:
        super().__init__(step)
        self._stopwatch, self._clock = stopwatch, stopwatch.clock

    def append(self, layer: int, **streams: Tensor) -> None:
        """Passes one layer's new rows on."""
        started = self._clock()
        self.step.append(layer, **streams)
        self._stopwatch.append += self._clock() - started

    def attend(self, layer: int, q: Tensor, **options: Any) -> Partial:
        """Passes the queries on, and the result back."""
        started = self._clock()
        result = self.step.attend(layer, q, **options)
        self._stopwatch.attend += self._clock() - started
        return result
