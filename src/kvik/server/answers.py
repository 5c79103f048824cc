"""What chats and completions share on the way back: who answers, and what it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvik.engine.engine import Engine
from kvik.engine.job import Likely, Update
from kvik.server.bodies import Sampled
from kvik.server.desk import Asked


@dataclass(frozen=True)
class Head:
    """What every body and chunk of an answer begins with."""

    id: str
    kind: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: Sequence[object], kind: str | None = None) -> dict[str, object]:
        """With its choices."""
        return {
            "id": self.id, "object": kind or self.kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": list(choices),
        }  # fmt: skip


def fingerprint(engine: Engine) -> str:
    """Changes with the weights and with what is kept of them: then a seed may give another answer."""
    return f"kvik_{engine.model.held[:12]}_{engine.cache.spec.fingerprint[:8]}"


def usage(asked: Asked, hidden: int = 0) -> dict[str, object]:
    """Tokens of a request, once it has ended.

    Args:
        hidden: new tokens that were computed and not asked for.
    """
    record = asked.record
    new = record.new_tokens - hidden
    return {
        "prompt_tokens": record.tokens,
        "completion_tokens": new,
        "total_tokens": record.tokens + new,
        "prompt_tokens_details": {"cached_tokens": record.cached},
    }


def headers(asked: Asked) -> dict[str, str]:
    """How many prompt tokens were known, where that is known yet."""
    known = any(prompt.known is not None for prompt in asked.record.prompts)
    return {"x-kvik-cached-tokens": str(asked.record.cached)} if known else {}


def shown(update: Update, asked: Asked, number: int) -> tuple[Likely, ...]:
    """The log-probabilities of tokens that are part of the text: not of the one that ended it."""
    request = asked.requests[number]
    own = () if request.ignore_end else asked.desk.engine.model.config.eos_ids
    ended = update.finish == "stop" and update.token_ids and update.token_ids[-1] in (*own, *request.stop_ids)
    return update.logprobs[:-1] if ended else update.logprobs


def with_usage(body: Sampled) -> bool:
    """Whether a stream ends with a chunk of usage."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)
