"""Several sources at once to their likeliest texts, step by step, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from kvik.cache.sequence import Sequence as KVSequence
from kvik.cache.step import Step
from kvik.engine.sampling import Sampling, choose
from kvik.models.model import Model
from kvik.models.watch import Chunk

_GREEDY = Sampling()


def greedy(
    model: Model,
    sequences: Sequence[KVSequence],
    max_tokens: int,
    *,
    watch: Callable[[Step, Sequence[int]], Chunk] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """Takes the likeliest token of each, until each has ended: one step for all that go on.

    Args:
        model: one that reads a source.
        sequences: empty ones of one cache, each opened with its source. They hold their texts afterwards.
        max_tokens: new tokens of each at the most.
        watch: see `Model.run`; told which of `sequences` are in the step, too.
        stopping: asked before each step; True ends it there.

    Returns:
        Their new token ids, each with its end token where it came to one.

    Raises:
        ContextError, BudgetError: see `Model.run`.
    """
    assert model.reading is not None, "a model that reads"
    begin, ends, constraints = model.reading.start_id, model.config.eos_ids, model.reading.constraints
    found: list[list[int]] = [[] for _ in sequences]
    going = list(range(len(sequences)))
    while going and not stopping():
        chunks = [(sequences[i], (found[i] or [begin])[-1:]) for i in going]
        logits = model.run(chunks, watch=None if watch is None else lambda step, now=tuple(going): watch(step, now))
        texts = [[begin, *found[i]] for i in going]
        allowed: Tensor = constraints.apply(logits, texts, began=1, limit=1 + max_tokens, ends=ends)
        for row, i in enumerate(going):
            sequences[i].settle()
            found[i].append(choose(allowed[row], _GREEDY, len(found[i])))
        going = [i for i in going if found[i][-1] not in ends and len(found[i]) < max_tokens]
    return found
