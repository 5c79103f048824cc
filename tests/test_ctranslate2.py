"""CTranslate2's model.bin: what it holds under transformers' names, and what is no such file."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

import readers
from kvik.errors import ConfigError, KvikError, TokenizerError, WeightsError
from kvik.models.files import ctranslate2
from kvik.models.files.convert import convert_ctranslate2
from kvik.models.files.folder import load
from kvik.models.model import Model
from readers import drawn, their_logits
from test_readers import read

TYPES = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4, torch.bfloat16: 5}
ENDS = {"weight": "gamma", "bias": "beta"}


def text(value):
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def variable(name, tensor):
    shape = struct.pack(f"<B{tensor.dim()}I", tensor.dim(), *tensor.shape)
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return text(name) + shape + struct.pack("<BI", TYPES[tensor.dtype], len(raw)) + raw


def model_bin(variables, aliases=(), spec="WhisperSpec", version=6, revision=3):
    body = struct.pack("<I", version) + text(spec) + struct.pack("<II", revision, len(variables))
    body += b"".join(variable(name, tensor) for name, tensor in variables)
    return body + struct.pack("<I", len(aliases)) + b"".join(text(a) + text(n) for a, n in aliases)


def as_ctranslate2(theirs, dtype=torch.float32):
    """transformers' tiny Whisper as that file's variables."""
    state, config = {n.removeprefix("model."): t for n, t in theirs.state_dict().items()}, theirs.config
    out = {}
    for stack, layers, heads in (
        ("encoder", config.encoder_layers, config.encoder_attention_heads),
        ("decoder", config.decoder_layers, config.decoder_attention_heads),
    ):
        out[f"{stack}/num_heads"] = torch.tensor(heads, dtype=torch.int16)
        out[f"{stack}/position_encodings/encodings"] = state[f"{stack}.embed_positions.weight"]
        norms = {f"{stack}.layer_norm": f"{stack}/layer_norm"}
        for i in range(layers):
            here, there = f"{stack}.layers.{i}", f"{stack}/layer_{i}"
            for number in (1, 2):
                for end in ("weight", "bias"):
                    out[f"{there}/ffn/linear_{number - 1}/{end}"] = state[f"{here}.fc{number}.{end}"]
            norms[f"{here}.final_layer_norm"] = f"{there}/ffn/layer_norm"
            for ours, name, products in (
                ("self_attn", "self_attention", ("qkv", ["out"])), ("encoder_attn", "attention", ("q", "kv", ["out"])),
            ):  # fmt: skip
                if f"{here}.{ours}.q_proj.weight" not in state:
                    continue
                norms[f"{here}.{ours}_layer_norm"] = f"{there}/{name}/layer_norm"
                for number, parts in enumerate(products):
                    weights = [state[f"{here}.{ours}.{p}_proj.weight"] for p in parts]
                    empty = torch.zeros(config.d_model)
                    biases = [state.get(f"{here}.{ours}.{p}_proj.bias", empty) for p in parts]
                    out[f"{there}/{name}/linear_{number}/weight"] = torch.cat(weights)
                    out[f"{there}/{name}/linear_{number}/bias"] = torch.cat(biases)
        for ours, name in norms.items():
            out |= {f"{name}/{ENDS[end]}": state[f"{ours}.{end}"] for end in ENDS}
    for name in ("conv1", "conv2"):
        out |= {f"encoder/{name}/{end}": state[f"encoder.{name}.{end}"] for end in ("weight", "bias")}
    out["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    out = {name: t.to(dtype) if t.is_floating_point() else t for name, t in out.items()}
    flags = {"pre_norm": 1, "alibi": 0, "scale_embeddings": 0, "start_from_zero_embedding": 0, "activation": 3}
    out |= {f"decoder/{name}": torch.tensor(value, dtype=torch.int8) for name, value in flags.items()}
    return out | {"decoder/alignment_layer": torch.tensor(-1, dtype=torch.int16)}


ALIASES = [("decoder/projection/weight", "decoder/embeddings/weight")]
SPECIAL = ["endoftext", "startoftranscript", "notimestamps", "transcribe", "translate"]


def folder(path, variables, aliases=ALIASES, special=SPECIAL, **options):
    path.mkdir(exist_ok=True)
    (path / "model.bin").write_bytes(model_bin(list(variables.items()), aliases, **options))
    (path / "config.json").write_text(json.dumps({"suppress_ids": [1, 2], "suppress_ids_begin": [3], "lang_ids": [9]}))
    names = {chr(33 + i): i for i in range(90)} | {f"<|{name}|>": 90 + i for i, name in enumerate(special)}
    Backend(models.WordLevel(names, unk_token="!")).save(str(path / "tokenizer.json"))
    return path / "model.bin"


def converted(path, variables, **options):
    into = path.parent / "into"
    into.mkdir()
    convert_ctranslate2(folder(path, variables, **options), into, {"name": "tiny", "from": "here"}, lambda _: None)
    return load(into)


def test_a_file_is_the_model_that_it_was_made_from(tmp_path):
    theirs = drawn("whisper")
    loaded = converted(tmp_path / "a", as_ctranslate2(theirs))
    model = Model(loaded.config, loaded.tensors, weights="f32")
    source = readers.source(model, 60)
    said = [91, 7, 30, 8]
    assert (read(model, source, said) - their_logits(theirs, source, said)).abs().max() < 1e-4
    reading = model.reading
    assert (reading.start_id, reading.eos_ids, reading.untimed_id, reading.latest_first) == (91, (90,), 92, 50)
    assert reading.constraints.never == ((1,), (2,)) and reading.constraints.never_begin == (3,)
    assert reading.languages == () and reading.name == "tiny"


def test_halves_stay_halves(tmp_path):
    variables = as_ctranslate2(drawn("whisper"), torch.float16)
    loaded = converted(tmp_path / "a", variables)
    assert loaded.tensors["model.encoder.conv1.weight"].dtype == torch.float16
    q, k, v = (loaded.tensors[f"model.decoder.layers.1.self_attn.{p}_proj.weight"] for p in "qkv")
    assert torch.equal(torch.cat((q, k, v)), variables["decoder/layer_1/self_attention/linear_0/weight"])


def test_every_cut_of_a_file_is_told(tmp_path):
    raw, path = model_bin([("a/b", torch.ones(2, 3)), ("c", torch.tensor(1, dtype=torch.int8))], [("d", "a/b")]), None
    path = tmp_path / "model.bin"
    path.write_bytes(raw)
    model = ctranslate2.read_model(path)
    assert model.variables["d"] is model.variables["a/b"] and model.variables["c"] == 1
    assert torch.equal(model.variables["a/b"], torch.ones(2, 3))
    for stop in range(len(raw)):
        path.write_bytes(raw[:stop])
        with pytest.raises(WeightsError) as caught:
            ctranslate2.read_model(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(raw + b"\0")
    with pytest.raises(WeightsError, match="1 bytes follow"):
        ctranslate2.read_model(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_anywhere_is_told_in_one_line_or_harmless(tmp_path_factory, data):
    raw = bytearray(model_bin([("a/b", torch.ones(2, 3)), ("c", torch.tensor(1, dtype=torch.int8))], [("d", "a/b")]))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(raw)
    said = ""
    try:
        ctranslate2.read_model(path)
    except WeightsError as error:
        said = str(error)
    assert "\n" not in said and len(said) < 500


ONE = struct.pack("<I", 6) + text("S") + struct.pack("<II", 3, 1) + text("a")  # before one variable's axes


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"GGUF" + bytes(40), "it begins with"),
        (model_bin([], version=5), "it begins with 5"),
        (model_bin([("a", torch.ones(1)), ("a", torch.ones(1))]), "a second time"),
        (model_bin([("a", torch.ones(1))], [("b", "c")]), "alias"),
        (model_bin([("a", torch.ones(1))], [("a", "a")]), "alias"),
        (struct.pack("<I", 6) + text("S") + struct.pack("<II", 3, 2**32 - 1), "it ends at byte"),
        (ONE + b"\xff" * 80, "255 axes"),
        (
            ONE
            + struct.pack("<BIIBI", 2, 2**31, 2**31, 0, 4) + bytes(8), "4 bytes, but its shape",
        ),
        (
            ONE
            + struct.pack("<BIBI", 1, 2**30, 0, 2**32 - 4), "has 4294967292 bytes|its shape",
        ),
        (ONE + struct.pack("<BBI", 0, 9, 4), "type 9"),
    ],
    ids=str,
)  # fmt: skip
def test_foreign_and_hostile_files(tmp_path, raw, named):
    path = tmp_path / "model.bin"
    path.write_bytes(raw)
    with pytest.raises(WeightsError, match=named) as caught:
        ctranslate2.read_model(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def changed(**changes):
    variables = as_ctranslate2(drawn("whisper")) | changes
    return {name: tensor for name, tensor in variables.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"decoder/num_heads": None}, "num_heads is missing"),
        ({"decoder/activation": torch.tensor(0, dtype=torch.int8)}, "activation is 0 instead of 3"),
        ({"decoder/pre_norm": torch.tensor(0, dtype=torch.int8)}, "pre_norm is 0"),
        ({"encoder/conv1/weight": None}, "conv1.weight is missing"),
        ({"encoder/conv1/weight": torch.ones(3)}, "conv1.weight is missing"),
        ({"encoder/layer_1/ffn/linear_0/weight": torch.ones(4, 4)}, "of another shape"),
        ({"encoder/layer_1/more/weight": torch.ones(4)}, "1 unknown: encoder/layer_1/more/weight"),
        ({"encoder/layer_1/attention/linear_7/weight": torch.ones(4)}, "1 unknown"),
        ({"decoder/layer_0/attention/linear_1/weight": torch.ones(7, 64)}, "missing"),
        ({"decoder/layer_0/ffn/linear_0/weight": torch.ones(112, 64).char()}, "stored as torch.int8"),
        ({"decoder/num_heads": torch.tensor(5, dtype=torch.int16)}, "can't be cut"),
        ({"decoder/num_heads": torch.tensor(-4, dtype=torch.int16)}, "decoder_attention_heads"),
    ],
    ids=str,
)
def test_models_that_do_not_fit_are_refused(tmp_path, changes, named):
    with pytest.raises((WeightsError, ConfigError), match=named) as caught:
        converted(tmp_path / "a", changed(**changes))
    assert "\n" not in str(caught.value)


def test_other_specs_and_tokenizers_without_the_tokens(tmp_path):
    with pytest.raises(WeightsError, match="TransformerSpec"):
        converted(tmp_path / "a", {}, aliases=(), spec="TransformerSpec")
    (tmp_path / "b").mkdir()
    with pytest.raises(TokenizerError, match="notimestamps"):
        converted(tmp_path / "b" / "c", changed(), special=SPECIAL[:2])


def test_a_model_of_many_languages_says_which(tmp_path):
    from kvik.models.text.tokenizer import Tokenizer

    path = folder(tmp_path / "a", {}, aliases=())
    got = ctranslate2.whisper_settings({"lang_ids": [9, 11]}, Tokenizer(path.parent), 51_865)
    assert list(got["lang_to_id"].values()) == [9, 11] and got["task_to_id"] == {"transcribe": 93, "translate": 94}
    assert "lang_to_id" not in ctranslate2.whisper_settings({"lang_ids": [9]}, Tokenizer(path.parent), 51_864)
    with pytest.raises(KvikError, match="suppress_ids"):
        ctranslate2.whisper_settings({"suppress_ids": "x"}, Tokenizer(path.parent), 51_864)
