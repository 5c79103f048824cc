"""What a decoder is, in one frozen value, read from config.json (transformers) or from a GGUF file's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from kvik.errors import ConfigError
from kvik.models.fields import Fields
from kvik.models.rope import Rope

__all__ = ["Config", "Rope"]

Family = Literal["llama", "gpt2"]
ACTIVATIONS: dict[Family, tuple[str, ...]] = {"llama": ("silu",), "gpt2": ("gelu_new",)}
MOST_LAYERS = 10_000
END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>")  # control tokens that end a turn in the known chat formats
_CONTROL = 3  # GGUF's token type of control tokens

_GGUF_KEYS = [  # what kvik reads, or knows to be without effect on the numbers; each under "<arch>."
    *("vocab_size", "context_length", "embedding_length", "feed_forward_length", "block_count", "tensor_data_layout"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.sliding_window"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.attn_factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow", "expert_count", "expert_used_count"),
]


@dataclass(frozen=True)
class Config:
    """A decoder.

    Attributes:
        family: "llama" (also Mistral, SmolLM) or "gpt2".
        layers, hidden, heads, kv_heads, head_dim, ffn: its sizes; heads is a multiple of kv_heads.
        max_positions: positions it was made for; a hard limit where positions are learned (gpt2).
        norm_eps: the epsilon of its norms.
        activation: of its feed-forward part, by transformers' name.
        tied_embeddings: whether the output projection is the embedding.
        attention_bias, mlp_bias: whether those projections have biases.
        rope: how positions turn queries and keys; None where positions are learned.
        windows: for each layer, how many positions back it sees (itself included); None for all.
        eos_ids: every token id that ends a text.
        bos_id: the token id that begins one, or None.
        name: for people.
    """

    family: Family
    vocab_size: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    max_positions: int
    norm_eps: float
    activation: str
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: Rope | None
    windows: tuple[int | None, ...]
    eos_ids: tuple[int, ...]
    bos_id: int | None
    name: str

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.name}: {self.heads} query heads can't share {self.kv_heads} key heads evenly")
        if self.rope is not None and self.rope.head_dim != self.head_dim:
            raise ConfigError(f"{self.name}: rope turns {self.rope.head_dim} of {self.head_dim} dimensions of a head")
        if (self.rope is None) != (self.family == "gpt2") or len(self.windows) != self.layers:
            raise ConfigError(f"{self.name}: its rope or windows do not fit a {self.family} of {self.layers} layers")

    @classmethod
    def from_hf(cls, folder_config: Mapping[str, object], generation: Mapping[str, object] | None, name: str) -> Config:
        """From config.json, and generation_config.json where there is one.

        Raises:
            ConfigError: model_type is not llama, mistral or gpt2; a key is missing or its value can't be used.
        """
        fields = Fields(folder_config, f"{name}: config.json")
        kind = fields.text("model_type", among=("llama", "mistral", "gpt2"))
        fields.refuse_unless("quantization_config", ())
        return (_gpt2_from_hf if kind == "gpt2" else _llama_from_hf)(fields, generation, name)

    @classmethod
    def from_gguf(cls, fields: Mapping[str, object]) -> Config:
        """From the fields that `read_gguf` returns: the file's own, "GGUF.tensors" (the tensors' names, which say
        whether embeddings are tied and projections have biases) and "GGUF.rope_freqs" (that tensor, if there).

        Raises:
            ConfigError: the architecture is not llama or gpt2; a key is missing, unknown, or can't be used.
        """
        name = fields.get("general.name")
        name = name if isinstance(name, str) and name else "GGUF model"
        checked = Fields(fields, name)
        family = cast(Family, checked.text("general.architecture", among=ACTIVATIONS))
        checked.refuse_unknown([f"{family}.{key}" for key in _GGUF_KEYS], prefix=f"{family}.")
        checked.refuse_unless(f"{family}.expert_count", (0,))
        return _from_gguf(checked, family, name)

    def to_json(self) -> dict[str, object]:
        """The same as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Config:
        """What `to_json` gave, checked again. Raises ConfigError."""
        where = "prepared config.json"
        if set(values) != {field.name for field in dataclasses.fields(cls)}:
            raise ConfigError(f"{where} has other keys than this version of kvik writes; delete its folder")
        fields = Fields(values, where)
        family = cast(Family, fields.text("family", among=ACTIVATIONS))
        sizes = ("vocab_size", "hidden", "heads", "kv_heads", "head_dim", "ffn", "max_positions")
        return cls(
            family=family,
            layers=fields.integer("layers", most=MOST_LAYERS),
            **{key: fields.integer(key) for key in sizes},
            norm_eps=fields.number("norm_eps"),
            activation=fields.text("activation", among=ACTIVATIONS[family]),
            tied_embeddings=fields.flag("tied_embeddings"),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
            rope=_rope_from_json(values["rope"]),
            windows=_windows_from_json(fields),
            eos_ids=fields.ids("eos_ids"),
            bos_id=fields.integer("bos_id", least=0) if fields.has("bos_id") else None,
            name=fields.text("name"),
        )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's canonical name and shape: those of transformers' own files for the family.

        Llama's projections are [out, in]; GPT-2's are Conv1D, [in, out], and its names have no "transformer." prefix.
        """
        return _llama_shapes(self) if self.family == "llama" else _gpt2_shapes(self)


def _end_ids(*sources: Fields) -> tuple[int, ...]:
    """Every end-of-sequence id that any source names, in order, once each."""
    return tuple(dict.fromkeys(i for fields in sources for i in fields.ids("eos_token_id")))


def _llama_from_hf(fields: Fields, generation: Mapping[str, object] | None, name: str) -> Config:
    mistral = fields.values["model_type"] == "mistral"
    hidden, heads = fields.integer("hidden_size", most=2**20), fields.integer("num_attention_heads", most=2**16)
    if not fields.has("head_dim") and hidden % heads:
        fields.fail("num_attention_heads", f"hidden_size {hidden} is not a multiple of it")
    head_dim = fields.integer("head_dim", hidden // heads, most=2**16)
    kv_heads = fields.integer("num_key_value_heads", _mistral_default(fields, heads), most=heads)
    if heads % kv_heads:
        fields.fail("num_key_value_heads", f"the {heads} num_attention_heads are not a multiple of it")
    layers, positions = fields.integer("num_hidden_layers", most=MOST_LAYERS), fields.integer("max_position_embeddings")
    window = None
    if mistral and ("sliding_window" not in fields.values or fields.has("sliding_window")):
        window = fields.integer("sliding_window", 4096)
    else:
        fields.refuse_unless("sliding_window", ())
    uniform = "full_attention" if window is None else "sliding_attention"
    fields.refuse_unless("layer_types", ([uniform] * layers,))
    bias = not mistral and fields.flag("attention_bias", False)
    return Config(
        family="llama",
        vocab_size=fields.integer("vocab_size", most=2**24),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=fields.integer("intermediate_size", most=2**24),
        max_positions=positions,
        norm_eps=fields.number("rms_norm_eps"),
        activation=fields.text("hidden_act", "silu", among=ACTIVATIONS["llama"]),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=bias,
        mlp_bias=not mistral and fields.flag("mlp_bias", False),
        rope=Rope.from_hf(fields, head_dim, positions),
        windows=(window,) * layers,
        eos_ids=_end_ids(fields, Fields(generation or {}, f"{name}: generation_config.json")),
        bos_id=fields.integer("bos_token_id", least=0) if fields.has("bos_token_id") else None,
        name=name,
    )


def _mistral_default(fields: Fields, heads: int) -> int:
    """Key heads where config.json names none: transformers takes 8 for Mistral, and all heads for Llama."""
    absent = "num_key_value_heads" not in fields.values
    return 8 if fields.values["model_type"] == "mistral" and absent else heads


def _gpt2_from_hf(fields: Fields, generation: Mapping[str, object] | None, name: str) -> Config:
    hidden, heads = fields.integer("n_embd", most=2**20), fields.integer("n_head", most=2**16)
    if hidden % heads:
        fields.fail("n_head", f"n_embd {hidden} is not a multiple of it")
    fields.refuse_unless("scale_attn_weights", (True,))
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        fields.refuse_unless(key, (False,))
    layers = fields.integer("n_layer", most=MOST_LAYERS)
    return Config(
        family="gpt2",
        vocab_size=fields.integer("vocab_size", most=2**24),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=fields.integer("n_inner", 4 * hidden, most=2**24),
        max_positions=fields.integer("n_positions"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.text("activation_function", "gelu_new", among=ACTIVATIONS["gpt2"]),
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        attention_bias=True,
        mlp_bias=True,
        rope=None,
        windows=(None,) * layers,
        eos_ids=_end_ids(fields, Fields(generation or {}, f"{name}: generation_config.json")),
        bos_id=fields.integer("bos_token_id", least=0) if fields.has("bos_token_id") else None,
        name=name,
    )


def _from_gguf(fields: Fields, family: Family, name: str) -> Config:
    def size(key: str, default: int | None = None, most: int = 2**24) -> int:
        key = f"{family}.{key}"
        return fields.integer(key, most=most) if default is None else fields.integer(key, default, most=most)

    llama = family == "llama"
    tensors = fields.values.get("GGUF.tensors")
    if not isinstance(tensors, list | tuple):
        raise ConfigError(f"{name}: the names of its tensors are missing; pass the fields that read_gguf returns")
    hidden, heads, layers = (
        size("embedding_length"),
        size("attention.head_count"),
        size("block_count", most=MOST_LAYERS),
    )
    if not fields.has(f"{family}.attention.key_length") and hidden % heads:
        fields.fail(f"{family}.attention.head_count", f"embedding_length {hidden} is not a multiple of it")
    head_dim = size("attention.key_length", hidden // heads)
    fields.refuse_unless(f"{family}.attention.value_length", (head_dim,))
    kv_heads = size("attention.head_count_kv", heads)
    if heads % kv_heads or (kv_heads != heads and not llama):
        fields.fail(f"{family}.attention.head_count_kv", f"the {heads} heads can't share that many key heads")
    vocabulary = fields.values.get("tokenizer.ggml.tokens")
    counted = len(vocabulary) if isinstance(vocabulary, list) and vocabulary else None
    positions = size("context_length", most=2**31 - 1)
    window_key = f"{family}.attention.sliding_window"
    window = fields.integer(window_key) if fields.has(window_key) and fields.values[window_key] != 0 else None
    return Config(
        family=family,
        vocab_size=size("vocab_size", counted),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=size("feed_forward_length"),
        max_positions=positions,
        norm_eps=fields.number(f"{family}.attention.layer_norm_{'rms_' if llama else ''}epsilon"),
        activation=ACTIVATIONS[family][0],
        tied_embeddings="output.weight" not in tensors,
        attention_bias=not llama or "blk.0.attn_q.bias" in tensors,
        mlp_bias=not llama or "blk.0.ffn_up.bias" in tensors,
        rope=Rope.from_gguf(fields, family, head_dim, positions) if llama else None,
        windows=(window,) * layers,
        eos_ids=_gguf_end_ids(fields),
        bos_id=next(iter(fields.ids("tokenizer.ggml.bos_token_id")), None),
        name=name,
    )


def _gguf_end_ids(fields: Fields) -> tuple[int, ...]:
    """The file's end-of-sequence and end-of-turn ids, and those of `END_TOKENS` that are control tokens in it."""
    ids = [*fields.ids("tokenizer.ggml.eos_token_id"), *fields.ids("tokenizer.ggml.eot_token_id")]
    tokens, kinds = fields.values.get("tokenizer.ggml.tokens"), fields.values.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, list):
        ends = {text: i for i, (text, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == _CONTROL}
        ids += [ends[text] for text in END_TOKENS if text in ends]
    return tuple(dict.fromkeys(ids))


def _rope_from_json(values: object) -> Rope | None:
    if values is None:
        return None
    known = {field.name for field in dataclasses.fields(Rope)}
    if not isinstance(values, dict) or set(values) != known:
        raise ConfigError("prepared config.json has other rope settings than this version of kvik writes")
    fields = Fields(values, "prepared config.json (rope)")
    numbers = ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    return Rope(
        head_dim=fields.integer("head_dim"),
        kind=cast(Literal["default"], fields.text("kind", among=("default", "linear", "llama3", "yarn"))),
        original_positions=fields.integer("original_positions", least=0),
        attention_factor=fields.optional_number("attention_factor"),
        mscale=fields.number("mscale", above=-1.0) if fields.has("mscale") else None,
        mscale_all_dim=fields.number("mscale_all_dim", above=-1.0) if fields.has("mscale_all_dim") else None,
        truncate=fields.flag("truncate"),
        factors=fields.numbers("factors"),
        **{key: fields.number(key) for key in numbers},
    )


def _windows_from_json(fields: Fields) -> tuple[int | None, ...]:
    windows = fields.values["windows"]
    if not isinstance(windows, list | tuple) or not all(w is None or (type(w) is int and w > 0) for w in windows):
        fields.fail("windows", "must be a list with a number of positions or null for each layer")
    return tuple(windows)


def _llama_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config.hidden, config.ffn
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    projections = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.layers):
        layer = f"model.layers.{i}"
        for part, shape in projections.items():
            shapes[f"{layer}.{part}.weight"] = shape
            if config.attention_bias if part.startswith("self_attn") else config.mlp_bias:
                shapes[f"{layer}.{part}.bias"] = shape[:1]
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    return shapes if config.tied_embeddings else shapes | {"lm_head.weight": (config.vocab_size, hidden)}


def _gpt2_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, ffn = config.hidden, config.ffn
    projections = {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, ffn),
        "mlp.c_proj": (ffn, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, hidden),
        "wpe.weight": (config.max_positions, hidden),
    }
    for i in range(config.layers):
        for part, shape in projections.items():
            shapes |= {f"h.{i}.{part}.weight": shape, f"h.{i}.{part}.bias": shape[1:]}
        shapes |= {f"h.{i}.{norm}.{part}": (hidden,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    shapes |= {"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)}
    return shapes if config.tied_embeddings else shapes | {"lm_head.weight": (config.vocab_size, hidden)}
