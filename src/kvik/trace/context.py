"""What one more word moves: the states of every earlier token, at every layer, before it came and after.

Where tokens see one side only, nothing moves, and that is why a cache is valid (law 9). Where they see both, all moves.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.cache.sequence import Sequence as KVSequence
from kvik.errors import UsageError
from kvik.models.model import Model
from kvik.trace.tokens import visible

SENTENCE = "The trophy does not fit into the suitcase because it is too small"  # "it" is known by the last word alone
KV = "bf16"


@dataclass(frozen=True)
class Moved:
    """One model, a sentence, and one more word.

    Attributes:
        model, weights: which, and how they are held.
        both_sides: whether its tokens see those behind them.
        tokens: of the sentence, as they can be shown; of an encoder those that it sets before, too.
        added: of the word.
        moved: f64 [layers, tokens], ‖after − before‖ / ‖before‖ of the state that leaves each layer.
        changed, numbers: how many numbers of those states are not the same, bit for bit, and of how many.
        computed: rows that had to be computed for the word.
        kept, kept_changed: numbers that a cache held before the word came, and how many were others after it; 0 where
            there is no cache.
        word_changed: numbers of the word's own states that are not those of the text computed all anew.
    """

    model: str
    weights: str
    both_sides: bool
    tokens: tuple[str, ...]
    added: tuple[str, ...]
    moved: NDArray[np.float64]
    changed: int
    numbers: int
    computed: int
    kept: int = 0
    kept_changed: int = 0
    word_changed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        layers = [
            {"layer": layer, "max": float(row.max()), "mean": float(row.mean()), "tokens": row.tolist()}
            for layer, row in enumerate(self.moved, 1)
        ]
        return {**asdict(replace(self, moved=np.zeros(0))), "moved": layers}


def split(sentence: str, word: str | None) -> tuple[str, str]:
    """The sentence and the word that is added to it: its own last one where none is given. Raises UsageError."""
    if word is None:
        sentence, _, word = sentence.strip().rpartition(" ")
    if not sentence.strip() or not word.strip():
        raise UsageError("there must be a sentence and a word; give at least two words, or --word as well")
    return sentence.strip(), word.strip()


def compare(model: Model, sentence: str, word: str) -> Moved:
    """Runs a model over a sentence, and over the same with one more word.

    Raises:
        UsageError: the model reads no text, or its tokenizer joins the word with the sentence's last token, so that
            there are other tokens to compare.
        ContextError: the sentence is longer than the model's positions.
    """
    if model.tokenizer is None:
        raise UsageError(f"{model.config.name} reads no text, so no word can be added to one; name another model")
    both = model.encoder is not None
    known, ids = (model.tokenizer.encode(text, add_special_tokens=both) for text in (sentence, f"{sentence} {word}"))
    count = len(known) - _closing(model, sentence, known)
    if not count or len(ids) <= len(known) or ids[:count] != known[:count]:
        raise UsageError(
            f"{model.config.name}'s tokenizer joins {word!r} with what comes before it, so that earlier tokens are "
            "others; take another --word"
        )
    end = count + len(ids) - len(known)
    before, after, cached = _both_sides(model, known, ids) if both else _one_side(model, known, ids)
    before, after = before[:, :count].double(), after[:, :count].double()
    away = (after - before).norm(dim=2) / before.norm(dim=2)
    texts = tuple(visible(model.tokenizer.decode([token], skip_special=False)) for token in ids)
    return Moved(
        model=model.config.name,
        weights=model.weights,
        both_sides=both,
        tokens=texts[:count],
        added=texts[count:end],
        moved=away.cpu().numpy(),
        changed=int((before != after).sum()),
        numbers=before.numel(),
        computed=len(ids) if both else end - count,
        **cached,
    )


def _closing(model: Model, sentence: str, ids: list[int]) -> int:
    """How many special tokens stand behind a text: the word comes before them."""
    assert model.tokenizer is not None, "the caller has looked"
    plain = model.tokenizer.encode(sentence)
    starts = [at for at in range(len(ids) - len(plain) + 1) if ids[at : at + len(plain)] == plain]
    return len(ids) - len(plain) - starts[0] if starts else len(ids)


def _both_sides(model: Model, known: list[int], ids: list[int]) -> tuple[Tensor, Tensor, dict[str, int]]:
    """An encoder's states, f32 [layers, tokens, width], before and after; nothing is kept in between."""
    return model.encode(known, every=True)[1:], model.encode(ids, every=True)[1:], {}


def _one_side(model: Model, known: list[int], ids: list[int]) -> tuple[Tensor, Tensor, dict[str, int]]:
    """A decoder's, the second time computed all anew. Beside that the word is appended to a cache: what becomes of the
    numbers held there, and of the word's states."""
    with model.cache(KV, shares=False).open() as sequence:
        layers = sorted(set(sequence.cache.spec.readers))
        before = _states(model, sequence, known)
        held = [sequence.read(layer) for layer in layers]
        appended = _states(model, sequence, ids[len(known) :])
        now = [sequence.read(layer) for layer in layers]
    with model.cache(KV, shares=False).open() as fresh:
        after = _states(model, fresh, ids)
    pairs = [
        (rows[stream], later[stream][:, : len(known)])
        for rows, later in zip(held, now, strict=True)
        for stream in rows
        if stream != "positions"
    ]
    return before, after, {
        "kept": sum(old.numel() for old, _ in pairs),
        "kept_changed": sum(int((old != new).sum()) for old, new in pairs),
        "word_changed": int((appended != after[:, len(known) :]).sum()),
    }  # fmt: skip


def _states(model: Model, sequence: KVSequence, tokens: Sequence[int]) -> Tensor:
    """What leaves each layer while tokens are appended: f32 [layers, tokens, width]."""
    kept: list[Tensor] = []
    network: Any = copy.copy(model.decoder)
    network.blocks = [_Leaving(block, kept) for block in model.decoder.blocks]
    seen = copy.copy(model)
    seen.network = network
    seen.run([(sequence, tokens)], every=True)
    return torch.stack(kept)


class _Leaving:
    """A layer that keeps what leaves it."""

    def __init__(self, block: Any, kept: list[Tensor]) -> None:
        self._block, self._kept = block, kept

    def __call__(self, *given: Any) -> Tensor:
        x: Tensor = self._block(*given)
        self._kept.append(x.clone())
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)
