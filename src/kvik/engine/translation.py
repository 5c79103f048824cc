"""Several sources at once to their likeliest texts, with rows of the sources kept or computed again at every step.

The second is what a decoder does that has no cache for cross-attention: from the encoder's states, which it keeps,
every layer computes the keys and values of the whole source for each new token. It is here to be measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kvik import events
from kvik.cache.cache import Cache
from kvik.cache.sequence import Sequence as KVSequence
from kvik.cache.step import Step
from kvik.engine.beams import beams
from kvik.engine.sampling import Sampling, choose
from kvik.errors import UsageError
from kvik.models.attention import attend_all
from kvik.models.model import Model
from kvik.models.watch import Chunk, Watch
from kvik.ops.reads import Partial

BATCH = 64  # sources that are open at once
_GREEDY = Sampling()
Look = Callable[[Sequence[int], Step], Chunk]  # which of the sources are in a step, and that


@dataclass(frozen=True)
class Outcome:
    """What came of some sources.

    Attributes:
        texts: new token ids of each, with its end token where it came to one; short where it was stopped.
        encoded: how often the encoder ran.
        rows: of sources whose keys and values were computed, each time they were, in each layer alike.
        held: payload bytes of the rows that were held at once, and of the encoder's states where these stand for rows;
            None under a beam search, whose forks come and go.
        source_s, text_s: seconds for the sources, and for the texts.
    """

    texts: list[list[int]]
    encoded: int
    rows: int
    held: int | None
    source_s: float
    text_s: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.source_s + self.text_s


def translate(
    model: Model,
    sources: Sequence[Sequence[int]],
    *,
    kv: str = "bf16",
    max_tokens: int,
    count: int = 1,
    memory: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Reads each source once, a source that is there twice included, and keeps its rows.

    Args:
        sources: token ids of each.
        max_tokens: new tokens of each at the most.
        count: beams of a search; 1 = the likeliest token at each step.
        memory: the cache's budget in bytes.
        stopping: asked between steps, and under a search between sources; True ends it there.

    Raises:
        UsageError, ContextError, BudgetError: see `Model.fill`, `Model.run` and `beams`.
    """
    cache, filled, spent = model.cache(kv, memory=memory, shares=False), list[int](), 0.0
    cache.listen(lambda event: filled.append(event.rows) if isinstance(event, events.Filled) else None)
    texts, held, began = list[list[int]](), 0, time.perf_counter()
    for start in range(0, len(sources), BATCH if count == 1 else 1):
        batch = sources[start : start + (BATCH if count == 1 else 1)]
        sequences: list[KVSequence] = []
        try:
            before = time.perf_counter()
            names = []
            for source in batch:  # opened at once, so that no later one takes its room
                names.append(model.fill(cache, source))
                sequences += [cache.open(source=names[-1])] if count == 1 else []
            spent += time.perf_counter() - before
            if count == 1:
                texts += greedy(model, sequences, max_tokens, stopping=stopping)
                held = max(held, cache.nbytes.payload)
            elif not stopping():
                best = beams(model, cache, source=names[0], count=count, max_tokens=max_tokens)[0]
                texts.append(list(best.token_ids))
        finally:
            for sequence in sequences:
                sequence.close()
        if stopping():
            break
    texts += [[]] * (len(sources) - len(texts))
    seconds = time.perf_counter() - began
    return Outcome(texts, len(filled), sum(filled), held if count == 1 else None, spent, seconds - spent)


def translate_again(
    model: Model,
    sources: Sequence[Sequence[int]],
    *,
    kv: str = "bf16",
    max_tokens: int,
    memory: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Outcome:
    """The same without a cache for cross-attention; see the module's docstring. Nothing of a source serves another."""
    reader = model.reader
    if reader is None:
        raise UsageError(f"{model.config.name} reads no source beside its text; open a sequence without one")
    spec, layers = model.spec(kv), sum(not layer.source for layer in model.decoder.layers)  # its own come first
    groups = tuple(group for group in spec.groups if not group.source)
    own = replace(spec, groups=groups, readers=spec.readers[:layers])
    cache = Cache(own, memory=memory, weights=model.held, shares=False, device=model.device)
    texts, held, rows, spent, began = list[list[int]](), 0, 0, 0.0, time.perf_counter()
    for start in range(0, len(sources), BATCH):
        before = time.perf_counter()
        states = [model.encode(source) for source in sources[start : start + BATCH]]
        spent += time.perf_counter() - before
        sequences = [cache.open() for _ in states]
        looks: list[int] = []

        def look(now: Sequence[int], step: Step, states: list[Tensor] = states, looks: list[int] = looks) -> Chunk:
            looks.extend(len(states[i]) for i in now)
            return _Again(step, model, [states[i] for i in now])

        try:
            texts += greedy(model, sequences, max_tokens, look=look, stopping=stopping)
            held = max(held, cache.nbytes.payload + sum(state.nbytes for state in states))
        finally:
            for sequence in sequences:
                sequence.close()
        rows += sum(looks)
        if stopping():
            break
    texts += [[]] * (len(sources) - len(texts))
    seconds = time.perf_counter() - began
    return Outcome(texts, len(sources), rows, held, spent, seconds - spent)


def greedy(
    model: Model,
    sequences: Sequence[KVSequence],
    max_tokens: int,
    *,
    look: Look | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """Takes the likeliest token of each, until each has ended: one step for all that go on.

    Args:
        model: one that reads a source.
        sequences: empty ones of one cache, each opened with its source. They hold their texts afterwards.
        max_tokens: new tokens of each at the most.
        look: what stands between decoder and step, as `Model.run`'s `watch`.
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
        watch = None if look is None else partial(look, going)
        logits = model.run(chunks, watch=watch)
        texts = [[begin, *found[i]] for i in going]
        allowed = constraints.apply(logits, texts, began=1, limit=1 + max_tokens, ends=ends)
        for row, i in enumerate(going):
            sequences[i].settle()
            found[i].append(choose(allowed[row], _GREEDY, len(found[i])))
        going = [i for i in going if found[i][-1] not in ends and len(found[i]) < max_tokens]
    return found


class _Again(Watch):
    """A step of one token of each text, that computes keys and values of their sources as each layer asks for them."""

    def __init__(self, step: Chunk, model: Model, states: Sequence[Tensor]) -> None:
        super().__init__(step)
        assert model.reader is not None, "a model that reads"
        self._layers = model.decoder.layers
        self._given = [model.reader.given(each) for each in states]

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        bias: Tensor | None = None,
        want_lse: bool = False,
        want_mass: bool = False,
    ) -> Partial:
        """Attention over a source's rows that are computed now; over the text's, the step's."""
        if not self._layers[layer].source:
            return super().attend(
                layer, q, scale=scale, softcap=softcap, bias=bias, want_lse=want_lse, want_mass=want_mass
            )
        assert softcap is None and bias is None and not want_lse and not want_mass, "sources are read plainly"
        outs = []
        for row, given in enumerate(self._given):
            at, rows = next(given)
            assert at == layer, "layers ask in their order"
            outs.append(attend_all(q[row : row + 1], rows["k"], rows["v"], scale=scale))
        return Partial(torch.cat(outs).view(len(outs), q.shape[1], -1))
