"""transformers' models of every family, with small random weights, and kvik's of the same files."""

import tempfile

import torch
import transformers as hf

from kvik.models.files import folder
from kvik.models.model import Model

VOCAB = 157
SIZES = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=112, num_hidden_layers=3, max_position_embeddings=512)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0},
}  # fmt: skip


def tiny(name, **sizes):
    """transformers' model of this name, with small random weights."""
    config = hf.Gemma3TextConfig if name == "Gemma3" else getattr(hf, f"{name}Config")
    return getattr(hf, f"{name}ForCausalLM")(config(**{**SIZES, **HEADS, **sizes}))


def llama(**changes):
    return tiny("Llama", **changes)


def gpt2():
    sizes = dict(vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))


def opt(**changes):
    sizes = dict(vocab_size=VOCAB, hidden_size=64, ffn_dim=112, num_hidden_layers=3, num_attention_heads=4)
    return hf.OPTForCausalLM(hf.OPTConfig(**{**sizes, "max_position_embeddings": 512, "pad_token_id": 1, **changes}))


def gemma(generation, **changes):
    """Four query heads on one KV head, two layers of three with a window."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    sizes = dict(head_dim=32, num_key_value_heads=1, sliding_window=40, layer_types=kinds, query_pre_attn_scalar=24)
    return tiny("Gemma3" if generation == 3 else "Gemma2", **{**sizes, **changes})


def deepseek(version, **changes):
    """Eight experts, of which a token takes two; the first layer has none."""
    sizes = dict(
        num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12
    )
    sizes |= dict(n_routed_experts=8, n_shared_experts=2, moe_intermediate_size=24, num_experts_per_tok=2)
    sizes |= dict(n_group=4, topk_group=2, first_k_dense_replace=1)
    return tiny(f"DeepseekV{version}", **{**sizes, **changes})


DEEPSEEK_YARN = {**SCALINGS["yarn"], "mscale": 0.7, "mscale_all_dim": 1.2}
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}
FAMILIES = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama, wide heads": lambda: llama(head_dim=32, num_key_value_heads=1),
    **{f"llama, {kind}": (lambda kind=kind: llama(rope_parameters=SCALINGS[kind])) for kind in SCALINGS},
    "mistral, window": lambda: tiny("Mistral", sliding_window=40),
    "gpt2": gpt2,
    "opt": opt,
    "opt, no biases": lambda: opt(enable_bias=False, tie_word_embeddings=False),
    "qwen2": lambda: tiny("Qwen2"),
    "qwen2, windows": lambda: tiny("Qwen2", use_sliding_window=True, sliding_window=40, max_window_layers=1),
    "qwen3": lambda: tiny("Qwen3", head_dim=32, tie_word_embeddings=True),
    "qwen3, biases and windows": lambda: tiny(
        "Qwen3", head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gemma2": lambda: gemma(2, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": lambda: gemma(3),
    "gemma3, scaled ropes, capped logits": lambda: gemma(3, rope_parameters=ROPES, final_logit_softcapping=2.0),
    "deepseek2": lambda: deepseek(2, topk_method="group_limited_greedy", topk_group=1, routed_scaling_factor=1.5),
    "deepseek2, plain queries, any group, biases": lambda: deepseek(2, q_lora_rank=None, attention_bias=True),
    "deepseek3": lambda: deepseek(3),
    "deepseek3, yarn": lambda: deepseek(3, rope_parameters=DEEPSEEK_YARN, norm_topk_prob=False, q_lora_rank=None),
}  # fmt: skip


def drawn(make):
    """A model whose biases and norms are random too, and whose weights are large enough to make a difference."""
    torch.manual_seed(0)
    theirs = make().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(5)
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return theirs


def ours(theirs, weights="f32", share=None):
    """kvik's model of transformers' files."""
    with tempfile.TemporaryDirectory() as home:
        theirs.save_pretrained(home)
        loaded = folder.load(home)
    config = loaded.config if share is None else loaded.config.sharing(share)
    return Model(config, loaded.tensors, weights=weights)


def tokens(count, seed=0):
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def their_logits(theirs, ids):
    return theirs(torch.tensor([ids])).logits[0]
