"""What a model keeps of every token, read from a GGUF file's header. See `families.py`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvik.errors import ConfigError, StorageError
from kvik.models.shapes.families import from_config
from kvik.models.shapes.shape import ModelShape

# GGUF's architectures whose layers keep plain k and v, and whose header says all about their windows
_PLAIN = ("gpt2", "llama", "qwen2", "qwen3")
_KEYS = {
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_size": "embedding_length",
    "max_position_embeddings": "context_length",
}


def from_gguf(path: Path) -> ModelShape:
    """From a GGUF file's header; its tensors give the exact parameters and bytes, and are not read.

    Raises:
        ConfigError: it is damaged, or its header does not say all that its layers keep.
        StorageError: it can't be read.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields: dict[str, Any] = {
            key: field.contents() for key, field in reader.fields.items() if "tokenizer" not in key
        }
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
        stored = sum(int(tensor.n_bytes) for tensor in reader.tensors)
        keys = [tensor for tensor in reader.tensors if re.match(r"blk\.0\.attn_(k|v|k_norm)\.", tensor.name)]
        kv_parameters = sum(int(tensor.n_elements) for tensor in keys) or None
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged file makes the reader fail anywhere
        raise ConfigError(
            f"{path} is no whole GGUF file ({type(error).__name__}); get it again from its source"
        ) from None
    family = fields.get("general.architecture")
    if family not in _PLAIN:
        raise ConfigError(f"{path}: GGUF of family {family!r} can't be sized; give the model's config.json instead")
    config = {ours: fields.get(f"{family}.{theirs}") for ours, theirs in _KEYS.items()}
    shape = from_config({"model_type": "plain", **config}, path.stem)
    window = fields.get(f"{family}.attention.sliding_window") or None
    turned = None if family == "gpt2" else ()
    layers = tuple(replace(layer, window=window, frequencies=turned) for layer in shape.layers)
    known = replace(shape, family=family, layers=layers, notes=())
    return replace(known, parameters=parameters, stored=stored, kv_parameters=kv_parameters)
