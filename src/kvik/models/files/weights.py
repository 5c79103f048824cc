"""A model's tensors: from safetensors files (mapped, not copied), checked against what its Config says.

Nothing here ever reads a pickle: PyTorch's .bin and .pt files can run code when they are opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kvik.errors import WeightsError
from kvik.models.config import Config
from kvik.models.fields import brief
from kvik.models.files.gguf import Weight, read_gguf

__all__ = ["Weight", "check", "read_gguf", "read_safetensors", "safetensors_files"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NO_PARAMETER = re.compile(
    r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)|model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|(bert\.)?embeddings\.position_ids"
)
_INDEX = "model.safetensors.index.json"
_SHOWN = 3  # names in a message; the rest is a number


def safetensors_files(folder: Path) -> dict[str, list[str] | None]:
    """The files that hold a folder's tensors, each with the names that the index expects in it (None: no index).

    Raises:
        WeightsError: there are none, only pickles, or the index or one of its files is damaged or missing.
    """
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    index = folder / _INDEX
    if not index.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        if pickles:
            raise WeightsError(
                f"{folder}: has its weights only in {pickles[0]}, a pickle, which can run code when opened, so kvik "
                "never does; convert it to model.safetensors"
            )
        raise WeightsError(f"{folder}: has no model.safetensors and no {_INDEX}, so there are no weights to load")
    try:
        mapping = json.loads(index.read_bytes())["weight_map"]
        names = {str(name): str(file) for name, file in mapping.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsError(f"{index}: is no index of shards; get the folder again from its source") from None
    files: dict[str, list[str] | None] = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise WeightsError(f"{index}: names {brief(file)}, which is no safetensors file beside it; don't use it")
        if not (folder / file).is_file():
            raise WeightsError(f"{folder / file}: is missing, but the index names it; get the folder again")
        files[file] = [name for name, shard in names.items() if shard == file]
    return files


def read_safetensors(folder: Path | str) -> dict[str, Tensor]:
    """The tensors of a transformers folder under canonical names, mapped from its files.

    GPT-2's "transformer." prefix goes; known constants that are no parameters (attention masks, rope frequencies,
    numbers of positions) are left out.

    Raises:
        WeightsError: a file is missing, truncated or foreign, or a tensor is not stored as f32, f16 or bf16.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for file, expected in safetensors_files(folder).items():
        found = read_file(folder / file)[0]
        absent = [name for name in expected or () if name not in found]
        if absent:
            raise WeightsError(f"{folder / file}: lacks {_some(absent)}, named by the index; get the folder again")
        for name, tensor in found.items():
            if _NO_PARAMETER.fullmatch(name):
                continue
            canonical = name.removeprefix("transformer.")
            if canonical in tensors:
                raise WeightsError(f"{folder / file}: holds {brief(canonical)} a second time; get the folder again")
            if tensor.dtype not in _FLOATS:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise WeightsError(
                    f"{folder / file}: {brief(name)} is stored as {kind}, which kvik can't use; use f32, f16 or bf16"
                )
            tensors[canonical] = tensor
    return tensors


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(every tensor of one safetensors file, mapped; its metadata). Raises WeightsError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise WeightsError(
            f"{path}: is damaged or no safetensors file ({reason}), so nothing is loaded; get it again from its source"
        ) from None


def check(tensors: Mapping[str, Weight], config: Config) -> dict[str, Weight]:
    """The tensors that the config asks for, no more and no fewer, by their canonical names; those that it can spare are
    left out.

    Raises:
        WeightsError: tensors are missing, extra or mis-shaped (names the first few and says how many), or two names of
            one tensor hold different values.
    """
    shapes = config.tensor_shapes()
    tensors = _named(tensors, config)
    missing = [name for name in shapes if name not in tensors]
    extra = [name for name in tensors if name not in shapes and not config.spare(name)]
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults = {"missing": missing, "unknown": extra, "of another shape": wrong}
    said = [f"{len(names)} {what}: {_some(names)}" for what, names in faults.items() if names]
    if said:
        raise WeightsError(
            f"{config.name}: its tensors do not fit its configuration ({'; '.join(said)}); get the model again"
        )
    return {name: tensors[name] for name in shapes}


def _named(tensors: Mapping[str, Weight], config: Config) -> dict[str, Weight]:
    """Tensors under their canonical names, each once; those that files may leave out are there."""
    shapes, found = config.tensor_shapes(), dict(tensors)
    for name, others in config.other_names().items():
        for other in others:
            if other not in found:
                continue
            copy = found[other] if other in shapes else found.pop(other)
            held = found.setdefault(name, copy)
            if other not in shapes and not _equal(held, copy):
                raise WeightsError(
                    f"{config.name}: {name} and {other} hold different values, but its configuration says they are "
                    "one; correct that, or get the model again"
                )
    for name in config.optional_tensors():
        found.setdefault(name, torch.zeros(shapes[name]))
    return found


def _equal(a: Weight, b: Weight) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def _some(names: Iterable[str]) -> str:
    """The first few names, and that there are more."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(name[:100] for name in listed[:_SHOWN]) + more
