"""The layers of a cache as transformers looks at them, one by one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from kvik.errors import SequenceError
from kvik.hf.batch import Batch
from kvik.hf.dense import spread_rows
from kvik.hf.finding import Found
from kvik.hf.handle import Handle


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's rows, which lie in the batch's sequences. It holds nothing itself."""

    is_compileable = False

    def __init__(self, batch: Batch, index: int, found: Found) -> None:
        policies = [group.retention.policy for group in batch.cache.spec.groups]
        self.is_croppable = not any(policies)  # rows that a policy let go don't come back
        self._batch, self._index, self._found = batch, index, found
        self._window = found.layers[index].window

    @property
    def is_sliding(self) -> bool:
        """Whether its queries see a window."""
        return self._window is not None

    @property
    def is_initialized(self) -> bool:
        """Whether anything is held."""
        return self._batch.columns > 0

    @property
    def keys(self) -> Tensor | None:
        """Decoded, [batch, heads, columns, width]; None before the first forward. For looking at."""
        return self._decoded(0)

    @property
    def values(self) -> Tensor | None:
        """Decoded; see `keys`."""
        return self._decoded(1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: room is taken when it is needed."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Stores new rows; gives handles, or decoded rows where the model computes with them.

        Raises:
            SequenceError: not within a forward of the cache's own model.
        """
        chunk = self._batch.chunk
        if chunk is None:
            raise SequenceError("rows came outside a forward of the model that the cache was made for; call that model")
        chunk.append(self._index, key_states, value_states)
        if not self._found.direct:
            k, v = chunk.dense(self._index)
            first = self._first(self._batch.columns)
            return k[:, :, first:], v[:, :, first:]
        length = self.get_mask_sizes(key_states.shape[-2])[0]
        return Handle(chunk, self._index, key_states, length), Handle(chunk, self._index, value_states, length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask has, and the first of them."""
        columns = self._batch.columns
        first = self._first(columns)
        return columns - first + query_length, first

    def get_seq_length(self) -> int:
        """Columns seen."""
        return self._batch.columns

    def get_max_length(self) -> int:
        """The window, or -1: no limit but memory."""
        return -1 if self._window is None else self._window

    def reset(self) -> None:
        """Nothing: the cache forgets its batch."""

    def _first(self, columns: int) -> int:
        """The first column that the next token sees."""
        return 0 if self._window is None else max(columns - self._window + 1, 0)

    def _decoded(self, which: int) -> Tensor | None:
        batch = self._batch
        if not batch.sequences:
            return None
        return spread_rows(batch.sequences, self._index, batch.real, self._found.dtype)[which][
            :, :, self._first(batch.columns) :
        ]


class MixedLayer(LinearAttentionLayer, Layer):  # type: ignore[misc]
    """A layer that has a recurrent state beside its rows. The state is transformers' own."""

    def __init__(self, batch: Batch, index: int, found: Found, theirs: LinearAttentionLayer) -> None:
        self.__dict__.update(vars(theirs))  # a state that nobody has written to
        Layer.__init__(self, batch, index, found)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """The state's."""
        if len(args) != 2:
            LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Forgets the state."""
        LinearAttentionLayer.reset(self)


def layers_of(batch: Batch, found: Found, config: PretrainedConfig) -> list[Any]:
    """A layer for each of a model's: transformers' own for recurrent states and for those that keep nothing."""
    own = DynamicCache(config=config).layers
    out: list[Any] = []
    for index, shape in enumerate(found.layers):
        theirs = own[index] if index < len(own) else None
        if shape.heads and isinstance(theirs, LinearAttentionLayer):
            out.append(MixedLayer(batch, index, found, theirs))
        elif shape.heads or theirs is None:
            out.append(Layer(batch, index, found))
        else:
            out.append(theirs)
    return out
