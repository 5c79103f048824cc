"""Where plans get their models: the table, configs and files; parameters are counted as transformers counts them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvik.cache.spec import LayerShape
from kvik.errors import ConfigError, StorageError
from kvik.models.shapes.wellknown import ALIASES, CONFIGS
from kvik.plan import from_config, lookup, make_plan, run_plan
from tiny_config import LLAMA

WHISPER = {"model_type": "whisper", "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 40}
MLA = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "first_k_dense_replace": 1}
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 2, "moe_intermediate_size": 10, "n_group": 1, "topk_group": 1}


# --- the table ---


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gpt2", 0.124), ("gpt2-medium", 0.355), ("gpt2-large", 0.774), ("gpt2-xl", 1.56), ("gpt3-175b", 175),
        ("opt-125m", 0.125), ("opt-6.7b", 6.7), ("opt-13b", 13), ("opt-30b", 30), ("opt-66b", 66), ("opt-175b", 175),
        ("llama-65b", 65.2), ("llama-2-7b", 6.74), ("llama-2-13b", 13), ("llama-2-70b", 69), ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.6), ("llama-3.1-405b", 406), ("llama-3.2-1b", 1.24), ("llama-3.2-3b", 3.21),
        ("mistral-7b-v0.1", 7.24), ("mistral-7b-v0.3", 7.25), ("mixtral-8x7b", 46.7), ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-7b", 7.62), ("qwen2.5-72b", 72.7), ("qwen3-0.6b", 0.596), ("qwen3-8b", 8.19), ("qwen3-32b", 32.8),
        ("gemma-2-2b", 2.61), ("gemma-2-9b", 9.24), ("gemma-3-1b", 1.0), ("gemma-3-4b", 3.88), ("gemma-3-27b", 27.0),
        ("phi-3-mini-4k", 3.82), ("deepseek-v2", 236), ("deepseek-v3", 671), ("t5-small", 0.0605), ("t5-base", 0.223),
        ("t5-large", 0.738), ("t5-11b", 11.3), ("whisper-tiny.en", 0.0378), ("whisper-base", 0.0726),
        ("whisper-large-v3", 1.54), ("bert-base", 0.11), ("smollm2-360m", 0.362), ("smollm2-1.7b", 1.71),
        ("minilm", 0.0227), ("vit-base", 0.0864),
    ],
)  # fmt: skip
def test_parameters_of_the_table_agree_with_the_published_rounded_sizes(name: str, billions: float) -> None:
    assert lookup(name).parameters == pytest.approx(billions * 1e9, rel=0.012)


def test_smollm2_is_in_the_table_as_it_is_in_its_file() -> None:
    shape = lookup("SmolLM2")
    assert (len(shape.layers), shape.d_model, shape.query_heads, shape.context) == (30, 576, 9, 8192)
    assert set(shape.layers) == {LayerShape(3, (("k", 64), ("v", 64)), frequencies=())}
    assert shape.parameters == 134_515_008


# --- parameters, against transformers ---

TINY: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", LLAMA),
    ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("MistralForCausalLM", {**LLAMA, "model_type": "mistral", "head_dim": 10}),
    ("MixtralForCausalLM", {**LLAMA, "model_type": "mixtral", "num_local_experts": 3}),
    ("Qwen2ForCausalLM", {**LLAMA, "model_type": "qwen2"}),
    ("Qwen3ForCausalLM", {**LLAMA, "model_type": "qwen3", "head_dim": 10}),
    ("GemmaForCausalLM", {**LLAMA, "model_type": "gemma", "head_dim": 10}),
    ("Gemma2ForCausalLM", {**LLAMA, "model_type": "gemma2", "head_dim": 10, "sliding_window": 8}),
    ("Gemma3ForCausalLM", {**LLAMA, "model_type": "gemma3_text", "head_dim": 10, "sliding_window": 8}),
    ("Phi3ForCausalLM", {**LLAMA, "model_type": "phi3", "pad_token_id": 0}),
    ("GPT2LMHeadModel", {"model_type": "gpt2", "n_layer": 2, "n_embd": 24, "n_head": 3, "n_positions": 16,
                         "vocab_size": 55}),
    ("OPTForCausalLM", {**LLAMA, "model_type": "opt", "ffn_dim": 30, "word_embed_proj_dim": 48}),
    ("OPTForCausalLM", {**LLAMA, "model_type": "opt", "ffn_dim": 30, "word_embed_proj_dim": 20,
                        "do_layer_norm_before": False}),
    ("FalconForCausalLM", {**LLAMA, "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("FalconForCausalLM", {**LLAMA, "model_type": "falcon", "bias": True, "parallel_attn": False}),
    ("DeepseekV2ForCausalLM", {**LLAMA, "model_type": "deepseek_v2", "q_lora_rank": 12, **MLA, **EXPERTS}),
    ("DeepseekV3ForCausalLM", {**LLAMA, "model_type": "deepseek_v3", "q_lora_rank": 12, **MLA, **EXPERTS}),
    ("T5ForConditionalGeneration", {"model_type": "t5", "num_layers": 2, "num_decoder_layers": 3, "d_model": 24,
                                    "d_kv": 5, "num_heads": 4, "d_ff": 33, "vocab_size": 70}),
    ("T5ForConditionalGeneration", {"model_type": "t5", "num_layers": 2, "d_model": 24, "d_kv": 5, "num_heads": 4,
                                    "d_ff": 33, "vocab_size": 70, "feed_forward_proj": "gated-gelu"}),
    ("WhisperForConditionalGeneration", {**WHISPER, "decoder_ffn_dim": 44, "encoder_attention_heads": 3,
                                         "vocab_size": 90, "decoder_attention_heads": 3, "pad_token_id": 0,
                                         "num_mel_bins": 7}),
    ("BertModel", {**LLAMA, "model_type": "bert"}),
    ("ViTModel", {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
                  "intermediate_size": 40, "image_size": 20, "patch_size": 5, "num_channels": 2}),
    ("ViTModel", {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
                  "intermediate_size": 40, "image_size": 20, "patch_size": 4, "qkv_bias": False}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "config"), TINY, ids=lambda value: value if isinstance(value, str) else "")
def test_parameters_are_counted_exactly_as_transformers_counts_them(model: str, config: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    built = getattr(pytest.importorskip("transformers"), model)
    with torch.device("meta"):
        reference = built(built.config_class(**{k: v for k, v in config.items() if k != "model_type"}))
    reference.tie_weights()
    shape = from_config(config)
    assert shape.parameters == sum(p.numel() for p in reference.parameters())
    assert shape == from_config(reference.config.to_dict(), shape.name)


# --- shapes ---


def test_gemma3_has_five_window_layers_for_each_global_one_by_pattern_and_by_layer_types() -> None:
    shape = lookup("gemma-3-1b")
    assert [layer.window for layer in shape.layers[:7]] == [512] * 5 + [None, 512]
    assert sum(layer.window is None for layer in shape.layers) == 4
    types = ["full_attention" if i == 2 else "sliding_attention" for i in range(3)]
    listed = from_config({**LLAMA, "model_type": "gemma3_text", "sliding_window": 8, "layer_types": types})
    assert [layer.window for layer in listed.layers] == [8, 8, None]


def test_a_gemma3_file_without_heads_takes_the_formats_defaults_and_says_pictures_are_left_out() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    shape = from_config({"model_type": "gemma3", "text_config": {**text, "model_type": "gemma3_text"}})
    assert shape.parameters == lookup("gemma-3-4b").parameters
    assert shape.layers == lookup("gemma-3-4b").layers
    assert "not counted" in shape.notes[0]


def test_qwen2_uses_its_window_only_where_the_config_says_so() -> None:
    config = {**LLAMA, "model_type": "qwen2", "sliding_window": 8, "max_window_layers": 2}
    assert {layer.window for layer in from_config(config).layers} == {None}
    used = from_config({**config, "use_sliding_window": True})
    assert [layer.window for layer in used.layers] == [None, None, 8]


def test_an_unknown_family_is_assumed_plain_and_the_note_says_so() -> None:
    shape = from_config({**LLAMA, "model_type": "novel"})
    assert shape.layers == from_config(LLAMA).layers
    assert shape.parameters is None
    assert shape.notes == ("family novel is not known to kvik; assumed plain attention; parameters unknown",)
    plan = make_plan(shape, memory=2**30)
    assert (plan.weight_bytes, plan.outweighs, plan.fit) == (None, None, None)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_attention_heads": "six"}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_key_value_heads": 4}, "share 4 KV heads"),
        ({"model_type": "novel", "layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ({"model_type": "novel", "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "novel", "is_encoder_decoder": True}, "novel"),
        ({"model_type": "gemma2", "sliding_window": -1}, "sliding_window"),
        ({"num_hidden_layers": 9999, "num_attention_heads": 9999, "num_key_value_heads": 9999,
          "hidden_size": 9999}, "9999 layers"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_sized_is_one_line_naming_the_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        from_config({**LLAMA, **change})
    assert "\n" not in str(caught.value)


# --- where models come from ---


def test_names_are_found_in_any_case_and_every_alias_leads_to_an_entry() -> None:
    assert lookup("GPT2-XL") == lookup("gpt2-xl")
    assert set(ALIASES.values()) <= set(CONFIGS)
    assert not set(ALIASES) & set(CONFIGS)


def test_a_miss_offers_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*llama-3\.1-8b"):
        lookup("llama3.1-8b")
    with pytest.raises(ConfigError, match="--list"):
        lookup("qqqqqqqq")


def test_a_config_is_read_from_its_file_or_folder(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    folder, file = lookup(str(tmp_path)), lookup(str(tmp_path / "config.json"))
    assert folder == file
    assert folder.name == tmp_path.name
    assert folder.parameters == from_config(LLAMA).parameters


@pytest.mark.parametrize("content", ["{", "{}", "[1]", "[" * 100_000, "\ufeff{}"])
def test_a_damaged_config_is_a_config_error(tmp_path: Any, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"/config\.json"):
        lookup(str(tmp_path))


@pytest.mark.parametrize("path", ["/nowhere/config.json", "./nowhere", "~nobody-of-this-name/x", "absent.json"])
def test_a_path_that_is_not_there_is_a_storage_error(path: str) -> None:
    with pytest.raises(StorageError):
        lookup(path)


@pytest.mark.parametrize("name", ["", "   ", "a\0b", "x" * 5000])
def test_names_that_no_path_can_have_are_config_errors(name: str) -> None:
    with pytest.raises(ConfigError):
        lookup(name)


def test_a_gguf_header_gives_exact_parameters_and_the_files_own_bytes(tmp_path: Any) -> None:
    numpy, gguf = pytest.importorskip("numpy"), pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(128)
    writer.add_tensor("token_embd.weight", numpy.zeros((10, 32), dtype=numpy.float16))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    plan = run_plan(str(path))
    assert (plan.shape.parameters, plan.weight_bytes, plan.per_token.payload) == (320, 640, 2 * 2 * 2 * 2 * 8)
    assert run_plan(str(path), weights="f32").weight_bytes == 1280
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="no whole GGUF"):
        lookup(str(path))


def test_a_hub_that_cannot_be_reached_is_one_storage_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_: object) -> str:
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    with pytest.raises(StorageError, match=r"some/model .*no route") as caught:
        lookup("some/model")
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_: str(tmp_path / "config.json"))
    assert lookup("some/model").name == "some/model"


def test_mistrals_window_is_the_formats_own_where_absent_and_none_where_null() -> None:
    config = {**LLAMA, "model_type": "mistral"}
    assert {layer.window for layer in from_config(config).layers} == {4096}
    assert {layer.window for layer in from_config({**config, "sliding_window": None}).layers} == {None}
