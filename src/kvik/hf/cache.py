"""The cache that `generate()` is given: transformers' interface over kvik's sequences.

cache = kvik.hf.Cache(model, "k8v4")
out = model.generate(**inputs, past_key_values=cache)
print(cache.describe())
cache.close()                                   # or `with kvik.hf.Cache(model) as cache:`
"""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from kvik.cache.cache import Cache as Pages
from kvik.cache.spec import Bytes, Spec
from kvik.errors import ModelError, SequenceError, SpecError
from kvik.hf.attachment import Attachment, attachment_of
from kvik.hf.batch import Batch
from kvik.hf.chunk import same_rows
from kvik.hf.finding import Found, differ, kept_by, reason, refused, tried
from kvik.hf.layers import layers_of
from kvik.hf.report import describe
from kvik.hf.sizes import memory_of, spec_within

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
        check_dense(found, parsed)
        limit = limit if memory is None else memory_of(memory)
        return attachment, found, Pages(parsed, memory=limit, shares=shares)
    except BaseException:
        attachment.release()
        raise


class Cache(transformers.Cache):  # type: ignore[misc]  # transformers has no types
    """Keys and values of one batch, as a kvik spec keeps them; give it to `generate(past_key_values=…)`.

    Attributes:
        pages: kvik's own cache, which holds the rows.
        batch: its sequences.
        attachment: what it put on the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: str | None = None,
        *,
        budget: int | str | None = None,
        memory: int | str | None = None,
        tokens: int | None = None,
        batch: int = 1,
    ) -> None:
        """
        Args:
            model: the one that will be run with it.
            spec: what is kept, as in `kvik.Spec.parse`; None = every row in the model's own precision.
            budget: bytes to live within, as a number or "512MiB": the most exact spec that fits is taken.
            memory: the most bytes that are ever held; None = the budget, or half of what the machine has left.
            tokens, batch: for a budget: columns and rows to expect; None = as many tokens as the model has positions.

        Raises:
            SpecError: the spec can't be read, or doesn't fit this model; or spec and budget were both given.
            BudgetError: there is less memory, or nothing fits the budget.
            ModelError: the model keeps no keys and values, or its attention can't be served.
        """
        self._set(*opened(model, spec, budget=budget, memory=memory, tokens=tokens, batch=batch))

    def __new__(cls, model: PreTrainedModel | None = None, *args: Any, **kwargs: Any) -> Any:
        """Of a model that reads a source, what transformers expects there: see `kvik.hf.source.ReaderCache`."""
        if model is not None and model.config.is_encoder_decoder:
            from kvik.hf.source import ReaderCache

            return ReaderCache(model, *args, **kwargs)
        return object.__new__(cls)

    def _set(self, attachment: Attachment, found: Found, pages: Pages) -> None:
        self.attachment, self.found, self.pages = attachment, found, pages
        self.batch = Batch(pages, {i: shape.window for i, shape in enumerate(found.layers)})
        super().__init__(layers=layers_of(self.batch, found, attachment.model.config.get_text_config(decoder=True)))
        self.closed = False
        self._finish = weakref.finalize(self, given_back, attachment, self.batch)

    def enter(self, inputs: dict[str, Any]) -> None:
        """A forward of the model begins: called by its hook."""
        self._check()
        ids, embeddings = inputs.get("input_ids"), inputs.get("inputs_embeds")
        given = ids if ids is not None else embeddings
        if given is None:
            raise SequenceError("the model was given neither input_ids nor inputs_embeds")
        if inputs.get("use_cache") is False:
            raise SequenceError(
                "the model was given a cache and use_cache=False, as its configuration may say: every step "
                "would store the whole text again; give generate(use_cache=True)"
            )
        rows, count = given.shape[:2]
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        fresh = rows > 1 and self.batch.columns == 0
        inputs = {name: x for name, x in inputs.items() if x is not self}
        twins = same_rows(rows, inputs) if fresh and not self.attachment.model.training else list(range(rows))
        self.batch.begin(rows, count, ids, mask, twins)

    def leave(self, done: bool) -> None:
        """The forward is over: called by the model's hook."""
        if done:
            self.batch.end()
        else:
            self.batch.abandon()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See transformers' Cache. Where attention reads pages, what comes back are handles, not tensors."""
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included, whatever is held of them."""
        return self.batch.columns

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The column of the next token."""
        return self.batch.columns

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns; the count is 0 or below, as in transformers.

        Raises:
            ValueError: it is above.
            SequenceError: rows that were visible from there have left.
        """
        self._check()
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): a positive number meant the length to keep before transformers 5.13, and "
                f"means nothing now; give -{tokens_to_remove} to remove so many columns"
            )
        self.batch.crop(-tokens_to_remove)
        for layer in self._recurrent():
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row i what row beam_idx[i] was: tables are copied, rows are shared."""
        self._select(beam_idx.tolist())
        for layer in self._recurrent():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Makes so many of each row, side by side; they share what they have in common."""
        count = len(self.batch.sequences)
        self.batch_select_indices(torch.arange(count).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order. A bool mask is taken too."""
        chosen = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.reorder_cache(chosen)

    def activate_past_recording(self) -> None:
        """From now on a crop follows each forward: nothing leaves before it."""
        self.batch.recording = True
        for layer in self._recurrent():
            layer.activate_past_recording()

    def reset(self) -> None:
        """Forgets every row; the next forward begins a new batch."""
        self._check()
        self.batch.clear()
        for layer in self._recurrent():
            layer.reset()

    def close(self) -> None:
        """Gives every page back, and the model its own attention. Idempotent."""
        self.closed = True
        self._finish()

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward."""
        return len(self.batch.sequences) or -1

    @property
    def nbytes(self) -> Bytes:
        """Bytes held: rows, and everything around them."""
        return self.pages.nbytes

    @property
    def spec(self) -> Spec:
        """What is kept."""
        return self.pages.spec

    @property
    def max_cache_len(self) -> int:
        """-1: it grows until its memory is full."""
        return -1

    def describe(self) -> str:
        """What is kept, where attention reads it and why, and what it takes."""
        return describe(self.found, self.batch)

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __bool__(self) -> bool:
        """True, whatever it holds: `if cache:` asks whether there is one."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        """Another cache with the same past, which shares its pages."""
        self._check()
        if self._recurrent():
            raise SequenceError("this model's recurrent states can't be shared; prefill a cache for each use")
        twin = object.__new__(type(self))
        twin._set(self.attachment.hold(), self.found, self.pages)
        twin.adopt(self.batch.twin())
        return twin

    def adopt(self, batch: Batch) -> None:
        """Takes another batch's sequences, and leaves it none."""
        self.batch.adopt(batch.sequences, batch.real)
        self.batch.recording = batch.recording
        batch.sequences = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec}, {len(self.batch.sequences)} rows of {self.batch.columns} columns)"

    def _select(self, rows: list[int]) -> None:
        self._check()
        self.batch.select(rows)

    def _recurrent(self) -> list[Any]:
        """Layers that hold a state of their own."""
        return [
            layer for layer in self.layers if isinstance(layer, transformers.cache_utils.LinearAttentionCacheLayerMixin)
        ]

    def _check(self) -> None:
        if self.closed:
            raise SequenceError("the cache is closed; make another")


def made(attachment: Attachment, found: Found, pages: Pages) -> Any:
    """A cache of parts that are there; the attachment is held."""
    if found.sources:
        from kvik.hf.source import ReaderCache

        return ReaderCache.of(attachment, found, pages)
    cache = object.__new__(Cache)
    cache._set(attachment, found, pages)
    return cache


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
    try:
        return differ(expected, tried(attachment.model, cache), found.dtype)
    except (ModelError, MemoryError):
        raise
    except Exception as error:  # whatever a model does with what it can't compute with
        return reason(error)
    finally:
        cache.close()


def check_dense(found: Found, spec: Spec) -> None:
    """Raises SpecError where rows would leave that decoded attention can't do without."""
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
    found = model.config.get_text_config(decoder=True).to_dict().get("max_position_embeddings")
    if not isinstance(found, int):
        raise SpecError("this model's configuration doesn't say how many positions it has; give tokens=… with a budget")
    return found


def given_back(attachment: Attachment, batch: Batch) -> None:
    batch.clear()
    attachment.release()
