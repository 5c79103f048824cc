"""Config and Rope: equal to transformers where it is defined, one line of ConfigError everywhere else."""

import contextlib
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvik.errors import ConfigError
from kvik.models import families
from kvik.models.rope import Rope

SMALL = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 64,
    "GGUF.tensors": ("token_embd.weight",),
}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "llama3-defaults": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1, "high_freq_factor": 4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn-attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn-mscale-alone": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707},
    "yarn-betas": {"rope_type": "yarn", "factor": 16.0, "beta_fast": 16, "beta_slow": 2},
    "yarn-untruncated": {"rope_type": "yarn", "factor": 16.0, "truncate": False},
    "yarn-shrinking": {"rope_type": "yarn", "factor": 0.5},
}


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_those_of_transformers(name, theta):
    settings = {**ROPES[name], "rope_theta": theta}
    reference = LlamaConfig(**{**SMALL, "head_dim": 64, "rope_parameters": dict(settings)})
    rope = families.from_hf({**SMALL, "head_dim": 64, "rope_parameters": settings}, None, "small").rope
    kind = settings["rope_type"]
    init = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, expected_attention = init(reference)
    got, attention = rope.frequencies()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected.double(), rtol=3e-6, atol=0)
    assert attention == pytest.approx(expected_attention, rel=1e-12)


def test_default_frequencies_are_float64_and_not_rounded_float32():
    frequencies, _ = Rope(10_000.0, 96).frequencies()
    assert frequencies.tolist() == pytest.approx([10_000.0 ** (-2 * i / 96) for i in range(48)], rel=1e-14)


def test_explicit_factors_divide_the_frequencies_and_give_llama3_again():
    llama3 = Rope(500_000.0, 16, "llama3", 8.0, 1024, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, expected = Rope(500_000.0, 16).frequencies()[0], llama3.frequencies()[0]
    factors = tuple((plain / expected).tolist())
    assert max(factors) > 7
    torch.testing.assert_close(Rope(500_000.0, 16, factors=factors).frequencies()[0], expected, rtol=1e-12, atol=0)
    fields = {**GGUF, "llama.rope.freq_base": 500_000.0, "GGUF.rope_freqs": factors}
    torch.testing.assert_close(families.from_gguf(fields).rope.frequencies()[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_old_and_new_forms_of_rope_settings_give_the_same_rope(key):
    old = {**SMALL, "rope_theta": 50_000.0, "rope_scaling": {key: "linear", "factor": 2.0}}
    new = {**SMALL, "rope_parameters": {"rope_theta": 50_000.0, "rope_type": "linear", "factor": 2.0}}
    assert families.from_hf(old, None, "x") == families.from_hf(new, None, "x")
    assert families.from_hf(old, None, "x").rope == Rope(50_000.0, 16, "linear", 2.0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "surprise": 1},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "default", "factor": 2.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"full_attention": {"rope_type": "default"}},
        {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        ["linear", 2.0],
    ],
    ids=str,
)
def test_rope_settings_that_kvik_does_not_know_are_refused_in_one_line(rope):
    with pytest.raises(ConfigError) as caught:
        families.from_hf({**SMALL, "rope_parameters": rope}, None, "small")
    assert "\n" not in str(caught.value)


def test_two_different_rope_settings_are_refused():
    two = {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}}
    with pytest.raises(ConfigError, match="rope_scaling"):
        families.from_hf({**SMALL, **two}, None, "small")


@pytest.mark.parametrize(
    ("config_class", "model_class", "changes"),
    [
        (LlamaConfig, LlamaForCausalLM, {}),
        (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "head_dim": 8}),
        (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": 128}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    ],
    ids=["plain", "tied", "biases", "window", "no-window"],
)
def test_llama_shapes_and_windows_equal_those_of_a_saved_model(config_class, model_class, changes, tmp_path):
    source = {**SMALL, **changes}
    source.pop("model_type")
    model = model_class(config_class(**source))
    model.save_pretrained(tmp_path)
    config = families.from_hf(json.loads((tmp_path / "config.json").read_text()), None, "tiny")
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if config.tied_embeddings:
        del shapes["lm_head.weight"]
    assert config.tensor_shapes() == shapes
    assert config.windows == (changes.get("sliding_window"),) * 2


@pytest.mark.parametrize("changes", [{}, {"n_inner": 48, "tie_word_embeddings": False}])
def test_gpt2_shapes_equal_those_of_transformers(changes):
    source = {**GPT2, **changes, "eos_token_id": 3, "bos_token_id": 3}
    config = families.from_hf(source, None, "tiny")
    model = GPT2LMHeadModel(GPT2Config(**{k: v for k, v in source.items() if k != "model_type"}))
    shapes = {name.removeprefix("transformer."): tuple(t.shape) for name, t in model.state_dict().items()}
    if config.tied_embeddings:
        del shapes["lm_head.weight"]
    assert config.tensor_shapes() == shapes
    assert config.ffn == changes.get("n_inner", 128)


def test_mistral_without_a_sliding_window_key_has_transformers_default():
    config = families.from_hf({**SMALL, "model_type": "mistral"}, None, "m")
    assert config.windows == (MistralConfig().sliding_window,) * 2


def test_every_end_id_of_both_files_is_kept_once():
    config = families.from_hf({**SMALL, "eos_token_id": [2, 5]}, {"eos_token_id": [5, 7]}, "x")
    assert config.eos_ids == (2, 5, 7)
    assert families.from_hf({**SMALL, "eos_token_id": None}, None, "x").eos_ids == ()


@pytest.mark.parametrize("missing", [k for k in SMALL if k not in ("eos_token_id", "bos_token_id")])
def test_a_missing_key_is_named_unless_transformers_has_a_default(missing):
    values = {k: v for k, v in SMALL.items() if k != missing}
    if missing == "num_key_value_heads":
        assert families.from_hf(values, None, "x").kv_heads == 4
    else:
        with pytest.raises(ConfigError, match=missing):
            families.from_hf(values, None, "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mamba"),
        ("model_type", 3),
        ("num_attention_heads", 5),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("hidden_size", -64),
        ("hidden_size", 64.0),
        ("hidden_size", "64"),
        ("hidden_size", True),
        ("num_hidden_layers", 10**12),
        ("vocab_size", 10**400),
        ("head_dim", 15),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", 10**400),
        ("hidden_act", "relu"),
        ("hidden_act", ["x" * 10_000]),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", "2"),
        ("eos_token_id", [-1]),
        ("sliding_window", 128),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("quantization_config", {"quant_method": "gptq"}),
        ("rope_theta", 0),
    ],
    ids=lambda v: str(v)[:24],
)
def test_a_value_that_cannot_be_is_refused_in_one_short_line(key, value):
    with pytest.raises(ConfigError) as caught:
        families.from_hf({**SMALL, key: value}, None, "x")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    assert key in message or key == "head_dim"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
        ("activation_function", "gelu"),
        ("n_head", 5),
    ],
)
def test_gpt2_variants_that_kvik_does_not_compute_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        families.from_hf({**GPT2, key: value}, None, "x")


def test_gguf_fields_give_the_same_decoder_as_config_json():
    from_gguf, from_hf = families.from_gguf({**GGUF, "general.name": "x"}), families.from_hf(SMALL, None, "x")
    differing = {"tied_embeddings", "eos_ids", "bos_id"}
    assert {k: v for k, v in vars(from_gguf).items() if k not in differing} == {
        k: v for k, v in vars(from_hf).items() if k not in differing
    }
    assert from_gguf.tied_embeddings
    assert not families.from_gguf({**GGUF, "GGUF.tensors": ("output.weight",)}).tied_embeddings


def test_gguf_end_ids_come_from_both_keys_and_from_known_control_tokens():
    fields = {
        "tokenizer.ggml.tokens": ["<|endoftext|>", "a", "<|im_end|>", "<|eot_id|>", "<end>"],
        "tokenizer.ggml.token_type": [3, 1, 3, 1, 3],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4,
    }
    assert families.from_gguf({**GGUF, **fields}).eos_ids == (2, 4, 0)  # <|eot_id|> is no control token here


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, Rope(10_000.0, 16)),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, Rope(1e4, 16, "linear", 4.0)),
        ({"llama.rope.scale_linear": 4.0}, Rope(1e4, 16, "linear", 4.0)),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 1024,
            },
            Rope(1e4, 16, "yarn", 4.0, 1024),
        ),
    ],
    ids=["none", "linear", "scale_linear", "yarn"],
)
def test_gguf_rope_scaling_is_read(fields, rope):
    assert families.from_gguf({**GGUF, **fields}).rope == rope


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.architecture", "falcon"),
        ("llama.rope.scaling.type", "longrope"),
        ("llama.rope.dimension_count", 8),
        ("llama.expert_count", 8),
        ("llama.surprise", 1),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.head_count_kv", [2, 2]),
        ("llama.block_count", 0),
        ("GGUF.rope_freqs", (1.0,)),
        ("GGUF.rope_freqs", (0.0,) * 8),
        ("GGUF.tensors", None),
    ],
)
def test_gguf_fields_that_cannot_be_are_refused_in_one_line(key, value):
    with pytest.raises(ConfigError) as caught:
        families.from_gguf({**GGUF, key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ROPES)
def test_a_config_survives_json(name):
    config = families.from_hf({**SMALL, "rope_parameters": ROPES[name]}, None, "x")
    assert families.from_json(json.loads(json.dumps(config.to_json()))) == config
    gpt2 = families.from_hf(GPT2, None, "x")
    assert families.from_json(json.loads(json.dumps(gpt2.to_json()))) == gpt2


JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers()))


@given(st.data())
def test_a_damaged_config_gives_a_config_or_a_config_error_and_nothing_else(data):
    for parse, base in (
        (lambda v: families.from_hf(v, None, "x"), {**SMALL, "rope_parameters": ROPES["yarn"]}),
        (families.from_gguf, GGUF),
        (families.from_json, families.from_hf(SMALL, None, "x").to_json()),
    ):
        key = data.draw(st.sampled_from(sorted(base)))
        with contextlib.suppress(ConfigError):
            parse({**base, key: data.draw(JUNK)})
