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
def native() -> ModuleType | None:
    """The module of C++ kernels, or None: not built, or switched off. The environment is read once.

    Raises:
        UsageError: KVIK_OPS or KVIK_ISA has a value that it can't have, or asks for what was not built.
    """
    wanted = os.environ.get("KVIK_OPS", "")
    if wanted not in ("", "native", "reference"):
        raise UsageError(f"KVIK_OPS={wanted!r} is unknown, so nothing is chosen; use native or reference, or unset it")
    if wanted == "reference":
        return None
    try:
        module = importlib.import_module("kvik._native")
    except ModuleNotFoundError as error:
        if error.name != "kvik._native":
            raise
        if wanted == "native":
            raise UsageError(_ABSENT) from None
        return None
    isa = os.environ.get("KVIK_ISA", "")
    if isa and not module.use(isa):
        raise UsageError(
            f"KVIK_ISA={isa!r} is not available here, so no kernels are chosen; use {', '.join(module.available())}"
        )
    return module
