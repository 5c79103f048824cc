"""Gemma 2 (arXiv:2408.00118) and the text model of Gemma 3 (arXiv:2503.19786): windows between global layers.

x = x + rmsnorm(W_o attention(q, k, W_v n))                         n = rmsnorm(x)
x = x + rmsnorm(W_down (gelu(W_gate n) · W_up n))                   n = rmsnorm(x)

Every norm's weight is 1 + w, and x begins as the embedding times √width. Gemma 2: q = turn(W_q n), every second layer
sees a window, and scores and logits are capped, c · tanh(y / c). Gemma 3: q = turn(rmsnorm(W_q n)), five layers of six
see a window, and those turn by angles of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kvik.models.config import windows_of
from kvik.models.decoder import narrowed
from kvik.models.families.llama import Llama, LlamaConfig, parts, read_sizes
from kvik.models.fields import Fields
from kvik.models.layer import Layer
from kvik.models.parts import Rotation, Source
from kvik.models.rope import Rope
from kvik.models.watch import Chunk
from kvik.ops.pointwise import GeGLU, RMSNorm

# Files leave out what equals transformers' own defaults, so those belong to the format.
_USUAL: Mapping[str, dict[str, Any]] = {
    kind: {
        "head_dim": 256, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "sliding_window": 4096,
        "tie_word_embeddings": True, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 2304,
        "intermediate_size": 9216, "num_hidden_layers": 26, "bos_token_id": 2, "eos_token_id": 1, **own,
    }
    for kind, own in {
        "gemma2": {"vocab_size": 256_000, "max_position_embeddings": 8192},
        "gemma3_text": {"vocab_size": 262_208, "max_position_embeddings": 131_072},
    }.items()
}  # fmt: skip
_CAPS: Mapping[str, dict[str, float]] = {
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {},
}


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(LlamaConfig):
    """A Gemma decoder.

    Attributes:
        local_rope: how positions turn queries and keys of layers that see a window; `rope` is for the others.
        head_norms: whether each head's queries and keys are normed.
        query_scalar: scores are divided by its root.
        score_cap, logit_cap: what scores and logits stay below; None = anything.
    """

    family: ClassVar[str] = "gemma"

    local_rope: Rope
    head_norms: bool
    query_scalar: float
    score_cap: float | None
    logit_cap: float | None

    def ropes(self) -> tuple[Rope, ...]:
        """See `LlamaConfig.ropes`."""
        return tuple(self.rope if window is None else self.local_rope for window in self.windows)

    def norms(self) -> dict[str, int]:
        """See `LlamaConfig.norms`."""
        around = {"pre_feedforward_layernorm": self.hidden, "post_feedforward_layernorm": self.hidden}
        heads = {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim} if self.head_norms else {}
        return super().norms() | around | heads


def read(fields: Fields, generation: Fields, name: str) -> GemmaConfig:
    """From config.json and generation_config.json of transformers' Gemma 2 or Gemma 3 (text). Raises ConfigError."""
    kind = str(fields.values["model_type"])
    caps = {key: value for key, value in _CAPS[kind].items() if key not in fields.values}
    fields = Fields({**_USUAL[kind], **caps, **fields.values}, fields.where)
    third, sizes = kind == "gemma3_text", read_sizes(fields, generation, name)
    fields.text("hidden_activation", "gelu_pytorch_tanh", among=("gelu_pytorch_tanh",))
    fields.refuse_unless("use_bidirectional_attention", (False,))
    if third:
        fields.refuse_unless("attn_logit_softcapping", ())
    pattern = fields.integer("sliding_window_pattern", 6 if third else 2)
    window = fields.integer("sliding_window")
    rope, local = _ropes(fields, sizes, split=third)
    return GemmaConfig(
        **sizes,
        norm_eps=fields.number("rms_norm_eps"),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=False,
        rope=rope,
        local_rope=local,
        windows=windows_of(fields, sizes["layers"], window, lambda layer: (layer + 1) % pattern != 0),
        head_norms=third,
        query_scalar=fields.number("query_pre_attn_scalar"),
        score_cap=fields.optional_number("attn_logit_softcapping"),
        logit_cap=fields.optional_number("final_logit_softcapping"),
    )


def _ropes(fields: Fields, sizes: Mapping[str, Any], *, split: bool) -> tuple[Rope, Rope]:
    """Of layers that see all, and of those that see a window: in transformers 5's form, or the older one."""
    given = fields.values.get("rope_parameters")
    width, positions = sizes["head_dim"], sizes["max_positions"]
    if not split:
        rope = Rope.from_hf(fields, width, positions)
        return rope, rope
    kinds = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}
    if given is not None and (not isinstance(given, dict) or not set(given) <= set(kinds)):
        fields.fail("rope_parameters", "must be an object with settings for full_attention and sliding_attention")
    found = []
    for kind, (key, usual) in kinds.items():
        older: dict[str, object] = {"rope_theta": fields.number(key, usual)}
        if kind == "full_attention":
            older["rope_scaling"] = fields.values.get("rope_scaling")
        settings = older if given is None else {**older, "rope_parameters": given.get(kind)}
        found.append(Rope.from_hf(Fields(settings, fields.where), width, positions))
    return found[0], found[1]


def norm(config: GemmaConfig, source: Source, name: str, turned: bool = False) -> RMSNorm:
    """A norm, whose weight is held less 1."""
    return RMSNorm(source.vector(f"{name}.weight", turned) + 1, config.norm_eps)


class Gemma(Llama):
    """A Gemma decoder."""

    config: GemmaConfig

    def __init__(self, config: GemmaConfig, source: Source) -> None:
        super().__init__(config, source)
        self.norm = norm(config, source, "model.norm")
        self.local_rotation = Rotation(config.local_rope, source.device)

    def block(self, config: LlamaConfig, source: Source, layer: int) -> Layer:
        """See `Llama.block`."""
        assert isinstance(config, GemmaConfig), "made for one of these"
        name, made = f"model.layers.{layer}", parts(config, source, layer)
        made["attention_norm"] = norm(config, source, f"{name}.input_layernorm")
        made["attention_after"] = norm(config, source, f"{name}.post_attention_layernorm")
        made["mlp_norm"] = norm(config, source, f"{name}.pre_feedforward_layernorm")
        made["mlp_after"] = norm(config, source, f"{name}.post_feedforward_layernorm")
        for part in ("q_norm", "k_norm") if config.head_norms else ():
            if part == "q_norm" or config.keeps(layer):
                made[part] = norm(config, source, f"{name}.self_attn.{part}", turned=True)
        return Layer(**made | {"activation": GeGLU(), "scale": config.query_scalar**-0.5, "softcap": config.score_cap})

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers; see `Llama.forward`."""
        angles, local = self.rotation.angles(step.positions), self.local_rotation.angles(step.positions)
        x = self.embedding.rows(tokens) * self.config.hidden**0.5
        for index, layer in enumerate(self.blocks):
            if index == self.late:
                step, going, rows = narrowed(step, rows, len(x))
                x, angles, local = x[going], angles[going], local[going]
            x = layer(step, index, x, angles if self.config.windows[index] is None else local)
        logits, cap = self.head(x[rows], after=self.norm), self.config.logit_cap
        return logits if cap is None else (logits / cap).tanh() * cap
