"""The cache's formula with its numbers in, the textbook's beside it, and why they differ.

true        Σ over groups of streams · bytes · layers · KV heads · width · rows · sequences
textbook    2 · bytes · layers · d_model · length · batch      (right where every query head has its own k and v)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from kvik.cache.policy import Policy, When
from kvik.cache.spec import Group, Spec
from kvik.models.shapes.shape import ModelShape


@dataclass(frozen=True)
class Term:
    """A product for people and its value.

    Attributes:
        text: the factors, `2 (k, v) · 2 B · 30 layers · …`.
        payload: bytes that they make.
    """

    text: str
    payload: int


def term(group: Group, tokens: int, batch: int, unit: str = "tokens") -> Term:
    """What one group keeps of `batch` sequences, as a product."""
    rows = group.rows(tokens)
    kept = f"{tokens:,} {unit}" if rows == tokens else f"{rows:,} of {tokens:,} {unit}"
    payload = batch * len(group.lanes) * rows * group.layout.payload_bits // 8
    return Term(f"{_streams(group)} · {_lanes(group)}{_wide(group)} · {kept} · {_sequences(batch)}", payload)


def textbook(shape: ModelShape, spec: Spec, tokens: int, batch: int) -> Term:
    """2 · bytes · layers · d_model · length · batch, at the bytes that a number takes in this spec on average."""
    numbers = sum(len(g.lanes) * sum(s.width for s in g.layout.streams) for g in spec.groups)
    each = Fraction(sum(len(g.lanes) * g.layout.payload_bits for g in spec.groups), 8 * numbers)
    layers, d = len(shape.layers), shape.d_model
    text = f"2 · {_bytes(each)} · {layers} layers · {d} d_model · {tokens:,} tokens · {_sequences(batch)}"
    return Term(text, int(2 * each * layers * d * tokens * batch))


def reasons(shape: ModelShape, spec: Spec, tokens: int) -> Iterator[str]:
    """Why the textbook's product is not what is kept; nothing where it is."""
    layer = shape.layers[0]
    names = [name for name, _ in layer.streams]
    if names != ["k", "v"]:
        parts = " and ".join(f"{name} of {width}" for name, width in layer.streams)
        yield f"a layer keeps {parts} for all of its {shape.query_heads} heads, no k and v for each"
    else:
        if layer.heads < shape.query_heads:
            yield f"{shape.query_heads} query heads share {layer.heads} KV head{'s' * (layer.heads > 1)}"
        wide = shape.query_heads * shape.head_dim
        if wide != shape.d_model:
            yield f"{shape.query_heads} heads of {shape.head_dim} are {wide:,} wide, d_model is {shape.d_model:,}"
    keeping = [layer for layer in shape.layers if layer.reads is None]
    if len(keeping) < len(shape.layers):
        yield f"{len(shape.layers) - len(keeping)} of {len(shape.layers)} layers read the rows of others"
    windows = Counter(layer.window for layer in keeping if layer.window is not None and layer.window < tokens)
    for window, count in windows.items():
        yield f"{count} of {len(shape.layers)} layers see the last {window:,} tokens alone"
    own = sum(layer.heads * min(tokens, layer.window or tokens) for layer in keeping)
    if sum(len(g.lanes) * g.rows(tokens) for g in spec.groups) < own:
        yield "the spec keeps fewer rows than the model sees"


def stays(policy: Policy, tokens: int) -> str:
    """What a policy's budget is a part of, when it is taken, and what stays besides, after a prompt of some tokens."""
    trigger, amount = policy.trigger, f"{float(policy.budget.amount):g}"
    who = {"ada": ", on average over a layer's heads", "pyramid": ", lower layers more, on average over all heads"}
    shared = who.get(policy.allocator, ", on average over all heads" if policy.allocator != "uniform" else "")
    if trigger.when is When.NEVER:
        return f"all; a query reads {amount} pages of each head"
    if trigger.when is When.FULL:
        every, bound = trigger.every or 1, int(policy.budget.amount)
        text = f"{bound:,} a head{shared}, chosen after every {every:,} positions, in the prompt too; "
        return text + f"up to {bound + every:,} in between"
    text = f"{amount} % of the prompt's tokens{shared}, chosen as the prompt ends (here after {tokens:,})"
    again = f"; and of all so far after every {trigger.every:,} more" if trigger.every else "; later rows all stay"
    fixed = policy.sinks + policy.recent
    more = f"; the first {policy.sinks} and the last {policy.recent} always stay"
    return text + again + more * (policy.budget_at(tokens) <= fixed)


def _streams(group: Group) -> str:
    streams = group.layout.streams
    each = [Fraction(s.codec.bits, 8) for s in streams]
    if len(set(each)) > 1:
        return "(" + " + ".join(f"{s.name} {_bytes(b)}" for s, b in zip(streams, each, strict=True)) + ")"
    if len({s.width for s in streams}) > 1:
        return "(" + " + ".join(f"{s.width} {s.name}" for s in streams) + f") · {_bytes(each[0])}"
    return f"{len(streams)} ({', '.join(s.name for s in streams)}) · {_bytes(each[0])}"


def _lanes(group: Group) -> str:
    by_layer = Counter(layer for layer, _ in group.lanes)
    heads = set(by_layer.values())
    layers = f"{len(by_layer)} layer{'s' * (len(by_layer) > 1)}"
    if len(heads) > 1:
        return f"{len(group.lanes)} KV heads in {layers}"
    if [s.name for s in group.layout.streams] != ["k", "v"] and heads == {1}:
        return layers
    return f"{layers} · {next(iter(heads))} KV head{'s' * (heads != {1})}"


def _wide(group: Group) -> str:
    widths = {s.width for s in group.layout.streams}
    return f" · {widths.pop()} wide" if len(widths) == 1 else ""


def _bytes(value: Fraction) -> str:
    return f"{float(value):.4g} B"


def _sequences(batch: int) -> str:
    return f"{batch:,} sequence{'s' * (batch != 1)}"
