"""SmolLM2-135M-Instruct as a transformers model, made of the weights that kvik has prepared for itself.

You have a model of your own? `AutoModelForCausalLM.from_pretrained(…)`, and the rest of an example stays as it is.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvik.models import prepare
from kvik.models.tokenizer import Tokenizer
from kvik.ops.grouped import GroupQuantized


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, Tokenizer]:
    """The model, and kvik's tokenizer for it: `encode(text)` and `decode(ids)`."""
    loaded = prepare.load(prepare.resolve("smollm2", prepare.quiet))
    own = loaded.config
    config = LlamaConfig(
        vocab_size=own.vocab_size, hidden_size=own.hidden, intermediate_size=own.ffn, num_hidden_layers=own.layers,
        num_attention_heads=own.heads, num_key_value_heads=own.kv_heads, head_dim=own.head_dim,
        max_position_embeddings=own.max_positions, rms_norm_eps=own.norm_eps, tie_word_embeddings=own.tied_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": own.rope.theta}, bos_token_id=1, eos_token_id=2,
        pad_token_id=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors = {
        name: (x.dequantize() if isinstance(x, GroupQuantized) else x).to(dtype) for name, x in loaded.tensors.items()
    }
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its angles are no weights
    return model.eval(), Tokenizer(loaded.tokenizer_folder)
