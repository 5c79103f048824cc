"""A request on its way through the engine, and what its asker hears of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kvik.cache.sequence import Sequence as KVSequence
from kvik.engine.grammar import Grammar
from kvik.engine.request import FinishReason, Request
from kvik.engine.sampling import Sampling, changed, choose
from kvik.engine.text import Text
from kvik.errors import KvikError

if TYPE_CHECKING:
    from kvik.models.model import Model


Stage = Literal["queued", "prompt", "answer", "preempted"]  # of a request that is not over


@dataclass(frozen=True)
class Likely:
    """A token's log-probability, and the likeliest tokens in its place.

    Attributes:
        token, logprob: the token that stands there.
        rank: how many tokens were likelier.
        top: (token, log-probability), the likeliest first; as many as were asked for.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: Tensor, token: int, count: int) -> Likely:
        """From logits f32 [vocabulary], before anything changed them."""
        logprobs = torch.log_softmax(logits.float(), -1)
        top = logprobs.topk(count)
        mine = logprobs[token]
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return cls(token, float(mine), int((logprobs > mine).sum()), tuple(pairs))


@dataclass(frozen=True)
class Known:
    """What was known of a prompt when its request began.

    Attributes:
        tokens: of the prompt.
        cached: how many of them needed no computing.
        why: what kept the rest from being known, where that lies in the request; else "".
    """

    tokens: int
    cached: int
    why: str


@dataclass(frozen=True)
class Update:
    """What an answer gained in a step.

    Attributes:
        job: the request's number.
        answer: which of its answers.
        text: new text.
        token_ids: new tokens, the one that ended it included.
        logprobs: theirs, if asked for.
        prompt_logprobs: in the first update, if asked for: of the prompt's tokens from the second on.
        finish: why it ended; None = it goes on.
        known: in the first update.
        error: what ended it instead.
    """

    job: int
    answer: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Likely, ...] = ()
    prompt_logprobs: tuple[Likely, ...] = ()
    finish: FinishReason | None = None
    known: Known | None = None
    error: KvikError | None = None

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return self.finish is not None or self.error is not None


@dataclass
class Task:
    """One answer of a job.

    Attributes:
        number: which of the job's.
        answer: its tokens so far.
        grammar: what it must follow.
        sequence: holds a beginning of prompt and answer; None while it waits.
        draft: the same for a model that guesses what comes next (`draft.py`); None where none does.
        undrafted: that model has no room for it, even alone.
    """

    job: Job
    number: int
    sampling: Sampling
    text: Text | None
    grammar: Grammar | None = None
    answer: list[int] = field(default_factory=list)
    sequence: KVSequence | None = None
    draft: KVSequence | None = None
    undrafted: bool = False
    finish: FinishReason | None = None

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer."""
        return [*self.job.request.prompt, *self.answer]

    @property
    def pending(self) -> list[int]:
        """Tokens that the sequence lacks."""
        assert self.sequence is not None, "it runs"
        at, prompt = len(self.sequence), self.job.request.prompt
        if at >= len(prompt):
            return self.answer[at - len(prompt) :]
        return [*prompt[at:], *self.answer]

    def take(self, logits: Tensor, model: Model) -> int:
        """Chooses the next token from logits f32 [vocabulary]; it is not in the answer yet."""
        return self.chosen(logits, model, self.answer, self.grammar)

    def chosen(self, logits: Tensor, model: Model, answer: list[int], grammar: Grammar | None) -> int:
        """The token that comes after `answer`, at whose end the grammar stands: this answer, or what it may become.

        Raises:
            EngineError: the grammar can't be followed.
        """
        request, ends = self.job.request, self.job.ends
        logits = changed(logits, self.sampling, request.prompt, answer)
        if len(answer) < request.min_tokens:
            logits = logits.clone()
            logits[list(ends)] = -torch.inf
        if model.reading is not None:
            began = len(request.prompt)
            logits = model.reading.constraints.apply(
                logits[None], [[*request.prompt, *answer]], began=began, limit=began + self.job.limit, ends=list(ends)
            )[0]
        if grammar is not None:
            logits = grammar.mask(logits, ends)
        return choose(logits, self.sampling, len(request.prompt) + len(answer))

    def close(self) -> None:
        """Gives its rows back, the draft's too: the one place where that happens."""
        for sequence in (self.sequence, self.draft):
            if sequence is not None:
                sequence.close()
        self.sequence = self.draft = None

    def add(self, token: int) -> str:
        """One more token of the answer; the text that is certain now."""
        self.answer.append(token)
        if token in self.job.ends:
            self.finish = "stop"
            return "" if self.text is None else self.text.finish()
        if self.grammar is not None:
            self.grammar.take(token)
        piece = "" if self.text is None else self.text.take(token)
        if (self.text is not None and self.text.stopped) or (self.grammar is not None and self.grammar.done):
            self.finish = "stop"
        elif len(self.answer) >= self.job.limit:
            self.finish = "length"
        return piece + (self.text.finish() if self.finish and self.text is not None else "")


@dataclass
class Job:
    """A request and its answers.

    Attributes:
        number: of arrival.
        limit: new tokens at the most.
        ends: tokens that end an answer.
        tell: takes each `Update`, in the engine's thread.
        known: what was known of the prompt at first.
        prompt_likely: of the prompt's tokens so far, if asked for.
        preempted: how often it had to give its rows back.
        arrived, began, first: seconds on the clock: of arrival, of the first step, of the first token.
    """

    number: int
    request: Request
    limit: int
    ends: frozenset[int]
    tell: Callable[[Update], None]
    tasks: list[Task] = field(default_factory=list)
    known: Known | None = None
    prompt_likely: list[Likely] = field(default_factory=list)
    preempted: int = 0
    arrived: float = field(default_factory=time.monotonic)
    began: float | None = None
    first: float | None = None

    @classmethod
    def of(cls, number: int, request: Request, model: Model, limit: int, tell: Callable[[Update], None]) -> Job:
        """A request that was checked."""
        own = () if request.ignore_end else model.config.eos_ids
        job = cls(number, request, limit, frozenset((*own, *request.stop_ids)), tell)
        for answer in range(request.n):
            sampling = replace(request.sampling, seed=(request.sampling.seed + answer) % 2**64)
            text = None if model.tokenizer is None else Text(model.tokenizer, request.stop)
            grammar = None if request.grammar is None else request.grammar()
            job.tasks.append(Task(job, answer, sampling, text, grammar))
        return job

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: the lowest."""
        return self.request.priority, self.number

    @property
    def begun(self) -> bool:
        """Whether any answer has a token."""
        return any(task.answer for task in self.tasks)

    @property
    def live(self) -> list[Task]:
        """Answers that go on."""
        return [task for task in self.tasks if task.finish is None]
