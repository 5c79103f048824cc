"""Models that read a source beside their text: what they keep of both, and their parameters. See `families.py`."""

from __future__ import annotations

from dataclasses import replace

from kvik.models.shapes.shape import Config, ModelShape, kv


def t5(c: Config) -> ModelShape:
    """T5 and mT5."""
    c = Config(c.raw, tie_word_embeddings=True, relative_attention_num_buckets=32, feed_forward_proj="relu")
    d, inner, ff, heads = c("d_model"), c("num_heads") * c("d_kv"), c("d_ff"), c("num_heads")
    encoder = c("num_layers")
    decoder = c.maybe("num_decoder_layers") or encoder
    attention = 4 * d * inner + d  # and its norm
    ffn = (3 if str(c.raw["feed_forward_proj"]).startswith("gated") else 2) * d * ff + d
    bias = 2 * c("relative_attention_num_buckets") * heads
    tied = 1 if c.flag("tie_word_embeddings") else 2
    blocks = encoder * (attention + ffn) + decoder * (2 * attention + ffn) + 2 * d
    source = c.maybe("n_positions") or 512
    return ModelShape(
        name=str(c.raw["model_type"]),
        family=str(c.raw["model_type"]),
        parameters=blocks + bias + tied * c("vocab_size") * d,
        layers=(replace(kv(heads, c("d_kv")), biased=True),) * decoder,
        d_model=d,
        query_heads=heads,
        head_dim=c("d_kv"),
        context=source,
        cross=(kv(heads, c("d_kv")),) * decoder,
        source=source,
        weights=c.weights,
        notes=(f"relative positions: trained on {source} tokens, more are possible",),
    )


def whisper(c: Config) -> ModelShape:
    """Whisper, whose source is sound."""
    c = Config(c.raw, max_source_positions=1500, max_target_positions=448, num_mel_bins=80)
    d, mels, source = c("d_model"), c("num_mel_bins"), c("max_source_positions")
    heads, target, vocab = c("decoder_attention_heads"), c("max_target_positions"), c("vocab_size")
    attention = 4 * d * d + 3 * d + 2 * d  # k has no bias; and its norm

    def ffn(ff: int) -> int:
        return 2 * d * ff + ff + d + 2 * d

    encoder = c("encoder_layers") * (attention + ffn(c("encoder_ffn_dim"))) + 2 * d
    encoder += 3 * mels * d + d + 3 * d * d + d + source * d  # two convolutions, positions
    decoder = c("decoder_layers") * (2 * attention + ffn(c("decoder_ffn_dim"))) + 2 * d + (vocab + target) * d
    layer = kv(heads, d // heads)
    return ModelShape(
        name="whisper",
        family="whisper",
        parameters=encoder + decoder,
        layers=(layer,) * c("decoder_layers"),
        d_model=d,
        query_heads=heads,
        head_dim=d // heads,
        context=target,
        cross=(layer,) * c("decoder_layers"),
        source=source,
        weights=c.weights,
        notes=(f"cross-attention keeps {source} frames (30 s of sound), whatever the length of the text",),
    )


def bart(c: Config) -> ModelShape:
    """BART and Marian."""
    marian = c.raw["model_type"] == "marian"
    c = Config(c.raw, tie_word_embeddings=True, share_encoder_decoder_embeddings=True)
    d, heads, vocab, positions = (
        c("d_model"),
        c("decoder_attention_heads"),
        c("vocab_size"),
        c("max_position_embeddings"),
    )
    shared = not marian or c.flag("share_encoder_decoder_embeddings")
    text = vocab if shared else (c.maybe("decoder_vocab_size") or vocab)
    attention = 4 * d * d + 4 * d + 2 * d  # and its norm

    def ffn(ff: int) -> int:
        return 2 * d * ff + ff + d + 2 * d

    blocks = c("encoder_layers") * (attention + ffn(c("encoder_ffn_dim")))
    blocks += c("decoder_layers") * (2 * attention + ffn(c("decoder_ffn_dim")))
    begin = positions * d if marian else (positions + 2) * d + 2 * d  # and a norm
    tables = (vocab if shared else vocab + text) * d + (not c.flag("tie_word_embeddings")) * text * d
    layer = kv(heads, d // heads)
    return ModelShape(
        name=str(c.raw["model_type"]),
        family=str(c.raw["model_type"]),
        parameters=blocks + 2 * begin + tables,
        layers=(layer,) * c("decoder_layers"),
        d_model=d,
        query_heads=heads,
        head_dim=d // heads,
        context=positions,
        cross=(layer,) * c("decoder_layers"),
        source=positions,
        weights=c.weights,
    )
