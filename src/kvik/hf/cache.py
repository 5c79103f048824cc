"""transformers' interface over kvik's sequences: what `kvik.hf.Cache` is, once it is known how the model asks."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kvik.cache.cache import Cache as Pages
from kvik.errors import SequenceError
from kvik.hf import files
from kvik.hf.attachment import Attachment
from kvik.hf.batch import Batch
from kvik.hf.chunk import same_rows
from kvik.hf.compat import CROP_KEEPS, to_remove
from kvik.hf.finding import Found
from kvik.hf.holder import Holder
from kvik.hf.layers import layers_of
from kvik.hf.pieces import Pieces, by_pieces
from kvik.hf.report import describe


class TextCache(Holder, transformers.Cache):  # type: ignore[misc]  # transformers has no types
    """Keys and values of one batch, as a kvik spec keeps them; give it to `generate(past_key_values=…)`.

    Made by `kvik.hf.Cache` and `kvik.hf.PrefixCache.open`.

    Attributes:
        pages: kvik's own cache, which holds the rows.
        batch: its sequences.
        attachment: what it put on the model.
    """

    def __init__(self, attachment: Attachment, found: Found, pages: Pages) -> None:
        """
        Args:
            attachment: held for it.
            found: how the model asks.
            pages: where rows are kept.
        """
        self.attachment, self.found, self.pages = attachment, found, pages
        self.batch = Batch(pages, {i: shape.window for i, shape in enumerate(found.layers)})
        super().__init__(layers=layers_of(self.batch, found, attachment.model.config.get_text_config(decoder=True)))
        self.closed = False
        self._finish = weakref.finalize(self, given_back, attachment, self.batch)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes every row to one safetensors file, from which `load` goes on with the same tokens.

        Raises:
            SequenceError: there is nothing to save, or the model has recurrent states, which are not in rows.
            StorageError: the file can't be written.
        """
        self._check()
        if not self.batch.sequences:
            raise SequenceError("the cache is empty; give it to a model first")
        if self.recurrent:
            raise SequenceError("this model's recurrent states are not in rows, and are not saved")
        files.write(path, self.batch.image(), files.about(self.attachment.model, self.spec))

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Takes what a file holds; the cache is empty.

        Raises:
            StorageError: it isn't what such a cache holds.
            BudgetError: it doesn't fit.
        """
        self.batch.take(tensors)

    def enter(self, inputs: dict[str, Any]) -> None:
        """A forward of the model begins: called by its hook."""
        self._check()
        if inputs.get("use_cache") is False:
            raise SequenceError(
                "the model was given a cache and use_cache=False, as its configuration may say: every step "
                "would store the whole text again; give generate(use_cache=True)"
            )
        rows, count, mask = size_of(inputs)
        twins = list(range(rows))
        if rows > 1 and count > 1 and self.batch.may_share and not self.attachment.model.training:
            twins = same_rows(rows, {name: x for name, x in inputs.items() if x is not self})
        self.batch.begin(rows, count, inputs.get("input_ids"), mask, twins)

    def cut(self, forward: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], Pieces | None]:
        """Takes what comes before a policy's positions through the model; what is left of a forward, and what came out.
        See `kvik.hf.pieces`."""
        batch = self.batch
        if not batch.cuts or batch.cutting:
            return inputs, None
        self._check()
        rows, count, mask = size_of(inputs)
        keep = inputs.get("logits_to_keep")
        batch.expect(rows, count, keep - 1 if isinstance(keep, int) and keep else 0, mask)
        end = batch.columns + count
        batch.cutting = True
        try:
            return by_pieces(forward, inputs, count, lambda: batch.room(end - batch.columns, mask))
        finally:
            batch.cutting = False

    def leave(self, done: bool) -> None:
        """The forward is over: called by the model's hook."""
        if done:
            self.batch.end()
        else:
            self.batch.abandon()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See transformers' Cache. Where attention reads pages, what comes back are handles, not tensors."""
        self._check()
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
        self.batch.crop(to_remove(tokens_to_remove, self.batch.columns))
        for layer in self.recurrent:
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes row i what row beam_idx[i] was: tables are copied, rows are shared."""
        self._select(beam_idx.tolist())
        for layer in self.recurrent:
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
        self.batch.recording, self.batch.begun = True, False
        for layer in self.recurrent:
            layer.activate_past_recording()

    def reset(self) -> None:
        """Forgets every row; the next forward begins a new batch."""
        self._check()
        self.batch.clear()
        for layer in self.recurrent:
            layer.reset()

    def close(self) -> None:
        """Gives every page back, and the model its own attention. Idempotent."""
        self.closed = True
        self._finish()

    @property
    def is_croppable(self) -> bool:
        """Whether a crop puts everything back as it was."""
        return bool(not self.recurrent if CROP_KEEPS else super().is_croppable)

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first forward."""
        return len(self.batch.sequences) or -1

    @property
    def max_cache_len(self) -> int:
        """-1: it grows until its memory is full."""
        return -1

    def describe(self) -> str:
        """What is kept, where attention reads it and why, and what it takes."""
        return describe(self.found, self.batch)

    def __deepcopy__(self, memo: dict[int, Any]) -> TextCache:
        """Another cache with the same past, which shares its pages."""
        self._check()
        if self.recurrent:
            raise SequenceError("this model's recurrent states can't be shared; prefill a cache for each use")
        twin = TextCache(self.attachment.hold(), self.found, self.pages)
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

    @property
    def recurrent(self) -> list[Any]:
        """Layers that hold a state of their own."""
        return [
            layer for layer in self.layers if isinstance(layer, transformers.cache_utils.LinearAttentionCacheLayerMixin)
        ]

    def _check(self) -> None:
        if self.closed:
            raise SequenceError("the cache is closed; make another")


def size_of(inputs: dict[str, Any]) -> tuple[int, int, Tensor | None]:
    """Rows and columns of what a forward was given, and where its padding stands.

    Raises:
        SequenceError: it was given no tokens.
    """
    ids = inputs.get("input_ids")
    given = inputs.get("inputs_embeds") if ids is None else ids
    if given is None:
        raise SequenceError("the model was given neither input_ids nor inputs_embeds")
    mask = inputs.get("attention_mask")
    return *given.shape[:2], mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def given_back(attachment: Attachment, batch: Batch) -> None:
    batch.clear()
    attachment.release()
