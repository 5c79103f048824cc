"""Answers that follow a grammar: JSON of a schema, a regular expression, or a context-free grammar, by llguidance.

    grammars = Grammars(model)
    Request(prompt, grammar=grammars.json({"type": "object", "properties": {"name": {"type": "string"}}}))

Before a token is chosen, all that can't come next are masked; what is chosen moves the grammar on.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from kvik.errors import EngineError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from kvik.models.model import Model


class Grammar(Protocol):
    """What one answer must follow, and where it stands."""

    @property
    def done(self) -> bool:
        """Whether nothing can come any more."""

    def mask(self, logits: Tensor, ends: Iterable[int]) -> Tensor:
        """Logits f32 [vocabulary] with -inf for what can't come next; `ends` may come where the text may end."""

    def take(self, token: int) -> None:
        """This one was chosen; it is no end."""

    def copy(self) -> Grammar:
        """Another that stands where this one does, and goes its own way."""


class Matched:
    """A grammar that llguidance follows. Raises EngineError where it becomes too complex to follow."""

    def __init__(self, matcher: LLMatcher, own: Iterable[int]) -> None:
        """
        Args:
            own: the model's end tokens, which llguidance would take without being asked.
        """
        self._matcher, self._own = matcher, list(own)

    @property
    def done(self) -> bool:
        """See `Grammar`."""
        return self._matcher.is_stopped()

    def mask(self, logits: Tensor, ends: Iterable[int]) -> Tensor:
        """See `Grammar`."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").astype(bool)
        allowed[self._own] = False
        if self._matcher.is_accepting():
            allowed[list(ends)] = True
        return logits.masked_fill(torch.from_numpy(~allowed).to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """See `Grammar`."""
        self._matcher.consume_token(token)
        self._check()

    def copy(self) -> Matched:
        """See `Grammar`."""
        return Matched(self._matcher.deep_copy(), self._own)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:200]
            raise EngineError(f"the grammar can't be followed any further ({reason}); make it simpler")


class Grammars:
    """Makes grammars over a model's tokens. Safe from several threads; the first call takes a second.

    Each method gives what `Request.grammar` takes, and raises UsageError where the text is none of its kind, or
    llguidance is not installed.
    """

    def __init__(self, model: Model) -> None:
        self._model, self._lock = model, threading.Lock()
        self._tokens: LLTokenizer | None = None

    def json(self, schema: object) -> Callable[[], Grammar]:
        """JSON of this schema; {"type": "object"} = any object."""
        try:
            source = _matcher().grammar_from_json_schema(json.dumps(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"the JSON schema can't be read ({_brief(error)}); give a valid one") from None
        return self._made(source, "JSON schema")

    def regex(self, pattern: str) -> Callable[[], Grammar]:
        """A text that a regular expression matches as a whole."""
        return self._made(_matcher().grammar_from_regex(pattern), "regular expression")

    def lark(self, rules: str) -> Callable[[], Grammar]:
        """A text of a context-free grammar in Lark's notation."""
        return self._made(_matcher().grammar_from_lark(rules), "grammar")

    def _made(self, source: str, what: str) -> Callable[[], Grammar]:
        from llguidance import LLMatcher

        tokens = self._tokenizer()
        error, messages = LLMatcher.validate_grammar_with_warnings(source, tokens)
        if error:
            raise UsageError(f"the {what} can't be used ({_brief(messages[0])}); give a valid one")
        first = LLMatcher(tokens, source, log_level=0)
        return lambda: Matched(first.deep_copy(), self._model.config.eos_ids)

    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokens is None:
                tokenizer, config = self._model.tokenizer, self._model.config
                if tokenizer is None or not (tokenizer.folder / "tokenizer.json").is_file():
                    raise UsageError(f"{config.name} has no tokenizer.json, which grammars need; ask without one")
                text = (tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8")
                ends = list(config.eos_ids) or None
                self._tokens = LLTokenizer(text, n_vocab=config.vocab_size, eos_token=ends)
            return self._tokens


def _matcher() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise UsageError("grammars need llguidance, which is not installed; pip install 'kvik[serve]'") from None
    return LLMatcher


def _brief(error: object) -> str:
    return " ".join(str(error).split())[:200]
