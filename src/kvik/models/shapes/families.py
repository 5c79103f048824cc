"""What a model keeps of every token, read from its `config.json`: layers, heads, windows; and its parameters.

Nothing is loaded: the numbers follow from the config alone. Each family is one function, and parameters are counted
by formula, tied embeddings once, exactly as `sum(p.numel() for p in model.parameters())` counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kvik.errors import ConfigError
from kvik.models.forms import Cost, Form
from kvik.models.shapes import ours, readers
from kvik.models.shapes.shape import ENCODER_ONLY, ModelShape, kv, latent
from kvik.models.shapes.shape import Config as _Config

__all__ = ["FAMILIES", "ModelShape", "from_config"]


def from_config(config: Mapping[str, Any], name: str | None = None) -> ModelShape:
    """The shape of the model that a Hugging Face `config.json` describes.

    Args:
        config: the parsed file.
        name: for people; default: what the config calls itself, else its `model_type`.

    Raises:
        ConfigError: a key that the sizes depend on is missing or no sensible number; the message names it.
    """
    if not isinstance(config, Mapping):
        raise ConfigError("config.json must hold an object with the model's sizes")
    family = str(config.get("model_type", "unknown"))[:60]
    text = config.get("text_config")
    if isinstance(text, Mapping):
        outer = {"model_type": family, "torch_dtype": config.get("torch_dtype", config.get("dtype"))}
        shape = from_config({**outer, **text})
        shape = replace(shape, notes=(*shape.notes, "the text model alone: encoders of pictures and sound not counted"))
    else:
        shape = FAMILIES.get(family, _unknown)(_Config(config, model_type=family))
    if sum(layer.heads for layer in shape.layers) > 1_000_000:
        each = shape.layers[0].heads
        raise ConfigError(f"config: {len(shape.layers)} layers of {each} heads are more than any model has")
    own = config.get("_name_or_path")
    return replace(shape, name=name or (own if isinstance(own, str) and own else family))


def _windows(c: _Config, layers: int, pattern: Callable[[int], bool]) -> list[int | None]:
    """Each layer's window: from `layer_types` where the config has them, else where `pattern(layer)` is true."""
    types = c.raw.get("layer_types")
    if types is None:
        return [c("sliding_window") if pattern(i) else None for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise ConfigError(f"config: layer_types must name a type for each of the {layers} layers")
    wrong = sorted({str(t) for t in types} - {"sliding_attention", "full_attention"})
    if wrong:
        raise ConfigError(f"config: layers of type {wrong[0]} keep something other than rows, which kvik can't size")
    return [c("sliding_window") if t == "sliding_attention" else None for t in types]


def _decoder(
    c: _Config,
    parameters: int | None,
    windows: list[int | None],
    notes: tuple[str, ...] = (),
    *,
    turned: bool = True,
    kv_bias: bool | None = None,
    k_norm: bool = False,
) -> ModelShape:
    (heads, shared, width), d = c.heads(), c("hidden_size", "n_embd", "d_model")
    family = str(c.raw["model_type"])
    return ModelShape(
        name=family,
        family=family,
        parameters=parameters,
        layers=tuple(kv(shared, width, window, turned) for window in windows),
        kv_parameters=None if kv_bias is None else 2 * shared * width * (d + kv_bias) + k_norm * width,
        d_model=d,
        query_heads=heads,
        head_dim=width,
        context=c.maybe("max_position_embeddings", "n_positions", "n_ctx", "seq_length"),
        weights=c.weights,
        notes=notes,
    )


def _gated(
    c: _Config, *, qkv_bias: bool = False, o_bias: bool = False, qk_norm: bool = False, norms: int = 2, experts: int = 0
) -> int:
    """Parameters of a decoder with gated feed-forwards and RMS norms: Llama and its kin."""
    d, ff, layers, vocab = c("hidden_size"), c("intermediate_size"), c("num_hidden_layers"), c("vocab_size")
    heads, shared, width = c.heads()
    q, k = heads * width, shared * width
    attention = d * (q + 2 * k) + q * d + qkv_bias * (q + 2 * k) + o_bias * d + qk_norm * 2 * width
    ffn = 3 * d * ff + c.flag("mlp_bias") * (2 * ff + d)
    if experts:
        ffn = experts * ffn + experts * d  # the router beside them
    return layers * (attention + ffn + norms * d) + d + vocab * d * (1 if c.flag("tie_word_embeddings") else 2)


def _llama(c: _Config) -> ModelShape:
    bias = c.flag("attention_bias")
    return _decoder(c, _gated(c, qkv_bias=bias, o_bias=bias), [None] * c("num_hidden_layers"), kv_bias=bias)


def _mistral(c: _Config) -> ModelShape:
    mixtral = c.raw["model_type"] == "mixtral"
    c = _Config(c.raw, num_key_value_heads=8, sliding_window=None if mixtral else 4096)
    experts = c("num_local_experts") if mixtral else 0
    windows, bias = [c.maybe("sliding_window")] * c("num_hidden_layers"), None if mixtral else False
    return _decoder(c, _gated(c, experts=experts), windows, kv_bias=bias)


def _phi3(c: _Config) -> ModelShape:
    return _decoder(c, _gated(c), [c.maybe("sliding_window")] * c("num_hidden_layers"))


def _qwen(c: _Config) -> ModelShape:
    third = c.raw["model_type"] == "qwen3"
    c = _Config(c.raw, max_window_layers=28, **({"head_dim": 128} if third else {}))
    windowed = c.flag("use_sliding_window") and c.maybe("sliding_window") is not None
    bias = c.flag("attention_bias") if third else True
    windows = _windows(c, c("num_hidden_layers"), lambda i: windowed and i >= c("max_window_layers", least=0))
    parameters = _gated(c, qkv_bias=bias, o_bias=bias and third, qk_norm=third)
    return _decoder(c, parameters, windows, kv_bias=bias, k_norm=third)


def _gemma(c: _Config) -> ModelShape:
    generation = {"gemma": 1, "gemma2": 2}.get(str(c.raw["model_type"]), 3)
    c = _Config(c.raw, **_GEMMA[generation], tie_word_embeddings=True)
    pattern = c("sliding_window_pattern", "_sliding_window_pattern")
    windows = _windows(c, c("num_hidden_layers"), lambda i: (i + 1) % pattern != 0)
    bias = c.flag("attention_bias")
    third, norms = generation == 3, 2 if generation == 1 else 4
    parameters = _gated(c, qkv_bias=bias, o_bias=bias, qk_norm=third, norms=norms)
    return _decoder(c, parameters, windows, kv_bias=None if generation == 1 else bias, k_norm=third)


# Files of Gemma leave out what equals the library's defaults, so the defaults belong to the format.
_GEMMA: dict[int, dict[str, int]] = {
    1: {"head_dim": 256, "sliding_window_pattern": 1},
    2: {"head_dim": 256, "sliding_window_pattern": 2, "sliding_window": 4096},
    3: {
        "head_dim": 256,
        "sliding_window_pattern": 6,
        "sliding_window": 4096,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
    },
}


def _gpt2(c: _Config) -> ModelShape:
    c = _Config(c.raw, tie_word_embeddings=True)
    d, layers, positions, vocab = c("n_embd"), c("n_layer"), c("n_positions", "n_ctx"), c("vocab_size")
    ff = c.maybe("n_inner") or 4 * d
    layer = 4 * d * d + 4 * d + 2 * d * ff + ff + d + 4 * d  # attention, feed-forward, two norms; all with biases
    tied = 1 if c.flag("tie_word_embeddings") else 2
    return _decoder(c, layers * layer + 2 * d + (tied * vocab + positions) * d, [None] * layers, turned=False)


def _opt(c: _Config) -> ModelShape:
    c = _Config(c.raw, tie_word_embeddings=True, do_layer_norm_before=True, enable_bias=True)
    d, layers, vocab, ff = c("hidden_size"), c("num_hidden_layers"), c("vocab_size"), c("ffn_dim")
    narrow = c.maybe("word_embed_proj_dim") or d
    bias = c.flag("enable_bias")
    norm = 2 * d * c.flag("layer_norm_elementwise_affine", True)
    layer = 4 * d * d + 2 * d * ff + bias * (5 * d + ff) + 2 * norm
    final = norm if c.flag("do_layer_norm_before") and not c.flag("_remove_final_layer_norm") else 0
    outside = (1 if c.flag("tie_word_embeddings") else 2) * vocab * narrow + (c("max_position_embeddings") + 2) * d
    project = 2 * d * narrow if narrow != d else 0
    return _decoder(c, layers * layer + final + outside + project, [None] * layers, turned=False)


def _falcon(c: _Config) -> ModelShape:
    c = _Config(c.raw, multi_query=True, parallel_attn=True, tie_word_embeddings=True)
    d, layers = c("hidden_size", "n_embed"), c("num_hidden_layers", "n_layer")
    heads = c("num_attention_heads", "n_head")
    new = c.flag("new_decoder_architecture")
    shared = (c.maybe("num_kv_heads", "n_head_kv") or heads) if new else 1 if c.flag("multi_query") else heads
    ff, bias = c.maybe("ffn_hidden_size") or 4 * d, c.flag("bias")
    qkv = d + 2 * shared * (d // heads)
    two_norms = (c.maybe("num_ln_in_parallel_attn") or 2) == 2 if new else not c.flag("parallel_attn")
    layer = d * qkv + d * d + 2 * d * ff + bias * (qkv + 2 * d + ff) + (4 if two_norms else 2) * d
    tied = 1 if c.flag("tie_word_embeddings") else 2
    known = _Config({**c.raw, "hidden_size": d, "num_attention_heads": heads, "num_key_value_heads": shared})
    parameters = layers * layer + 2 * d + tied * c("vocab_size") * d
    return _decoder(known, parameters, [None] * layers, turned=not c.flag("alibi"))


def _deepseek(c: _Config) -> ModelShape:
    d, layers, heads = c("hidden_size"), c("num_hidden_layers"), c("num_attention_heads")
    rank, rope, nope, value = c("kv_lora_rank"), c("qk_rope_head_dim"), c("qk_nope_head_dim"), c("v_head_dim")
    query, bias = c.maybe("q_lora_rank"), c.flag("attention_bias")
    wide = heads * (nope + rope)
    q = d * wide if query is None else d * query + bias * query + query + query * wide
    attention = q + d * (rank + rope) + bias * (rank + rope) + rank + rank * heads * (nope + value)
    attention += heads * value * d + bias * d
    routed, shared, ff = c("n_routed_experts"), c("n_shared_experts", least=0), c("moe_intermediate_size")
    experts = 3 * d * ff * (routed + shared) + routed * d
    dense = min(c("first_k_dense_replace", least=0), layers)
    ffn = dense * 3 * d * c("intermediate_size") + (layers - dense) * experts
    tied = 1 if c.flag("tie_word_embeddings") else 2
    parameters = layers * (attention + 2 * d) + ffn + d + tied * c("vocab_size") * d
    shape = _decoder(_Config({**c.raw, "num_key_value_heads": heads, "head_dim": nope + rope}), parameters, [])
    return replace(shape, layers=(latent(rank, rope),) * layers)


def _bert(c: _Config) -> ModelShape:
    c = _Config(c.raw, type_vocab_size=2)
    d, ff, layers = c("hidden_size"), c("intermediate_size"), c("num_hidden_layers")
    embeddings = (c("vocab_size") + c("max_position_embeddings") + c("type_vocab_size")) * d + 2 * d
    layer = 4 * (d * d + d) + 2 * d * ff + ff + d + 4 * d
    return _decoder(c, embeddings + layers * layer + d * d + d, [], (f"no cache: {ENCODER_ONLY}",))


def _vit(c: _Config) -> ModelShape:
    c = _Config(c.raw, image_size=224, patch_size=16, num_channels=3, qkv_bias=True)
    d, ff, layers, patch = c("hidden_size"), c("intermediate_size"), c("num_hidden_layers"), c("patch_size")
    rows = (c("image_size") // patch) ** 2 + 1
    places, attention, pooler = rows, 4 * d * d + (4 if c.flag("qkv_bias") else 1) * d, d * d + d
    if operator := str(c.raw.get("operator") or ""):
        form, side = Form.parse(operator), c("image_size") // patch
        cost = Cost(d, d, c("num_attention_heads"), form.sets_around(side, side), form)
        places, attention, pooler = rows * (form.positions == "learned"), cost.parameters + d * d + d, 0
    embeddings = (places + 1) * d + (c("num_channels") * patch**2 + 1) * d
    layer = attention + 2 * d * ff + ff + d + 4 * d
    c = _Config({**c.raw, "max_position_embeddings": rows})
    return _decoder(c, embeddings + layers * layer + 2 * d + pooler, [], (f"no cache: {ENCODER_ONLY}",))


def _unknown(c: _Config) -> ModelShape:
    family = c.raw["model_type"]
    if c.flag("is_encoder_decoder"):
        unknown = "and what its decoder keeps of the encoder can't be guessed"
        raise ConfigError(f"family {family} is not known to kvik, {unknown}")
    if str(c.raw.get("architectures")).rstrip("']").endswith("ForMaskedLM") and not c.flag("is_decoder"):
        return _decoder(c, None, [], (f"no cache: {ENCODER_ONLY}", "parameters unknown"))
    note = f"family {family} is not known to kvik; assumed plain attention; parameters unknown"
    windows = _windows(c, c("num_hidden_layers", "n_layer", "num_layers"), lambda _: False)
    return _decoder(c, None, windows, (note,))


FAMILIES: dict[str, Callable[[_Config], ModelShape]] = {
    "bart": readers.bart,
    "bert": _bert,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma3_text": _gemma,
    "gpt2": _gpt2,
    "kvik_encoder": ours.encoder,
    "kvik_gpt": ours.decoder,
    "llama": _llama,
    "marian": readers.bart,
    "mistral": _mistral,
    "mixtral": _mistral,
    "mt5": readers.t5,
    "opt": _opt,
    "phi3": _phi3,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "roberta": _bert,
    "t5": readers.t5,
    "vit": _vit,
    "whisper": readers.whisper,
    "xlm-roberta": _bert,
}
