"""What an asker holds: updates as they come, and whole answers."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvik.engine.job import Known, Likely, Update
from kvik.engine.request import FinishReason


@dataclass
class Answer:
    """A finished answer.

    Attributes:
        text, token_ids, logprobs, finish_reason: see `Update`.
        known: of the request's prompt.
        prompt_logprobs: of its tokens from the second on, if asked for.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Likely] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    known: Known | None = None
    prompt_logprobs: tuple[Likely, ...] = ()

    def take(self, update: Update) -> None:
        """Adds what came. Raises the error that ended it."""
        if update.error is not None:
            raise update.error
        self.text += update.text
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs
        self.finish_reason = update.finish
        self.known = update.known or self.known
        self.prompt_logprobs = update.prompt_logprobs or self.prompt_logprobs


class Stream:
    """A request's updates as they come; iterate once. `abort` ends it at any moment."""

    def __init__(self, job: int, answers: int, mail: queue.SimpleQueue[Update], abort: Callable[[int], None]) -> None:
        self.job, self._answers, self._mail, self._abort = job, answers, mail, abort

    def __iter__(self) -> Iterator[Update]:
        """Raises the error that ended the request."""
        left = self._answers
        while left:
            update = self._mail.get()
            if update.error is not None:
                raise update.error
            yield update
            left -= update.last

    def abort(self) -> None:
        """Ends all its answers; harmless where they have ended."""
        self._abort(self.job)

    def answers(self) -> list[Answer]:
        """Waits for all of them."""
        found = [Answer() for _ in range(self._answers)]
        for update in self:
            found[update.answer].take(update)
        return found
