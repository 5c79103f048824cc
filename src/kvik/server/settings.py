"""What a server was told at its start, and what it allows in one request."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvik.server.keys import Keys


@dataclass(frozen=True)
class Limits:
    """What one request, or one key, may ask. All are checked before anything is made of them.

    Attributes:
        body_bytes: of a request.
        upload_s: seconds until a request has arrived whole.
        seconds: that an answer may take, the time in the queue included.
        answers: of one request: its prompts times `n`.
        logprobs: likeliest tokens beside each.
        stops, stop_chars: stop texts, and characters of each.
        biases: tokens whose logits are changed.
        messages, tools: in a chat.
        grammar_chars: of a JSON schema, regular expression or grammar.
        requests_per_key: at once, from their first byte to their answer's last; without keys nothing is counted so.
        requests: at once, of all; each may hold `body_bytes`.
    """

    body_bytes: int = 4 << 20
    upload_s: float = 30.0
    seconds: float = 1800.0
    answers: int = 128
    logprobs: int = 20
    stops: int = 16
    stop_chars: int = 1024
    biases: int = 1024
    messages: int = 4096
    tools: int = 128
    grammar_chars: int = 1 << 16
    requests_per_key: int = 64
    requests: int = 512


@dataclass(frozen=True)
class Settings:
    """A server's.

    Attributes:
        names: of the model; the first is what answers say.
        keys: who may ask; none = everybody.
        share_prefixes: what one key's requests left may be found by another's.
        apart: each key's rows are on an account of its own, so that who holds the most makes room; else whatever was
            used least recently goes, whosever it is.
        vllm_names: metrics have vLLM's names as well.
        drain_s: seconds that running requests get to finish after the first SIGTERM.
        keep_alive_s: seconds of silence after which a stream says that it lives.
    """

    names: tuple[str, ...]
    keys: Keys = field(default_factory=Keys)
    share_prefixes: bool = False
    apart: bool = True
    vllm_names: bool = False
    drain_s: float = 30.0
    keep_alive_s: float = 15.0
    limits: Limits = field(default_factory=Limits)
