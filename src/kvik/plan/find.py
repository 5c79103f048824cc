"""Where a model's shape comes from: the table, a config.json, a GGUF file's header, or the hub."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvik.errors import ConfigError, StorageError
from kvik.plan.shapes import ModelShape, from_config
from kvik.plan.wellknown import ALIASES, CONFIGS

MOST_CONFIG_BYTES = 16 * 2**20
# GGUF's architectures whose layers keep plain k and v, and whose header says all about their windows
_PLAIN_GGUF = ("gpt2", "llama", "qwen2", "qwen3")
_GGUF_KEYS = {
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_size": "embedding_length",
    "max_position_embeddings": "context_length",
}


def lookup(model: str) -> ModelShape:
    """A model by its well-known name (in any case), its config.json or folder, its .gguf file, or its hub id.

    Raises:
        ConfigError: no model of this name (the message offers the nearest), or a config that can't be sized.
        StorageError: the file, or the hub, can't be read.
    """
    plain = model.strip().lower()
    plain = ALIASES.get(plain, plain)
    if plain in CONFIGS:
        return from_config(CONFIGS[plain], plain)
    if _is_path(model):
        return _from_path(Path(model))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model, flags=re.ASCII):
        return _from_json(_download(model), model)
    near = " or ".join(difflib.get_close_matches(plain, [*CONFIGS, *ALIASES], n=3, cutoff=0.5))
    hint = f"did you mean {near}?" if near else "see `kvik plan --list`, or give a config.json or a hub id"
    raise ConfigError(f"{model!r} is no well-known model; {hint}")


def _is_path(model: str) -> bool:
    if model.endswith((".json", ".gguf")) or model.startswith((".", "/", "~")):
        return True
    try:
        return bool(model.strip()) and Path(model).exists()
    except (OSError, ValueError):  # too long, or characters that no path has
        return False


def _from_path(path: Path) -> ModelShape:
    try:
        path = path.expanduser()
    except RuntimeError:
        raise StorageError(f"{path} can't be read: there is no such user") from None
    if path.is_dir():
        return _from_json(path / "config.json", path.resolve().name)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    return _from_json(path, path.stem if path.stem != "config" else path.resolve().parent.name)


def _from_json(path: Path, name: str) -> ModelShape:
    try:
        if path.stat().st_size > MOST_CONFIG_BYTES:
            raise ConfigError(f"{path} has more than {MOST_CONFIG_BYTES:,} bytes: no config.json is so large")
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is no JSON, so no config.json of a model") from None
    return from_config(config, name)


def _download(model: str) -> Path:
    """The config.json of a hub id, from the local copy where there is one."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        held = try_to_load_from_cache(model, "config.json")
        return Path(held if isinstance(held, str) else hf_hub_download(model, "config.json"))
    except Exception as error:  # its errors come from several trees, its HTTP library's among them
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        hint = "give a config.json or a name of `kvik plan --list` instead"
        raise StorageError(f"config.json of {model} can't be had from the hub ({why}); {hint}") from None


def _from_gguf(path: Path) -> ModelShape:
    """From a GGUF file's header; its tensors give the exact parameters and bytes, and are not read."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields: dict[str, Any] = {
            key: field.contents() for key, field in reader.fields.items() if "tokenizer" not in key
        }
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
        stored = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged file makes the reader fail anywhere
        raise ConfigError(
            f"{path} is no whole GGUF file ({type(error).__name__}); get it again from its source"
        ) from None
    family = fields.get("general.architecture")
    if family not in _PLAIN_GGUF:
        raise ConfigError(f"{path}: GGUF of family {family!r} can't be sized; give the model's config.json instead")
    config = {ours: fields.get(f"{family}.{theirs}") for ours, theirs in _GGUF_KEYS.items()}
    shape = from_config({"model_type": "plain", **config}, path.stem)
    window = fields.get(f"{family}.attention.sliding_window") or None
    turned = None if family == "gpt2" else ()
    layers = tuple(replace(layer, window=window, frequencies=turned) for layer in shape.layers)
    return replace(shape, family=family, layers=layers, parameters=parameters, stored=stored, notes=())
