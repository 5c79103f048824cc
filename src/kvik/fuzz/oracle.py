"""What each request is told alone: a fresh cache, nothing shared, nobody beside it, one token at a time, no engine.

alone     prompt, then token by token: the definition of the right answer
forced    prompt and answer at once, in chunks: the same log-probabilities (law 1: the cut can't show)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvik.cache.sequence import Sequence as KVSequence
from kvik.engine.answers import Answer
from kvik.engine.generation import CHUNK, prefill, room
from kvik.engine.job import Job, Likely
from kvik.engine.request import Request
from kvik.engine.reread import Repetition
from kvik.errors import KvikError
from kvik.fuzz.trace import Ask, Part, Piece, Said, Trace, part_ids
from kvik.models.model import Model


@dataclass
class Turns:
    """A grammar of token numbers: token i of an answer is i modulo `count`, or an end."""

    count: int
    taken: int = 0
    done: bool = False

    def mask(self, logits: Tensor, ends: Iterable[int]) -> Tensor:
        """See `Grammar`."""
        wrong = torch.arange(len(logits), device=logits.device) % self.count != self.taken % self.count
        wrong[list(ends)] = False
        return logits.masked_fill(wrong, -torch.inf)

    def take(self, token: int) -> None:
        """See `Grammar`."""
        self.taken += 1

    def copy(self) -> Turns:
        """See `Grammar`."""
        return replace(self)


def request_of(ask: Ask, prompt: Sequence[int]) -> Request:
    """What the engine is asked."""
    count = ask.grammar
    return Request(
        prompt, ask.max_tokens, ask.stop, ask.sampling, n=ask.n, stop_ids=ask.stop_ids, ignore_end=ask.ignore_end,
        min_tokens=ask.min_tokens, logprobs=ask.logprobs, prompt_logprobs=ask.prompt_logprobs, priority=ask.priority,
        salt=ask.salt, grammar=None if count is None else lambda: Turns(count),
    )  # fmt: skip


@dataclass
class Oracle:
    """Right answers over one spec. Each is computed once, when it is first wanted.

    Attributes:
        kv: a spec string.
        known: what was computed so far, by request.
    """

    model: Model
    kv: str
    known: dict[int, list[Answer]] = field(default_factory=dict)
    _prompts: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def requests(self, trace: Trace) -> dict[int, Request]:
        """What each of a trace's requests is, by number: pieces that others are told are looked up."""
        for ask in sorted(trace.asks, key=lambda ask: ask.number):
            if ask.number not in self._prompts:
                self._prompts[ask.number] = self._prompt(ask, trace)
        return {ask.number: request_of(ask, self._prompts[ask.number]) for ask in trace.asks}

    def answers(self, number: int, request: Request) -> list[Answer]:
        """What a request is told alone. Raises what `Model.run` and `prefill` do."""
        if number not in self.known:
            self.known[number] = [self._alone(request, answer) for answer in range(request.n)]
        return self.known[number]

    def spelled(self, trace: Trace, whole: Trace) -> Trace:
        """A part of a trace that can stand alone: what others are told is written out.

        Args:
            whole: the trace whose part it is; its requests were asked for.
        """
        return replace(trace, asks=tuple(replace(ask, prompt=self._pieces(ask, whole)) for ask in trace.asks))

    def _pieces(self, ask: Ask, trace: Trace) -> tuple[Piece, ...]:
        pieces = (self._said(piece, trace) if isinstance(piece, Said) else piece for piece in ask.prompt)
        return tuple(piece for piece in pieces if piece != ())

    def _said(self, piece: Said, trace: Trace) -> tuple[int, ...]:
        other = next(each for each in trace.asks if each.number == piece.ask)
        try:
            told = self.answers(other.number, request_of(other, self._prompts[other.number]))
        except KvikError:
            return ()  # it is refused, so nobody goes on from it
        return tuple(told[0].token_ids[: piece.tokens])

    def _prompt(self, ask: Ask, trace: Trace) -> tuple[int, ...]:
        found = list[int]()
        for piece in self._pieces(ask, trace):
            assert not isinstance(piece, Said), "it is written out"
            found += part_ids(piece, trace.vocabulary) if isinstance(piece, Part) else piece
        return tuple(found)

    @torch.inference_mode()
    def _alone(self, request: Request, number: int) -> Answer:
        """One of a request's answers."""
        self.model.check_context(len(request.prompt) + 1)
        prompt = list(request.prompt)
        limit = min(request.max_tokens or 1, self.model.longest(self.model.spec(self.kv)) - len(prompt))
        task = Job.of(0, request, self.model, limit, lambda _: None).tasks[number]
        answer, every = Answer(), request.prompt_logprobs is not None
        with self._opened(prompt) as sequence:
            if every:
                rows = self.rows(sequence, prompt)
                answer.prompt_logprobs = _likely(rows, prompt[1:], request.prompt_logprobs or 0)
                logits = rows[-1]
            else:
                logits = prefill(self.model, [sequence], prompt)[0]
            while True:
                token = task.take(logits, self.model)
                if request.logprobs is not None:
                    answer.logprobs.append(Likely.of(logits, token, request.logprobs))
                answer.text += task.add(token)
                if task.finish is not None:
                    break
                logits = prefill(self.model, [sequence], [token])[0]
        answer.token_ids, answer.finish_reason = task.answer, task.finish
        return answer

    @torch.inference_mode()
    def forced(self, request: Request, tokens: Sequence[int]) -> tuple[Likely, ...]:
        """Log-probabilities of an answer's tokens from one pass over prompt and answer, as many likeliest ones beside
        each as were asked for."""
        text = [*request.prompt, *tokens[:-1]]
        with self._opened(list(request.prompt)) as sequence:
            rows = self.rows(sequence, text)[len(request.prompt) - 1 :]
        return _likely(rows, tokens, request.logprobs or 0)

    def rows(self, sequence: KVSequence, tokens: Sequence[int]) -> Tensor:
        """Logits after each token, f32 [tokens, vocabulary]."""
        found, start = list[Tensor](), 0
        while start < len(tokens):
            chunk = tokens[start : start + min(CHUNK, room(sequence))]
            start += len(chunk)
            found.append(self.model.run([(sequence, chunk)], every=True))
            Repetition().take(self.model, sequence, watch=None, stopping=lambda: False)
            sequence.settle()
        return torch.cat(found)

    def _opened(self, prompt: list[int]) -> KVSequence:
        """An empty sequence of a cache of its own."""
        return self.model.cache(self.kv, shares=False).open(prompt)


def _likely(rows: Tensor, tokens: Sequence[int], count: int) -> tuple[Likely, ...]:
    return tuple(Likely.of(row, token, count) for row, token in zip(rows, tokens, strict=False))
