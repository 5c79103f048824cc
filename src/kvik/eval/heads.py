"""Which KV heads look far back, and the spec that lets only those keep everything (DuoAttention, arXiv:2410.10819).

One pass over a text; each lane's score is `cache.streaming.far_sight`. Of all lanes of the model, those with the
highest scores keep every row, the others a window and sinks. Scores need the mean query and the mean key of a lane
alone, both turned back to position 0, so sums are all that is held of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvik.bench.growth import Environment
from kvik.bench.runs import environment
from kvik.cache import weigh
from kvik.cache.retention import Retention
from kvik.cache.seen import Seen
from kvik.cache.spec import PAGE_SIZE, Bytes, LayerShape, Rule, parse_rules
from kvik.cache.streaming import check_turned, far_sight
from kvik.engine.generation import CHUNK, prefill
from kvik.errors import SpecError, UsageError
from kvik.eval.caches import opened
from kvik.models.model import Model
from kvik.models.watch import Chunk, Watch
from kvik.ops.reads import Partial

Lanes = frozenset[tuple[int, int]]  # (layer, head)
Which = tuple[tuple[int, ...], tuple[int, ...]]  # layers, and heads of each


@dataclass(frozen=True)
class Heads:
    """What `measure_heads` found.

    Attributes:
        weights: how they are held.
        text: what was read, and `tokens` how much of it.
        scores: how far each head of each layer looks, 0 to 1.
        far: lanes that keep every row.
        spec: the spec string.
        every, held: bytes of a text of so many tokens, by formula: if every lane kept every row, and under the spec.
    """

    model: str
    weights: str
    text: str
    tokens: int
    environment: Environment
    scores: tuple[tuple[float, ...], ...]
    far: Lanes
    spec: str
    every: Bytes
    held: Bytes

    @cached_property
    def lanes(self) -> list[tuple[int, int]]:
        """All of the model, layer by layer."""
        return [(layer, head) for layer, scores in enumerate(self.scores) for head in range(len(scores))]

    @property
    def least_far(self) -> float | None:
        """The lowest score of a lane that keeps every row; None where none does."""
        return min((self.scores[layer][head] for layer, head in self.far), default=None)

    @property
    def share(self) -> float:
        """Bytes under the spec, of those if every lane kept every row."""
        return self.held.allocated / self.every.allocated

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values: scores by layer and head, bytes."""
        return {
            "model": self.model, "weights": self.weights, "text": self.text, "tokens": self.tokens,
            "environment": asdict(self.environment), "scores": [list(each) for each in self.scores],
            "far": sorted(map(list, self.far)), "spec": self.spec,
            "bytes": {"every_row": self.every.allocated, "spec": self.held.allocated},
        }  # fmt: skip


def measure_heads(
    model: Model,
    ids: Sequence[int],
    *,
    kv: str = "int8",
    far: Fraction | float = Fraction(1, 2),
    window: int = 256,
    sinks: int = 4,
    name: str = "",
    text: str = "the text",
    show: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Heads:
    """Reads a text, and scores every lane.

    Args:
        model: loaded.
        ids: the text's tokens: all are read.
        kv: how rows are stored, a codec or a pair; and the page size, if any.
        far: the share of all lanes that keep every row.
        window, sinks: rows that the other lanes keep.
        name, text: what to call the model and the text.
        show: called with (what is done next, tokens done, tokens in all).

    Raises:
        SpecError: the model's positions don't turn its keys, layers share rows, or `kv` can't be read.
        UsageError: `kv` says more than how rows are stored, or a number is none.
        ContextError, BudgetError: the text is too long for the model or the machine.
    """
    rule, page_size = stored(kv)
    shapes = model.decoder.layers
    for layer, shape in enumerate(shapes):
        check_turned(shape.frequencies)
        if shape.reads is not None:
            raise SpecError(
                f"layer {layer} keeps no rows and reads those of layer {shape.reads}, so that a head's rows serve "
                "layers that look differently far; use a model whose layers each keep their own"
            )
    if not ids or window < 1 or sinks < 0 or not 0 <= far <= 1:
        raise UsageError("heads need a text, a window of at least 1, sinks from 0 and a share from 0 to 1")
    model.check_context(len(ids))
    means = Means(shapes)
    with opened(model, "f32", len(ids)).open(ids) as sequence:
        for start in range(0, len(ids), CHUNK):
            show(f"token {start:,} of {len(ids):,}", start, len(ids))
            prefill(model, [sequence], ids[start : start + CHUNK], watch=means.watch)
    scores = means.scores()
    chosen = farthest(scores, far)
    spec = spec_text(rule, chosen, [shape.heads for shape in shapes], Retention(window, sinks), page_size)
    return Heads(
        name or model.config.name, model.weights, text, len(ids), environment(model.device), scores, chosen, spec,
        model.spec(kv).nbytes(len(ids)), model.spec(spec).nbytes(len(ids)),
    )  # fmt: skip


class Means:
    """Sums of what passes, for each layer: queries f64 [H, D] and keys f64 [L, D], all turned back to position 0."""

    def __init__(self, shapes: Sequence[LayerShape]) -> None:
        self.frequencies = [torch.tensor(shape.frequencies, dtype=torch.float64) for shape in shapes]
        self.heads = [shape.heads for shape in shapes]
        self.count = 0
        self.scales: dict[int, float] = {}
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}

    def watch(self, step: Chunk) -> Watch:
        """For `prefill`: adds what passes."""
        self.count += len(step.positions)
        return _Adding(step, self)

    def add(self, sums: dict[int, Tensor], layer: int, rows: Tensor, positions: list[int]) -> None:
        """Adds f32 [T, heads, D] at these positions to one of the sums."""
        back = weigh.turns(self.frequencies[layer], -torch.tensor(positions, device=rows.device))
        total = weigh.turned(rows, back[:, None]).double().sum(0)
        sums[layer] = total + sums[layer] if layer in sums else total

    def scores(self) -> tuple[tuple[float, ...], ...]:
        """How far every head of every layer looks."""
        return tuple(tuple(far_sight(self._seen(layer)).tolist()) for layer in range(len(self.heads)))

    def _seen(self, layer: int) -> Seen:
        """A text of one token whose query and key are the means: they are all that `far_sight` takes of any text."""
        key, query = ((sums[layer] / self.count).float().cpu() for sums in (self.keys, self.queries))
        zero = torch.zeros(1, dtype=torch.int64)
        return Seen(
            keys=key[:, None], values=key[:, None], positions=zero.expand(len(key), 1), tokens=1,
            scale=self.scales[layer], queries=torch.unflatten(query, 0, (self.heads[layer], -1))[None], asking=zero,
            mass=None, frequencies=self.frequencies[layer], seed=0,
        )  # fmt: skip


class _Adding(Watch):
    """A step whose keys and queries are added to sums."""

    def __init__(self, step: Chunk, means: Means) -> None:
        super().__init__(step)
        self._means = means

    def append(self, layer: int, **streams: Tensor) -> None:
        """Adds one layer's keys, and passes its rows on."""
        keys = torch.cat([rows for name, rows in streams.items() if name != "v"], dim=-1)
        self._means.add(self._means.keys, layer, keys, self.positions)
        super().append(layer, **streams)

    def attend(self, layer: int, q: Tensor, **options: Any) -> Partial:
        """Adds one layer's queries, and passes them on."""
        self._means.add(self._means.queries, layer, q, self.positions)
        self._means.scales[layer] = options["scale"]
        return super().attend(layer, q, **options)

    def only(self, rows: Sequence[int]) -> None:
        """Never: every query counts."""


def stored(kv: str) -> tuple[Rule, int]:
    """The rule and the page size of a spec that says how rows are stored, and nothing else.

    Raises:
        SpecError: it can't be read.
        UsageError: it says more than that.
    """
    rules, page_size = parse_rules(kv)
    if len(rules) > 1 or rules[0].retention != Retention():
        raise UsageError(
            f"--kv {kv!r} says which rows stay, or differs by layer, and that is what heads are to say; "
            f"give a codec alone, such as --kv int8 or --kv k8v4"
        )
    return rules[0], page_size


def farthest(scores: Sequence[Sequence[float]], share: Fraction | float) -> Lanes:
    """The share of all lanes that score highest, rounded to a whole number; of equal ones the earlier.

    >>> sorted(farthest([[0.5, 0.7], [0.5, 0.1]], 0.5))
    [(0, 0), (0, 1)]
    """
    lanes = [(-score, layer, head) for layer, each in enumerate(scores) for head, score in enumerate(each)]
    count = int(share * len(lanes) + Fraction(1, 2))
    return frozenset((layer, head) for _, layer, head in sorted(lanes)[:count])


def spec_text(rule: Rule, far: Lanes, heads: Sequence[int], near: Retention, page_size: int = PAGE_SIZE) -> str:
    """The spec string in which `far` lanes keep every row and all others keep what `near` says.

    Args:
        rule: how rows are stored.
        far: lanes.
        heads: of each layer.
    """
    if len(far) == sum(heads):
        rules = [rule]
    else:
        ways = [list(_rules(rule, which, heads)) for which in (_by_layer(far), _by_head(far))]
        rules = [Rule(rule.codecs, near), *min(ways, key=lambda way: len("; ".join(map(str, way))))]
    return "; ".join([*map(str, rules), *([f"page {page_size}"] if page_size != PAGE_SIZE else [])])


def _rules(rule: Rule, which: Sequence[Which], heads: Sequence[int]) -> Iterator[Rule]:
    for layers, mine in which:
        every = all(mine == tuple(range(heads[layer])) for layer in layers)
        yield Rule(rule.codecs, Retention(), layers, None if every else mine)


def _by_layer(far: Lanes) -> list[Which]:
    """Layers with the same heads together."""
    found: dict[tuple[int, ...], list[int]] = {}
    for layer in sorted({layer for layer, _ in far}):
        mine = tuple(sorted(head for at, head in far if at == layer))
        found.setdefault(mine, []).append(layer)
    return [(tuple(layers), mine) for mine, layers in found.items()]


def _by_head(far: Lanes) -> list[Which]:
    """Heads with the same layers together: shorter where layers have many heads."""
    turned = _by_layer(frozenset((head, layer) for layer, head in far))
    return [(layers, mine) for mine, layers in turned]
