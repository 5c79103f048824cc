"""Prompts that come again: what was computed of them stays, across calls of `generate()`, batches and turns.

prefixes = kvik.hf.PrefixCache(model, "int8", memory="1GiB")
with prefixes.open(**inputs) as cache:                       # knows whatever was seen of these tokens
    out = model.generate(**inputs, past_key_values=cache)
"""

from __future__ import annotations

import weakref

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from kvik import events
from kvik.errors import ModelError, SequenceError
from kvik.hf.cache import TextCache
from kvik.hf.fingerprint import fingerprint
from kvik.hf.holder import Holder
from kvik.hf.opening import made, opened
from kvik.units import format_bytes


class PrefixCache(Holder):
    """Pages of one model, found again by the tokens that they were made of. Full pages are shared, others copied when
    one of their users writes; the least recently used leave first when the memory is full.

    Attributes:
        asked, known: tokens that came in with `open`, and how many of them were known.
    """

    def __init__(
        self, model: PreTrainedModel, spec: str | None = None, *, memory: int | str | None = None, salt: str = ""
    ) -> None:
        """
        Args:
            model, spec, memory: see `kvik.hf.Cache`; the memory is for all caches that are opened here.
            salt: of those who name none; see `open`.

        Raises:
            ModelError: the model has recurrent states or reads a source: its tokens' rows are not all.
        """
        if model.config.is_encoder_decoder:
            raise ModelError("this model reads a source, on which all rows of its text depend; use kvik.hf.Cache")
        self._attachment, self._found, self.pages = opened(
            model, spec, memory=memory, shares=True, weights=fingerprint(model)
        )
        self._finish = weakref.finalize(self, self._attachment.release)
        self.salt, self.asked, self.known = salt, 0, 0
        with made(self._attachment.hold(), self._found, self.pages) as tried:
            recurrent = bool(tried.recurrent)
        if recurrent:
            self.close()
            raise ModelError("this model has recurrent states, which can't go back to a position; use kvik.hf.Cache")
        self.evicted = 0
        self.pages.listen(self._heard)

    def open(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, salt: str | None = None) -> TextCache:
        """A cache for one batch, which knows the columns that all its rows are known in: `generate` computes the rest.

        Args:
            input_ids, attention_mask: as `generate` will get them, [rows, columns].
            salt: only what was computed under the same salt is found: a tenant, an adapter.

        Raises:
            SequenceError: a row has no token, or ends with padding.
            BudgetError: the tables don't fit.
        """
        ids = input_ids.tolist()
        real = np.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.cpu().numpy() != 0
        if not real[:, -1].all():
            raise SequenceError("a row ends with padding, behind which nothing can be generated; pad on the left")
        sequences, columns = [], real.shape[1]
        try:
            for row, text in enumerate(ids):
                places = np.flatnonzero(real[row])
                tokens = [text[place] for place in places]
                sequence = self.pages.open(tokens, self.salt if salt is None else salt)
                sequences.append(sequence)
                columns = min(columns, int(places[len(sequence)]))
                self.asked, self.known = self.asked + len(tokens), self.known + len(sequence)
        except BaseException:
            for sequence in sequences:
                sequence.close()
            raise
        cache: TextCache = made(self._attachment.hold(), self._found, self.pages)
        cache.batch.adopt(sequences, real[:, :columns])
        return cache

    def close(self) -> None:
        """Takes no more; caches that are open go on. Idempotent."""
        self._finish()

    def describe(self) -> str:
        """What is kept and was found."""
        held, books = self.nbytes, self.pages.books
        part = f"{100 * self.known / self.asked:.0f} %" if self.asked else "none"
        return "\n".join([
            f"spec       {self.spec}",
            f"tokens     {self.asked} asked for, {self.known} known: {part}",
            f"pages      {books.in_use} in use, {books.kept} kept to be found, {self.evicted} dropped for room",
            f"bytes      {format_bytes(held.payload + held.overhead)} of {format_bytes(self.pages.budget)}",
        ])  # fmt: skip

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec}, {len(self.pages.index)} blocks)"

    def _heard(self, event: events.Event) -> None:
        if isinstance(event, events.Evicted):
            self.evicted += event.pages
