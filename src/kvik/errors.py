"""What can go wrong, as one tree. Every message is one line: what was wrong, what follows, the way out.

KvikError
├── SpecError            a cache specification that can't be read or doesn't fit the model
├── BudgetError          more bytes were needed than the budget leaves
├── SequenceError        a Sequence was used in a way its state does not allow
├── ModelError           a model can't be used
│   ├── ConfigError      its configuration is missing, damaged, or of an unknown family
│   ├── WeightsError     a tensor is missing, extra, mis-shaped, truncated or of an unknown type
│   └── TokenizerError   its tokenizer or chat template is missing, damaged or hostile
├── ContextError         more tokens than the model has positions for
├── StorageError         a file or folder can't be read or written
├── UsageError           an option has a value that it can't have
├── QueueError           more requests wait than may
└── EngineError          the engine was closed, or has broken down
"""

from __future__ import annotations


class KvikError(Exception):
    """The root: catch this to catch everything that kvik raises on purpose."""


class SpecError(KvikError):
    """A cache specification that can't be read, or that doesn't fit the model."""


class BudgetError(KvikError):
    """More bytes were needed than the budget leaves.

    Attributes:
        needed: bytes that the request asked for.
        available: bytes that could have been had, after every unreferenced block was dropped.
    """

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class SequenceError(KvikError):
    """A Sequence was used in a way that its state does not allow (closed, mid-step, trimmed below an eviction)."""


class ModelError(KvikError):
    """A model can't be used."""


class ConfigError(ModelError):
    """A model's configuration is missing, damaged, or names a family that kvik does not know."""


class WeightsError(ModelError):
    """A tensor is missing, extra, mis-shaped, truncated, or stored in a type that can't be read."""


class TokenizerError(ModelError):
    """A tokenizer or chat template is missing, damaged, or reaches for what a template must not touch."""


class ContextError(KvikError):
    """More tokens than the model has positions for."""


class StorageError(KvikError):
    """A file or folder can't be read or written, or a download failed or did not match its checksum."""


class UsageError(KvikError):
    """An option or argument has a value that it can't have."""


class QueueError(KvikError):
    """More requests wait than may: try again later."""


class EngineError(KvikError):
    """The engine was closed before an answer was complete, or has broken down."""
