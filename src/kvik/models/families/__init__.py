"""The families that kvik runs: which file reads a model's metadata, and which network it describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvik.errors import ConfigError
from kvik.models.config import Config
from kvik.models.decoder import Decoder, Encoder
from kvik.models.families import bart, bert, deepseek, gemma, gpt, gpt2, llama, masked, opt, qwen, t5, vit, whisper
from kvik.models.fields import Fields, brief
from kvik.models.parts import Source


@dataclass(frozen=True)
class Family:
    """What one family's file provides.

    Attributes:
        config: its sizes.
        read: them from config.json and generation_config.json, and a name for people.
        build: the network from its sizes and weights.
        kinds: the values of config.json's `model_type` that it serves.
        read_gguf: its sizes from a GGUF file's fields; None = it has no such files.
        archs: the values of GGUF's `general.architecture` that it serves.
    """

    config: type[Config]
    read: Callable[[Fields, Fields, str], Config]
    build: Callable[[Any, Source], Decoder | Encoder]
    kinds: tuple[str, ...]
    read_gguf: Callable[[Fields], Config] | None = None
    archs: tuple[str, ...] = ()


FAMILIES = (
    Family(llama.LlamaConfig, llama.read, llama.Llama, ("llama", "mistral"), llama.read_gguf, ("llama",)),
    Family(gpt2.GPT2Config, gpt2.read, gpt2.GPT2, ("gpt2",), gpt2.read_gguf, ("gpt2",)),
    Family(gpt.GPTConfig, gpt.read, gpt.GPT, ("kvik_gpt",)),
    Family(opt.OPTConfig, opt.read, opt.OPT, ("opt",)),
    Family(qwen.QwenConfig, qwen.read, qwen.Qwen, ("qwen2", "qwen3"), qwen.read_gguf, ("qwen2", "qwen3")),
    Family(deepseek.DeepseekConfig, deepseek.read, deepseek.Deepseek, ("deepseek_v2", "deepseek_v3")),
    Family(gemma.GemmaConfig, gemma.read, gemma.Gemma, ("gemma2", "gemma3_text")),
    Family(bart.BartConfig, bart.read, bart.Bart, ("bart", "marian")),
    Family(t5.T5Config, t5.read, t5.T5, ("mt5", "t5")),
    Family(whisper.WhisperConfig, whisper.read, whisper.Whisper, ("whisper",)),
    Family(bert.BertConfig, bert.read, bert.Bert, ("bert",)),
    Family(masked.MaskedConfig, masked.read, masked.Masked, ("kvik_encoder",)),
    Family(vit.ViTConfig, vit.read, vit.ViT, ("vit",)),
)
_BY_NAME = {family.config.family: family for family in FAMILIES}
_BY_KIND = {kind: family for family in FAMILIES for kind in family.kinds}
_GGUF = {arch: family for family in FAMILIES for arch in family.archs}

_GGUF_KEYS = [  # what kvik reads, or knows to be without effect on the numbers; each under "<arch>."
    *("vocab_size", "context_length", "embedding_length", "feed_forward_length", "block_count", "tensor_data_layout"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.sliding_window"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.attn_factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "expert_count", "expert_used_count"),
]


def from_hf(values: Mapping[str, object], generation: Mapping[str, object] | None, name: str) -> Config:
    """From config.json, and generation_config.json where there is one.

    Raises:
        ConfigError: no family serves its model_type; a key is missing or its value can't be used.
    """
    fields = Fields(values, f"{name}: config.json")
    kind = fields.text("model_type")
    if kind not in _BY_KIND:
        raise ConfigError(
            f"{fields.where}: model_type is {brief(kind)}, and kvik has code of {', '.join(sorted(_BY_KIND))}; use one "
            "of these, or --backend transformers"
        )
    fields.refuse_unless("quantization_config", ())
    return _BY_KIND[kind].read(fields, Fields(generation or {}, f"{name}: generation_config.json"), name)


def from_gguf(values: Mapping[str, object]) -> Config:
    """From the fields that `read_gguf` returns: the file's own, "GGUF.tensors" (the tensors' names, which say
    whether embeddings are tied and projections have biases) and "GGUF.rope_freqs" (that tensor, if there).

    Raises:
        ConfigError: no family serves the architecture; a key is missing, unknown, or can't be used.
    """
    name = values.get("general.name")
    fields = Fields(values, name if isinstance(name, str) and name else "GGUF model")
    arch = fields.text("general.architecture", among=_GGUF)
    fields.refuse_unknown([f"{arch}.{key}" for key in _GGUF_KEYS], prefix=f"{arch}.")
    fields.refuse_unless(f"{arch}.expert_count", (0,))
    read = _GGUF[arch].read_gguf
    assert read is not None, "only those that read such files are asked"
    return read(fields)


def from_json(values: Mapping[str, object]) -> Config:
    """What `Config.to_json` gave, checked again. Raises ConfigError."""
    family = Fields(values, "prepared config.json").text("family", among=_BY_NAME)
    return _BY_NAME[family].config.from_json(values)


def build(config: Config, source: Source) -> Decoder | Encoder:
    """The network that a configuration describes."""
    return _BY_NAME[config.family].build(config, source)
