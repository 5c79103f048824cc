"""GGUF files: the header, read within bounds, and the tensors under the names and layouts of transformers.

The header is walked here and not by `gguf.GGUFReader`: that one trusts counts (a damaged one sends it into an endless
loop) and takes two seconds over a vocabulary. Types, block sizes and dequantisation are the gguf library's.

Legend: N outputs, K inputs, B blocks of 32 inputs in all of a tensor.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvik.errors import WeightsError
from kvik.models.fields import Fields, brief
from kvik.ops.grouped import GROUP, GroupQuantized

Weight = Tensor | GroupQuantized

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_ITEMS = 2**22  # of one array; the largest vocabularies have 2**18 tokens and 2**20 merges
_MOST_TEXT = 2**24  # bytes of one string
_MOST_ENTRIES = 2**17  # fields, or tensors

_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
    "gpt2": {
        "token_embd": "wte",
        "position_embd": "wpe",
        "output_norm": "ln_f",
        "output": "lm_head",
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
}
_LAYERS = {arch: "h" if arch == "gpt2" else "model.layers" for arch in _NAMES}
_CONV1D = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")  # GPT-2's, which transformers holds as [in, out]
_NO_PARAMETER = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")  # constants in some older files
_NAME = re.compile(r"(?:blk\.(\d{1,5})\.)?([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True)
class _Stored:
    """One tensor as the file has it: its type's name, its shape (outputs first) and its bytes."""

    kind: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


class _Cursor:
    """Reads a header from the front; every step is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str) -> NoReturn:
        raise WeightsError(f"{self.path}: {what}, so the file is damaged or no GGUF file; get it again from its source")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            self.fail(f"it ends within its header, at byte {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> int:
        value: int = struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]
        return value

    def count(self, what: str, most: int) -> int:
        value = self.number("Q")
        if value > most:
            self.fail(f"it claims {value} {what}")
        return value

    def text(self) -> str:
        raw = self.take(self.count("bytes in one text", _MOST_TEXT))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"the text before byte {self.at} is no UTF-8")

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.scalars(kind, 1)[0]
        if kind != _ARRAY:
            self.fail(f"a field has type {kind}, which does not exist")
        item, count = self.number("I"), self.count("items in one array", _MOST_ITEMS)
        if item == _STRING:
            return [self.text() for _ in range(count)]
        if item not in _SCALARS:
            self.fail(f"an array has items of type {item}, which kvik can't read")
        return self.scalars(item, count)

    def scalars(self, kind: int, count: int) -> list[int | float | bool]:
        code = _SCALARS[kind]
        raw = self.take(count * struct.calcsize("<" + code))
        if code == "f":  # the shortest decimal that is this f32: 1e-05, not 9.999999747378752e-06
            return [float(str(x)) for x in np.frombuffer(raw, "<f4")]
        return list(struct.unpack(f"<{count}{code}", raw))


def read_gguf(path: Path | str) -> tuple[dict[str, object], dict[str, Weight]]:
    """Everything in a GGUF file of a model that kvik knows.

    Returns:
        The file's fields, with two of kvik's own: "GGUF.tensors" (names of the file's tensors) and, where the file has
        that tensor, "GGUF.rope_freqs" (divisors of the rope's frequencies); and the tensors under transformers' names
        and layouts. Q4_0, Q4_1 and Q8_0 stay quantised, F32, F16 and BF16 stay as they are, other types become f32.
        An output projection that repeats the embedding byte for byte is left out: the model is tied.

    Raises:
        WeightsError: the file is truncated, foreign or damaged, or has a tensor that kvik can't read.
        ConfigError: the architecture is another, or its number of heads is missing.
    """
    path = Path(path)
    fields, stored = _read(path)
    checked = Fields(fields, path.name)
    family = checked.text("general.architecture", among=_NAMES)
    factors = stored.pop("rope_freqs.weight", None)
    if factors is not None:
        fields["GGUF.rope_freqs"] = tuple(_dense(path, "rope_freqs.weight", factors).flatten().tolist())
    output, embedding = stored.get("output.weight"), stored.get("token_embd.weight")
    if output and embedding and output.kind == embedding.kind and np.array_equal(output.data, embedding.data):
        del stored["output.weight"]
    fields["GGUF.tensors"] = tuple(stored)
    heads = {}
    if family == "llama":
        query = checked.integer("llama.attention.head_count", most=2**16)
        heads = {"attn_q": query, "attn_k": checked.integer("llama.attention.head_count_kv", query, most=2**16)}
    tensors: dict[str, Weight] = {}
    for name, tensor in stored.items():
        if not _NO_PARAMETER.fullmatch(name):
            canonical, part = _canonical(path, family, name)
            tensors[canonical] = _weight(path, name, part, tensor, family, heads)
    return fields, tensors


def _read(path: Path) -> tuple[dict[str, object], dict[str, _Stored]]:
    """(fields, tensors as stored), every byte range checked. The tensors' bytes are views of the mapped file."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise WeightsError(f"{path}: the file is empty, so it holds no model; get it again from its source") from None
    except OSError as error:
        raise WeightsError(f"{path}: can't be read ({error.strerror}); check the path and its permissions") from None
    cursor = _Cursor(path, data)
    if data[:4] != _MAGIC:
        cursor.fail("it does not begin with GGUF")
    cursor.at = 4
    version = cursor.number("I")
    if version not in (2, 3):
        cursor.fail(f"its GGUF version is {version}, not 2 or 3")
    tensor_count, field_count = cursor.count("tensors", _MOST_ENTRIES), cursor.count("fields", _MOST_ENTRIES)
    fields: dict[str, object] = {}
    for _ in range(field_count):
        key = cursor.text()
        if key in fields or key.startswith("GGUF."):
            cursor.fail(f"the field {brief(key)} occurs twice or is reserved")
        fields[key] = cursor.value(cursor.number("I"))
    parts = fields.get("split.count", 1)
    if parts not in (0, 1):
        raise WeightsError(f"{path}: is one of {brief(parts)} parts of a model; merge them into one file first")
    return fields, _read_tensors(cursor, fields, tensor_count)


def _read_tensors(cursor: _Cursor, fields: Mapping[str, object], count: int) -> dict[str, _Stored]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    infos: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.text()
        rank = cursor.number("I")
        if name in infos or not 1 <= rank <= 4:
            cursor.fail(f"the tensor {brief(name)} occurs twice or has {rank} dimensions")
        shape = tuple(cursor.count("values in one dimension", 2**40) for _ in range(rank))[::-1]
        code, offset = cursor.number("I"), cursor.number("Q")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise WeightsError(
                f"{cursor.path}: tensor {brief(name)} has type {code}, which kvik does not know; use another file"
            ) from None
        block, size = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            cursor.fail(f"the tensor {brief(name)} has the shape {list(shape)} in blocks of {block}")
        values = 1
        for extent in shape:
            values *= extent
        infos[name] = (kind.name, shape, offset, values // block * size)
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        cursor.fail(f"its alignment is {brief(alignment)}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, (kind_name, shape, offset, length) in infos.items():
        if start + offset + length > len(cursor.data):
            cursor.fail(f"the tensor {brief(name)} ends beyond the file's {len(cursor.data)} bytes")
        data = np.frombuffer(cursor.data, np.uint8, length, start + offset) if length else np.empty(0, np.uint8)
        tensors[name] = _Stored(kind_name, shape, data)
    return tensors


def _canonical(path: Path, family: str, name: str) -> tuple[str, str]:
    """(transformers' name, GGUF's name of the part): blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight."""
    match = _NAME.fullmatch(name)
    part = _NAMES[family].get(match[2]) if match else None
    if match is None or part is None:
        raise WeightsError(f"{path}: tensor {brief(name)} is no part of a {family} that kvik knows; use another model")
    layer = f"{_LAYERS[family]}.{int(match[1])}." if match[1] else ""
    return f"{layer}{part}.{match[3]}", match[2]


def _weight(path: Path, name: str, part: str, stored: _Stored, family: str, heads: dict[str, int]) -> Weight:
    """One tensor as transformers lays it out: rope's rows for rotate-half, GPT-2's projections as Conv1D."""
    weight = _quantized(path, name, stored) if len(stored.shape) == 2 else None
    transposed = family == "gpt2" and part in _CONV1D and len(stored.shape) == 2
    if weight is None or transposed:
        dense = _dense(path, name, stored)
        return dense.t().contiguous() if transposed else _unpermuted(path, name, dense, heads.get(part))
    order = _row_order(path, name, weight.shape[0], heads.get(part))
    return weight if order is None else weight.rows(order)


def _unpermuted(path: Path, name: str, dense: Tensor, heads: int | None) -> Tensor:
    order = _row_order(path, name, dense.shape[0], heads)
    return dense if order is None else dense[order]


def _row_order(path: Path, name: str, rows: int, heads: int | None) -> Tensor | None:
    """Which stored row comes where, so that a head's two rotary halves lie apart again; None to leave the rows.

    GGUF interleaves a head's halves for llama: with heads of 6 rows, the stored rows 0 1 2 3 4 5 are the original
    0 3 1 4 2 5. The order back is therefore 0 2 4 1 3 5.
    """
    if heads is None:
        return None
    if rows % (2 * heads):
        raise WeightsError(f"{path}: tensor {brief(name)} has {rows} rows for {heads} heads; get the file again")
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def _quantized(path: Path, name: str, stored: _Stored) -> GroupQuantized | None:
    """The tensor with its codes kept, or None where its type is not one of those that `GroupQuantized` holds.

    Q4_0: d, then 16 bytes; w = d * (code - 8).  Q4_1: d, m, 16 bytes; w = d * code + m.  Q8_0: d, 32 signed bytes.
    Products of d (11 bits) and a code are exact in f32, as are the zeros below, so values equal the library's.
    """
    header = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}.get(stored.kind)
    if header is None:
        return None
    rows, width = stored.shape
    bits = 8 if stored.kind == "Q8_0" else 4
    blocks = stored.data.reshape(-1, header + GROUP * bits // 8)  # [B, bytes]
    halves = blocks[:, :header].copy().view("<f2")
    scale = halves[:, 0]
    if stored.kind == "Q8_0":
        codes = blocks[:, 2:] ^ 0x80  # int8 q as uint8 q + 128
        zero = scale.astype(np.float32) * -128
    else:
        packed = blocks[:, header:]  # byte j: input j in the low half, input j + 16 in the high one
        inputs = np.concatenate((packed & 15, packed >> 4), axis=1)  # [B, 32]
        codes = inputs[:, 0::2] | (inputs[:, 1::2] << 4)
        zero = halves[:, 1].astype(np.float32) if stored.kind == "Q4_1" else scale.astype(np.float32) * -8
    if not (np.isfinite(scale).all() and np.isfinite(zero).all()):
        raise WeightsError(f"{path}: tensor {brief(name)} has scales that are not finite; get the file again")
    with np.errstate(over="ignore"):
        half = zero.astype(np.float16)
    exact = bool((half.astype(np.float32) == zero).all())  # -128 * d may be beyond f16
    shape = (rows, width // GROUP)
    return GroupQuantized(
        codes=torch.from_numpy(codes.reshape(rows, -1)),
        scale=torch.from_numpy(scale.reshape(shape).copy()),
        zero=torch.from_numpy((half if exact else zero).reshape(shape)),
        bits=bits,
    )


def _dense(path: Path, name: str, stored: _Stored) -> Tensor:
    """The tensor as f16, bf16 or f32, as it is stored; every other type as f32."""
    if stored.kind in ("F32", "F16"):
        kind = "<f4" if stored.kind == "F32" else "<f2"
        return torch.from_numpy(stored.data.copy().view(kind).reshape(stored.shape))
    if stored.kind == "BF16":
        return torch.from_numpy(stored.data.copy().view("<i2").reshape(stored.shape)).view(torch.bfloat16)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = stored.data.reshape(-1, stored.data.size // max(1, int(np.prod(stored.shape[:-1]))))
    try:
        values = dequantize(rows, GGMLQuantizationType[stored.kind])
    except NotImplementedError:
        raise WeightsError(
            f"{path}: tensor {brief(name)} is stored as {stored.kind}, which kvik can't read; use another quantisation"
        ) from None
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32).reshape(stored.shape))
