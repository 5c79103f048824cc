"""Functions that a model may call: what it writes for a call, and how that is read back.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

This is the one format known here. A model has it if its chat template shows it; others are refused, not guessed at.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvik.models.text.tokenizer import Tokenizer
from kvik.server.bodies import ChatBody, Tool, ToolChoice
from kvik.server.problems import ProblemError, wrong

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """One call.

    Attributes:
        arguments: as JSON text.
    """

    id: str
    name: str
    arguments: str

    @property
    def body(self) -> dict[str, object]:
        """OpenAI's."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def wanted(body: ChatBody, tokenizer: Tokenizer) -> list[Tool]:
    """The tools that an answer may use. Raises ProblemError where it can call none."""
    if not body.tools or body.tool_choice == "none":
        if isinstance(body.tool_choice, ToolChoice) or body.tool_choice == "required":
            raise wrong("tool_choice", "needs tools")
        return []
    template = tokenizer.chat_template or ""
    if OPEN not in template or "tools" not in template or "<function=" in template:
        raise ProblemError(
            400, f"the model's chat template shows no tool calls as {OPEN}{{json}}{CLOSE}, so none could be read; "
            "leave tools out, or use response_format", param="tools", code="tools_unsupported",
        )  # fmt: skip
    if isinstance(body.tool_choice, ToolChoice):
        chosen = [tool for tool in body.tools if tool.function.name == body.tool_choice.function.name]
        if not chosen:
            raise wrong("tool_choice", f"{body.tool_choice.function.name!r} is none of the tools")
        return chosen[:1]
    return body.tools


def forced(tools: Sequence[Tool], tokenizer: Tokenizer) -> str:
    """Rules in Lark's notation for exactly one call of one of the tools."""
    marks = [mark if tokenizer.token_id(mark) is not None else json.dumps(mark) for mark in (OPEN, CLOSE)]
    rules = []
    for tool in tools:
        schema = {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        rules.append(f"%json {json.dumps(schema)}")
    names = [f"call{number}" for number in range(len(rules))]
    lines = [f'start: {marks[0]} "\\n" ({" | ".join(names)}) "\\n" {marks[1]}']
    return "\n".join(lines + [f"{name}: {rule}" for name, rule in zip(names, rules, strict=True)])


@dataclass
class CallReader:
    """Splits an answer's text, as it comes, into what is said and what is called.

    >>> reader = CallReader(["weather"])
    >>> reader.take('Well. <tool_c')[0]
    'Well. '
    >>> said, calls = reader.take('all>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>')
    >>> said, calls[0].name, calls[0].arguments
    ('', 'weather', '{"city": "Oslo"}')

    Attributes:
        names: of the tools; text that calls none of them stays text.
        most: calls that are read; later ones are dropped.
        calls: so far.
    """

    names: Sequence[str]
    most: int = 1000
    calls: list[Call] = field(default_factory=list)
    _held: str = ""

    def take(self, text: str) -> tuple[str, list[Call]]:
        """What is certain after more text: new text, and new calls."""
        self._held += text
        said, new = "", list[Call]()
        while True:
            at = self._held.find(OPEN)
            if at < 0:
                safe = len(self._held) - _beginning(self._held)
                said, self._held = said + self._held[:safe], self._held[safe:]
                break
            end = self._held.find(CLOSE, at)
            if end < 0:
                said, self._held = said + self._held[:at], self._held[at:]
                break
            whole = self._held[at : end + len(CLOSE)]
            call = self._read(whole[len(OPEN) : -len(CLOSE)])
            said += self._held[:at] + (whole if call is None else "")
            self._held = self._held[end + len(CLOSE) :]
            if call is not None and len(self.calls) < self.most:
                self.calls.append(call)
                new.append(call)
        return (said if not self.calls or said.strip() else ""), new

    def finish(self) -> str:
        """What was held back, when no more text comes: it is no call."""
        rest, self._held = self._held, ""
        return rest if not self.calls or rest.strip() else ""

    def _read(self, text: str) -> Call | None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or found.get("name") not in self.names:
            return None
        arguments = found.get("arguments", {})
        as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return Call(f"call_{secrets.token_hex(12)}", found["name"], as_text)


def _beginning(text: str) -> int:
    """How many last characters may be the beginning of a call."""
    return max((n for n in range(1, min(len(OPEN), len(text) + 1)) if text.endswith(OPEN[:n])), default=0)
