"""CTranslate2's model.bin: tensors under names of its own, and what they are called in transformers.

    u32 version · text spec · u32 revision
    u32 variables, each: text name · u8 rank · u32 size of each axis · u8 type · u32 bytes · its bytes
    u32 aliases, each:   text alias · text name

Little-endian; a text is a u16 length, its bytes, and a zero byte that the length counts. Every length is checked
against what is left of the file before anything is read or allocated; nothing in it is executed.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from kvik.errors import TokenizerError, WeightsError
from kvik.models.fields import Fields, brief
from kvik.models.text.tokenizer import Tokenizer

VERSION = 6
_MOST_AXES = 8
_FLOATS: dict[int, torch.dtype] = {0: torch.float32, 4: torch.float16, 5: torch.bfloat16}
_TYPES: dict[int, torch.dtype] = {**_FLOATS, 1: torch.int8, 2: torch.int16, 3: torch.int32}


@dataclass(frozen=True)
class Model:
    """What a file holds.

    Attributes:
        spec: what kind of model it is.
        revision: of the spec.
        variables: tensors by name, aliases included.
    """

    spec: str
    revision: int
    variables: dict[str, Tensor]


def read_model(path: Path | str) -> Model:
    """A model.bin. Raises WeightsError: it is foreign, truncated or damaged; OSError: it can't be opened."""
    path = Path(path)
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise WeightsError(f"{path}: is empty, so there are no weights to load; get it again from its source")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).model()


class _Reader:
    """Reads on from where it stands.

    Attributes:
        at: the next byte.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def model(self) -> Model:
        """The whole file."""
        version = self.number("I")
        if version != VERSION:
            raise WeightsError(
                f"{self.path}: is no model.bin of CTranslate2's version {VERSION} (it begins with {version}); use a "
                "file that kvik supports"
            )
        spec, revision = self.text(), self.number("I")
        variables: dict[str, Tensor] = {}
        for _ in range(self.number("I")):
            name = self.text()
            if name in variables:
                self.fail(f"it holds {brief(name)} a second time")
            variables[name] = self.tensor(name)
        for _ in range(self.number("I")):
            alias, name = self.text(), self.text()
            if alias in variables or name not in variables:
                self.fail(f"its alias {brief(alias)} of {brief(name)} can't be")
            variables[alias] = variables[name]
        if self.at != len(self.data):
            self.fail(f"{len(self.data) - self.at} bytes follow its end")
        return Model(spec, revision, variables)

    def number(self, kind: str) -> int:
        """A whole number: B, H or I as in `struct`."""
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))
        return int(value)

    def text(self) -> str:
        """A text without its zero byte."""
        raw = self.take(self.number("H"))
        if not raw.endswith(b"\0") or not raw[:-1].isascii():
            self.fail(f"{brief(raw)} at byte {self.at - len(raw)} is no text")
        return raw[:-1].decode("ascii")

    def tensor(self, name: str) -> Tensor:
        """A variable behind its name; a copy."""
        rank = self.number("B")
        if rank > _MOST_AXES:
            self.fail(f"{brief(name)} has {rank} axes")
        shape = [self.number("I") for _ in range(rank)]
        kind, size = self.number("B"), self.number("I")
        dtype = _TYPES.get(kind) or self.fail(f"{brief(name)} has the type {kind}, which kvik does not know")
        if size != prod(shape) * dtype.itemsize:
            self.fail(f"{brief(name)} has {size} bytes, but its shape is {brief(shape)}")
        raw = bytearray(self.take(size))
        return torch.frombuffer(raw, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > len(self.data) - self.at:
            self.fail(f"it ends at byte {len(self.data)}, but {count} more were to come at byte {self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def fail(self, what: str) -> NoReturn:
        """Raises the WeightsError for a file that can't be what it should be."""
        raise WeightsError(f"{self.path}: is damaged or no model.bin ({what}); get it again from its source")


def whisper(model: Model, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A WhisperSpec as transformers has it: (config.json, tensors by name). Raises WeightsError."""
    found = model.variables
    if model.spec != "WhisperSpec" or model.revision != 3:
        raise WeightsError(
            f"{path}: holds a {brief(model.spec)} of revision {model.revision}, but kvik reads a WhisperSpec of "
            "revision 3; use a file that kvik supports"
        )
    settings = {"pre_norm": 1, "alibi": 0, "scale_embeddings": 0, "start_from_zero_embedding": 0, "activation": 3}
    for name, value in settings.items():
        if (got := _setting(found, f"decoder/{name}", path)) != value:
            raise WeightsError(f"{path}: decoder/{name} is {got} instead of {value}; use a file that kvik supports")
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if name == "decoder/projection/weight" and tensor is found.get("decoder/embeddings/weight"):
            continue  # an alias
        if tensor.dtype in _FLOATS.values():
            tensors |= _renamed(name, tensor)
        elif tensor.dim() and name != "decoder/alignment_heads":
            raise WeightsError(f"{path}: {brief(name)} is stored as {tensor.dtype}; use a file of floats")
    return _config(found, tensors, path), tensors


_MANY_LANGUAGES = 51_865  # tokens of a Whisper that knows more than English, at the least
_LATEST_FIRST = 50  # a text's first time is 1 s at the most, as its makers have it


def whisper_settings(config: Mapping[str, object], tokenizer: Tokenizer, vocabulary: int) -> dict[str, object]:
    """What transformers' generation_config.json says, from CTranslate2's config.json and the tokenizer's own tokens.

    Raises:
        ConfigError: a value can't be used. TokenizerError: a token is missing.
    """

    def token(name: str) -> int:
        found = tokenizer.token_id(f"<|{name}|>")
        if found is None:
            raise TokenizerError(f"{tokenizer.folder}: its tokenizer has no <|{name}|>; get the model again")
        return found

    fields = Fields(config, f"{tokenizer.folder / 'config.json'}")
    settings: dict[str, object] = {
        "decoder_start_token_id": token("startoftranscript"),
        "eos_token_id": token("endoftext"),
        "no_timestamps_token_id": token("notimestamps"),
        "suppress_tokens": list(fields.ids("suppress_ids")),
        "begin_suppress_tokens": list(fields.ids("suppress_ids_begin")),
        "max_initial_timestamp_index": _LATEST_FIRST,
    }
    if vocabulary < _MANY_LANGUAGES:
        return settings
    return settings | {
        "lang_to_id": {str(each): each for each in fields.ids("lang_ids")},
        "task_to_id": {name: token(name) for name in ("transcribe", "translate")},
    }


def _setting(found: Mapping[str, Tensor], name: str, path: Path) -> int:
    if name not in found or found[name].numel() != 1:
        raise WeightsError(f"{path}: {name} is missing, so the model can't be built; get it again from its source")
    return int(found[name])


_ATTENTIONS = {  # of CTranslate2 -> (of transformers, what each of its products makes)
    "self_attention": ("self_attn", (("q", "k", "v"), ("out",))),
    "attention": ("encoder_attn", (("q",), ("k", "v"), ("out",))),
}
_NORMS = {"self_attention": "self_attn_layer_norm", "attention": "encoder_attn_layer_norm", "ffn": "final_layer_norm"}
_ENDS = {"gamma": "weight", "beta": "bias", "encodings": "weight", "weight": "weight", "bias": "bias"}
_OTHERS = {"embeddings": "embed_tokens", "position_encodings": "embed_positions"}


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One variable under transformers' names: several where it is several products side by side. A name that is not
    known stays, so that the check against the configuration complains about it."""
    stack, *middle, end = name.split("/")
    last = _ENDS.get(end, end)
    if not middle or not re.fullmatch(r"layer_\d+", middle[0]):
        return {".".join(("model", stack, *(_OTHERS.get(part, part) for part in middle), last)): tensor}
    where = f"model.{stack}.layers.{middle[0].removeprefix('layer_')}"
    part, piece = (*middle[1:], "", "")[:2]
    if piece == "layer_norm" and part in _NORMS:
        return {f"{where}.{_NORMS[part]}.{last}": tensor}
    number = int(piece.removeprefix("linear_")) if re.fullmatch(r"linear_\d", piece) else 9
    if part == "ffn" and number < 2:
        return {f"{where}.fc{number + 1}.{last}": tensor}
    ours, products = _ATTENTIONS.get(part, ("", ()))
    if number < len(products) and len(tensor) % len(products[number]) == 0:
        pieces = tensor.chunk(len(products[number]))
        named = zip(products[number], pieces, strict=True)
        return {f"{where}.{ours}.{p}_proj.{last}": each.clone() for p, each in named}
    return {name: tensor}


def _config(found: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Its sizes, as transformers' config.json has them; whether all tensors fit them is checked later."""

    def size(name: str, axis: int) -> int:
        if name not in tensors or tensors[name].dim() <= axis:
            raise WeightsError(f"{path}: {name} is missing, so the model can't be built; get it again from its source")
        return tensors[name].shape[axis]

    def layers(stack: str) -> int:
        return sum(bool(re.fullmatch(rf"model\.{stack}\.layers\.\d+\.fc1\.weight", name)) for name in tensors)

    return {
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "vocab_size": size("model.decoder.embed_tokens.weight", 0),
        "d_model": size("model.decoder.embed_tokens.weight", 1),
        "num_mel_bins": size("model.encoder.conv1.weight", 1),
        "max_source_positions": size("model.encoder.embed_positions.weight", 0),
        "max_target_positions": size("model.decoder.embed_positions.weight", 0),
        "activation_function": "gelu",
    } | {
        f"{stack}_{key}": value
        for stack in ("encoder", "decoder")
        for key, value in (
            ("layers", layers(stack)),
            ("attention_heads", _setting(found, f"{stack}/num_heads", path)),
            ("ffn_dim", size(f"model.{stack}.layers.0.fc1.weight", 0)),
        )
    }
