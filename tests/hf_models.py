"""Tiny models of many architectures, with random weights, for what `kvik.hf` must do for all of them."""

import torch
import transformers as hf

VOCAB = 151
SIZES = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, max_position_embeddings=256)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]


def config(name, **changes):
    """transformers' configuration of this name in a small size; what it doesn't know of is left out."""
    kind = getattr(hf, f"{name}Config")
    return kind(**{**SIZES, **HEADS, **IDS, **changes})


def causal(name, **changes):
    """A decoder of this name."""
    model = f"{name.removesuffix('Text')}ForCausalLM"
    return lambda: getattr(hf, model)(config(name, **changes))


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=256, **IDS))


def gptj(name="GPTJ"):
    sizes = dict(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=256, rotary_dim=4)
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**sizes, **IDS))


def gpt_neo():
    types = [[["global", "local"], 2]]
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_layers=4, num_heads=4, attention_types=types, window_size=6)
    return hf.GPTNeoForCausalLM(hf.GPTNeoConfig(**sizes, max_position_embeddings=256, **IDS))


def big_code():
    sizes = dict(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=256, multi_query=True)
    return hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**sizes, **IDS))


def bloom():
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, **IDS))


def mpt():
    sizes = dict(vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, max_seq_len=256)
    return hf.MptForCausalLM(hf.MptConfig(**sizes, **IDS))


def xglm():
    sizes = dict(vocab_size=VOCAB, d_model=32, ffn_dim=48, num_layers=3, attention_heads=4)
    return hf.XGLMForCausalLM(hf.XGLMConfig(**sizes, max_position_embeddings=256, **IDS))


def opt():
    sizes = dict(vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4)
    return hf.OPTForCausalLM(hf.OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=256, **IDS))


def deepseek(version):
    sizes = dict(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=8)
    sizes |= dict(v_head_dim=12, n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=16)
    sizes |= dict(num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1)
    return causal(f"DeepseekV{version}", **sizes)


def gemma3n():
    sizes = dict(num_hidden_layers=4, num_kv_shared_layers=2, head_dim=8, sliding_window=6, laurel_rank=4)
    sizes |= dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, altup_num_inputs=2)
    sizes |= dict(layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4)
    sizes |= dict(intermediate_size=[48] * 4)
    return hf.Gemma3nForCausalLM(config("Gemma3nText", **sizes))


def jamba():
    sizes = dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2)
    sizes |= dict(num_experts=2, num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False)
    return hf.JambaForCausalLM(config("Jamba", **sizes))


def t5(name="T5"):
    sizes = dict(vocab_size=VOCAB, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)
    kind = getattr(hf, f"{name}Config")(**sizes, decoder_start_token_id=0, eos_token_id=2, pad_token_id=0)
    return getattr(hf, f"{name}ForConditionalGeneration")(kind)


def bart(name="Bart"):
    sizes = dict(vocab_size=VOCAB, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2)
    sizes |= dict(decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=128)
    kind = getattr(hf, f"{name}Config")(**sizes, **IDS, decoder_start_token_id=3, forced_eos_token_id=None)
    model = "MarianMTModel" if name == "Marian" else f"{name}ForConditionalGeneration"
    return getattr(hf, model)(kind)


def whisper():
    sizes = dict(vocab_size=VOCAB, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=2)
    sizes |= dict(decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=8)
    sizes |= dict(max_source_positions=16, max_target_positions=64, decoder_start_token_id=3)
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **IDS, suppress_tokens=None))


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
DECODERS = {
    "llama": causal("Llama"),
    "qwen2": causal("Qwen2"),
    "qwen2_moe": causal("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3": causal("Qwen3", head_dim=8),
    "qwen3_moe": causal("Qwen3Moe", head_dim=8, **EXPERTS),
    "mistral": causal("Mistral", sliding_window=6),
    "mixtral": causal("Mixtral", num_local_experts=4, sliding_window=None),
    "gemma": causal("Gemma", head_dim=8),
    "gemma2": causal("Gemma2", head_dim=8, sliding_window=6, layer_types=SLIDING, query_pre_attn_scalar=8),
    "gemma3": causal("Gemma3Text", head_dim=8, sliding_window=6, layer_types=SLIDING, query_pre_attn_scalar=8),
    "gemma3n": gemma3n,
    "gpt2": gpt2,
    "gptj": gptj,
    "codegen": lambda: gptj("CodeGen"),
    "gpt_neo": gpt_neo,
    "gpt_neox": causal("GPTNeoX"),
    "gpt_bigcode": big_code,
    "gpt_oss": causal("GptOss", head_dim=8, sliding_window=6, layer_types=SLIDING, num_local_experts=4),
    "opt": opt,
    "phi": causal("Phi"),
    "phi3": causal("Phi3"),
    "falcon": causal("Falcon", new_decoder_architecture=True, num_kv_heads=2),
    "falcon_alibi": causal("Falcon", alibi=True, new_decoder_architecture=False, multi_query=False),
    "bloom": bloom,
    "mpt": mpt,
    "deepseek_v2": deepseek(2),
    "deepseek_v3": deepseek(3),
    "cohere": causal("Cohere"),
    "cohere2": causal("Cohere2", sliding_window=6, layer_types=SLIDING),
    "starcoder2": causal("Starcoder2", sliding_window=None),
    "stablelm": causal("StableLm"),
    "olmo2": causal("Olmo2"),
    "granite": causal("Granite"),
    "glm4": causal("Glm4", head_dim=8),
    "nemotron": causal("Nemotron"),
    "persimmon": causal("Persimmon"),
    "smollm3": causal("SmolLM3"),
    "exaone4": causal("Exaone4", sliding_window=6, layer_types=SLIDING),
    "xglm": xglm,
    "llama4": causal("Llama4Text", head_dim=8, attention_chunk_size=6, num_local_experts=2, moe_layers=[],
        layer_types=["chunked_attention", "full_attention", "chunked_attention"], intermediate_size_mlp=48),
    "jamba": jamba,
    "lfm2": causal("Lfm2", layer_types=["conv", "full_attention", "conv"], block_ff_dim=48),
}  # fmt: skip
READERS = {
    "t5": t5,
    "mt5": lambda: t5("MT5"),
    "bart": bart,
    "mbart": lambda: bart("MBart"),
    "pegasus": lambda: bart("Pegasus"),
    "marian": lambda: bart("Marian"),
    "whisper": whisper,
}


def made(name, seed=0):
    """A model of the tables above: weights large enough that tokens differ."""
    torch.manual_seed(seed)
    model = {**DECODERS, **READERS}[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.generation_config.eos_token_id = None
    return model
