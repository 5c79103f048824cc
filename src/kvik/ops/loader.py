"""The native kernels, where they were built and are wanted; everything works, slower, without them.

KVIK_OPS=reference takes plain torch, KVIK_OPS=native insists on the kernels. KVIK_ISA=avx2 takes them for that
instruction set instead of the best one that the machine has.
"""

from __future__ import annotations

import importlib
import os
from functools import lru_cache
from types import ModuleType

from kvik.errors import StorageError, UsageError

_ABSENT = "KVIK_OPS=native: the kernels were not built; install with a C++ compiler, or unset it"
_WAY_OUT = "install kvik again, or set KVIK_OPS=reference for plain torch, which is several times slower"


@lru_cache(maxsize=1)
def _found() -> ModuleType | str | None:
    """The module; or why its file can't be loaded; None: there is none."""
    try:
        return importlib.import_module("kvik._native")
    except ModuleNotFoundError as error:
        if error.name != "kvik._native":
            raise
        return None
    except ImportError as error:  # damaged, or made for another Python or machine
        reason = str(error).removeprefix(f"{error.path}: ")
        return f"{error.path}: the kernels can't be loaded ({reason}), so nothing was done; {_WAY_OUT}"


def built() -> ModuleType | None:
    """The module of C++ kernels, wanted or not; None where it was not built, or can't be loaded and isn't wanted.

    Raises:
        StorageError: it can't be loaded, and the environment does not ask for plain torch.
    """
    found = _found()
    if isinstance(found, str):
        if os.environ.get("KVIK_OPS") != "reference":
            raise StorageError(found)
        return None
    return found


def chosen() -> ModuleType | None:
    """The kernels as the environment asks for them; None: not built, or switched off.

    Raises:
        UsageError: KVIK_OPS or KVIK_ISA has a value that it can't have, or asks for what was not built.
        StorageError: see `built`.
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


def spinning(microseconds: int) -> int:
    """How long idle threads of the kernels look for work before they sleep: while others want the cores, not long.

    Returns:
        How long it was; 0 where there are no kernels.
    """
    module = native()
    if module is None:
        return 0
    before = int(module.spin())
    module.set_spin(microseconds)
    return before
