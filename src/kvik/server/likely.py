"""Log-probabilities as OpenAI shows them: one way for chats, another for completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvik.engine.job import Likely
from kvik.models.text.tokenizer import Tokenizer

LEAST = -9999.0  # stands for -inf, which JSON lacks


def in_chat(likely: Sequence[Likely], tokenizer: Tokenizer) -> list[dict[str, object]]:
    """A chat's `logprobs.content`: each token with its bytes, and the likeliest in its place."""
    return [
        {
            **_entry(each.token, each.logprob, tokenizer),
            "top_logprobs": [_entry(token, value, tokenizer) for token, value in each.top],
        }
        for each in likely
    ]


def _entry(token: int, value: float, tokenizer: Tokenizer) -> dict[str, object]:
    spelled = tokenizer.spelled(token)
    return {"token": spelled.decode("utf-8", "replace"), "logprob": max(value, LEAST), "bytes": list(spelled)}


@dataclass
class Columns:
    """A completion's `logprobs`: lists side by side. `offset` counts characters of text so far."""

    tokenizer: Tokenizer
    offset: int = 0
    tokens: list[str] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    top: list[dict[str, float] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def begin(self, token: int) -> None:
        """A prompt's first token: nothing is before it that could make it likely."""
        self._put(token, None, None)

    def add(self, likely: Sequence[Likely]) -> None:
        """More tokens. Beside each the likeliest ones, and itself; of two spelled alike the likelier."""
        for each in likely:
            top: dict[str, float] = {}
            for token, value in (*each.top, (each.token, each.logprob)):
                top.setdefault(self._text(token), max(value, LEAST))
            self._put(each.token, max(each.logprob, LEAST), top)

    def take(self) -> dict[str, object]:
        """What was added since the last time."""
        body = {
            "tokens": self.tokens,
            "token_logprobs": self.values,
            "top_logprobs": self.top,
            "text_offset": self.offsets,
        }
        self.tokens, self.values, self.top, self.offsets = [], [], [], []
        return body

    def _put(self, token: int, value: float | None, top: dict[str, float] | None) -> None:
        self.tokens.append(self._text(token))
        self.values.append(value)
        self.top.append(top)
        self.offsets.append(self.offset)
        self.offset += len(self.tokenizer.spelled(token).decode("utf-8", "ignore"))

    def _text(self, token: int) -> str:
        """A token that is no whole characters is spelled byte by byte."""
        spelled = self.tokenizer.spelled(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
