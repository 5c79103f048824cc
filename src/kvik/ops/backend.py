"""Which implementation of append, attend and compact serves a device: the kernels on a CPU, where `ops/loader.py` finds
them wanted and built, else plain torch.
"""

from __future__ import annotations

import torch

from kvik.ops import loader, native, reference
from kvik.ops.reads import Backend


def backend(device: torch.device) -> Backend:
    """The one that serves a device.

    Raises:
        UsageError: the environment asks for what is not there.
    """
    return native if device.type == "cpu" and loader.chosen() is not None else reference
