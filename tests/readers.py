"""Tiny models that read a source, of transformers and of kvik, with the same random weights."""

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationMixin,
    MarianConfig,
    MarianMTModel,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from kvik.models import families
from kvik.models.files.weights import check
from kvik.models.hearing import HearingConfig
from kvik.models.model import Model

VOCAB, POSITIONS = 157, 300
T5_SIZES = dict(
    vocab_size=VOCAB, d_model=64, d_kv=24, d_ff=112, num_layers=2, num_decoder_layers=3, num_heads=4,
    decoder_start_token_id=0, relative_attention_max_distance=40,
)  # fmt: skip
BART_SIZES = dict(
    vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=96, decoder_ffn_dim=112,
    encoder_attention_heads=2, decoder_attention_heads=4, max_position_embeddings=POSITIONS, init_std=0.1,
)  # fmt: skip
MARIAN = dict(
    pad_token_id=156, decoder_start_token_id=156, eos_token_id=0, forced_eos_token_id=0, scale_embedding=True,
    activation_function="swish",
)  # fmt: skip
WHISPER_SIZES = dict(
    vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=96, decoder_ffn_dim=112,
    encoder_attention_heads=2, decoder_attention_heads=4, max_target_positions=POSITIONS, max_source_positions=40,
    num_mel_bins=24, init_std=0.1, decoder_start_token_id=2, bos_token_id=1, eos_token_id=1, pad_token_id=1,
    suppress_tokens=None, begin_suppress_tokens=None,
)  # fmt: skip


def t5(make=T5ForConditionalGeneration, config=T5Config, **changes):
    """Untied where the settings say so, as checkpoints of v1.1 are and a new model of transformers 5 is not."""
    model = make(config(**{**T5_SIZES, **changes}))
    if changes.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 64) * 0.1)
    return model


def bart(**changes):
    return BartForConditionalGeneration(BartConfig(**{**BART_SIZES, **changes}))


def marian(**changes):
    return MarianMTModel(MarianConfig(**{**BART_SIZES, **MARIAN, **changes}))


def whisper(**changes):
    return WhisperForConditionalGeneration(WhisperConfig(**{**WHISPER_SIZES, **changes}))


MAKERS = {"t5": t5, "bart": bart, "marian": marian, "whisper": whisper}
READERS = {
    "t5": t5,
    "t5 v1.1": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": lambda: t5(MT5ForConditionalGeneration, MT5Config, tie_word_embeddings=False),
    "bart": bart,
    "bart, scaled": lambda: bart(scale_embedding=True, activation_function="gelu_new"),
    "marian": marian,
    "marian, two vocabularies": lambda: marian(
        vocab_size=120, pad_token_id=100, share_encoder_decoder_embeddings=False, decoder_vocab_size=VOCAB,
    ),
    "whisper": whisper,
}  # fmt: skip


def drawn(name, **changes):
    """transformers' model; biases and norms are drawn too."""
    torch.manual_seed(0)
    theirs = (READERS[name] if not changes else MAKERS[name])(**changes).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        if name.startswith(("bart", "marian")):
            theirs.final_logits_bias.normal_()
    return theirs


def ours(theirs, weights="f32", **options):
    config = families.from_hf(theirs.config.to_dict(), None, "tiny")
    return Model(config, check(theirs.state_dict(), config), weights=weights, **options)


def tokens(count, seed=0, first=None, vocab=VOCAB):
    """Random ids, of a text where the one that it begins with is given, else of a source."""
    ids = torch.randint(3, min(vocab, 100), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids if first is None else [first, *ids[1:]]


def source(model, count, seed=0):
    """Random ids, or features: as many frames as there are then, of which the first `count` are not silent."""
    if not isinstance(model.config, HearingConfig):
        return tokens(count, seed)
    frames, generator = torch.zeros(model.config.frames, model.config.mels), torch.Generator().manual_seed(seed)
    frames[:count] = torch.randn(frames[:count].shape, generator=generator)
    return frames


def rows(model, count):
    """Of such a source, as the decoder reads it."""
    return model.config.frames // 2 if isinstance(model.config, HearingConfig) else count


def theirs_of(given):
    """A source as an argument of transformers' models."""
    features = isinstance(given, torch.Tensor)
    return {"input_features": given.t()[None]} if features else {"input_ids": torch.tensor([given])}


@torch.no_grad()
def generate(theirs, given, **options):
    """transformers' search in general, without what Whisper's own `generate` does around it."""
    return GenerationMixin.generate(theirs, **theirs_of(given), **options)


@torch.no_grad()
def their_logits(theirs, given, text):
    """f32 [tokens, vocabulary] of the whole text at once."""
    return theirs(**theirs_of(given), decoder_input_ids=torch.tensor([text])).logits[0]
