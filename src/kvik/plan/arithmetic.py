"""Spec × model × machine → what fits, before a byte is allocated.

    cache = batch · Σ over layers of heads · rows · widths · bytes        rows = min(length, window + sinks)

Where a policy chooses which rows stay, the length is that of a prompt: bytes are those once it has chosen, and beside
them the most on the way there. Prompts are taken to come in one after another.

For plain multi-head attention that is the textbook's 2 · bytes · layers · d_model · length · batch; a plan prints both
with their numbers in, and says why they differ where heads are shared, rows are latents or layers have windows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from kvik.cache.policy import Policy, When
from kvik.cache.retention import Retention
from kvik.cache.spec import Bytes, Group, Spec, parse_rules
from kvik.errors import UsageError
from kvik.models.shapes.shape import ModelShape
from kvik.plan.formula import Term, reasons, stays, term, textbook

MOST_TOKENS = 10**9
MOST_SEQUENCES = 10**6


@dataclass(frozen=True)
class WeightFormat:
    """How many bytes a parameter takes; all parameters are counted alike.

    Attributes:
        name: `f32`, `f16`, `bf16`, `int8`, `int4`, or `file` for a file's own.
        each: bytes a parameter.
        formula: the same for people.
    """

    name: str
    each: Fraction
    formula: str

    def nbytes(self, parameters: int) -> int:
        """Bytes of so many parameters, rounded up."""
        return -(-parameters * self.each.numerator // self.each.denominator)


WEIGHTS = {
    w.name: w
    for w in (
        WeightFormat("f32", Fraction(4), "4 B"),
        WeightFormat("bf16", Fraction(2), "2 B"),
        WeightFormat("f16", Fraction(2), "2 B"),
        WeightFormat("int8", Fraction(34, 32), "(1 B + a 2 B scale for 32) = 1.0625 B"),
        WeightFormat("int4", Fraction(20, 32), "(0.5 B + a 2 B scale and a 2 B zero for 32) = 0.625 B"),
    )
}


@dataclass(frozen=True)
class Fit:
    """What a memory holds.

    Attributes:
        memory: bytes there are.
        room: bytes that the weights leave for the cache (0 where they alone are too much).
        fits: whether the plan's batch at the plan's context fits.
        batch: the most sequences at the plan's context.
        tokens: the longest context at the plan's batch; None = windows bound the cache, any length fits.
    """

    memory: int
    room: int
    fits: bool
    batch: int
    tokens: int | None


@dataclass(frozen=True)
class Plan:
    """What one model needs at one length, batch and spec. All sizes are bytes.

    Attributes:
        shape: the model.
        spec: what is kept of self-attention; None for an encoder-only model, which keeps nothing.
        cross_spec: what is kept of cross-attention, for `shape.source` rows, filled once for each sequence.
        kv: the spec string.
        tokens: length of each sequence.
        batch: sequences.
        weights: the weights' number format.
        memory: bytes of the machine, None = not asked.
    """

    shape: ModelShape
    spec: Spec | None
    cross_spec: Spec | None
    kv: str
    tokens: int
    batch: int
    weights: WeightFormat
    memory: int | None = None

    @cached_property
    def weight_bytes(self) -> int | None:
        """Bytes of the weights; None where the number of parameters is unknown."""
        if self.weights.name == "file":
            return self.shape.stored
        return None if self.shape.parameters is None else self.weights.nbytes(self.shape.parameters)

    @cached_property
    def per_token(self) -> Bytes:
        """What one token adds while no window is full, its share of a full page's overhead rounded up."""
        return sum(map(_row, self.spec.groups if self.spec else ()), Bytes(0, 0))

    @cached_property
    def per_token_later(self) -> Bytes:
        """What one token adds once all windows are full, and all bounds reached: the rows of what still grows."""
        groups = self.spec.groups if self.spec else ()
        return sum((_later(g) for g in groups), Bytes(0, 0))

    @cached_property
    def cross(self) -> Bytes:
        """What cross-attention keeps for one sequence, whatever its length."""
        return self.cross_spec.nbytes(0, source=self.shape.source) if self.cross_spec else Bytes(0, 0)

    @cached_property
    def per_sequence(self) -> Bytes:
        """One sequence of `tokens` tokens, cross-attention included."""
        return self._held(self.tokens)

    @cached_property
    def peak(self) -> int:
        """The most bytes that the batch allocates on its way, prompts coming in one after another."""
        return self._needed(self.batch, self.tokens)

    @cached_property
    def policies(self) -> tuple[Policy, ...]:
        """Those of the spec, each once."""
        found = (group.retention.policy for group in (self.spec.groups if self.spec else ()))
        return tuple(dict.fromkeys(policy for policy in found if policy is not None))

    @cached_property
    def total(self) -> Bytes:
        """The whole batch."""
        return _times(self.per_sequence, self.batch)

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The formula: terms that add up to `total.payload`."""
        own = [term(g, self.tokens, self.batch) for g in (self.spec.groups if self.spec else ())]
        cross = self.cross_spec.groups if self.cross_spec else ()
        return (*own, *(term(g, self.shape.source, self.batch, "source rows") for g in cross))

    @cached_property
    def textbook(self) -> Term | None:
        """2 · bytes · layers · d_model · length · batch; None for an encoder-only model."""
        return textbook(self.shape, self.spec, self.tokens, self.batch) if self.spec else None

    @cached_property
    def textbook_ratio(self) -> float | None:
        """The textbook's figure over the true one, cross-attention left out; 3.0 = three times too much."""
        own = self.total.payload - self.batch * self.cross.payload
        return None if self.textbook is None else self.textbook.payload / own

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """Why the textbook's formula is wrong here; empty where it is right."""
        return tuple(reasons(self.shape, self.spec, self.tokens)) if self.spec else ()

    @cached_property
    def outweighs(self) -> int | None:
        """The length from which the batch's cache takes more bytes than the weights; None = never, or not known."""
        if self.weight_bytes is None or self.spec is None:
            return None
        return self._first_above(self.weight_bytes)

    @cached_property
    def fit(self) -> Fit | None:
        """What fits in `memory`; None where it was not given or the weights are unknown."""
        if self.memory is None or self.weight_bytes is None:
            return None
        room = max(0, self.memory - self.weight_bytes)
        enough = self.memory >= self.weight_bytes
        first, each = self._needed(1, self.tokens), self._needed(2, self.tokens) - self._needed(1, self.tokens)
        batch = (1 + (room - first) // each if each else MOST_SEQUENCES) if enough and first <= room else 0
        above = self._first_above(room) if enough else 1
        tokens = None if above is None else above - 1
        return Fit(self.memory, room, batch >= self.batch, batch, tokens)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know about the numbers."""
        notes = list(self.shape.notes)
        own = self.shape.context
        if own is not None and self.spec is not None and self.tokens > self.spec.longest(own):
            notes.append(f"{self.tokens:,} tokens are more than the {own:,} that the model was made for")
        windowed = sum(layer.window is not None for layer in self.shape.layers)
        if windowed and any(rule.retention.policy is not None for rule in parse_rules(self.kv)[0]):
            notes.append(f"{windowed} layers have a window of their own, which stays as it is: no policy chooses there")
        return tuple(notes)

    def _held(self, tokens: int) -> Bytes:
        """Bytes of one sequence of `tokens` tokens."""
        return self.cross if self.spec is None else self.spec.nbytes(tokens) + self.cross

    def _needed(self, batch: int, tokens: int) -> int:
        """The most bytes that a batch holds on its way to `tokens` tokens each: the last sequence at its peak, the
        others as they are from the end of their prompts on."""
        if tokens < 1 or self.spec is None:
            return batch * self.cross.allocated
        settled = sum(_settled(replace(self.spec, groups=(group,)), tokens) for group in self.spec.groups)
        peak = self.spec.peak(tokens).allocated
        return batch * self.cross.allocated + (batch - 1) * min(settled, peak) + peak

    def _first_above(self, limit: int) -> int | None:
        """The shortest length at which the batch holds more than `limit` bytes; None = none does."""

        def above(tokens: int) -> bool:
            return self._needed(self.batch, tokens) > limit

        high = 1
        while not above(high):
            high *= 2
            if high > 10**18:
                return None
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if above(middle) else (middle, high)
        return high

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; every size in bytes."""
        shape, textbook, fit = self.shape, self.textbook, self.fit
        return {
            "model": shape.name,
            "family": shape.family,
            "parameters": shape.parameters,
            "context": self.tokens,
            "model_context": shape.context,
            "batch": self.batch,
            "weights": {"format": self.weights.name, "formula": self.weights.formula, "bytes": self.weight_bytes},
            "cache": {
                "spec": self.kv,
                "per_token": _figures(self.per_token),
                "per_token_beyond_windows": _figures(self.per_token_later),
                "per_sequence": _figures(self.per_sequence),
                "cross_attention_per_sequence": _figures(self.cross),
                "total": _figures(self.total),
                "peak": self.peak,
                "policies": [{"policy": str(each), "rows": stays(each, self.tokens)} for each in self.policies],
            },
            "formula": [{"text": t.text, "bytes": t.payload} for t in self.terms],
            "textbook": None
            if textbook is None
            else {"text": textbook.text, "bytes": textbook.payload, "ratio": self.textbook_ratio},
            "why_the_textbook_is_wrong": list(self.reasons),
            "cache_outweighs_weights_at_tokens": self.outweighs,
            "memory": None
            if fit is None
            else {
                "bytes": fit.memory,
                "left_by_weights": fit.room,
                "fits": fit.fits,
                "largest_batch": fit.batch,
                "longest_context": fit.tokens,
            },
            "notes": list(self.notes),
        }


def make_plan(
    shape: ModelShape,
    *,
    kv: str = "f16",
    context: int | None = None,
    batch: int = 1,
    weights: str | None = None,
    memory: int | None = None,
    source: int | None = None,
) -> Plan:
    """A plan for a known shape; see `run_plan`."""
    shape = _reading(shape, source)
    tokens = shape.context if context is None else context
    if tokens is None:
        raise UsageError(
            f"{shape.name} does not say for how many tokens it was made; add --context, such as --context 4096"
        )
    _whole("--context", tokens, MOST_TOKENS)
    _whole("--batch", batch, MOST_SEQUENCES)
    parse_rules(kv)
    spec = cross = None
    if shape.layers:
        whole = Spec.parse(kv, [*shape.layers, *(replace(layer, source=True) for layer in shape.cross)])
        spec = replace(whole, groups=tuple(group for group in whole.groups if not group.source))
        cross = replace(whole, groups=tuple(group for group in whole.groups if group.source)) if shape.cross else None
    if spec is not None and shape.context is not None:
        spec.longest(shape.context)  # complains where a window is wider
    return Plan(shape, spec, cross, kv, tokens, batch, _weight_format(shape, weights), memory)


def _reading(shape: ModelShape, source: int | None) -> ModelShape:
    """The shape with a source of so many rows; None = as many as it was made for."""
    if source is None:
        return shape
    if not shape.cross:
        raise UsageError(f"{shape.name} reads no source beside its text (no cross-attention); leave --source out")
    _whole("--source", source, MOST_TOKENS)
    return replace(shape, source=source)


def _whole(option: str, value: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UsageError(f"{option} {value} is out of range; use a whole number from 1 to {most:,}")


def _weight_format(shape: ModelShape, name: str | None) -> WeightFormat:
    if name is None and shape.stored is not None:
        return WeightFormat("file", Fraction(0), "as stored in the file")
    chosen = WEIGHTS.get(name or shape.weights)
    if chosen is None:
        raise UsageError(f"--weights {name!r} is no format of weights; use {', '.join(WEIGHTS)}")
    return chosen


def _row(group: Group) -> Bytes:
    payload = len(group.lanes) * group.layout.payload_bits // 8
    page = replace(group, retention=Retention()).nbytes(group.page_size)
    return Bytes(payload, -(-page.allocated // group.page_size) - payload)


def _later(group: Group) -> Bytes:
    """What one more token adds when rows have begun to leave."""
    policy, row = group.retention.policy, _row(group)
    if policy is None:
        return row if group.retention.window is None else Bytes(0, 0)
    part = Fraction(1) if policy.trigger.every is None else policy.budget.amount / 100
    part = Fraction(0) if policy.trigger.when is When.FULL else part
    return Bytes(int(row.payload * part), int(row.overhead * part))


def _settled(spec: Spec, tokens: int) -> int:
    """The most bytes of a group from the end of a prompt of `tokens` tokens on, as long as it grows no longer."""
    policy = spec.groups[0].retention.policy
    if policy is None or policy.trigger.when is not When.PROMPT:
        return spec.peak(tokens).allocated
    return spec.nbytes(tokens).allocated


def _times(size: Bytes, count: int) -> Bytes:
    return Bytes(size.payload * count, size.overhead * count)


def _figures(size: Bytes) -> dict[str, int]:
    return {"payload": size.payload, "overhead": size.overhead, "allocated": size.allocated}
