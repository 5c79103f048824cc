"""What is held for somebody: pages, which go back when it is closed."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from kvik.cache.cache import Cache as Pages
from kvik.cache.spec import Bytes, Spec


class Holder:
    """Whoever holds pages of a cache of kvik's: `with` closes it.

    Attributes:
        pages: that cache.
    """

    pages: Pages

    @property
    def spec(self) -> Spec:
        """What is kept."""
        return self.pages.spec

    @property
    def nbytes(self) -> Bytes:
        """Bytes held, each page once: rows, and everything around them."""
        return self.pages.nbytes

    def close(self) -> None:
        """Gives back what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __bool__(self) -> bool:
        """True, however long it is: `if cache:` asks whether there is one."""
        return True
