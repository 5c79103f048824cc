"""From a request's body to what the engine takes. Every limit is checked here, before anything is made of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvik.engine.engine import Engine
from kvik.engine.grammar import Grammar, Grammars
from kvik.engine.request import Request
from kvik.engine.sampling import Sampling
from kvik.errors import UsageError
from kvik.server.bodies import IDLE, REFUSED, Body, ChatBody, CompletionBody, Sampled, StructuredOutputs
from kvik.server.keys import salt_of
from kvik.server.problems import ProblemError, wrong
from kvik.server.settings import Settings
from kvik.server.tenants import Tenants

log = logging.getLogger("kvik.server")


@dataclass
class Asks:
    """Turns bodies into requests.

    Attributes:
        grammars: of the model.
        tenants: on whose account rows are.
    """

    engine: Engine
    settings: Settings
    grammars: Grammars
    tenants: Tenants
    _told: set[str] = field(default_factory=set)  # unknown fields that were named in the log

    def check_body(self, body: Body) -> None:
        """The model's name, and fields that are not ours. Raises ProblemError."""
        if body.model is not None and body.model not in self.settings.names:
            raise ProblemError(
                404, f"the model {body.model!r} is not served here; use {self.settings.names[0]!r}", param="model",
                code="model_not_found",
            )  # fmt: skip
        extra = body.model_extra or {}
        for name, way in REFUSED.items():
            if extra.get(name) not in (None, False, "", [], {}):
                raise wrong(name, f"is not taken; {way}")
        if extra.get("best_of", 1) not in (None, 1, getattr(body, "n", None)):
            raise wrong("best_of", "is not taken; ask for n answers and choose")
        if extra.get("skip_special_tokens") is False:
            raise wrong("skip_special_tokens", "is always true here; use logprobs to see special tokens")
        for name in extra:
            if name not in IDLE and name not in REFUSED and name not in self._told and len(self._told) < 100:
                self._told.add(name)
                log.warning("the field %.60r is unknown and ignored; this is said once", name)

    def check_shape(self, body: Sampled, prompts: int = 1) -> int:
        """What would be multiplied: answers to all prompts; returns how many to each. Raises ProblemError."""
        limits, n = self.settings.limits, 1 if body.n is None else body.n
        if n < 1:
            raise wrong("n", "ask for at least one answer")
        if prompts * n > limits.answers:
            raise wrong("n", f"{prompts} prompts with {n} answers each are more than {limits.answers}; ask for fewer")
        stops = stops_of(body)
        if len(stops) > limits.stops:
            raise wrong("stop", f"{len(stops)} texts are more than {limits.stops}; give fewer")
        if any(not stop or len(stop) > limits.stop_chars for stop in stops):
            raise wrong("stop", f"each must have 1 to {limits.stop_chars} characters")
        if len(body.logit_bias or ()) > limits.biases:
            raise wrong("logit_bias", f"{len(body.logit_bias or ())} tokens are more than {limits.biases}; give fewer")
        if len(body.stop_token_ids or ()) > limits.biases:
            raise wrong("stop_token_ids", f"more than {limits.biases}; give fewer")
        for name in ("top_logprobs", "logprobs"):
            count = getattr(body, name, None)
            if count is not None and not isinstance(count, bool) and count > limits.logprobs:
                raise wrong(name, f"{count} are more than {limits.logprobs}; ask for fewer")
        if isinstance(body, ChatBody):
            if len(body.messages) > limits.messages:
                raise wrong("messages", f"{len(body.messages)} are more than {limits.messages}; send fewer")
            if len(body.tools or ()) > limits.tools:
                raise wrong("tools", f"{len(body.tools or ())} are more than {limits.tools}; send fewer")
        return n

    def request(
        self, body: ChatBody | CompletionBody, prompt: Sequence[int], tenant: str, grammar: Callable[[], Grammar] | None
    ) -> Request:
        """One prompt's. Raises ProblemError."""
        asked = self._most(body, len(prompt))
        if isinstance(body, ChatBody):
            logprobs = (body.top_logprobs or 0) if body.logprobs else None
            if body.top_logprobs and not body.logprobs:
                raise wrong("top_logprobs", "needs logprobs: true")
            every = None
        else:
            logprobs, every = body.logprobs, body.logprobs if body.echo else None
        vocabulary = self.engine.model.config.vocab_size
        if any(token >= vocabulary for token in body.stop_token_ids or ()):
            raise wrong("stop_token_ids", f"tokens are 0 to {vocabulary - 1}")
        try:
            return Request(
                prompt, asked, stops_of(body), self._sampling(body), n=body.n or 1,
                stop_ids=tuple(body.stop_token_ids or ()), ignore_end=bool(body.ignore_eos),
                min_tokens=body.min_tokens or 0, logprobs=logprobs, prompt_logprobs=every,
                priority=body.priority or 0, salt=salt_of(tenant, body.cache_salt or "", self.settings.share_prefixes),
                grammar=grammar, owner=self.tenants.owner(tenant),
            )  # fmt: skip
        except UsageError as error:
            raise ProblemError(400, str(error), code="invalid_value") from None

    def grammar(self, body: Sampled) -> Callable[[], Grammar] | None:
        """What the answer must follow, if anything. May take a second. Raises ProblemError."""
        form, outputs, limit = body.response_format, body.structured_outputs, self.settings.limits.grammar_chars
        asked: list[tuple[str, Any]] = []
        if form is not None and form.type == "json_object":
            asked.append(("json", {"type": "object"}))
        if form is not None and form.type == "json_schema":
            if form.json_schema is None:
                raise wrong("response_format", "json_schema needs the schema in its field json_schema")
            asked.append(("json", form.json_schema.schema_))
        if outputs is not None:
            asked += _asked(outputs)
        if not asked:
            return None
        if len(asked) > 1:
            raise wrong("structured_outputs", "an answer can follow one form; ask for exactly one")
        kind, value = asked[0]
        param = "response_format" if form is not None and form.type != "text" else "structured_outputs"
        if len(value if isinstance(value, str) else json.dumps(value)) > limit:
            raise wrong(param, f"is longer than {limit:,} characters; make it smaller")
        makers = {"json": self.grammars.json, "regex": self.grammars.regex, "grammar": self.grammars.lark}
        try:
            return makers[kind](value)
        except UsageError as error:
            raise ProblemError(400, str(error), param=param, code="invalid_value") from None

    def _most(self, body: ChatBody | CompletionBody, prompt: int) -> int | None:
        """New tokens at the most; None = what there is room for. Raises ProblemError."""
        asked = body.max_tokens
        if isinstance(body, ChatBody):
            asked = body.max_completion_tokens if body.max_completion_tokens is not None else asked
            if asked == 0:
                raise wrong("max_tokens", "use at least 1")
        elif asked is None:
            asked = 16  # OpenAI's
        check_length(prompt, max(asked or 1, 1), self.engine.longest)
        return asked if asked is None else max(asked, 1)  # a completion of 0 tokens: one, that is not shown

    def _sampling(self, body: Sampled) -> Sampling:
        given: dict[str, Any] = {
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "top_p": body.top_p,
            "top_k": None if body.top_k is None else max(body.top_k, 0),
            "seed": None if body.seed is None else body.seed % 2**64,
            "min_p": body.min_p,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "repetition_penalty": body.repetition_penalty,
            "bias": self._bias(body.logit_bias or {}),
        }
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    def _bias(self, given: dict[str, float]) -> dict[int, float]:
        vocabulary, found = self.engine.model.config.vocab_size, {}
        for token, value in given.items():
            if not (token.isascii() and token.isdigit()) or int(token) >= vocabulary:
                raise wrong("logit_bias", f"{token!r} is no token; they are 0 to {vocabulary - 1}")
            found[int(token)] = value
        return found


def stops_of(body: Sampled) -> tuple[str, ...]:
    """Texts that end an answer."""
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def check_length(prompt: int, new: int, longest: int) -> None:
    """Raises ProblemError with both numbers where a prompt and its answer are longer than a text can be."""
    if prompt + new > longest:
        raise ProblemError(
            400, f"This model's maximum context length is {longest} tokens. However, you requested {prompt + new} "
            f"tokens ({prompt} in the prompt, {new} in the completion). Please reduce the length of either.",
            param="messages", code="context_length_exceeded",
        )  # fmt: skip


def _asked(outputs: StructuredOutputs) -> list[tuple[str, Any]]:
    """What structured_outputs asks for: (kind, its text or value)."""
    found: list[tuple[str, Any]] = []
    if outputs.json_ is not None:
        try:
            found.append(("json", json.loads(outputs.json_) if isinstance(outputs.json_, str) else outputs.json_))
        except (ValueError, RecursionError):
            raise wrong("structured_outputs", "json is no JSON") from None
    if outputs.json_object:
        found.append(("json", {"type": "object"}))
    if outputs.regex is not None:
        found.append(("regex", outputs.regex))
    if outputs.choice is not None:
        if not outputs.choice or not all(outputs.choice):
            raise wrong("structured_outputs", "choice needs texts, and none may be empty")
        found.append(
            ("grammar", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in outputs.choice))
        )
    if outputs.grammar is not None:
        found.append(("grammar", outputs.grammar))
    return found
