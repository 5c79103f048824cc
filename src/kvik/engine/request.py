"""What is asked of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvik.engine.grammar import Grammar
from kvik.engine.sampling import Sampling
from kvik.errors import UsageError

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: new tokens at the most; None = up to the model's last position, and where there is none
            (`Spec.longest`) as many as it has positions.
        stop: texts that end the answer; they are not part of it.
        sampling: how tokens are chosen.
        source: token ids of what the model reads beside its text; None where it reads none.
        n: answers; the first has the sampling's seed, each further one the next number.
        stop_ids: tokens that end the answer beside the model's own.
        ignore_end: the model's own end tokens end nothing.
        min_tokens: new tokens before one may end the answer.
        logprobs: log-probabilities of the chosen tokens, and of so many likeliest ones beside each; None = none.
        prompt_logprobs: the same of the prompt's tokens, which are all computed then.
        priority: lower ones go first.
        salt: only requests with the same salt share rows.
        owner: on whose account its rows are when room is short; see `cache/owners.py`.
        grammar: makes what each answer must follow, from its first token on; see `engine/grammar.py`.
    """

    prompt: Sequence[int]
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    source: Sequence[int] | None = None
    n: int = 1
    stop_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    salt: str = ""
    owner: str = ""
    grammar: Callable[[], Grammar] | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("the prompt is empty; give at least one token of text")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max-tokens {self.max_tokens}: use at least 1")
        if not all(self.stop):
            raise UsageError("an empty stop text would end every answer before it starts; leave it out")
        if self.n < 1:
            raise UsageError(f"n {self.n}: ask for at least one answer")
        if not 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens):
            raise UsageError(f"min-tokens {self.min_tokens}: use 0 up to max-tokens")
        if self.grammar is not None and self.min_tokens:
            raise UsageError("min-tokens and a grammar may contradict each other; leave one of the two out")
        for name, value in (("logprobs", self.logprobs), ("prompt-logprobs", self.prompt_logprobs)):
            if value is not None and value < 0:
                raise UsageError(f"{name} {value}: use 0 or more")
