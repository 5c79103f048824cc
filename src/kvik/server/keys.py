"""API keys: who asks, compared in constant time, and the salt that keeps one key's rows from another's."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvik.cache.prefix import digest
from kvik.errors import UsageError

MOST = 10_000


@dataclass(frozen=True)
class Keys:
    """The keys that a server takes; none = it asks for none.

    Attributes:
        digests: SHA-256 of each: the keys themselves are not held.
    """

    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, keys: Sequence[str], file: Path | None = None) -> Keys:
        """From options and a file with a key a line (# begins a comment). Raises UsageError."""
        found = list(keys)
        if file is not None:
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
                raise UsageError(
                    f"--api-key-file {file} can't be read ({why}), so nobody could ask; name a file with a key a line"
                ) from None
            in_file = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
            if not in_file:
                raise UsageError(f"--api-key-file {file} holds no key, so nobody could ask; write one a line")
            found += in_file
        if len(found) > MOST:
            raise UsageError(f"{len(found):,} API keys are more than the {MOST:,} that are compared one by one")
        for key in found:
            if not key.isascii() or not key.isprintable() or " " in key or not key:
                raise UsageError("an API key is empty or has characters that no header can carry; use letters, digits")
        return cls(tuple(dict.fromkeys(hashlib.sha256(key.encode()).digest() for key in found)))

    def tenant(self, authorization: str | None) -> str | None:
        """Who asks, from the header: the digest of a known key; "" where none is needed; None = nobody we know.

        Every key is compared, whichever fits, and only digests are: the time taken tells nothing about any key.
        """
        if not self.digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        fits = [hmac.compare_digest(given, known) for known in self.digests]
        return given.hex() if scheme.lower() == "bearer" and any(fits) else None


def salt_of(tenant: str, own: str, share_prefixes: bool) -> str:
    """The salt of a request's rows.

    Args:
        own: the request's `cache_salt`: sets it apart from the same key's others.
    """
    who = "" if share_prefixes else tenant
    return digest(tenant=who.encode(), own=own.encode()).hex() if who or own else ""
