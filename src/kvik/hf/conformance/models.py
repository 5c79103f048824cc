"""Tiny models of the kinds that ask different things of a cache, with random weights that make attention matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCAB = 61
WINDOW = 8
SEED = 8
SOURCE = 12  # tokens (or frames, halved) that an encoder reads
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    tie_word_embeddings=False,
)  # fmt: skip
_MIXED = ["sliding_attention", "full_attention"]


def plain() -> Any:
    """Llama: every layer sees everything, two query heads to a KV head."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES))


def equal_heads() -> Any:
    """Llama with as many KV heads as query heads: nothing is repeated before attention."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_SIZES, "num_key_value_heads": 4}))


def window() -> Any:
    """Mistral: every layer sees the last tokens only."""
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_SIZES, sliding_window=WINDOW))


def mixed() -> Any:
    """Gemma 3: a layer with a window, then one without."""
    sizes = dict(head_dim=16, sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=16)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_SIZES, **sizes))


def capped() -> Any:
    """Gemma 2: scores and logits go through tanh, and layers are mixed."""
    sizes = dict(head_dim=16, sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=16)
    config = transformers.Gemma2Config(**_SIZES, **sizes, attn_logit_softcapping=1.5, attn_implementation="eager")
    return transformers.Gemma2ForCausalLM(config)


def shared() -> Any:
    """Gemma 3n: the last two layers read the rows of the two before them."""
    sizes = dict(
        num_hidden_layers=4, layer_types=_MIXED * 2, head_dim=16, sliding_window=WINDOW, num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, altup_num_inputs=2, laurel_rank=4,
    )  # fmt: skip
    return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**{**_SIZES, **sizes}))


def sinks() -> Any:
    """GPT-OSS: each head has a logit that takes weight from all rows; layers are mixed."""
    sizes = dict(head_dim=16, sliding_window=WINDOW, layer_types=_MIXED, num_local_experts=2, num_experts_per_tok=2)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(**_SIZES, **sizes, rope_parameters=rope, attn_implementation="eager")
    return transformers.GptOssForCausalLM(config)


def alibi() -> Any:
    """BLOOM: no positions but a bias by distance, made of the attention mask."""
    sizes = dict(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, eos_token_id=None, pad_token_id=0)
    return transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))


def alibi_by_length() -> Any:
    """MPT: a bias by distance, made of lengths."""
    sizes = dict(vocab_size=VOCAB, d_model=64, n_layers=2, n_heads=4, max_seq_len=1024, use_cache=True)
    return transformers.MptForCausalLM(transformers.MptConfig(**sizes, eos_token_id=None, pad_token_id=0))


def learned() -> Any:
    """GPT-2: learned positions."""
    sizes = dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=1024, bos_token_id=1, pad_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=None))


def latent() -> Any:
    """DeepSeek-V3: keys are wider than values. Nothing is routed, so that a small loss stays small."""
    sizes = dict(
        num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=16, n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=24, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=2,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**{**_SIZES, **sizes}))


def recurrent() -> Any:
    """LFM2: a short convolution, which keeps a state and no rows, then a layer of attention."""
    config = transformers.Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"], block_multiple_of=32)
    return transformers.Lfm2ForCausalLM(config)


def relative() -> Any:
    """T5: encoder and decoder, a bias by distance."""
    sizes = dict(vocab_size=VOCAB, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0)
    ends = dict(eos_token_id=None, pad_token_id=0, decoder_start_token_id=0, tie_word_embeddings=False)
    config = transformers.T5Config(**sizes, **ends)
    return transformers.T5ForConditionalGeneration(config)


def translator() -> Any:
    """BART: encoder and decoder, learned positions."""
    sizes = dict(
        vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=None, forced_eos_token_id=None, decoder_start_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes))


def listener() -> Any:
    """Whisper: its encoder hears a spectrogram."""
    sizes = dict(
        vocab_size=VOCAB, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=8, max_source_positions=SOURCE,
        max_target_positions=64, bos_token_id=1, eos_token_id=None, decoder_start_token_id=2, pad_token_id=0,
        begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes))


MODELS: dict[str, Callable[[], Any]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        plain, equal_heads, window, mixed, capped, shared, sinks, alibi, alibi_by_length, learned, latent, recurrent,
        relative, translator, listener,
    )
}  # fmt: skip


def build(name: str, seed: int = SEED) -> Any:
    """A tiny model of MODELS with weights drawn for a seed, in f32 and evaluation mode. Never ends a text by itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]()
        with torch.no_grad():
            for key, weight in model.named_parameters():
                _draw(key, weight)
        model.tie_weights()
    model.generation_config.eos_token_id = None
    return model.eval()


def _draw(key: str, weight: torch.Tensor) -> None:
    """Scores, states and logits of spread about 1. Norms stay as they are."""
    if weight.dim() > 1:
        weight.normal_(0.0, 1.0 if "bias" in key else 1.5 / weight.shape[-1] ** 0.5)
    elif "bias" in key:
        weight.normal_(0.0, 0.1)
    elif "sinks" in key:
        weight.normal_(0.0, 1.0)


def perturbed(name: str, amount: float = 0.05) -> Any:
    """The same model with slightly other weights: a draft whose guesses are right now and then."""
    model = build(name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED + 1)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * weight.std(correction=0) * amount)
    return model


def text(length: int, seed: int = 0) -> list[int]:
    """Random tokens, none of them special."""
    drawn = torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(100 + seed))
    return [int(token) for token in drawn]
