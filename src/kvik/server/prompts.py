"""From a body to prompts: conversations through the model's own template, texts, and token ids as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvik.errors import TokenizerError
from kvik.models.model import Model
from kvik.models.text.tokenizer import Tokenizer
from kvik.server.bodies import CompletionBody, Message, Tool
from kvik.server.problems import ProblemError, wrong


def tokenizer_of(model: Model) -> Tokenizer:
    """The model's. Raises ProblemError where it has none."""
    if model.tokenizer is None:
        raise ProblemError(400, "the model has no tokenizer: send token ids to /v1/completions", code="no_tokenizer")
    return model.tokenizer


def chat(
    model: Model,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    options: Mapping[str, object] | None = None,
    begin: bool = True,
) -> list[int]:
    """A conversation's tokens. Raises ProblemError.

    Args:
        options: variables that the template may read.
        begin: end with the start of the answer.
    """
    if not messages:
        raise wrong("messages", "is empty; send at least one")
    tokenizer = tokenizer_of(model)
    plain = [_plain(message) for message in messages]
    offered = [tool.model_dump(exclude_none=True) for tool in tools] or None
    try:
        text = tokenizer.chat(plain, begin, tools=offered, options=options)
        return _some(tokenizer.encode(text), "messages")
    except TokenizerError as error:
        message = str(error).replace("; use --raw to send text without it", "").replace("; use --raw", "")
        raise ProblemError(400, message.replace(str(tokenizer.folder), "the model"), param="messages") from None


def texts(model: Model, body: CompletionBody) -> list[list[int]]:
    """The prompts of a completion: one, or several. Raises ProblemError."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [text(model, prompt, body.add_special_tokens is not False)]
    if not prompt:
        raise wrong("prompt", "is empty; give at least one token")
    if isinstance(prompt[0], int):
        return [_known(model, prompt)]
    many = [
        text(model, each, body.add_special_tokens is not False) if isinstance(each, str) else _known(model, each)
        for each in prompt
    ]
    return many


def text(model: Model, prompt: str, special: bool) -> list[int]:
    """A text's tokens, with those that the tokenizer itself adds or without. Raises ProblemError."""
    try:
        return _some(tokenizer_of(model).encode(prompt, add_special_tokens=special), "prompt")
    except TokenizerError as error:
        raise wrong("prompt", str(error)) from None


def count(body: CompletionBody) -> int:
    """How many prompts."""
    one = isinstance(body.prompt, str) or (bool(body.prompt) and isinstance(body.prompt[0], int))
    return 1 if one else len(body.prompt)


def _known(model: Model, ids: Any) -> list[int]:
    most = model.config.vocab_size
    if not all(0 <= token < most for token in ids):
        raise wrong("prompt", f"tokens are 0 to {most - 1}")
    return _some(list(ids), "prompt")


def _some(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise wrong(param, "is empty; give at least one token")
    return ids


def _plain(message: Message) -> dict[str, object]:
    """A message as templates take it: content is a text, and a call's arguments are an object."""
    plain = message.model_dump(exclude_none=True)
    plain["content"] = _content(message.content)
    calls = []
    for call in message.tool_calls or ():
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong("messages", "a tool call has no function with a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise wrong("messages", "a tool call's arguments are no JSON") from None
        calls.append({**call, "function": {**function, "arguments": arguments}})
    if calls:
        plain["tool_calls"] = calls
    return plain


def _content(content: str | list[dict[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = []
    for part in content:
        if part.get("type") not in ("text", "input_text") or not isinstance(part.get("text"), str):
            raise wrong("messages", f"parts of the type {str(part.get('type'))[:40]!r} are not read; send text")
        parts.append(part["text"])
    return "".join(parts)
