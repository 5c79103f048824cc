"""Where a model's shape comes from: the table, a config.json, a GGUF file's header, or the hub."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path

from kvik.errors import ConfigError, StorageError
from kvik.models.shapes.families import from_config
from kvik.models.shapes.gguf import from_gguf
from kvik.models.shapes.shape import ModelShape
from kvik.models.shapes.wellknown import ALIASES, CONFIGS

MOST_CONFIG_BYTES = 16 * 2**20


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
        return from_gguf(path)
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
    try:
        return from_config(config, name)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; give a model's config.json, or its folder") from None


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
