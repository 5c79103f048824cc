"""A text fed through a cache token by token, and what each step asked, kept, computed and would have computed.

Legend: T new tokens of a step, n tokens of the text so far, H query heads, L lanes (KV heads), D width of keys, E width
of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.cache.sequence import Sequence as KVSequence
from kvik.cache.spec import Bytes, Spec
from kvik.engine.generation import room
from kvik.errors import ModelError, UsageError
from kvik.models.model import Model
from kvik.ops.reads import visible
from kvik.trace.observe import Counted, Tally, retained

MOST_TOKENS = 512  # every step is shown, and each computes the whole text again: more would neither end nor be read
GUESSES = 5


@dataclass(frozen=True)
class Look:
    """One layer's view of one step.

    Attributes:
        layer: which.
        q: f32 [T, H, D], the new tokens' queries.
        k: f32 [L, T, D], the new rows as they are stored: decoded, keys turned by position.
        v: f32 [L, T, E].
        weights: f32 [T, H, n], by position; 0 where the query sees no row.
        out: f32 [T, H, E], weights @ v.
        seen: bool [L, T, n], rows that each query sees.
        held: bool [L, n], rows that lie in the cache when the step has settled.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    weights: Tensor
    out: Tensor
    seen: Tensor
    held: Tensor


@dataclass(frozen=True)
class Guess:
    """A token that may come next."""

    token: int
    probability: float


@dataclass(frozen=True)
class Difference:
    """How far a step lies from a recomputation of its whole text, at the most.

    Attributes:
        logits: over the last token's logits.
        attention: over the last token's attention outputs of the recorded layers, all heads.
    """

    logits: float
    attention: float

    @property
    def largest(self) -> float:
        """Of the two."""
        return max(self.logits, self.attention)


@dataclass(frozen=True)
class Frame:
    """One step.

    Attributes:
        number: 1 for the first.
        phase: a step of the prompt is prefill, be it of one token.
        start: position of its first new token.
        tokens: T new ids.
        guesses: likeliest next tokens, the likeliest first.
        looks: by recorded layer.
        nbytes: what the sequence holds when the step has settled.
        cached: computed so far.
        recomputed: computed so far by a run that keeps nothing and computes the whole text at each step, with rows in
            f32 and the model's own windows.
        same: against the whole text from nothing under the same spec. The cut cannot show: exactly 0.
        plain: against the whole text with f32 rows and the model's own windows: what the spec costs.
    """

    number: int
    phase: Literal["prefill", "decode"]
    start: int
    tokens: tuple[int, ...]
    guesses: tuple[Guess, ...]
    looks: Mapping[int, Look]
    nbytes: Bytes
    cached: Counted
    recomputed: Counted
    same: Difference
    plain: Difference

    @property
    def length(self) -> int:
        """n, with the new tokens."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Trace:
    """A text's steps, and what is needed to read them.

    Attributes:
        model, weights, spec: names: the model's as it was asked for, the format of its weights, what the cache keeps.
        text: as it was given, "" where only ids were.
        tokens: ids.
        texts: of every token that occurs, guesses included; raw.
        heads, lanes: of a layer.
        layers: of the model.
        rotated: keys are turned by position before they are kept.
        hides: what a run has besides that sees all that the model would: "no window", "every row" where a policy lets
            rows go, "" where the spec hides nothing.
        page_size: rows a page.
        frames: the steps.
    """

    model: str
    weights: str
    spec: str
    text: str
    tokens: tuple[int, ...]
    texts: Mapping[int, str]
    layers: int
    heads: int
    lanes: int
    rotated: bool
    hides: Literal["", "no window", "every row"]
    page_size: int
    frames: tuple[Frame, ...]

    @property
    def prompt(self) -> int:
        """Tokens of the prefill."""
        return sum(len(frame.tokens) for frame in self.frames if frame.phase == "prefill")

    def lane(self, head: int) -> int:
        """The lane that a query head reads."""
        return head // (self.heads // self.lanes)

    def sharing(self, lane: int) -> range:
        """The query heads that read a lane."""
        shared = self.heads // self.lanes
        return range(lane * shared, (lane + 1) * shared)


class Again:
    """Runs texts from nothing, each in a fresh sequence of one cache, and counts what that computes."""

    def __init__(self, model: Model, kv: str, layers: Sequence[int], prompt: int) -> None:
        self.model, self.prompt = model, prompt
        self.cache = model.cache(kv, shares=False)
        self.tally = Tally(self.cache.spec, model.config.heads, layers)

    def run(self, tokens: Sequence[int]) -> Tensor:
        """The last token's logits [vocabulary]; its attention is in `tally.asked`."""
        self.tally.begin()
        with self.cache.open(tokens[: self.prompt]) as sequence:
            while True:
                chunk = tokens[len(sequence) : len(sequence) + room(sequence)]
                logits = self.model.run([(sequence, chunk)], watch=self.tally.watch)[0]
                if len(sequence) == len(tokens):
                    return logits
                sequence.settle()  # a policy chooses here
                self.tally.settled(sequence)


def record(
    model: Model, tokens: Sequence[int], *, kv: str = "bf16", prefill: int = 1, layers: Sequence[int] = (0,)
) -> Iterator[Frame]:
    """Feeds a text through a cache and looks at every step; nothing is generated.

    Args:
        tokens: ids, 1 to 512.
        kv: what the cache keeps, a spec string.
        prefill: tokens of the prompt, which go in as one step, or more where a policy chooses on the way; each later
            step takes one.
        layers: to be looked at, all their heads.

    Raises:
        UsageError: no token, too many, or an impossible prefill or layer.
        ContextError: more tokens than the model has positions.
        SpecError: a spec that can't be read or doesn't fit the model.
        ModelError, at a step: the model gives no numbers.
    """
    model.check_attends("a trace")
    if not tokens:
        raise UsageError("the text has no tokens, so there is nothing to trace; give at least one character")
    if len(tokens) > MOST_TOKENS:
        raise UsageError(
            f"the text has {len(tokens):,} tokens, and a trace shows every step: it takes {MOST_TOKENS} at the most; "
            "shorten the text"
        )
    model.check_context(len(tokens))
    if not 1 <= prefill <= len(tokens):
        raise UsageError(f"prefill {prefill}: the text has {len(tokens)} tokens; use 1 to {len(tokens)}")
    for layer in layers:
        check_index("layer", layer, model.config.layers, model.config.name)
    return _frames(model, list(tokens), kv, prefill, list(layers))


def check_index(what: str, number: int, count: int, owner: str) -> None:
    """Raises UsageError where a layer's or head's number, counted from 0, is none of `count`."""
    if not 0 <= number < count:
        these = f"{what} 0 alone" if count == 1 else f"{what}s 0 to {count - 1}"
        raise UsageError(f"{what} {number}: {owner} has {these}; name one of these")


def collect(
    model: Model,
    tokens: Sequence[int],
    *,
    name: str = "",
    text: str = "",
    kv: str = "bf16",
    prefill: int = 1,
    layers: Sequence[int] = (0,),
    progress: Callable[[int], None] | None = None,
) -> Trace:
    """All of `record`, with the texts of the tokens.

    Args:
        name: the model's, to be shown; by default the one that its file gives.
        text: what the tokens were made of.
        progress: called after each step with the tokens fed so far.
    """
    frames = []
    for frame in record(model, tokens, kv=kv, prefill=prefill, layers=layers):
        frames.append(frame)
        if progress is not None:
            progress(frame.length)
    config, spec = model.config, model.spec(kv)
    known = {*tokens, *(guess.token for frame in frames for guess in frame.guesses)}
    return Trace(
        model=name or config.name,
        weights=model.weights,
        spec=str(spec),
        text=text,
        tokens=tuple(tokens),
        texts={token: _text(model, token) for token in known},
        layers=config.layers,
        heads=config.heads,
        lanes=config.kv_heads,
        rotated=all(layer.frequencies is not None for layer in model.decoder.layers),
        hides=_hides(model, spec),
        page_size=spec.page_size,
        frames=tuple(frames),
    )


def _hides(model: Model, spec: Spec) -> Literal["", "no window", "every row"]:
    if any(group.retention.policy is not None for group in spec.groups):
        return "every row"
    return "no window" if retained(spec) != retained(model.spec("f32")) else ""


def _frames(model: Model, tokens: list[int], kv: str, prefill: int, layers: list[int]) -> Iterator[Frame]:
    spec = model.spec(kv)
    same = Again(model, kv, layers, prefill)
    plain = same if spec.fingerprint == model.spec("f32").fingerprint else Again(model, "f32", layers, prefill)
    tally, number = Tally(spec, model.config.heads, layers), 0
    with model.cache(kv, shares=False).open(tokens[:prefill]) as sequence:
        while (start := len(sequence)) < len(tokens):
            number += 1
            length = min(max(prefill, start + 1), start + room(sequence))
            logits = model.run([(sequence, tokens[start:length])], watch=tally.watch)[0]
            if not bool(logits.isfinite().all()):
                raise ModelError(
                    f"{model.config.name}: what token {length - 1} gives is no number; its weights are damaged or too "
                    "large for this format, so try --weights f32"
                )
            rows = {layer: sequence.read(layer) for layer in layers}
            sequence.settle()
            tally.settled(sequence)
            looks = {layer: _look(tally, sequence, layer, rows[layer], start) for layer in layers}
            same_difference = plain_difference = _difference(tally, logits, same, tokens[:length])
            if plain is not same:
                plain_difference = _difference(tally, logits, plain, tokens[:length])
            yield Frame(
                number=number,
                phase="prefill" if start < prefill else "decode",
                start=start,
                tokens=tuple(tokens[start:length]),
                guesses=_guesses(logits),
                looks=looks,
                nbytes=sequence.nbytes,
                cached=tally.counted,
                recomputed=plain.tally.counted,
                same=same_difference,
                plain=plain_difference,
            )


def _look(tally: Tally, sequence: KVSequence, layer: int, rows: dict[str, Tensor], start: int) -> Look:
    """What passed through a layer in a step, beside the rows that it read: those held before it settled."""
    asked, n = tally.asked[layer], len(sequence)
    layout = tally.groups[layer, 0].layout
    keys = torch.cat([rows[stream.name] for stream in layout.keys], dim=-1).cpu()
    lanes, _, width = keys.shape
    k = torch.zeros(lanes, n, width)  # by position; nobody sees a row that is not there
    k[:, rows["positions"]] = keys.nan_to_num()  # NaN: other lanes hold it
    there = torch.zeros(lanes, n, dtype=torch.bool)
    there[:, rows["positions"]] = ~keys.isnan().all(dim=-1)
    asking, every = asked.positions.numpy()[:, None], np.arange(n)[None, :]
    groups = [tally.groups[layer, lane] for lane in range(lanes)]
    masks = [(each.retention.window, each.retention.sinks) for each in groups]
    seen = torch.from_numpy(np.stack([visible(asking, every, *mask) for mask in masks]))
    seen &= there[:, None]
    new = rows["positions"] >= start
    return Look(
        layer=layer,
        q=asked.q,
        k=keys[:, new],
        v=rows[layout.value.name][:, new].cpu(),
        weights=asked.weights(k, seen, groups),
        out=asked.out,
        seen=seen,
        held=torch.from_numpy(_held(sequence, layer, lanes)),
    )


def _held(sequence: KVSequence, layer: int, lanes: int) -> NDArray[np.bool_]:
    """Which positions lie in a page of the sequence: bool [L, n]."""
    held = np.zeros((lanes, len(sequence)), bool)
    for table in sequence.tables:
        positions, _ = table.rows(len(sequence))
        for (at, lane), mine in zip(table.group.lanes, positions, strict=True):
            if at == layer:
                held[lane, mine[mine >= 0]] = True
    return held


def _guesses(logits: Tensor) -> tuple[Guess, ...]:
    best = logits.double().softmax(dim=-1).topk(min(GUESSES, logits.numel()))
    return tuple(Guess(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _difference(tally: Tally, logits: Tensor, again: Again, tokens: list[int]) -> Difference:
    """Runs the whole text again and compares its last token with what the step gave."""
    other = again.run(tokens)
    pairs = [(asked.out[-1], again.tally.asked[layer].out[-1]) for layer, asked in tally.asked.items()]
    return Difference(_apart(logits, other), max((_apart(*pair) for pair in pairs), default=0.0))


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; what is no number is infinitely far from everything."""
    return float((a - b).abs().nan_to_num(nan=torch.inf).max())


def _text(model: Model, token: int) -> str:
    """A token's own text, special or not; of one that the tokenizer does not know, its number."""
    known = "" if model.tokenizer is None else model.tokenizer.decode([token], skip_special=False)
    return known or f"#{token}"
