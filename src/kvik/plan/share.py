"""A plan for a model whose layers read the rows of others (`cache/sharing.py`)."""

from __future__ import annotations

from dataclasses import replace

from kvik.cache.sharing import readers, shared
from kvik.errors import UsageError
from kvik.models.shapes.shape import ModelShape


def sharing(shape: ModelShape, rule: str) -> ModelShape:
    """The same model under a rule: layers that read another's rows keep none, and have no projections to k and v.

    Raises:
        UsageError: there is no such rule, or the model's layers can't share by it.
    """
    if shape.kv_parameters is None:
        raise UsageError(
            f"share {rule!r}: layers of {shape.family} models can't share rows in kvik; leave it out, or use another "
            "model, such as smollm2"
        )
    layers = shared(shape.layers, readers(shape.layers, rule))
    reading = sum(layer.reads is not None for layer in layers)
    fewer = None if shape.parameters is None else shape.parameters - reading * shape.kv_parameters
    note = (
        f"share {rule}: another model than the published one, {reading} of its {len(layers)} layers read others' rows"
    )
    return replace(
        shape, name=f"{shape.name} (share {rule})", layers=layers, parameters=fewer, notes=(*shape.notes, note)
    )
