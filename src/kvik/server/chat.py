"""`POST /v1/chat/completions`: whole, or chunk by chunk in OpenAI's order.

role ─► content … ─► tool calls … ─► finish_reason      for each answer; then usage, if asked for, and [DONE]
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from kvik.models.text.tokenizer import Tokenizer
from kvik.server import tools
from kvik.server.answers import Head, shown, usage, with_usage
from kvik.server.bodies import ChatBody, Tool
from kvik.server.desk import Asked
from kvik.server.likely import in_chat
from kvik.server.stream import ALIVE, event


@dataclass
class _Answer:
    """One of n."""

    reader: tools.CallReader | None
    text: str = ""
    logprobs: list[dict[str, object]] = field(default_factory=list)
    finish: str | None = None

    def take(self, text: str, ended: str | None) -> tuple[str, list[tools.Call]]:
        """What is said and called with more text, and when it has ended."""
        calls: list[tools.Call] = []
        if self.reader is not None:
            text, calls = self.reader.take(text)
            text += self.reader.finish() if ended else ""
        if ended:
            self.finish = "tool_calls" if self.reader is not None and self.reader.calls else ended
        self.text += text
        return text, calls


class ChatAnswer:
    """The answers to a chat.

    Args:
        offered: tools that may be called.
    """

    def __init__(self, head: Head, body: ChatBody, asked: Asked, tokenizer: Tokenizer, offered: list[Tool]) -> None:
        self._head, self._body, self._asked, self._tokenizer = head, body, asked, tokenizer
        names, most = [tool.function.name for tool in offered], 1 if body.parallel_tool_calls is False else 1000
        self._answers = [_Answer(tools.CallReader(names, most) if names else None) for _ in range(body.n or 1)]

    async def whole(self) -> dict[str, object]:
        """The body of a response. Raises ProblemError."""
        async for number, update in self._asked.updates():
            answer = self._answers[update.answer]
            answer.take(update.text, update.finish)
            answer.logprobs += in_chat(shown(update, self._asked, number), self._tokenizer)
        choices = [self._choice(index, answer) for index, answer in enumerate(self._answers)]
        return self._head.body(choices) | {"usage": usage(self._asked)}

    def _choice(self, index: int, answer: _Answer) -> dict[str, object]:
        calls = answer.reader.calls if answer.reader is not None else []
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if calls:
            message |= {"content": answer.text.strip() or None, "tool_calls": [call.body for call in calls]}
        logprobs = {"content": answer.logprobs, "refusal": None} if self._body.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Events. Raises ProblemError."""
        for index in range(len(self._answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for item in self._asked.updates_or_none(self._asked.desk.settings.keep_alive_s):
            if item is None:
                yield ALIVE
                continue
            number, update = item
            index, answer = update.answer, self._answers[update.answer]
            before = 0 if answer.reader is None else len(answer.reader.calls)
            text, calls = answer.take(update.text, update.finish)
            likely = in_chat(shown(update, self._asked, number), self._tokenizer) if self._body.logprobs else []
            if text or likely:
                yield self._chunk(index, {"content": text}, likely)
            for at, call in enumerate(calls, before):
                opening = {**call.body, "function": {"name": call.name, "arguments": ""}}
                yield self._chunk(index, {"tool_calls": [{"index": at, **opening}]})
                yield self._chunk(index, {"tool_calls": [{"index": at, "function": {"arguments": call.arguments}}]})
            if answer.finish is not None:
                yield self._chunk(index, {}, finish=answer.finish)
        if with_usage(self._body):
            yield event(self._head.body([], "chat.completion.chunk") | {"usage": usage(self._asked)})

    def _chunk(
        self, index: int, delta: dict[str, object], likely: list[dict[str, object]] | None = None,
        finish: str | None = None,
    ) -> bytes:  # fmt: skip
        logprobs = {"content": likely, "refusal": None} if likely else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        body = self._head.body([choice], "chat.completion.chunk")
        return event(body | {"usage": None} if with_usage(self._body) else body)
