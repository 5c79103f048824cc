"""`POST /v1/completions`: text that goes on, for one prompt or several, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from kvik.engine.job import Update
from kvik.models.text.tokenizer import Tokenizer
from kvik.server.answers import Head, shown, usage, with_usage
from kvik.server.bodies import CompletionBody
from kvik.server.desk import Asked
from kvik.server.likely import Columns
from kvik.server.stream import ALIVE, event


@dataclass
class _Choice:
    """One answer to one prompt."""

    columns: Columns
    text: str = ""
    begun: bool = False
    finish: str | None = None
    parts: list[dict[str, object]] = field(default_factory=list)


class CompletionAnswer:
    """The answers to a completion: those to the first prompt, then those to the second …"""

    def __init__(self, head: Head, body: CompletionBody, asked: Asked, tokenizer: Tokenizer) -> None:
        self._head, self._body, self._asked, self._tokenizer = head, body, asked, tokenizer
        self._n = body.n or 1
        self._choices = [_Choice(Columns(tokenizer)) for _ in range(len(asked.requests) * self._n)]

    async def whole(self) -> dict[str, object]:
        """The body of a response. Raises ProblemError."""
        logprobs = self._body.logprobs is not None
        async for number, update in self._asked.updates():
            self._take(number, update)
        choices = [
            {"index": at, "text": each.text, "logprobs": each.columns.take() if logprobs else None,
             "finish_reason": each.finish}
            for at, each in enumerate(self._choices)
        ]  # fmt: skip
        return self._head.body(choices) | {"usage": usage(self._asked, self._hidden)}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Events. Raises ProblemError."""
        async for item in self._asked.updates_or_none(self._asked.desk.settings.keep_alive_s):
            if item is None:
                yield ALIVE
                continue
            number, update = item
            at, choice = number * self._n + update.answer, self._choices[number * self._n + update.answer]
            text = self._take(number, update)
            logprobs = choice.columns.take() if choice.columns.tokens else None
            if text or logprobs:
                yield self._chunk(at, text, logprobs)
            if choice.finish is not None:
                yield self._chunk(at, "", None, choice.finish)
        if with_usage(self._body):
            yield event(self._head.body([]) | {"usage": usage(self._asked, self._hidden)})

    @property
    def _hidden(self) -> int:
        """Tokens that nobody asked for: a prompt's log-probabilities alone cost one."""
        return self._asked.record.new_tokens if self._body.max_tokens == 0 else 0

    def _take(self, number: int, update: Update) -> str:
        """What an update adds to its answer's text."""
        choice = self._choices[number * self._n + update.answer]
        text, likely = update.text, shown(update, self._asked, number)
        if self._body.max_tokens == 0:
            text, likely = "", ()
        if self._body.echo and not choice.begun:
            text = self._echo(number, choice, update) + text
        choice.begun = True
        if self._body.logprobs is not None:
            choice.columns.add(likely)
        choice.text += text
        choice.finish = "length" if self._body.max_tokens == 0 and update.finish else update.finish
        return text

    def _echo(self, number: int, choice: _Choice, update: Update) -> str:
        """The prompt, as text, and its log-probabilities where they were asked for."""
        prompt = self._asked.requests[number].prompt
        if self._body.logprobs is not None:
            choice.columns.begin(prompt[0])
            choice.columns.add(update.prompt_logprobs)
        given = self._body.prompt
        one = given if isinstance(given, str) else given[number]
        return one if isinstance(one, str) else self._tokenizer.decode(prompt, skip_special=False)

    def _chunk(self, at: int, text: str, logprobs: dict[str, object] | None, finish: str | None = None) -> bytes:
        choice = {"index": at, "text": text, "logprobs": logprobs, "finish_reason": finish}
        body = self._head.body([choice])
        return event(body | {"usage": None} if with_usage(self._body) else body)
