"""A tokenizer for the phrases: byte pairs' way of merging letters (arXiv:1508.07909), numerals one by one."""

from __future__ import annotations

import string
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kvik.train.phrases import LANGUAGES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1 and 2
_SINGLE = "[0-9零〇一二三四五六七八九十百千万亿两일이삼사오육칠팔구십백천만억]"
_SPACE = "\u2581"


def learn(texts: Iterable[str], size: int) -> Tokenizer:
    """A vocabulary of at most so many pieces. Sources begin with their language's token; every text ends with `END`.

    Numerals are pieces of their own, so that a number has one way to be cut.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace("\u2019", "'")  # as word processors write it
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Metaspace(_SPACE, "always"),
        pre_tokenizers.Split(Regex(_SINGLE), "isolated"),
        pre_tokenizers.Punctuation("isolated"),
    ])  # fmt: skip
    tokenizer.decoder = decoders.Metaspace(_SPACE, "always")
    special = [PAD, END, UNKNOWN, *LANGUAGES.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=20, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(string.ascii_letters + string.digits + string.punctuation),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, and the few settings that transformers wants beside it. Raises OSError."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN,
        additional_special_tokens=list(LANGUAGES.values()),
    )  # fmt: skip
    made.save_pretrained(folder)
