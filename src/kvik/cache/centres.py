"""A constant for each lane that is subtracted from keys before a quantising codec sees them, so that no code is spent
on what all keys have in common.

Softmax ignores it: q·(k - c) = q·k - q·c, and q·c is one number for all rows that a query sees. So attention is the
same but for what the codec loses, which is less. Rows in floats stay as they are, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from kvik.cache.spec import Group, Spec
from kvik.errors import UsageError


class Centres:
    """What to subtract from a model's keys, as they are stored: after positions turned them, before any rotation of a
    codec.

    Attributes:
        layers: for each, f32 [heads, width of a key]; [0, 0] where it keeps no keys of its own text.
    """

    def __init__(self, layers: Sequence[Tensor]) -> None:
        """
        Raises:
            UsageError: a layer's are no finite f32 [heads, width].
        """
        self.layers = tuple(layer.detach().cpu().contiguous() for layer in layers)
        for number, layer in enumerate(self.layers):
            if layer.dtype != torch.float32 or layer.dim() != 2 or not layer.isfinite().all():
                raise UsageError(f"the key centres of layer {number} are no finite f32 [heads, width]; leave them out")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every number, in hex."""
        sha = hashlib.sha256(b"kvik key centres 1")
        for layer in self.layers:
            sha.update(f"{tuple(layer.shape)}".encode() + layer.numpy().astype("<f4").tobytes())
        return sha.hexdigest()

    def of(self, group: Group, device: torch.device) -> Tensor | None:
        """f32 [lanes of the group, width]; None where keys are not quantised, are a source's, or may stand beyond the
        positions that the model knows (slow pairs of channels turn away from their centre there).

        Raises:
            UsageError: they were made for other layers.
        """
        keys = next((stream for stream in group.layout.streams if stream.name == "k"), None)
        if group.source or group.retention.relative or keys is None or not keys.codec.quantises:
            return None
        for layer, head in group.lanes:
            have = tuple(self.layers[layer].shape) if layer < len(self.layers) else (0, 0)
            if head >= have[0] or keys.width != have[1]:
                raise UsageError(
                    f"the key centres are for other layers: layer {layer} has {have[0]} heads of {have[1]} there, but "
                    f"its head {head} has keys of {keys.width}; use the model's own, or none"
                )
        return torch.stack([self.layers[layer][head] for layer, head in group.lanes]).to(device)

    def __repr__(self) -> str:
        return f"<Centres of {len(self.layers)} layers' keys, {self.fingerprint[:8]}>"


def centres_of(centres: Centres | None, spec: Spec, device: torch.device) -> tuple[list[Tensor | None], str]:
    """For each group of a spec, what is subtracted from its keys; and a name for it, "" where it is nothing anywhere.

    Raises:
        UsageError: they were made for other layers.
    """
    if centres is None:
        return [None for _ in spec.groups], ""
    found = [centres.of(group, device) for group in spec.groups]
    return found, centres.fingerprint if any(each is not None for each in found) else ""
