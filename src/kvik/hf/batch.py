"""A batch's sequences, and where in its columns their tokens stand. `kvik/hf/chunk.py` draws it."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from kvik.cache.cache import Cache
from kvik.cache.image import image, restored
from kvik.cache.sequence import Sequence
from kvik.errors import SequenceError, StorageError
from kvik.hf.chunk import Bools, Chunk
from kvik.hf.compat import CROP_UNTOLD
from kvik.hf.places import Places


class Batch:
    """Rows of a batch, each a sequence of one cache.

    Attributes:
        cache: where the rows are kept.
        columns: of the batch so far, padding included.
        sequences: one a row; none before the first forward.
        windows: of each layer, as the model has them.
        recording: a crop follows each forward, and says what stays; nothing is settled before it.
        chunk: the forward that goes on.
        cutting: a forward goes through the model piece by piece.
        begun: a forward came since a crop was said to follow each.
        tried: the model is being tried; see `kvik.hf.chunk.Reading`.
        sources: of a new batch's rows, where the model reads any: their digests.
    """

    def __init__(self, cache: Cache, windows: Mapping[int, int | None]) -> None:
        self.cache, self.windows = cache, windows
        self.columns = 0
        self.sequences: list[Sequence] = []
        self.recording = False
        self.chunk: Chunk | None = None
        self.sources: list[bytes] = []
        self.cutting = self.begun = self.tried = False
        self._real = np.zeros((0, 0), bool)

    @property
    def real(self) -> Bools:
        """Where tokens stand: bool [rows, columns]."""
        return self._real[:, : self.columns]

    @property
    def may_share(self) -> bool:
        """Whether rows of one input may have one past: they begin, or their tokens are known."""
        return self.columns == 0 or self.cache.shares

    @property
    def cuts(self) -> bool:
        """Whether a policy may want to choose in the middle of a forward."""
        return any(group.retention.policy is not None for group in self.cache.spec.groups)

    def expect(self, batch: int, count: int, guesses: int, mask: Tensor | None) -> None:
        """Says what comes before it is cut: so many columns, of which a row's tokens are a prompt, if they are many.

        Args:
            guesses: last columns that may be, where a crop follows each forward: of the first one after it was said so.
        """
        self.abandon()
        self._fit(batch)
        end = self.columns + count - (guesses if self.recording else 0)
        new = self._joined(count, mask)[:, self.columns : end].sum(axis=1)
        for sequence, tokens in zip(self.sequences, new.tolist(), strict=True):
            if tokens > 1 and not (self.recording and self.begun):
                sequence.prompt = len(sequence) + tokens
        self.begun = True

    def room(self, count: int, mask: Tensor | None) -> int:
        """How many of so many new columns may come in one step: no row passes a position where its policy chooses."""
        self.settle()
        new = self._joined(count, mask)[:, self.columns :]
        for sequence, row in zip(self.sequences, new, strict=True):
            at, places = sequence.next_trigger, np.flatnonzero(row)
            if at is not None and len(sequence) + len(places) > at:
                count = min(count, int(places[at - len(sequence)]))
        return count

    def begin(self, batch: int, count: int, ids: Tensor | None, mask: Tensor | None, twins: list[int]) -> Chunk:
        """Opens a step for a forward's new columns.

        Args:
            batch, count: rows, and new columns.
            ids: their tokens, [batch, count]; None = not known, as the model was given embeddings.
            mask: [batch, columns and new ones, or more]: 0 where padding stands; None = nowhere.
            twins: see `Chunk`; of rows with another past none is a twin.

        Raises:
            SequenceError: the batch or the mask doesn't fit what is held.
            BudgetError: the rows don't fit; nothing changed.
        """
        self.abandon()
        self._fit(batch)
        self.settle()
        twins = [twin if self._alike(row, twin) else row for row, twin in enumerate(twins)]
        real = self._joined(count, mask)
        stored, chunks, tokens = [], [], None if ids is None else ids.tolist()
        for row, sequence in enumerate(self.sequences):
            columns = np.flatnonzero(real[row, self.columns :])
            known = max(len(sequence) - int(self.real[row].sum()), 0)  # shared rows that the batch has yet to reach
            mine = [0] * len(columns) if tokens is None else [tokens[row][c] for c in columns]
            self._check_known(sequence, mine, known)
            columns, mine = columns[known:], mine[known:]
            stored.append(columns)
            if len(columns) and twins[row] == row:
                if tokens is None:
                    sequence._publishes = False
                chunks.append((sequence, mine))
        rows, places = [self.sequences[twin] for twin in twins], Places(batch, count, stored, twins)
        step = self.cache.step(chunks).__enter__() if chunks else None
        self.chunk = Chunk(step, count, real, rows, twins, places, self.windows, self.tried)
        return self.chunk

    def end(self) -> None:
        """The forward is over: its tokens are part of their sequences."""
        chunk, self.chunk = self.chunk, None
        if chunk is None:
            return
        if chunk.step is not None:
            chunk.step.__exit__(None, None, None)
        self._grow(chunk.real)
        for row, twin in enumerate(chunk.twins):
            if twin != row:
                self.sequences[row].close()
                self.sequences[row] = self.sequences[twin].fork()
        if not self.recording and not CROP_UNTOLD:
            self.settle()

    def abandon(self) -> None:
        """The forward came to nothing, and leaves nothing."""
        chunk, self.chunk = self.chunk, None
        if chunk is not None and chunk.step is not None:
            error = SequenceError("the forward was given up")
            chunk.step.__exit__(SequenceError, error, None)

    def settle(self) -> None:
        """What is here stays: policies choose, and what no later token sees leaves."""
        for sequence in self.sequences:
            if sequence.pending:  # else a policy would choose twice at one position
                sequence.settle()

    def select(self, rows: Seq[int]) -> None:
        """Makes row i what row rows[i] is: a fork, where that is wanted more than once; rows nobody wants are closed.

        Raises:
            SequenceError: there is no such row.
        """
        self._check_idle()
        if not self.sequences:
            return
        if not all(0 <= row < len(self.sequences) for row in rows):
            raise SequenceError(
                f"rows {list(rows)[:8]} of a batch of {len(self.sequences)}: give 0 to {len(self.sequences) - 1}"
            )
        taken: set[int] = set()
        chosen = []
        for row in rows:
            chosen.append(self.sequences[row].fork() if row in taken else self.sequences[row])
            taken.add(row)
        for row, sequence in enumerate(self.sequences):
            if row not in taken:
                sequence.close()
        self.sequences, self._real = chosen, self._real[list(rows)].copy()

    def crop(self, count: int) -> None:
        """Forgets the last `count` columns, and settles the rest.

        Raises:
            SequenceError: there are fewer, or rows that were visible from there have left; nothing changed.
        """
        self._check_idle()
        if count > self.columns:
            raise SequenceError(f"crop by {count} columns: the cache has {self.columns}; give 0 to {self.columns}")
        gone = self._real[:, self.columns - count : self.columns].sum(axis=1)
        for sequence, tokens in zip(self.sequences, gone, strict=True):
            sequence.trim(len(sequence) - int(tokens))
        self.columns -= count
        self.settle()

    def clear(self) -> None:
        """Forgets everything; the next forward begins a new batch."""
        self.abandon()
        for sequence in self.sequences:
            sequence.close()
        self.sequences, self.columns, self._real = [], 0, np.zeros((0, 0), bool)

    def twin(self) -> Batch:
        """Another batch with the same past: tables are copied, rows are not."""
        self._check_idle()
        other = Batch(self.cache, self.windows)
        other.sequences = [sequence.fork() for sequence in self.sequences]
        other.columns, other.recording, other._real = self.columns, self.recording, self._real.copy()
        return other

    def adopt(self, sequences: list[Sequence], real: Bools) -> None:
        """Takes sequences that have a past, and where it stands: bool [rows, columns]."""
        self.clear()
        self.sequences, self._real, self.columns = sequences, real.copy(), real.shape[1]

    def image(self) -> dict[str, Tensor]:
        """Everything, as tensors: see `kvik.cache.image`."""
        self._check_idle()
        self.settle()
        return {**image(self.sequences), "real": torch.from_numpy(self.real)}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """What `image` gave, into a batch that is empty.

        Raises:
            StorageError: it isn't that.
            BudgetError: it doesn't fit.
        """
        real = tensors.get("real")
        if real is None or real.dtype != torch.bool or real.dim() != 2:
            raise StorageError("'real' is not what a saved cache holds there; save the cache again")
        sequences = restored(self.cache, tensors)
        self.adopt(sequences, real.numpy())
        if real.shape[0] != len(sequences) or [len(s) for s in sequences] != real.sum(1).tolist():
            raise StorageError("'real' does not say where the tokens stand; save the cache again")

    def _fit(self, batch: int) -> None:
        """Opens sequences for a new batch; one row serves all rows of a larger one."""
        if not self.sequences:
            sources: Seq[bytes | None] = self.sources or [None] * batch
            self.sequences = [self.cache.open(source=source) for source in sources]
            self._real = np.zeros((batch, 0), bool)
        elif len(self.sequences) == 1 and batch > 1:
            self.select([0] * batch)
        elif len(self.sequences) != batch:
            raise SequenceError(
                f"the cache holds a batch of {len(self.sequences)} and was given one of {batch}; use "
                "cache.batch_repeat_interleave or batch_select_indices, or reset() it"
            )

    def _joined(self, count: int, mask: Tensor | None) -> Bools:
        """Where tokens stand, new columns included: bool [rows, columns + count]."""
        end = self.columns + count
        if mask is None:
            return np.concatenate((self.real, np.ones((len(self.sequences), count), bool)), axis=1)
        if tuple(mask.shape) < (len(self.sequences), end) or mask.shape[1] < end:
            raise SequenceError(
                f"an attention mask of {tuple(mask.shape)}: the cache has {self.columns} columns and {count} are new, "
                f"so it needs ({len(self.sequences)}, {end}); give the whole mask, old columns included"
            )
        real: Bools = np.asarray(mask[:, :end].detach().cpu().numpy() != 0, bool)
        if not np.array_equal(real[:, : self.columns], self.real):
            row = int(np.flatnonzero((real[:, : self.columns] != self.real).any(axis=1))[0])
            raise SequenceError(
                f"the attention mask of row {row} says other than before which old columns are padding; rows are "
                "stored for real tokens alone, so give the same mask, or start with a new cache"
            )
        return real

    def _grow(self, real: Bools) -> None:
        """Takes new columns, in room that doubles."""
        rows, end = real.shape
        if end > self._real.shape[1]:
            wider = np.zeros((rows, max(2 * self._real.shape[1], end, 64)), bool)
            wider[:, : self.columns] = self.real
            self._real = wider
        self._real[:, self.columns : end] = real[:, self.columns :]
        self.columns = end

    def _alike(self, row: int, twin: int) -> bool:
        """Whether two rows have the same past."""
        mine, other = self.sequences[row], self.sequences[twin]
        return row == twin or (mine.tokens == other.tokens and np.array_equal(self.real[row], self.real[twin]))

    def _check_known(self, sequence: Sequence, tokens: list[int], known: int) -> None:
        """Tokens whose rows are shared already must be the ones that come."""
        at = len(sequence) - known
        mine = sequence.tokens[at : at + len(tokens)]
        if known and mine != tokens[: len(mine)]:
            raise SequenceError(
                "the tokens are not those that the cache was opened for; open another with these input_ids"
            )

    def _check_idle(self) -> None:
        if self.chunk is not None:
            raise SequenceError("the model is in the middle of a forward; change the cache before or after it")
