"""Caches of models that read a source beside their text (cross-attention): T5, BART, Whisper.

    cache = kvik.hf.Cache(model)                    # a ReaderCache, where the model is such a one
    out = model.generate(features, num_beams=5, past_key_values=cache)

A source's rows are stored once, for all rows of the batch that read the same: beams, several answers, a repeated input.
Its padding is not stored.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from kvik.cache.cache import Cache as Pages
from kvik.cache.shape import LayerShape
from kvik.cache.source import Filling
from kvik.errors import SequenceError, StorageError
from kvik.hf import files
from kvik.hf.attachment import Attachment
from kvik.hf.batch import Batch
from kvik.hf.cache import TextCache, given_back
from kvik.hf.chunk import Bools, Chunk, Query, same_rows
from kvik.hf.dense import source_length, source_rows
from kvik.hf.finding import Found
from kvik.hf.handle import Handle
from kvik.hf.holder import Holder
from kvik.hf.pieces import Pieces


class Over:
    """A chunk's queries over the rows of its sources: see `kvik.hf.chunk.Reading`."""

    causal = False

    def __init__(self, chunk: Chunk, sources: Sources) -> None:
        self._chunk, self._sources = chunk, sources

    def attend(self, layer: int, query: Query) -> Tensor:
        """Every row of its source is seen by every query."""
        if query.bias is not None and bool(query.bias.any()):
            raise SequenceError("a bias on the rows of a source can't be read over pages")
        return self._chunk.attend(layer, Query(query.q, query.width, query.scale, query.softcap, query.sinks))

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """Decoded."""
        return source_rows(self._chunk.rows, layer, self._sources.real, self._chunk.dtype)

    @property
    def tried(self) -> bool:
        """See `kvik.hf.chunk.Reading`."""
        return bool(self._chunk.tried)

    def compare(self, found: Tensor, expected: Tensor) -> None:
        """See `kvik.hf.chunk.Reading`."""
        self._chunk.compare(found, expected)

    def check(self, layer: int, window: int | None) -> None:
        """Nothing: a source has no windows."""


class Sources(transformers.Cache):  # type: ignore[misc]
    """The half of an encoder-decoder cache that holds sources.

    Attributes:
        real: bool [rows, columns of the encoder]: where it read tokens.
    """

    def __init__(self, batch: Batch, found: Found) -> None:
        self.batch, self.found = batch, found
        self.real: Bools = np.zeros((0, 0), bool)
        self._fillings: dict[int, Filling] = {}  # by the first row that reads it, while its rows come in
        layers = [SourceLayer(self, index) for index in range(len(found.sources))]
        super().__init__(layers=layers)

    def begin(self, states: Tensor, mask: Tensor | None) -> None:
        """Makes room for a new batch's sources.

        Args:
            states: what the encoder made of them, [rows, columns, width].
            mask: [rows, columns]: 0 where padding stood; None = nowhere.
        """
        whole = torch.ones(states.shape[:2], dtype=torch.bool) if mask is None else mask != 0
        self.real = np.asarray(whole.cpu().numpy(), bool)
        first = same_rows(len(states), {"states": states, "mask": whole})
        cache, digests = self.batch.cache, {}
        try:
            for row in dict.fromkeys(first):
                digests[row] = _digest(states[row], whole[row])
                if cache.knows(digests[row]):
                    continue
                filling = cache.fill(digests[row], int(self.real[row].sum()))
                filling.__enter__()
                self._fillings[row] = filling
                filling.announce()
        except BaseException as error:
            self.end(error)
            raise
        self.batch.sources = [digests[row] for row in first]

    def end(self, error: BaseException | None) -> None:
        """All rows are in; or not, after an error, and nothing is kept."""
        fillings, self._fillings = self._fillings, {}
        for filling in fillings.values():
            filling.__exit__(None if error is None else type(error), error, None)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Takes a layer's rows, [rows of the batch, heads, columns, width] each."""
        for row, filling in self._fillings.items():
            real = torch.from_numpy(self.real[row]).to(k.device)
            mine = (x[row].transpose(0, 1)[real].float() for x in (k, v))
            filling.append(len(self.found.layers) + layer, **dict(zip("kv", mine, strict=True)))

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Takes what a file says of sources that the batch's sequences have.

        Raises:
            StorageError: it isn't what was saved.
        """
        real, rows = tensors.get("source"), self.batch.sequences
        right = real is not None and real.dtype == torch.bool and real.dim() == 2 and len(real) == len(rows)
        if real is None or not right or real.sum(1).tolist() != [source_length(sequence) for sequence in rows]:
            raise StorageError("'source' is not what a saved cache holds there; save the cache again")
        self.real = real.numpy()
        for layer, shape in zip(self.layers, self.found.sources, strict=True):
            layer.expect(len(rows), shape)

    def select(self, rows: list[int]) -> None:
        """Makes row i what row rows[i] is."""
        self.real = self.real[rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the encoder."""
        return self.real.shape[1] if len(self.real) else 0

    def __bool__(self) -> bool:
        """True: there is one."""
        return True


class SourceLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's view of the sources."""

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self, sources: Sources, index: int) -> None:
        self._sources, self._index = sources, index
        self._like: tuple[Tensor, Tensor] | None = None  # of no columns

    @property
    def is_initialized(self) -> bool:
        """Whether its rows are here."""
        return self._like is not None

    @property
    def keys(self) -> Handle | Tensor | None:
        """What the model passes to its attention; outside a forward decoded rows, for looking at."""
        return self._given(0)

    @property
    def values(self) -> Handle | Tensor | None:
        """See `keys`."""
        return self._given(1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Takes the source's rows, once."""
        if self._sources.batch.chunk is None:
            raise SequenceError("rows came outside a forward of the model that the cache was made for; call that model")
        self._sources.append(self._index, key_states, value_states)
        self._like = key_states[:, :, :0], value_states[:, :, :0]
        return self.keys, self.values

    def expect(self, rows: int, shape: LayerShape) -> None:
        """Its rows are here already, for so many of the batch."""
        k, v = (
            torch.zeros((rows, shape.heads, 0, width), dtype=self._sources.found.dtype) for _, width in shape.streams
        )
        self._like = k, v

    def get_seq_length(self) -> int:
        """Columns of the encoder."""
        return self._sources.get_seq_length() if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the encoder, from the first."""
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        """-1: no limit but memory."""
        return -1

    def reset(self) -> None:
        """Forgets that there were rows."""
        self._like = None

    def _given(self, which: int) -> Handle | Tensor | None:
        if self._like is None:
            return None
        sources, found = self._sources, self._sources.found
        layer, chunk = len(found.layers) + self._index, sources.batch.chunk
        if chunk is not None and found.direct:
            return Handle(Over(chunk, sources), layer, self._like[which], sources.get_seq_length())
        rows = sources.batch.sequences if chunk is None else chunk.rows
        return source_rows(rows, layer, sources.real, found.dtype)[which]


class ReaderCache(Holder, transformers.EncoderDecoderCache):  # type: ignore[misc]
    """What `kvik.hf.Cache(model)` is where the model reads a source: see there for its arguments."""

    def __init__(self, attachment: Attachment, found: Found, pages: Pages) -> None:
        """See `kvik.hf.cache.TextCache`."""
        text = TextCache(attachment, found, pages)
        text._finish.detach()
        self.attachment, self.found, self.pages, self.batch = attachment, found, pages, text.batch
        super().__init__(text, Sources(text.batch, found))
        self._finish = weakref.finalize(self, given_back, attachment, self.batch)

    def enter(self, inputs: dict[str, Any]) -> None:
        """A forward of the decoder begins: called by its hook."""
        if not self.batch.sequences:
            states = inputs.get("encoder_hidden_states")
            if not isinstance(states, Tensor):
                raise SequenceError("the decoder was given no encoder_hidden_states, and this model reads a source")
            self.cross_attention_cache.begin(states, inputs.get("encoder_attention_mask"))
        try:
            self.self_attention_cache.enter({name: x for name, x in inputs.items() if x is not self})
        except BaseException as error:
            self.cross_attention_cache.end(error)
            raise
        if len(self.cross_attention_cache.real) != len(self.batch.sequences):  # one row serves a larger batch
            self.cross_attention_cache.select([0] * len(self.batch.sequences))

    def cut(self, forward: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], Pieces | None]:
        """A text's forward is never cut here: a decoder's prompt is short. Raises SequenceError where it would be."""
        return inputs, None

    def leave(self, done: bool) -> None:
        """It is over: called by the decoder's hook."""
        first = self.batch.columns == 0
        self.self_attention_cache.leave(done)
        self.cross_attention_cache.end(None if done else SequenceError("the forward was given up"))
        if first and not done:
            self.reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """See `TextCache.save`; sources are saved with it."""
        if not self.batch.sequences:
            raise SequenceError("the cache is empty; give it to a model first")
        tensors = {**self.batch.image(), "source": torch.from_numpy(self.cross_attention_cache.real)}
        files.write(path, tensors, files.about(self.attachment.model, self.spec))

    def take(self, tensors: dict[str, Tensor]) -> None:
        """See `TextCache.take`."""
        self.batch.take(tensors)
        self.cross_attention_cache.take(tensors)
        self.is_updated = dict.fromkeys(range(len(self.found.sources)), True)

    def crop(self, tokens_to_remove: int) -> None:
        """See `TextCache.crop`; sources stay."""
        self.self_attention_cache.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See `TextCache.reorder_cache`."""
        self.self_attention_cache.reorder_cache(beam_idx)
        self.cross_attention_cache.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See `TextCache.batch_repeat_interleave`."""
        self.reorder_cache(torch.arange(len(self.batch.sequences)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `TextCache.batch_select_indices`."""
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def reset(self) -> None:
        """Forgets every row, sources included."""
        self.self_attention_cache.reset()
        for layer in self.cross_attention_cache.layers:
            layer.reset()
        self.cross_attention_cache.select([])
        self.is_updated = dict.fromkeys(range(len(self.found.sources)), False)

    def close(self) -> None:
        """See `TextCache.close`."""
        self.self_attention_cache.closed = True
        self._finish()

    def describe(self) -> str:
        """See `TextCache.describe`."""
        text: str = self.self_attention_cache.describe()
        return text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec}, {len(self.batch.sequences)} rows of {self.batch.columns} columns)"


def _digest(states: Tensor, real: Tensor) -> bytes:
    """Names a source: what its encoder made of it, padding aside."""
    rows = states[real.to(states.device)].detach().cpu().contiguous()
    sha = hashlib.sha256(f"{tuple(rows.shape)} {rows.dtype}".encode())
    sha.update(rows.view(torch.uint8).numpy().data)
    return sha.digest()
