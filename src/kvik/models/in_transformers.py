"""A model that kvik has prepared, as transformers' own class: for comparisons, and for examples without a download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvik.errors import ModelError
from kvik.models.families.llama import LlamaConfig
from kvik.models.families.whisper import WhisperConfig
from kvik.models.files import prepare
from kvik.models.text.tokenizer import Tokenizer
from kvik.ops.grouped import GroupQuantized


def in_transformers(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tokenizer]:
    """transformers' model over the weights that kvik holds, dequantised, and kvik's tokenizer.

    Args:
        name: as `kvik.load` takes it: `smollm2`, `whisper-tiny.en`, a folder, a GGUF file.

    Raises:
        ModelError: its family isn't written out here; load it with transformers itself.
        ModelError, StorageError: see `kvik.load`.
    """
    import transformers

    loaded = prepare.load(prepare.resolve(name, prepare.quiet))
    own: Any = loaded.config
    shared = dict(vocab_size=own.vocab_size, tie_word_embeddings=own.tied_embeddings)
    made: Any
    if type(own) is LlamaConfig and own.rope.kind == "default":
        made = transformers.LlamaForCausalLM
        config = transformers.LlamaConfig(
            **shared, hidden_size=own.hidden, intermediate_size=own.ffn, num_hidden_layers=own.layers,
            num_attention_heads=own.heads, num_key_value_heads=own.kv_heads, head_dim=own.head_dim,
            max_position_embeddings=own.max_positions, rms_norm_eps=own.norm_eps, bos_token_id=own.bos_id,
            eos_token_id=list(own.eos_ids), pad_token_id=own.eos_ids[0], attention_bias=own.attention_bias,
            rope_parameters={"rope_type": "default", "rope_theta": own.rope.theta}, mlp_bias=own.mlp_bias,
        )  # fmt: skip
    elif isinstance(own, WhisperConfig):
        made = transformers.WhisperForConditionalGeneration
        config = transformers.WhisperConfig(
            **shared, d_model=own.hidden, encoder_layers=own.encoder_layers, decoder_layers=own.layers,
            encoder_ffn_dim=own.encoder_ffn, decoder_ffn_dim=own.ffn, encoder_attention_heads=own.encoder_heads,
            decoder_attention_heads=own.heads, num_mel_bins=own.mels, pad_token_id=own.eos_ids[0],
        )  # fmt: skip
    else:
        raise ModelError(
            f"{own.name}: kvik doesn't write this family out for transformers; load it with from_pretrained"
        )
    tensors = {name: _plain(x).to(dtype) for name, x in _named(loaded.tensors).items()}
    model = made.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    return model.eval(), Tokenizer(loaded.tokenizer_folder)


def _named(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without the biases of keys, which one family's files have as zeros and its class has not."""
    return {name: x for name, x in tensors.items() if not name.endswith("k_proj.bias")}


def _plain(x: Tensor | GroupQuantized) -> Tensor:
    return x.dequantize() if isinstance(x, GroupQuantized) else x
