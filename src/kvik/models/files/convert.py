"""Files of several makers become kvik's prepared folder; see `models/files/folder.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kvik.models import embedding
from kvik.models.families import from_gguf, from_hf
from kvik.models.files import ctranslate2
from kvik.models.files.folder import load, read_json, write_prepared
from kvik.models.files.weights import check, read_gguf
from kvik.models.text.gguf_tokenizer import write_tokenizer
from kvik.models.text.tokenizer import Tokenizer

Tell = Callable[[str], None]  # what happens now

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def convert_gguf(gguf: Path, into: Path, source: dict[str, object], tell: Tell) -> None:
    """From a GGUF file, whose licence joins the source.

    Args:
        into: an empty folder.
        source: where the file is from.

    Raises:
        ModelError: it is damaged or describes a model that kvik can't run.
    """
    fields, tensors = read_gguf(gguf)
    config = from_gguf(fields)
    tensors = check(tensors, config)
    tell("convert the tokenizer")
    write_tokenizer(gguf, fields, into)
    tell("write the prepared model")
    write_prepared(into, config, tensors, {**source, "license": fields.get("general.license")})


def convert_folder(weights: Path, into: Path, source: dict[str, object], tell: Tell) -> None:
    """From a folder as transformers writes it, given by its safetensors file; the source's "name" becomes the model's.
    See `convert_gguf`."""
    folder = weights.parent
    loaded = load(folder)
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, into / name)
    embedding.keep(into, embedding.read(folder))
    tell("write the prepared model")
    write_prepared(into, replace(loaded.config, name=str(source["name"])), loaded.tensors, source)


def convert_ctranslate2(weights: Path, into: Path, source: dict[str, object], tell: Tell) -> None:
    """From CTranslate2's model.bin, beside which its config.json and tokenizer.json lie. See `convert_folder`."""
    folder = weights.parent
    described, tensors = ctranslate2.whisper(ctranslate2.read_model(weights), weights)
    tokenizer = Tokenizer(folder)
    settings = ctranslate2.whisper_settings(read_json(folder / "config.json"), tokenizer, int(described["vocab_size"]))
    config = from_hf(described, settings, str(source["name"]))
    shutil.copyfile(folder / "tokenizer.json", into / "tokenizer.json")
    tell("write the prepared model")
    write_prepared(into, config, check(tensors, config), source)
