"""kvik's own decoders with an operator of choice: what they keep, their parameters, and what training them takes."""

from __future__ import annotations

from dataclasses import replace

from kvik.cache.sharing import shared
from kvik.models.forms import Cost, Form
from kvik.models.shapes.shape import ENCODER_ONLY, Config, ModelShape
from kvik.units import format_bytes, format_count


def decoder(c: Config) -> ModelShape:
    """See `models/families/gpt.py`."""
    return _shape(c, causal=True)


def encoder(c: Config) -> ModelShape:
    """See `models/families/masked.py`: it keeps nothing."""
    return replace(_shape(c, causal=False), layers=(), kv_parameters=None, notes=(f"no cache: {ENCODER_ONLY}",))


def _shape(c: Config, causal: bool) -> ModelShape:
    c = Config(c.raw, operator="attention:learned", owners=[])
    (heads, _, width), d, layers = c.heads(), c("hidden_size"), c("num_hidden_layers")
    length, vocabulary, ffn = c("max_position_embeddings"), c("vocab_size"), c.maybe("intermediate_size") or 4 * d
    form, owners = Form.parse(str(c.raw["operator"])), [int(owner) for owner in c.raw["owners"]]
    cost, m = Cost(d, heads * width, heads, form.sets(length, causal), form), heads * width
    reading = sum(owner != layer for layer, owner in enumerate(owners))
    layer = cost.parameters + m * d + d + 2 * d * ffn + ffn + d + 4 * d
    tied = 1 if c.flag("tie_word_embeddings") else 2
    parameters = layers * layer + 2 * d + tied * vocabulary * d + (form.positions == "learned") * length * d
    every = form.layer_shapes(d, heads, width, length) * layers
    return ModelShape(
        name=str(c.raw["model_type"]),
        family=str(c.raw["model_type"]),
        parameters=parameters - reading * 2 * d * m,
        layers=shared(every, owners) if owners else tuple(every),
        kv_parameters=2 * d * m if form.kind == "attention" else None,
        d_model=d,
        query_heads=heads,
        head_dim=width,
        context=length,
        weights=c.weights,
        notes=tuple(_notes(form, cost, layers, length)),
    )


def _notes(form: Form, cost: Cost, layers: int, length: int) -> list[str]:
    """What an operator costs beside its cache, where that is news."""
    if form.kind == "attention":
        return []
    plain = Cost(cost.d, cost.m, cost.heads, 1, Form("attention"))
    more = layers * (cost.parameters - plain.parameters)
    notes = [f"operator {form}: {format_count(abs(more))} parameters {'more' if more >= 0 else 'fewer'} than attention"]
    step, usual = cost.step(length), plain.step(length)
    notes.append(f"a token's step at {length:,}: {step / usual:.1f} times the operations of attention")
    if form.kind == "bucketed":
        each = len(form.layer_shapes(cost.d, cost.heads, cost.m // cost.heads, length))
        notes.append(
            f"each of {layers} layers has {each} in the cache: x, and one for each range of more than one offset"
        )
    if form.kind in ("translution", "lor"):
        inner, outer = (cost.d, cost.m) if form.kind == "translution" else (cost.rank, cost.rank)
        s, pairs, both = len(form.relative), length * (length + 1) // 2, inner + outer
        gathered, kept, once = 4 * length * length * inner * outer, 4 * s * pairs * both, 4 * 8 * length * both
        notes.append(
            f"training a text of {length:,} in f32, a layer: {format_bytes(gathered)} for each of {s} relative "
            f"projections where a matrix is gathered for every pair; offset by offset {format_bytes(kept)} in all, or "
            f"{format_bytes(once)} at a time where products are computed again on the way back"
        )
    return notes
