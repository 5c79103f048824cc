"""Which implementation of append, attend and compact serves a device.

KVIK_OPS=reference takes the plain torch one, KVIK_OPS=native insists on the kernels; by default the kernels serve the
CPU wherever they were built.
"""

from __future__ import annotations

import os

import torch

from kvik.errors import UsageError
from kvik.ops import native, reference
from kvik.ops.reads import Backend


def backend(device: torch.device) -> Backend:
    """The one that serves a device.

    Raises:
        UsageError: KVIK_OPS names no backend, or one that is not built; KVIK_ISA names no instruction set that is here.
    """
    asked = os.environ.get("KVIK_OPS", "")
    if asked not in ("", "native", "reference"):
        raise UsageError(f"KVIK_OPS={asked!r} is no backend; use native or reference, or leave it out")
    if asked == "native" and not native.built():
        raise UsageError("KVIK_OPS=native: the kernels were not built; install with a C++ compiler, or leave it out")
    if asked == "reference" or device.type != "cpu" or not native.built():
        return reference
    native.check_isa()
    return native
