"""What a client is told when something is wrong: OpenAI's error body, and the status that it expects."""

from __future__ import annotations

import json

from kvik.errors import BudgetError, ContextError, EngineError, KvikError, QueueError

_KINDS = {429: "rate_limit_error"}


class ProblemError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        param: the field that is wrong.
        code: for programs.
        wait: seconds after which to try again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, wait: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.wait = status, message, param, code, wait

    @property
    def body(self) -> dict[str, object]:
        """OpenAI's."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Beside the body."""
        headers = {} if self.wait is None else {"retry-after": str(self.wait)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    @classmethod
    def of(cls, error: KvikError) -> ProblemError:
        """From what the engine or a model raised."""
        if isinstance(error, ContextError):
            return cls(400, str(error), param="messages", code="context_length_exceeded")
        if isinstance(error, BudgetError):
            return cls(400, str(error), param="max_tokens", code="cache_budget_exceeded")
        if isinstance(error, QueueError):
            return cls(429, str(error), code="queue_full", wait=1)
        if isinstance(error, EngineError):
            return cls(503, str(error), code="engine_unavailable", wait=5)
        return cls(400, str(error), code="invalid_value")


def wrong(param: str, message: str) -> ProblemError:
    """A field's value can't be used."""
    return ProblemError(400, f"{param}: {message}", param=param, code="invalid_value")


def encoded(value: object) -> bytes:
    """JSON as short as it gets; ASCII, so that no text can fail to be sent."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
