"""A cache in a file: one safetensors file, with pages verbatim (`kvik/cache/image.py`), and who may read it.

Its metadata has one entry, `kvik.hf`, which is JSON: the file's version, the spec and its fingerprint, the model's
fingerprint, and a SHA-256 over every tensor. Nothing in it is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvik.cache.spec import Spec
from kvik.errors import StorageError
from kvik.hf.fingerprint import fingerprint

VERSION, ENTRY = 1, "kvik.hf"


def about(model: PreTrainedModel, spec: Spec) -> dict[str, Any]:
    """What a file says of a cache."""
    told = {"spec": str(spec), "fingerprint": spec.fingerprint}
    return {**told, "model": fingerprint(model), "name": type(model).__name__}


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Writes a file whole, or not at all.

    Raises:
        StorageError: it can't be written.
    """
    target = Path(path)
    entry = json.dumps({"version": VERSION, **about, "sha256": _digest(tensors, about)}, sort_keys=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file({name: x.contiguous() for name, x in tensors.items()}, partial, metadata={ENTRY: entry})
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{target} can't be written: {_line(error)}") from None


def read(path: str | os.PathLike[str], model: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Its tensors, and what it says of them.

    Args:
        model: fingerprint of the one that it is for.

    Raises:
        StorageError: it is no such file, of another version or another model, damaged, or can't be read.
    """
    about = heading(path)
    if about["model"] != model:
        raise StorageError(
            f"{path} was saved with another model ({about['name']}, other weights or configuration): its rows mean "
            "nothing here; load it with that one"
        )
    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} can't be read: {_line(error)}") from None
    told = {name: value for name, value in about.items() if name not in ("version", "sha256")}
    if _digest(tensors, told) != about["sha256"]:
        raise StorageError(f"{path} is damaged: its checksum is not that of its bytes; save the cache again")
    return tensors, about


def heading(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file says of itself: version, spec, model.

    Raises:
        StorageError: it is no such file, or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entry = (file.metadata() or {}).get(ENTRY)
    except FileNotFoundError:
        raise StorageError(f"{path} is not there; save a cache first") from None
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} is no saved cache, or was cut off ({_line(error)}); save it again") from None
    if entry is None:
        raise StorageError(f"{path} is a safetensors file of something else, no saved cache")
    try:
        about = json.loads(entry)
        version = about["version"]
        texts = ("spec", "fingerprint", "model", "name", "sha256")
        right = version != VERSION or all(isinstance(about[key], str) for key in texts)
    except (ValueError, KeyError, TypeError):
        right, version = False, VERSION
    if version != VERSION:
        raise StorageError(f"{path} has version {version!r}, and this kvik reads version {VERSION}; save it again")
    if not right:
        raise StorageError(f"{path} is damaged: what it says of itself can't be read; save the cache again")
    return dict(about)


def _digest(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        sha.update(f"{name} {x.dtype} {tuple(x.shape)};".encode())
        sha.update(np.ascontiguousarray(x.numpy()).data)
    return sha.hexdigest()


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
