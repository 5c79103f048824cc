"""Text to token ids and back, and conversations to text, from a model's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.errors import TokenizerError
from kvik.models.text import sentencepieces
from kvik.models.text.spelling import Spelling
from kvik.models.text.template import ChatTemplate

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class Tokenizer:
    """A model's tokenizer and chat template.

    Attributes:
        vocab_size: how many ids it knows, added tokens included.
        bos_token, eos_token: as texts, or None; the chat template may print them.

    Raises:
        TokenizerError: tokenizer.json (or what stands for it, see `sentencepieces.py`) or tokenizer_config.json is
            missing or damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        mixed = not (self.folder / "tokenizer.json").is_file() and sentencepieces.serves(self.folder)
        self._pieces = sentencepieces.TwoLanguages(self.folder) if mixed else None
        self._backend = self._pieces.backend if self._pieces is not None else _backend(self.folder)
        settings = _settings(self.folder)
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.bos_token = _token_text(self.folder, settings, "bos_token")
        self.eos_token = _token_text(self.folder, settings, "eos_token")
        self._template_source = _template_source(self.folder, settings)
        self._template: ChatTemplate | None = None
        self._spelling: Spelling | None = None

    @property
    def chat_template(self) -> str | None:
        """The source of the chat template; None where the model has none."""
        return self._template_source

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids. Special tokens written out in the text become their ids, as in transformers.

        Args:
            text: what to encode; text that a chat template made already holds its special tokens.
            add_special_tokens: also add those that the tokenizer's own post-processor adds (often one at the start).

        Raises:
            TokenizerError: the text is no valid Unicode (it has half of a surrogate pair).
        """
        try:
            if self._pieces is not None:
                return self._pieces.encode(text, add_special_tokens)
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError):
            raise TokenizerError(
                "the text is no valid Unicode (another encoding, or no text at all), so it has no tokens; give UTF-8"
            ) from None
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of token ids; bytes that make no character become U+FFFD. Ids beyond the vocabulary are dropped."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_id(self, token: str) -> int | None:
        """The id of one token by its exact spelling, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def spelled(self, token: int) -> bytes:
        """The bytes that one id stands for, a space before it included; b"" for an id beyond the vocabulary."""
        if self._spelling is None:
            self._spelling = Spelling(self._backend)
        return self._spelling.of(token)

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """Text from token ids that come one by one."""
        return TextStream(self._backend, skip_special)

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> str:
        """A conversation as the text that the model was trained on.

        Args:
            messages: each with "role" and "content", and whatever else the template reads; JSON values only.
            add_generation_prompt: end with the start of the assistant's answer.
            tools: functions that the model may call, each as the template reads it; JSON values only.
            options: other variables that the template reads; JSON values only. They replace none of the above.

        Raises:
            TokenizerError: there is no template, it refuses the messages, or it is broken or hostile.
        """
        if self._template_source is None:
            raise TokenizerError(f"{self.folder}: the model has no chat template; use --raw to send text as it is")
        if self._template is None:
            self._template = ChatTemplate(self._template_source)
        variables: dict[str, object] = {"documents": None, **(options or {})}
        variables |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        variables["tools"] = None if tools is None else list(tools)
        for name, token in (("bos_token", self.bos_token), ("eos_token", self.eos_token)):
            if token is not None:
                variables[name] = token
        return self._template.render(variables)


class TextStream:
    """Token ids in, text out as soon as it is certain. The pieces and `finish` make what `decode` gives.

    Only where bytes make no UTF-8 may a tokenizer with byte fallback differ: there `decode` turns a whole run of bytes
    into U+FFFD, of which this stream has given the first letters already.
    """

    def __init__(self, backend: Backend, skip_special: bool) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._skip_special = skip_special
        self._decoder = DecodeStream(skip_special_tokens=skip_special)
        self._pending: list[int] = []  # ids since the last piece

    def step(self, token: int) -> str:
        """The text that this id completes; "" while a character is still in pieces."""
        from tokenizers.decoders import DecodeStream

        self._pending.append(token)
        try:
            piece = self._decoder.step(self._backend, token) or ""
        except Exception:  # it gives up on runs of bytes that are no UTF-8; go on behind them
            piece = self._rest()
            self._decoder = DecodeStream(ids=[token], skip_special_tokens=self._skip_special)
        if piece:
            self._pending = []
        return piece

    def finish(self) -> str:
        """What is left when no more ids come: usually "", or U+FFFD for a character that was never completed."""
        rest = self._rest()
        self._pending = []
        return rest

    def _rest(self) -> str:
        """The text of the pending ids."""
        text: str = self._backend.decode(self._pending, skip_special_tokens=self._skip_special)
        return text


def _backend(folder: Path) -> Backend:
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{path}: is missing, so text can't be turned into tokens; save it with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        backend: Backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())[:120]
        raise TokenizerError(f"{path}: is damaged or no tokenizer ({reason}); get it again from its source") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _settings(folder: Path) -> dict[str, object]:
    """tokenizer_config.json, or nothing where there is none."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise TokenizerError(f"{path}: is damaged (no JSON object); get it again from its source")
    return settings


def _token_text(folder: Path, settings: Mapping[str, object], key: str) -> str | None:
    """A special token's text; files have it as a text or as an object with "content"."""
    value = settings.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{folder / 'tokenizer_config.json'}: {key} is no text; get it again from its source")
    return value


def _template_source(folder: Path, settings: Mapping[str, object]) -> str | None:
    """The chat template: chat_template.jinja, else tokenizer_config.json's, the one named "default" of several."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeError):
            raise TokenizerError(f"{path}: can't be read as text; get it again, or use --raw") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template is no text; get it again, or use --raw"
        )
    return template
