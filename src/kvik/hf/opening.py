"""How a cache comes to be: a model is tried, a spec is read and checked against it, and room is made."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvik.cache.cache import Cache as Pages
from kvik.cache.methods import Needs
from kvik.cache.spec import Spec
from kvik.errors import ModelError, SpecError
from kvik.hf.attachment import Attachment, attachment_of
from kvik.hf.cache import TextCache
from kvik.hf.finding import Found, differ, kept_by, reason, refused, tried
from kvik.hf.sizes import memory_of, spec_within
from kvik.hf.source import ReaderCache

_TRIAL_BYTES = 64 << 20


def opened(
    model: PreTrainedModel,
    spec: str | None,
    *,
    budget: int | str | None = None,
    memory: int | str | None = None,
    tokens: int | None = None,
    batch: int = 1,
    shares: bool = False,
    weights: str = "",
) -> tuple[Attachment, Found, Pages]:
    """What a cache of a model is made of: see `Cache`."""
    if spec is not None and budget is not None:
        raise SpecError("spec and budget were both given, and a budget chooses the spec; give one of them")
    attachment = attachment_of(model, find)
    try:
        found = attachment.found
        assert found is not None, "an attachment has looked"
        limit = memory_of(memory if budget is None else budget)
        text = found.codec if spec is None else spec
        if budget is not None and limit is not None:
            text = spec_within(found, limit, tokens or positions_of(model), batch)
        parsed = Spec.parse(text, [*found.layers, *found.sources])
        check_spec(found, parsed)
        limit = limit if memory is None else memory_of(memory)
        return attachment, found, Pages(parsed, memory=limit, shares=shares, weights=weights)
    except BaseException:
        attachment.release()
        raise


def made(attachment: Attachment, found: Found, pages: Pages) -> Any:
    """A cache of parts that are there; the attachment is held."""
    return (ReaderCache if found.sources else TextCache)(attachment, found, pages)


def find(attachment: Attachment) -> Found:
    """How a model asks: see `kvik.hf.finding`.

    Raises:
        ModelError: it can't be served.
    """
    model = attachment.model
    found, expected = kept_by(model)
    why = ""
    for direct in (True, False):
        attachment.found = Found(**{**vars(found), "direct": direct, "why": why})
        gap = _tried(attachment, expected)
        if not gap:
            return attachment.found
        if not direct:
            raise refused(model, why, gap)
        why = gap
    raise AssertionError("one of the two was decided")


def _tried(attachment: Attachment, expected: list[Tensor]) -> str:
    """How what the model computes with kvik differs from what it should; nothing where it doesn't."""
    found = attachment.found
    assert found is not None, "it is what is tried"
    spec = Spec.parse(found.codec, [*found.layers, *found.sources])
    cache = made(attachment.hold(), found, Pages(spec, memory=_TRIAL_BYTES, shares=False))
    cache.batch.tried = True
    try:
        return differ(expected, tried(attachment.model, cache), found.dtype)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # whatever a model does with what it can't compute with
        return reason(error)
    finally:
        cache.close()


def check_spec(found: Found, spec: Spec) -> None:
    """Raises SpecError where a policy can't be shown what it asks for, or decoded attention can't do without rows."""
    for group in spec.groups:
        policy = group.retention.policy
        if policy is not None and policy.needs & (Needs.PASS | Needs.FUTURE):
            raise SpecError(
                f"spec {str(spec)!r}: {policy} chooses by a pass of the model over the text, which is not made of "
                "transformers' models; use a method without one, such as 'snapkv'"
            )
    if found.direct:
        return
    own = {(layer, head): shape.window for layer, shape in enumerate(found.layers) for head in range(shape.heads)}
    for group in spec.groups:
        if group.source:
            continue
        narrowed = any(group.retention.window != own[lane] for lane in group.lanes)
        if group.retention.policy is not None or narrowed:
            raise SpecError(
                f"spec {str(spec)!r}: {group.retention} lets rows leave, but this model's own code computes with "
                f"all of them ({found.why}); give codecs alone, such as 'int8'"
            )


def positions_of(model: PreTrainedModel) -> int:
    """Positions that a model was made for, as its configuration says."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)  # its name for all
    if not isinstance(found, int):
        raise SpecError("this model's configuration doesn't say how many positions it has; give tokens=… with a budget")
    return found
