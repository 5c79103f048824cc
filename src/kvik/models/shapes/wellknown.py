"""Well-known models as data: the sizes from their published `config.json`, or from the paper where there is none.

An entry is a config in the words of its family, so that one reader (`families.from_config`) serves the table and files
alike. Cache sizes and parameter counts are computed from it, never written down twice.
"""

from __future__ import annotations

from typing import Any

from kvik.models.shapes.families import ModelShape, from_config

Config = dict[str, Any]


def _gpt(layers: int, d: int, heads: int, context: int = 1024) -> Config:
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": d,
        "n_head": heads,
        "n_positions": context,
        "vocab_size": 50257,
    }


def _operator(operator: str, layers: int, d: int, heads: int, context: int) -> Config:
    return {
        "model_type": "kvik_gpt",
        "operator": operator,
        "num_hidden_layers": layers,
        "hidden_size": d,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "vocab_size": 50257,
        "torch_dtype": "float32",
    }


def _opt(layers: int, d: int, heads: int) -> Config:
    return {
        "model_type": "opt",
        "num_hidden_layers": layers,
        "hidden_size": d,
        "num_attention_heads": heads,
        "ffn_dim": 4 * d,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
    }


def _decoder(
    family: str, layers: int, d: int, ff: int, heads: int, kv_heads: int, vocab: int, context: int, **more: Any
) -> Config:
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": d,
        "intermediate_size": ff,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        **more,
    }


def _deepseek(layers: int, d: int, ff: int, vocab: int, routed: int, shared: int, expert: int, dense: int) -> Config:
    experts = {"n_routed_experts": routed, "n_shared_experts": shared, "moe_intermediate_size": expert}
    heads = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    more: Config = {**experts, **heads, "v_head_dim": 128, "first_k_dense_replace": dense}
    return _decoder("deepseek_v3" if dense > 1 else "deepseek_v2", layers, d, ff, 128, 128, vocab, 163840, **more)


def _t5(layers: int, d: int, ff: int, heads: int, width: int) -> Config:
    sizes = {"d_model": d, "d_ff": ff, "num_heads": heads, "d_kv": width, "vocab_size": 32128, "n_positions": 512}
    return {"model_type": "t5", "num_layers": layers, **sizes}


def _bart(kind: str, layers: int, d: int, ff: int, heads: int, vocab: int, positions: int) -> Config:
    sizes = {"layers": layers, "ffn_dim": ff, "attention_heads": heads}
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in sizes.items()}
    return {"model_type": kind, "d_model": d, "vocab_size": vocab, "max_position_embeddings": positions, **sides}


def _whisper(layers: int, d: int, heads: int, vocab: int, mels: int = 80) -> Config:
    sides = {
        f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", layers), ("ffn_dim", 4 * d))
    }
    heads_of = {"encoder_attention_heads": heads, "decoder_attention_heads": heads}
    return {"model_type": "whisper", "d_model": d, "vocab_size": vocab, "num_mel_bins": mels, **sides, **heads_of}


CONFIGS: dict[str, Config] = {
    # Radford et al. 2019; Brown et al. 2020 (arXiv:2005.14165), table 2.1
    "gpt2": _gpt(12, 768, 12),
    "gpt2-medium": _gpt(24, 1024, 16),
    "gpt2-large": _gpt(36, 1280, 20),
    "gpt2-xl": _gpt(48, 1600, 25),
    "gpt3-175b": _gpt(96, 12288, 96, 2048),
    # arXiv:2205.01068, table 1
    "opt-125m": _opt(12, 768, 12),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
    # arXiv:2302.13971, arXiv:2307.09288, arXiv:2407.21783 and the published configs
    "llama-65b": _decoder("llama", 80, 8192, 22016, 64, 64, 32000, 2048),
    "llama-2-7b": _decoder("llama", 32, 4096, 11008, 32, 32, 32000, 4096),
    "llama-2-13b": _decoder("llama", 40, 5120, 13824, 40, 40, 32000, 4096),
    "llama-2-70b": _decoder("llama", 80, 8192, 28672, 64, 8, 32000, 4096),
    "llama-3.1-8b": _decoder("llama", 32, 4096, 14336, 32, 8, 128256, 131072),
    "llama-3.1-70b": _decoder("llama", 80, 8192, 28672, 64, 8, 128256, 131072),
    "llama-3.1-405b": _decoder("llama", 126, 16384, 53248, 128, 8, 128256, 131072),
    "llama-3.2-1b": _decoder("llama", 16, 2048, 8192, 32, 8, 128256, 131072, tie_word_embeddings=True),
    "llama-3.2-3b": _decoder("llama", 28, 3072, 8192, 24, 8, 128256, 131072, tie_word_embeddings=True),
    "smollm2": _decoder("llama", 30, 576, 1536, 9, 3, 49152, 8192, tie_word_embeddings=True),
    "smollm2-360m": _decoder("llama", 32, 960, 2560, 15, 5, 49152, 8192, tie_word_embeddings=True),
    "smollm2-1.7b": _decoder("llama", 24, 2048, 8192, 32, 32, 49152, 8192, tie_word_embeddings=True),
    # arXiv:2310.06825 (v0.1 has the window, v0.3 has not), arXiv:2401.04088
    "mistral-7b-v0.1": _decoder("mistral", 32, 4096, 14336, 32, 8, 32000, 32768, sliding_window=4096),
    "mistral-7b-v0.3": _decoder("mistral", 32, 4096, 14336, 32, 8, 32768, 32768, sliding_window=None),
    "mixtral-8x7b": _decoder("mixtral", 32, 4096, 14336, 32, 8, 32000, 32768, num_local_experts=8),
    # arXiv:2412.15115, arXiv:2505.09388 and the published configs
    "qwen2.5-0.5b": _decoder("qwen2", 24, 896, 4864, 14, 2, 151936, 32768, tie_word_embeddings=True),
    "qwen2.5-7b": _decoder("qwen2", 28, 3584, 18944, 28, 4, 152064, 131072),
    "qwen2.5-72b": _decoder("qwen2", 80, 8192, 29568, 64, 8, 152064, 131072),
    "qwen3-0.6b": _decoder("qwen3", 28, 1024, 3072, 16, 8, 151936, 40960, head_dim=128, tie_word_embeddings=True),
    "qwen3-8b": _decoder("qwen3", 36, 4096, 12288, 32, 8, 151936, 40960, head_dim=128),
    "qwen3-32b": _decoder("qwen3", 64, 5120, 25600, 64, 8, 151936, 40960, head_dim=128),
    # arXiv:2408.00118 (every second layer has a window), arXiv:2503.19786 (five in six); text models alone
    "gemma-2-2b": _decoder("gemma2", 26, 2304, 9216, 8, 4, 256000, 8192),
    "gemma-2-9b": _decoder("gemma2", 42, 3584, 14336, 16, 8, 256000, 8192),
    "gemma-3-1b": _decoder("gemma3_text", 26, 1152, 6912, 4, 1, 262144, 32768, sliding_window=512),
    "gemma-3-4b": _decoder("gemma3_text", 34, 2560, 10240, 8, 4, 262208, 131072, sliding_window=1024),
    "gemma-3-27b": _decoder("gemma3_text", 62, 5376, 21504, 32, 16, 262208, 131072, sliding_window=1024, head_dim=128),
    # arXiv:2404.14219
    "phi-3-mini-4k": _decoder("phi3", 32, 3072, 8192, 32, 32, 32064, 4096, sliding_window=2047),
    "phi-3-mini-128k": _decoder("phi3", 32, 3072, 8192, 32, 32, 32064, 131072),
    # latent attention: arXiv:2405.04434, arXiv:2412.19437 (without its multi-token prediction module)
    "deepseek-v2": _deepseek(60, 5120, 12288, 102400, routed=160, shared=2, expert=1536, dense=1),
    "deepseek-v3": _deepseek(61, 7168, 18432, 129280, routed=256, shared=1, expert=2048, dense=3),
    # arXiv:2510.10060, the sizes of its public code: GPT base with attention, Translution, low rank and ranges
    "gpt-base": _operator("attention:learned", 12, 768, 12, 1024),
    "translution-base": _operator("translution:qkv", 12, 768, 12, 1024),
    "lor-base": _operator("lor:qkv,8", 12, 768, 12, 1024),
    "bucketed-base": _operator("bucketed:qkv,16", 12, 768, 12, 1024),
    "translution-tiny": _operator("translution:qkv", 6, 192, 3, 256),
    # arXiv:1910.10683
    "t5-small": _t5(6, 512, 2048, 8, 64),
    "t5-base": _t5(12, 768, 3072, 12, 64),
    "t5-large": _t5(24, 1024, 4096, 16, 64),
    "t5-11b": _t5(24, 1024, 65536, 128, 128),
    # arXiv:1910.13461; Marian's English to German of OPUS-MT
    "bart-base": _bart("bart", 6, 768, 3072, 12, 50265, 1024),
    "bart-large": _bart("bart", 12, 1024, 4096, 16, 50265, 1024),
    "opus-mt-en-de": _bart("marian", 6, 512, 2048, 8, 58101, 512),
    # arXiv:2212.04356
    "whisper-tiny.en": _whisper(4, 384, 6, 51864),
    "whisper-base": _whisper(6, 512, 8, 51865),
    "whisper-large-v3": _whisper(32, 1280, 20, 51866, mels=128),
    # arXiv:1810.04805
    "bert-base": _decoder("bert", 12, 768, 3072, 12, 12, 30522, 512),
    "minilm": _decoder("bert", 6, 384, 1536, 12, 12, 30522, 512, torch_dtype="float32"),
    # arXiv:2010.11929
    "vit-base": {
        "model_type": "vit",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": 16,
        "num_channels": 3,
    },
}

ALIASES = {
    "bert": "bert-base",
    "bert-base-uncased": "bert-base",
    "deepseek-r1": "deepseek-v3",
    "all-minilm-l6-v2": "minilm",
    "gpt-2": "gpt2",
    "gpt-3": "gpt3-175b",
    "gpt3": "gpt3-175b",
    "mistral-7b": "mistral-7b-v0.3",
    "phi-3-mini": "phi-3-mini-4k",
    "smollm2-135m": "smollm2",
    "vit-base-patch16-224": "vit-base",
}


def known_models() -> list[ModelShape]:
    """All well-known models, the one with the fewest parameters first."""
    return sorted(
        (from_config(config, name) for name, config in CONFIGS.items()), key=lambda m: (m.parameters or 0, m.name)
    )
