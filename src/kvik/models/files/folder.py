"""A model's folder: what `load` maps into memory, whether kvik prepared it or transformers wrote it.

A prepared folder holds config.json (kvik's own: format, sizes of the files, provenance, fingerprint, Config),
tokenizer.json, tokenizer_config.json, chat_template.jinja where there is one, and model.safetensors, in which a
quantised tensor NAME is stored as NAME.codes, NAME.scale and NAME.zero, its bits under NAME in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from kvik.errors import ConfigError, WeightsError
from kvik.models.config import Config
from kvik.models.families import from_hf, from_json
from kvik.models.fields import brief
from kvik.models.files.weights import Weight, check, read_file, read_safetensors, safetensors_files
from kvik.ops.grouped import GroupQuantized

FORMAT = 2  # of a prepared folder
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the built-in model's file
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # and of the built-in encoder's
_NAMES = {
    SMOLLM2_SHA256: "SmolLM2-135M-Instruct",  # the file calls itself "Smollm2 135M 8k Lc100K Mix1 Ep2"
    MINILM_SHA256: "all-MiniLM-L6-v2",
}
_WEIGHTS = "model.safetensors"
_PARTS = ("codes", "scale", "zero")


@dataclass(frozen=True)
class Loaded:
    """A model, ready to be built.

    Attributes:
        config: what it is.
        tensors: its weights under canonical names, exactly those of `config.tensor_shapes()`, memory-mapped.
        tokenizer_folder: where its tokenizer and chat template lie.
        fingerprint: SHA-256 in hex, naming the weights. Of a prepared folder: over the configuration and the bytes of
            model.safetensors, taken when it was prepared. Of a transformers folder: over config.json, and each
            safetensors file's name, header, size and time of change (not its bytes, which would take seconds to read).
    """

    config: Config
    tensors: dict[str, Weight]
    tokenizer_folder: Path
    fingerprint: str


def load(folder: Path | str) -> Loaded:
    """Maps a model's tensors and reads its configuration; nothing is copied or converted.

    Raises:
        ConfigError: config.json is missing, damaged, or describes a model that kvik does not know.
        WeightsError: a file is missing, truncated or changed, or tensors do not fit the configuration.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    if "kvik" in values:
        return _load_prepared(folder, values)
    generation = folder / "generation_config.json"
    config = from_hf(values, read_json(generation) if generation.is_file() else None, folder.name)
    tensors = check(read_safetensors(folder), config)
    return Loaded(config, tensors, folder, _folder_fingerprint(folder))


def write_prepared(folder: Path, config: Config, tensors: Mapping[str, Weight], source: Mapping[str, object]) -> None:
    """Adds weights and config.json to a folder that already holds the tokenizer. Raises OSError."""
    from safetensors.torch import save_file

    flat: dict[str, Tensor] = {}
    bits: dict[str, str] = {}
    for name, weight in tensors.items():
        if isinstance(weight, GroupQuantized):
            bits[name] = str(weight.bits)
            flat |= {f"{name}.{part}": getattr(weight, part) for part in _PARTS}
        else:
            flat[name] = weight
    save_file(flat, folder / _WEIGHTS, metadata=bits)
    described = config.to_json()
    fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True).encode() + b"\0")
    fingerprint.update(bytes.fromhex(file_sha256(folder / _WEIGHTS)))
    head = {
        "format": FORMAT,
        "fingerprint": fingerprint.hexdigest(),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        "source": dict(source),
    }
    (folder / "config.json").write_text(json.dumps({"kvik": head, "config": described}, indent=1), encoding="utf-8")


def makers_name(source: object, name: str) -> str:
    """What a model's makers call it: by the SHA-256 of the file that it was prepared from, else what the file says."""
    sha256 = source.get("sha256") if isinstance(source, dict) else None
    return _NAMES.get(sha256, name) if isinstance(sha256, str) else name


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, object]:
    """An object in a file of a model's folder. Raises ConfigError."""
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{path}: is missing, so the folder holds no model; give one with config.json") from None
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is damaged (no JSON object); get the model again, or delete a prepared folder")
    return values


def _damaged(folder: Path, what: str) -> NoReturn:
    raise WeightsError(f"{folder}: is damaged ({what}); delete the folder and it will be prepared again")


def _load_prepared(folder: Path, values: Mapping[str, object]) -> Loaded:
    head, described = values["kvik"], values.get("config")
    if not isinstance(head, dict) or not isinstance(described, dict):
        _damaged(folder, "its config.json is incomplete")
    if head.get("format") != FORMAT:
        raise ConfigError(
            f"{folder}: has format {brief(head.get('format'))}, but this version of kvik reads {FORMAT}; "
            "delete the folder and it will be prepared again"
        )
    files, fingerprint = head.get("files"), head.get("fingerprint")
    if not isinstance(files, dict) or _WEIGHTS not in files or not isinstance(fingerprint, str):
        _damaged(folder, "its config.json is incomplete")
    for name, size in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            _damaged(folder, f"{path.name} is missing")
        if path.stat().st_size != size:
            _damaged(folder, f"{path.name} has {path.stat().st_size} bytes instead of {brief(size)}")
    try:
        config = from_json(described)
        config = replace(config, name=makers_name(head.get("source"), config.name))
        flat, bits = read_file(folder / _WEIGHTS)
        tensors = check(_assembled(flat, bits), config)
    except (ConfigError, WeightsError, KeyError, ValueError) as error:
        _damaged(folder, str(error)[:160])
    return Loaded(config, tensors, folder, fingerprint)


def _assembled(flat: Mapping[str, Weight], bits: Mapping[str, str]) -> dict[str, Weight]:
    """The tensors with their quantised ones put together again. Raises KeyError or ValueError where parts lack."""
    tensors = dict(flat)
    for name, width in bits.items():
        codes, scale, zero = (tensors.pop(f"{name}.{part}") for part in _PARTS)
        if isinstance(codes, GroupQuantized) or isinstance(scale, GroupQuantized) or isinstance(zero, GroupQuantized):
            raise ValueError(f"{name} is stored twice")
        if width not in ("4", "8") or codes.ndim != 2 or scale.ndim != 2 or scale.shape != zero.shape:
            raise ValueError(f"{name} has parts that do not fit")
        tensors[name] = GroupQuantized(codes, scale, zero, int(width))
    return tensors


def _folder_fingerprint(folder: Path) -> str:
    """See `Loaded.fingerprint`; every part is preceded by its length."""
    digest = hashlib.sha256(b"kvik transformers folder 1")
    parts = [(folder / "config.json").read_bytes()]
    for name in safetensors_files(folder):
        status = (folder / name).stat()
        with (folder / name).open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        parts += [name.encode(), header, f"{status.st_size} {status.st_mtime_ns}".encode()]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
