"""What names a transformers model: two models with one name give the same rows, as far as can be told quickly."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel

SAMPLE = 64  # values of each weight that are looked at
_IDLE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256, in hex, over the configuration, every weight's name, type and shape, and a sample of its values.

    A sample and not all, since a large model's weights take seconds to hash; a model that was trained further has other
    values everywhere.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _IDLE}
    sha = hashlib.sha256(b"kvik model 1")
    sha.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        sha.update(f"{name} {weight.dtype} {tuple(weight.shape)};".encode())
        flat = weight.detach().reshape(-1)
        if flat.is_meta or not flat.numel():
            continue
        at = torch.linspace(0, flat.numel() - 1, min(SAMPLE, flat.numel()), dtype=torch.float64).long()
        values = flat[at.to(flat.device)].cpu().contiguous()
        sha.update(values.view(torch.uint8).numpy().data)
    return sha.hexdigest()
