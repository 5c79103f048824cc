"""Weights from safetensors files: read whole, refused by name, checked against the configuration."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from kvik.errors import WeightsError
from kvik.models import families
from kvik.models.files.weights import check, read_safetensors
from test_gguf_weights import HIDDEN, llama


@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_of_transformers_are_read_whole(tmp_path, shards):
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    tensors = read_safetensors(tmp_path)
    expected = model.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_gpt2_files_lose_their_prefix_and_their_masks(tmp_path):
    tensors = {"transformer.wte.weight": torch.ones(3, 2), "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    tensors |= {"h.1.attn.masked_bias": torch.tensor(-1e4), "h.0.attn.c_attn.bias": torch.ones(6)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert set(read_safetensors(tmp_path)) == {"wte.weight", "h.0.attn.c_attn.bias"}


def test_a_cut_or_foreign_safetensors_file_is_named(tmp_path):
    llama().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", b"x", whole[:8], whole[:1000], whole[:-1], whole + b"x", b"\xff" * 64, b"PK" + whole[2:]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"model\.safetensors") as caught:
            read_safetensors(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_missing_shard_and_a_hostile_index_are_named(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    original = index.read_text()
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shutil.move(shard, tmp_path / "aside")
    with pytest.raises(WeightsError, match=shard.name):
        read_safetensors(tmp_path)
    shutil.move(tmp_path / "aside", shard)
    mapping = json.loads(original)["weight_map"]
    save_file({"model.secret.weight": torch.ones(HIDDEN)}, tmp_path.parent / "secret.safetensors")
    for changed in (
        {"weight_map": {**mapping, "model.secret.weight": "../secret.safetensors"}},
        {"weight_map": {**mapping, "model.more.weight": shard.name}},
        {"weight_map": [1]},
        {},
        [],
    ):
        index.write_text(json.dumps(changed))
        with pytest.raises(WeightsError):
            read_safetensors(tmp_path)
    index.write_text(original)
    assert len(read_safetensors(tmp_path)) == len(mapping)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_a_pickle_is_never_opened_and_the_reason_is_said(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(WeightsError, match="pickle") as caught:
        read_safetensors(tmp_path)
    assert name in str(caught.value)


def test_tensors_that_are_no_floats_are_refused_by_name(tmp_path):
    save_file({"model.norm.weight": torch.ones(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.norm\.weight.*int8"):
        read_safetensors(tmp_path)


def tiny_config(tied):
    sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 3, "rms_norm_eps": 1e-5}
    heads = {"model_type": "llama", "num_attention_heads": 1, "max_position_embeddings": 8}
    return families.from_hf({**sizes, **heads, "tie_word_embeddings": tied}, None, "tiny")


def test_check_names_the_first_faults_and_counts_them():
    config = tiny_config(tied=False)
    tensors = {name: torch.zeros(shape) for name, shape in config.tensor_shapes().items()}
    assert check(tensors, config).keys() == tensors.keys()
    broken = {name: t for name, t in tensors.items() if "v_proj" not in name and "k_proj" not in name}
    broken |= {"model.layers.3.input_layernorm.weight": torch.zeros(4), "model.norm.weight": torch.zeros(5)}
    with pytest.raises(WeightsError) as caught:
        check(broken, config)
    message = str(caught.value)
    assert "6 missing: model.layers.0.self_attn.k_proj.weight" in message
    assert "and 3 more" in message
    assert "1 unknown: model.layers.3.input_layernorm.weight" in message
    assert "model.norm.weight [5] instead of [4]" in message


def test_lm_head_is_spare_when_tied_and_missing_when_not():
    tied, untied = tiny_config(tied=True), tiny_config(tied=False)
    tensors = {name: torch.zeros(shape) for name, shape in untied.tensor_shapes().items()}
    assert "lm_head.weight" not in check(tensors, tied)
    del tensors["lm_head.weight"]
    with pytest.raises(WeightsError, match=r"1 missing: lm_head\.weight"):
        check(tensors, untied)
