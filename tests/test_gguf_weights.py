"""Weights from GGUF files: the values of transformers and gguf, bit for bit; damage is an error that names it."""

import contextlib
import struct
import tracemalloc
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Q
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from kvik.errors import ConfigError, KvikError, WeightsError
from kvik.models import families
from kvik.models.files.weights import check, read_gguf
from kvik.ops.grouped import GroupQuantized

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, VOCAB = 2, 64, 4, 2, 96, 300


KEPT = (Q.Q4_0, Q.Q4_1, Q.Q8_0)


TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 256}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))


def gguf_name(name):
    stem, part = name.rsplit(".", 1)
    head, _, rest = stem.removeprefix("model.layers.").removeprefix("transformer.h.").partition(".")
    return f"blk.{head}.{TO_GGUF[rest]}.{part}" if head.isdigit() else f"{TO_GGUF[stem]}.{part}"


def permuted(weight, heads):
    """As llama.cpp's converter does it: its `LlamaModel.permute`."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def alphabet():
    """A byte-level vocabulary of VOCAB tokens: 256 bytes, one merge, three control tokens, fillers."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "he", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return tokens + [f"f{i}" for i in range(VOCAB - len(tokens))]


def write_gguf(path, model, kind=None, *, pre="smollm", template=None, extra=()):
    """A GGUF file of a tiny model as llama.cpp's converter would write it: 2-D tensors as `kind`, the rest f32."""
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if family == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
    if family == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    tokens = alphabet()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(tokens.index("<|im_start|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    if template:
        writer.add_chat_template(template)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
        if heads and family == "llama":
            data = permuted(data, heads)
        if family == "gpt2" and data.ndim == 2 and ".c_" in name:
            data = data.T
        data = np.ascontiguousarray(data)
        if kind is not None and data.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), data)
    for name, data in extra:
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_llama_from_gguf_equals_the_transformers_model_bit_for_bit(tmp_path):
    model = llama(attention_bias=True, mlp_bias=True)
    fields, tensors = read_gguf(write_gguf(tmp_path / "tiny.gguf", model))
    config = families.from_gguf(fields)
    expected = model.state_dict()
    assert check(tensors, config).keys() == expected.keys()
    assert config.attention_bias
    assert config.mlp_bias
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_a_qwen_from_gguf_equals_the_transformers_model_bit_for_bit(tmp_path, family, changes):
    sizes = {**llama().config.to_dict(), "head_dim": 24 if family == "Qwen3" else 16, **changes}
    del sizes["model_type"]
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    fields, tensors = read_gguf(write_gguf(tmp_path / "tiny.gguf", model))
    read, named = families.from_gguf(fields), families.from_hf(config.to_dict(), None, "tiny")
    expected = model.state_dict()
    assert tensors.keys() == expected.keys() - ({"lm_head.weight"} if changes else set())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in check(tensors, read).items())
    assert replace(read, eos_ids=(), bos_id=None) == replace(named, eos_ids=(), bos_id=None)


@pytest.mark.parametrize("kind", [None, Q.F16, Q.Q8_0], ids=str)
def test_a_gpt2_from_gguf_has_conv1d_layout(tmp_path, kind):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=HIDDEN, n_head=HEADS, n_layer=LAYERS, n_positions=32, vocab_size=VOCAB))
    fields, tensors = read_gguf(write_gguf(tmp_path / "tiny.gguf", model, kind))
    config = families.from_gguf(fields)
    expected = {name.removeprefix("transformer."): t for name, t in model.state_dict().items()}
    tensors = check(tensors, config)
    assert config.tied_embeddings
    for name, tensor in tensors.items():
        if kind is None:
            assert torch.equal(tensor, expected[name]), name
        else:
            value = tensor.dequantize() if isinstance(tensor, GroupQuantized) else tensor.float()
            torch.testing.assert_close(value, expected[name], atol=2e-3, rtol=0)
    assert not isinstance(tensors["h.0.mlp.c_fc.weight"], GroupQuantized)


@pytest.mark.parametrize("kind", [*KEPT, Q.Q5_1, Q.BF16, Q.F16], ids=lambda k: k.name)
def test_every_type_has_exactly_the_values_of_gguf_dequantize(tmp_path, kind):
    model = llama()
    path = write_gguf(tmp_path / "tiny.gguf", model, kind)
    _, tensors = read_gguf(path)
    names = {gguf_name(name): name for name in model.state_dict()}
    for stored in gguf.GGUFReader(path).tensors:
        name = names[stored.name]
        expected = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(stored.shape[::-1].tolist())
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
        if heads:
            rows = expected.shape[0]
            expected = expected.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(expected.shape)
        got = tensors[name]
        if stored.tensor_type in KEPT:
            assert isinstance(got, GroupQuantized)
            assert got.bits == (8 if stored.tensor_type == Q.Q8_0 else 4)
        value = got.dequantize() if isinstance(got, GroupQuantized) else got.float()
        assert np.array_equal(value.numpy(), expected), name
    assert tensors["model.norm.weight"].dtype == torch.float32
    if kind in (Q.F16, Q.BF16):
        assert tensors["lm_head.weight"].dtype == {Q.F16: torch.float16, Q.BF16: torch.bfloat16}[kind]


@pytest.mark.parametrize("kind", [*KEPT, Q.Q2_K, Q.Q4_K, Q.Q6_K, Q.IQ4_NL], ids=lambda k: k.name)
def test_random_codes_with_ordinary_scales_have_exactly_the_values_of_gguf(tmp_path, kind):
    """All codes and signs, and scales over f16's whole range, which no quantizer would write."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(1)
    blocks = generator.integers(0, 256, (16 * 512 // block, size), np.uint8)
    if kind in KEPT:
        halves = blocks[:, : 4 if kind == Q.Q4_1 else 2].view(np.uint16)
        halves[(halves & 0x7C00) == 0x7C00] = 1  # no infinities, no NaN
    else:
        for at in {Q.Q2_K: (80, 82), Q.Q4_K: (0, 2), Q.Q6_K: (208,), Q.IQ4_NL: (0,)}[kind]:
            blocks[:, at : at + 2] = np.float16([0.01]).view(np.uint8)
    data = blocks.reshape(16, -1)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gpt2")
    writer.add_tensor("token_embd.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = read_gguf(tmp_path / "x.gguf")[1]["wte.weight"]
    value = got.dequantize() if isinstance(got, GroupQuantized) else got
    assert isinstance(got, GroupQuantized) == (kind in KEPT)
    assert np.array_equal(value.numpy(), gguf.quants.dequantize(data, kind))


def test_the_fields_are_those_that_gguf_reads(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", llama())
    fields, _ = read_gguf(path)
    for key, field in gguf.GGUFReader(path).fields.items():
        if not key.startswith("GGUF."):
            assert fields[key] == pytest.approx(field.contents(), rel=1e-6) if "epsilon" in key else field.contents()
    assert fields["llama.attention.layer_norm_rms_epsilon"] == 1e-6


def test_rope_factors_become_a_field_and_no_tensor(tmp_path):
    factors = np.linspace(1, 8, HIDDEN // HEADS // 2).astype(np.float32)
    fields, tensors = read_gguf(write_gguf(tmp_path / "x.gguf", llama(), extra=[("rope_freqs.weight", factors)]))
    config = families.from_gguf(fields)
    assert config.rope.factors == tuple(factors.tolist())
    check(tensors, config)


def test_an_output_that_repeats_the_embedding_makes_the_model_tied(tmp_path):
    model = llama(tie_word_embeddings=True)
    output = model.state_dict()["model.embed_tokens.weight"].numpy()
    fields, tensors = read_gguf(write_gguf(tmp_path / "x.gguf", model, extra=[("output.weight", output)]))
    assert families.from_gguf(fields).tied_embeddings
    assert "lm_head.weight" not in tensors
    fields, tensors = read_gguf(write_gguf(tmp_path / "x.gguf", model, extra=[("output.weight", output + 1)]))
    assert not families.from_gguf(fields).tied_embeddings
    assert "lm_head.weight" in tensors


def test_a_gguf_cut_anywhere_gives_an_error_that_names_it_and_nothing_else(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", llama(), Q.Q4_1).read_bytes()
    cut = tmp_path / "cut.gguf"
    lengths = sorted({*range(40), *(len(whole) * i // 60 for i in range(60)), len(whole) - 32, len(whole) - 100})
    for length in lengths:
        cut.write_bytes(whole[:length])
        with pytest.raises((WeightsError, ConfigError)) as caught:
            read_gguf(cut)
        assert "cut.gguf" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_gguf_with_any_damaged_header_byte_never_crashes_and_never_grows(tmp_path):
    whole = bytearray(write_gguf(tmp_path / "whole.gguf", llama(), Q.Q4_1).read_bytes())
    header = whole.index(b"token_embd") + 60
    damaged = tmp_path / "damaged.gguf"
    generator = np.random.default_rng(0)
    tracemalloc.start()
    for at in (*range(4, 64), *generator.integers(64, header, 150).tolist()):
        changed = bytearray(whole)
        changed[at] ^= int(generator.integers(1, 256))
        damaged.write_bytes(changed)
        with contextlib.suppress(KvikError):
            fields, tensors = read_gguf(damaged)
            check(tensors, families.from_gguf(fields))
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"", "empty"),
        (b"PK\x03\x04" + bytes(60), "begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version is 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "claims"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**50), "claims"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 2**60), "claims"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 4), "items of type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99), "type 99"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 64, 0, 2**62), "beyond"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 64, 999, 0), "type 999"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 31, 3, 0), "blocks of 32"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 10**6), "dimensions"),
    ],
)
def test_a_foreign_or_absurd_gguf_is_refused_with_the_reason(tmp_path, head, said):
    (tmp_path / "bad.gguf").write_bytes(head)
    with pytest.raises(WeightsError, match=said) as caught:
        read_gguf(tmp_path / "bad.gguf")
    assert "bad.gguf" in str(caught.value)


def test_a_gguf_tensor_of_another_model_is_refused_by_name(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", llama(), extra=[("blk.0.ssm_in.weight", np.zeros((4, 32), np.float32))])
    with pytest.raises(WeightsError, match="ssm_in"):
        read_gguf(path)


def test_scales_that_are_not_finite_are_refused(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", llama(), Q.Q8_0)
    data = bytearray(path.read_bytes())
    start = next(t.data_offset for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    data[start : start + 2] = np.float16([np.inf]).tobytes()
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"token_embd.*not finite"):
        read_gguf(path)
