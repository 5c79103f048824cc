"""One request's text, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvik.cache.cache import Cache
from kvik.cache.sequence import Sequence as KVSequence
from kvik.cache.spec import Bytes
from kvik.cache.step import Step
from kvik.engine.request import FinishReason, Request
from kvik.engine.reread import Pass, Repetition
from kvik.engine.sampling import Sampling, changed, choose
from kvik.engine.text import Text
from kvik.errors import UsageError
from kvik.models.hearing import HearingConfig
from kvik.models.model import Model
from kvik.models.watch import Chunk

CHUNK = 512  # prompt tokens that go through the model at once: bounds memory, changes no bit (law 1)


def room(sequence: KVSequence) -> int:
    """How many tokens may come before a sequence must settle, for its policy to choose; CHUNK where nothing waits."""
    at = sequence.next_trigger
    return CHUNK if at is None else at - len(sequence)


def prefill(
    model: Model,
    sequences: Sequence[KVSequence],
    tokens: Sequence[int],
    *,
    watch: Callable[[Step], Chunk] | None = None,
    stopping: Callable[[], bool] = lambda: False,
    passes: Pass | None = None,
) -> Tensor:
    """Takes tokens to the end of a sequence, CHUNK at once at the most, each chunk settled. One token is a chunk too.
    Where a policy asks for a pass of the model before it chooses, that is made first.

    Args:
        model: of whose cache the sequences are.
        sequences: one, or several of one cache that take the same tokens side by side, CHUNK in all at once.
        tokens: ids.
        watch: see `Model.run`.
        stopping: asked before each chunk, and during a pass; True ends it there. A chunk whose pass was not finished
            is taken back.
        passes: makes what policies ask for; None = the model repeats the text (`engine/reread.py`).

    Returns:
        Logits after the last token, f32 [sequences, vocabulary]; empty where no chunk was computed.

    Raises:
        ContextError, BudgetError: see `Model.run`, and `Repetition.take`; chunks that were done before stay.
    """
    passes = passes or Repetition()
    for sequence in sequences:
        if (at := sequence.next_trigger) is not None and at <= len(sequence) + len(tokens):
            passes.check(model, sequence, at)
    piece = max(CHUNK // len(sequences), 1)
    logits = torch.empty(0)
    start = 0
    while start < len(tokens) and not stopping():
        chunk = tokens[start : start + min(piece, *(room(sequence) for sequence in sequences))]
        start += len(chunk)
        found = model.run([(sequence, chunk) for sequence in sequences], watch=watch)
        shown = False
        try:
            shown = all(passes.take(model, each, watch=watch, stopping=stopping) for each in sequences)
        finally:
            for sequence in sequences if not shown else ():
                sequence.trim(len(sequence) - len(chunk))
        if not shown:
            break
        logits = found
        for sequence in sequences:
            sequence.settle()
    return logits


def opened(model: Model, cache: Cache, request: Request) -> KVSequence:
    """An empty sequence for a request, which reads its source: filled in where the cache doesn't know it.

    Raises:
        UsageError, ContextError, BudgetError: see `Model.fill`.
    """
    return cache.open(source=None if request.source is None else model.fill(cache, request.source))


class Generation:
    """An answer in the making: iterate over it for the pieces of its text.

    Attributes:
        token_ids: new ids so far, the one that ended the text included.
        text: the text so far.
        cached_tokens: prompt tokens that the sequence already held.
        finish_reason: "stop" (an end-of-sequence token or stop text), "length", "interrupted"; None while it goes on.
        note: for `length`: which limit it was, and the way out.
        ttft_s: seconds to the first token.
        tokens_per_s: of the tokens after the first.
        nbytes: what the sequence held at the end.
    """

    def __init__(self, model: Model, request: Request, sequence: KVSequence | None) -> None:
        """
        Args:
            model: with a tokenizer.
            request: what is asked.
            sequence: holds a beginning of the prompt, possibly nothing, and takes the rest and the answer; it reads
                the request's source. None keeps no cache: everything is computed anew at every step.

        Raises:
            ContextError: the prompt leaves no position for an answer.
        """
        assert model.tokenizer is not None, "text needs a tokenizer"
        spec = None if sequence is None else sequence.cache.spec
        model.check_context(len(request.prompt) + 1, spec)
        held = [] if sequence is None else sequence.tokens
        if len(held) >= len(request.prompt) or held != list(request.prompt[: len(held)]):
            raise UsageError(
                f"the sequence's {len(held)} tokens must begin the prompt's {len(request.prompt)}, short of its last; "
                "trim it, or open another with the prompt"
            )
        self.model, self.request, self.sequence = model, request, sequence
        if sequence is not None:
            sequence.prompt = len(request.prompt)
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.note = ""
        self.cached_tokens = 0 if sequence is None else len(sequence)
        self.ttft_s = self.tokens_per_s = 0.0
        self.nbytes = Bytes(0, 0)
        self._text = Text(model.tokenizer, request.stop)
        self._started = self._stopping = False
        room = model.longest(spec) - len(request.prompt)
        self._limit = min(request.max_tokens or model.config.max_positions, room)
        self._full = self._limit == room

    def __iter__(self) -> Iterator[str]:
        """Pieces of text as soon as they are certain; once only.

        Raises:
            UsageError: it was started before.
            BudgetError: the cache has no room for the next token; what was said so far stands.
        """
        if self._started:
            raise UsageError("the answer was started already; make another Generation for another answer")
        self._started = True
        started = first = time.perf_counter()
        try:
            logits = self._advance(list(self.request.prompt[self.cached_tokens :]))
            while not self._stopping:
                text = [*self.request.prompt, *self.token_ids]
                allowed = self._allowed(logits, text)
                token = choose(
                    changed(allowed, self.request.sampling, self.request.prompt, self.token_ids),
                    self.request.sampling, len(text),
                )  # fmt: skip
                self.token_ids.append(token)
                if len(self.token_ids) == 1:
                    first = time.perf_counter()
                    self.ttft_s = first - started
                piece = self._take(token)
                if self.finish_reason is not None:
                    piece += self._text.finish()
                if piece:
                    self.text += piece
                    yield piece
                if self.finish_reason is not None:
                    return
                logits = self._advance([token])
            self.finish_reason = "interrupted"
        finally:
            self.finish_reason = self.finish_reason or "interrupted"
            elapsed = time.perf_counter() - first
            self.tokens_per_s = (len(self.token_ids) - 1) / elapsed if len(self.token_ids) > 1 else 0.0
            if self.sequence is not None and not self.sequence.closed:
                self.nbytes = self.sequence.nbytes

    def stop(self) -> None:
        """Ends the answer after the chunk that is being computed; can be called from a signal handler."""
        self._stopping = True

    def run(self) -> Generation:
        """To the end; returns itself."""
        for _ in self:
            pass
        return self

    def _advance(self, tokens: list[int]) -> Tensor:
        """Logits after some more tokens: f32 [vocabulary]."""
        if self.sequence is None:
            with opened(self.model, self.model.cache("f32", shares=False), self.request) as sequence:
                return self._chunked(sequence, [*self.request.prompt, *self.token_ids])
        return self._chunked(self.sequence, tokens)

    def _chunked(self, sequence: KVSequence, tokens: list[int]) -> Tensor:
        logits = prefill(self.model, [sequence], tokens, stopping=lambda: self._stopping)
        return logits[0] if len(logits) else logits

    def _allowed(self, logits: Tensor, text: list[int]) -> Tensor:
        """Logits without what the model's makers rule out there."""
        if self.model.reading is None:
            return logits
        began, ends = len(self.request.prompt), self.model.config.eos_ids
        constraints = self.model.reading.constraints
        return constraints.apply(logits[None], [text], began=began, limit=began + self._limit, ends=ends)[0]

    def _take(self, token: int) -> str:
        """Text that is certain after this token; sets the reason if it was the last."""
        if token in self.model.config.eos_ids:
            forced = self.model.reading is not None and token in self.model.reading.constraints.last
            self.finish_reason = "length" if forced and len(self.token_ids) == self._limit else "stop"
            self.note = self._why_length() if self.finish_reason == "length" else ""
            return ""
        piece = self._text.take(token)
        if self._text.stopped:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._limit:
            self.finish_reason = "length"
            self.note = self._why_length()
        return piece

    def _why_length(self) -> str:
        if not self._full:
            return f"stopped after {self._limit} new tokens; raise --max-tokens for more"
        last = len(self.request.prompt) + self._limit
        return (
            f"stopped at the model's last position, {last:,}; shorten the prompt or use a model with more"
            f"{self.model.way_beyond}"
        )


def generate(
    model: Model,
    prompt: str,
    *,
    kv: str = "bf16",
    raw: bool = False,
    max_tokens: int | None = None,
    stop: str | tuple[str, ...] = (),
    sampling: Sampling | None = None,
    memory: int | None = None,
) -> Iterator[str]:
    """An answer's text, piece by piece, over a cache of its own that is given back at the end.

    Args:
        model: from `kvik.load`.
        prompt: what the user says, or the source for a model that reads one; `raw=True` takes it as the beginning of
            the text instead.
        kv: what the cache keeps, a spec string, or "none".
        max_tokens: new tokens at the most.
        stop: texts that end the answer.
        sampling: greedy where None.
        memory: the cache's budget in bytes.
    """
    stops = (stop,) if isinstance(stop, str) else stop
    request = ask(model, prompt, raw=raw, max_tokens=max_tokens, stop=stops, sampling=sampling or Sampling())
    if kv == "none":
        if memory is not None:
            raise UsageError("kv 'none' keeps no cache, so it has no memory budget; leave one of the two out")
        yield from Generation(model, request, None)
        return
    with opened(model, model.cache(kv, memory=memory, shares=False), request) as sequence:
        yield from Generation(model, request, sequence)


def ask(model: Model, prompt: str, *, raw: bool = False, **options: Any) -> Request:
    """A request for the answer to a text: that is the source of a model that reads one, and else what `encode_prompt`
    makes of it.

    Args:
        options: `Request`'s other attributes.
    """
    reading = model.reading
    if reading is None:
        return Request(encode_prompt(model, prompt, raw=raw), **options)
    if isinstance(reading, HearingConfig):
        raise UsageError(f"{reading.name} hears sound and reads no text; use kvik transcribe FILE.wav")
    if raw:
        raise UsageError(f"{reading.name} takes the prompt as its source, as it is; leave --raw out")
    return Request([reading.start_id], source=source_ids(model, prompt), **options)


def source_ids(model: Model, text: str) -> list[int]:
    """The token ids of a text as a source. Raises UsageError where the folder's tokenizer is for other texts alone."""
    if model.reading is not None and model.reading.own_tokenizer:
        raise UsageError(
            f"{model.reading.name} has token ids of its own for sources, and one tokenizer in its folder; encode the "
            "source yourself and give it to `Model.fill`"
        )
    return _encoded(model, text, special=True)


def encode_prompt(model: Model, prompt: str, *, raw: bool = False) -> list[int]:
    """The token ids of one user message in the model's chat format, or of the text as it is."""
    if model.reading is not None:
        raise UsageError(f"{model.config.name} answers a source and continues no prompt; use kvik run")
    if raw:
        return _encoded(model, prompt, special=True)
    assert model.tokenizer is not None, "text needs a tokenizer"
    return _encoded(model, model.tokenizer.chat([{"role": "user", "content": prompt}]) if prompt else "", special=False)


def _encoded(model: Model, text: str, special: bool) -> list[int]:
    assert model.tokenizer is not None, "text needs a tokenizer"
    if not text:
        raise UsageError("the prompt is empty; give at least one character of text")
    return model.tokenizer.encode(text, add_special_tokens=special)
