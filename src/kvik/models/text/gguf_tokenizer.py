"""A GGUF file's tokenizer as tokenizer.json, once, when the model is prepared.

transformers does the conversion. Three things that it leaves out are added here from the file's `tokenizer.ggml.pre`,
as llama.cpp has them: how digits are split before byte-level BPE, Llama 3's whole-word look-up, and its first token.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvik.errors import TokenizerError
from kvik.models.fields import brief

_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_PLAIN = ("gpt-2", "gpt2", "default", "mpt", "olmo", "phi-2", "jais")  # GPT-2's own split, which byte-level BPE has
_CONVERTED = ("tekken", "qwen2", "deepseek-r1-qwen", "gpt-4o", "llama4")  # split by transformers itself
_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def write_tokenizer(gguf: Path, fields: Mapping[str, object], folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, where the file has one, chat_template.jinja into the folder.

    Args:
        gguf: the file.
        fields: what `read_gguf` returned for it.
        folder: where to.

    Raises:
        TokenizerError: the file has no tokenizer, one of an unknown kind, or its ids come out differently.
    """
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise TokenizerError(f"{gguf}: has no tokenizer, so text can't be turned into tokens; use another file")
    tokenizer = _adjusted(gguf, fields, _converted(gguf), tokens)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    _verify(gguf, folder / "tokenizer.json", tokens)
    settings = {}
    for name, key in _TOKENS.items():
        token = fields.get(f"tokenizer.ggml.{key}")
        if isinstance(token, int) and 0 <= token < len(tokens):
            settings[name] = tokens[token]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def _converted(gguf: Path) -> dict[str, Any]:
    """transformers' conversion of the file's tokenizer, as the content of tokenizer.json."""
    with _silence():
        from transformers import AutoTokenizer

        try:
            converted = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, local_files_only=True)
            content: dict[str, Any] = json.loads(converted.backend_tokenizer.to_str())
        except Exception as error:  # whatever a foreign file makes of it
            reason = " ".join(str(error).split())[:160]
            raise TokenizerError(f"{gguf}: its tokenizer can't be converted ({reason}); use another file") from None
    return content


def _adjusted(gguf: Path, fields: Mapping[str, object], content: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """The content with what `tokenizer.ggml.pre` asks for (only byte-level BPE, "gpt2", has kinds of splits)."""
    if fields.get("tokenizer.ggml.model") != "gpt2":
        return content
    kind = fields.get("tokenizer.ggml.pre", "default")
    if kind not in (*_LLAMA3, *_DIGITS, *_PLAIN, *_CONVERTED):
        raise TokenizerError(
            f"{gguf}: splits text in the way {brief(kind)}, which kvik does not know and would get wrong; "
            "use the model's transformers folder"
        )
    if kind in _DIGITS:
        digits = {"type": "Digits", "individual_digits": True}
        bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, bytes_]}
    first = fields.get("tokenizer.ggml.bos_token_id")
    if kind in _LLAMA3:
        content["model"]["ignore_merges"] = True
        if fields.get("tokenizer.ggml.add_bos_token", True) and isinstance(first, int) and first < len(tokens):
            content["post_processor"] = _begin_with(tokens[first], first)
    return content


def _begin_with(token: str, token_id: int) -> dict[str, Any]:
    """A post-processor that puts one token before the text, where special tokens are asked for."""
    begin, text, other = (
        {"SpecialToken": {"id": token, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    )
    named = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, begin, other],
        "special_tokens": named,
    }


def _verify(gguf: Path, path: Path, tokens: list[str]) -> None:
    """Every id must mean the same text as in the file; byte-level BPE may spell a text in its own alphabet."""
    from tokenizers import Tokenizer, pre_tokenizers

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())[:120]
        raise TokenizerError(f"{gguf}: its tokenizer can't be converted ({reason}); use another file") from None
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for token_id, token in enumerate(tokens):
        got = backend.id_to_token(token_id)
        if got != token and got != "".join(piece for piece, _ in spell.pre_tokenize_str(token)):
            raise TokenizerError(
                f"{gguf}: its tokenizer came out wrong (id {token_id} is {brief(got)} instead of {brief(token)}); "
                "use the model's transformers folder"
            )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps transformers' warnings, logs and progress bars off the screen, and its settings as they were."""
    logger = logging.getLogger("transformers")
    level, disabled = logger.level, logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
            logger.setLevel(level)
