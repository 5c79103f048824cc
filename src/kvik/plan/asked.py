"""What `kvik plan` is asked: about one model by its name, or about all well-known ones."""

from __future__ import annotations

from kvik.errors import SpecError
from kvik.models.shapes.wellknown import known_models
from kvik.plan.arithmetic import Plan, make_plan
from kvik.plan.find import lookup
from kvik.plan.share import sharing
from kvik.units import parse_bytes


def run_plan(
    model: str,
    *,
    context: int | None = None,
    batch: int = 1,
    kv: str = "f16",
    weights: str | None = None,
    memory: str | None = None,
    source: int | None = None,
    share: str | None = None,
) -> Plan:
    """What `kvik plan` prints.

    Args:
        model: a well-known name, a config.json or its folder, a .gguf file, or a hub id.
        context: tokens a sequence; default: what the model was made for.
        batch: sequences.
        kv: a spec string.
        weights: `f32`, `bf16`, `f16`, `int8` or `int4`; default: as the model comes.
        memory: a size such as `8GiB`.
        source: rows of the source that each sequence reads; default: the most that the model was made for.
        share: layers read the rows of others, by a rule of `cache/sharing.py`.

    Raises:
        UsageError: a number or size that can't be.
        ConfigError: no such model, or a config that can't be sized.
        SpecError: a wrong spec string.
        StorageError: a file or hub that can't be read.
    """
    room = None if memory is None else parse_bytes(memory, "--memory")
    shape = lookup(model) if share is None else sharing(lookup(model), share)
    return make_plan(shape, kv=kv, context=context, batch=batch, weights=weights, memory=room, source=source)


def list_plans(kv: str = "f16", weights: str | None = None) -> tuple[list[Plan], dict[str, SpecError]]:
    """A plan for every well-known model at its full context, smallest first; and why others can't have the spec.

    Raises:
        SpecError: none can.
    """
    plans, refused = [], dict[str, SpecError]()
    for shape in known_models():
        try:
            plans.append(make_plan(shape, kv=kv, weights=weights))
        except SpecError as error:
            refused[shape.name] = error
    if not plans:
        raise next(iter(refused.values()))
    return plans, refused
