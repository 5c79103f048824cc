"""The native kernels, where they were built and are wanted; everything works, slower, without them.

KVIK_OPS=reference takes plain torch, KVIK_OPS=native insists on the kernels. KVIK_ISA=avx2 takes them for that
instruction set instead of the best one that the machine has.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from types import ModuleType

from kvik.errors import UsageError

_ABSENT = "KVIK_OPS=native: the kernels were not built; install with a C++ compiler, or unset it"


@lru_cache(maxsize=1)
def built() -> ModuleType | None:
    """The module of C++ kernels, wanted or not; None where it was not built."""
    try:
        return importlib.import_module("kvik._native")
    except ModuleNotFoundError as error:
        if error.name != "kvik._native":
            raise
        return None


def chosen() -> ModuleType | None:
    """The kernels as the environment asks for them; None: not built, or switched off.

    Raises:
        UsageError: KVIK_OPS or KVIK_ISA has a value that it can't have, or asks for what was not built.
    """
    wanted = os.environ.get("KVIK_OPS", "")
    if wanted not in ("", "native", "reference"):
        raise UsageError(f"KVIK_OPS={wanted!r} is unknown, so nothing is chosen; use native or reference, or unset it")
    module = None if wanted == "reference" else built()
    if module is None:
        if wanted == "native":
            raise UsageError(_ABSENT)
        return None
    known = module.available()
    isa = os.environ.get("KVIK_ISA", "") or known[-1]
    if not module.use(isa):
        raise UsageError(
            f"KVIK_ISA={isa!r} is not available here, so no kernels are chosen; use {', '.join(known)}, or unset it"
        )
    return module


@lru_cache(maxsize=1)
def native() -> ModuleType | None:
    """The same, asked once: for calls that are made thousands of times a second."""
    return chosen()
