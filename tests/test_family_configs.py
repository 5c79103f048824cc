"""config.json of each family: transformers' defaults and older forms are read, all else is refused in one line."""

import json

import pytest
import torch
import transformers as hf

from kvik.errors import ConfigError, WeightsError
from kvik.models import families
from kvik.models.files.weights import check
from kvik.models.rope import Rope
from tiny_models import FAMILIES, deepseek, gemma, opt, ours, tiny

SIZES = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def read(values):
    return families.from_hf(values, None, "small")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prepared_config_is_the_same_again(name):
    config = read(FAMILIES[name]().config.to_dict())
    assert families.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gemma2", hf.Gemma2Config()),
        ("gemma3_text", hf.Gemma3TextConfig()),
        ("qwen2", hf.Qwen2Config(**SIZES)),
        ("qwen3", hf.Qwen3Config(**SIZES)),
        ("opt", hf.OPTConfig()),
    ],
)
def test_what_a_file_leaves_out_is_what_transformers_takes(kind, config):
    given = {} if "gemma" in kind else SIZES
    if kind == "opt":
        given = {key: value for key, value in config.to_dict().items() if key in (*SIZES, "ffn_dim")}
    ends = {"eos_token_id": config.eos_token_id, "bos_token_id": config.bos_token_id}
    assert read({"model_type": kind, **given, **ends}) == read(config.to_dict())


def test_gemmas_older_form_of_rope_settings_is_the_same():
    new = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
           "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}  # fmt: skip
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    base = {"model_type": "gemma3_text"}
    config = read({**base, **old})
    assert config == read({**base, "rope_parameters": new})
    assert (config.rope, config.local_rope) == (Rope(5e5, 256, "linear", 8.0), Rope(2e4, 256))
    theirs = hf.Gemma3TextConfig(**old)
    assert read(theirs.to_dict()) == config


def test_windows_are_where_transformers_has_them():
    config = read({"model_type": "gemma3_text", "sliding_window": 512, "num_hidden_layers": 13})
    assert [window is None for window in config.windows] == [(layer + 1) % 6 == 0 for layer in range(13)]
    assert read({"model_type": "gemma2", "num_hidden_layers": 4}).windows == (4096, None, 4096, None)
    windowed = {**SIZES, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 20}
    assert read({**windowed, "max_window_layers": 2}).windows == (None, None, 20)
    assert read(windowed).windows == (None,) * 3, "28 layers see all"
    assert read({**windowed, "use_sliding_window": False, "max_window_layers": 0}).windows == (None,) * 3
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert read({**windowed, "layer_types": kinds}).windows == (None, 20, None)


REFUSED = [
    (opt, {"do_layer_norm_before": False}, "do_layer_norm_before"),
    (opt, {"word_embed_proj_dim": 32}, "word_embed_proj_dim"),
    (opt, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    (opt, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    (opt, {"activation_function": "gelu"}, "activation_function"),
    (opt, {"hidden_size": 66}, "num_attention_heads"),
    (lambda: tiny("Qwen2"), {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    (lambda: tiny("Qwen2"), {"layer_types": ["full_attention"] * 2}, "layer_types"),
    (lambda: tiny("Qwen3"), {"layer_types": ["linear_attention"] * 3}, "layer_types"),
    (lambda: tiny("Qwen3"), {"hidden_act": "gelu"}, "hidden_act"),
    (lambda: tiny("Qwen3"), {"num_key_value_heads": 3}, "num_key_value_heads"),
    (lambda: gemma(3), {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (lambda: gemma(3), {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    (lambda: gemma(3), {"hidden_activation": "silu"}, "hidden_activation"),
    (lambda: gemma(3), {"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
    (lambda: gemma(2), {"sliding_window": 0}, "sliding_window"),
    (lambda: deepseek(3), {"rope_interleave": False}, "rope_interleave"),
    (lambda: deepseek(3), {"scoring_func": "softmax"}, "scoring_func"),
    (lambda: deepseek(3), {"topk_method": "greedy"}, "topk_method"),
    (lambda: deepseek(3), {"n_group": 3}, "equal groups"),
    (lambda: deepseek(3), {"num_experts_per_tok": 7}, "can't take 7 of 8"),
    (lambda: deepseek(3), {"kv_lora_rank": 33}, "pairs"),
    (lambda: deepseek(3), {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    (lambda: deepseek(2), {"norm_topk_prob": True}, "norm_topk_prob"),
    (lambda: deepseek(2), {"mlp_bias": True}, "mlp_bias"),
    (lambda: deepseek(2), {"moe_layer_freq": 2}, "moe_layer_freq"),
    (lambda: deepseek(2), {"n_routed_experts": None}, "n_routed_experts"),
]


@pytest.mark.parametrize(
    ("make", "change", "named"), REFUSED, ids=lambda value: str(value) if type(value) is str else ""
)
def test_what_changes_numbers_in_an_unknown_way_is_refused_in_one_line(make, change, named):
    values = make().config.to_dict()
    read(values)
    with pytest.raises(ConfigError, match=named) as refused:
        read({**values, **change})
    assert "\n" not in str(refused.value)


def test_deepseeks_layers_that_predict_further_tokens_are_left_unread():
    theirs = deepseek(3)
    model = ours(theirs)
    shapes = model.config.tensor_shapes()
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    spare = {
        f"model.layers.{model.config.layers}.{part}": torch.zeros(1) for part in ("enorm.weight", "eh_proj.weight")
    }
    assert check({**tensors, **spare}, model.config).keys() == shapes.keys()
    with pytest.raises(WeightsError, match="unknown"):
        check({**tensors, "model.layers.0.enorm.weight": torch.zeros(1)}, model.config)


def test_a_pad_of_the_vocabulary_is_no_end_of_text():
    assert read(tiny("Qwen2", eos_token_id=[5, 6]).config.to_dict()).eos_ids == (5, 6)
