"""DeepSeek-V2 (arXiv:2405.04434) and -V3 (arXiv:2412.19437): latent attention, and experts.

A token leaves one latent c for all heads, and one key r that carries its position:

c = rmsnorm(W_DKV n)            r = turn(W_KR n)            n = rmsnorm(x)
q = W_UQ rmsnorm(W_DQ n)        or W_Q n; of each head: a part p without position, and a turned part t
score = (W_UKᵀ p) · c + t · r   its key W_UK c is never made: the query goes to the latent instead
x = x + W_O (W_UV Σ weight · c) nor its value W_UV c: the weighted latents are turned into values once

So a layer is one lane with two streams, `latent` and `rope`, and all heads share it: one latent is key and value. Every
chunk is computed so, of a prompt too. The feed-forward part of all but the first layers are experts
(`models/experts.py`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from kvik.cache.shape import LayerShape
from kvik.errors import ConfigError
from kvik.models.config import MOST_LAYERS, MOST_ROWS, MOST_WIDTH, Config, end_ids, first_id
from kvik.models.experts import Experts, FeedForward, Router, Scoring
from kvik.models.fields import Fields
from kvik.models.parts import Rotation, Source
from kvik.models.rope import Rope
from kvik.models.watch import Chunk
from kvik.ops import pointwise
from kvik.ops.grouped import dense
from kvik.ops.pointwise import RMSNorm, SwiGLU

INNER_EPS = 1e-6  # of the norms of the latent and of the query's: not the model's own


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(Config):
    """A DeepSeek-V2- or V3-style decoder.

    Attributes:
        latent: width of c; with that of r it is `head_dim`, and `kv_heads` is 1.
        rope: how positions turn r, and the queries' part t.
        plain: width of a head's part p.
        value: width of a head's value.
        query_rank: width of the query's own latent; 0 = it has none.
        attention_bias: whether the projections to latents, and the last, have biases.
        dense: how many of the first layers have one feed-forward part, of `ffn` channels, and no experts.
        experts, used, shared: how many there are, a token takes, and make up the part that all tokens take.
        expert_ffn: channels of one.
        groups, used_groups, scoring, normed, factor: see `Router`.
        norm_eps: the epsilon of its norms.
    """

    family: ClassVar[str] = "deepseek"

    ffn: int
    norm_eps: float
    latent: int
    plain: int
    value: int
    query_rank: int
    rope: Rope
    attention_bias: bool
    dense: int
    experts: int
    used: int
    shared: int
    expert_ffn: int
    groups: int
    used_groups: int
    scoring: str
    normed: bool
    factor: float

    def __post_init__(self) -> None:
        super().__post_init__()
        each, name = self.experts // self.groups, self.name
        if self.latent % 2:
            raise ConfigError(f"{name}: a latent of {self.latent} channels can't be cut into pairs, as kvik turns them")
        if self.experts % self.groups or self.used_groups > self.groups or self.used > each * self.used_groups:
            raise ConfigError(
                f"{name}: a token can't take {self.used} of {self.experts} experts from {self.used_groups} of "
                f"{self.groups} equal groups"
            )

    @property
    def scale(self) -> float:
        """Of the scores; where positions are stretched (YaRN, arXiv:2309.00071) it grows with that factor."""
        scale = 1 / math.sqrt(self.plain + self.rope.head_dim)
        if self.rope.kind == "default" or not self.rope.mscale_all_dim or self.rope.factor <= 1:
            return scale
        grown = 0.1 * self.rope.mscale_all_dim * math.log(self.rope.factor) + 1
        return scale * grown * grown

    def layer_shapes(self) -> list[LayerShape]:
        """What each layer keeps of a token. Positions turn the channels of r alone."""
        frequencies = (0.0,) * (self.latent // 2) + tuple(self.rope.frequencies()[0].tolist())
        streams = (("latent", self.latent), ("rope", self.rope.head_dim))
        return [LayerShape(1, streams, frequencies=frequencies)] * self.layers

    def spare(self, name: str) -> bool:
        """See `Config.spare`: layers behind the last predict further tokens, and are none of this decoder."""
        match = re.match(r"model\.layers\.(\d{1,5})\.", name)
        return super().spare(name) or (match is not None and int(match[1]) >= self.layers)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Config.tensor_shapes`: of files, where each expert has tensors of its own."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden)}
        for i in range(self.layers):
            shapes |= {f"model.layers.{i}.{part}": shape for part, shape in self._attention().items()}
            shapes |= {f"model.layers.{i}.mlp.{part}": shape for part, shape in self._feed_forward(i).items()}
        shapes["model.norm.weight"] = (self.hidden,)
        return shapes if self.tied_embeddings else shapes | {"lm_head.weight": (self.vocab_size, self.hidden)}

    def _attention(self) -> dict[str, tuple[int, ...]]:
        hidden, rank, rope = self.hidden, self.query_rank, self.rope.head_dim
        queries = self.heads * (self.plain + rope)
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.kv_a_proj_with_mqa.weight": (self.latent + rope, hidden),
            "self_attn.kv_a_layernorm.weight": (self.latent,),
            "self_attn.kv_b_proj.weight": (self.heads * (self.plain + self.value), self.latent),
            "self_attn.o_proj.weight": (hidden, self.heads * self.value),
        }
        if rank:
            shapes |= {"self_attn.q_a_proj.weight": (rank, hidden), "self_attn.q_a_layernorm.weight": (rank,)}
            shapes |= {"self_attn.q_b_proj.weight": (queries, rank)}
        else:
            shapes |= {"self_attn.q_proj.weight": (queries, hidden)}
        if self.attention_bias:
            for part in ("kv_a_proj_with_mqa", "o_proj", *(["q_a_proj"] if rank else [])):
                shapes[f"self_attn.{part}.bias"] = shapes[f"self_attn.{part}.weight"][:1]
        return shapes

    def _feed_forward(self, layer: int) -> dict[str, tuple[int, ...]]:
        if layer < self.dense:
            return _gated("", self.ffn, self.hidden)
        shapes: dict[str, tuple[int, ...]] = {"gate.weight": (self.experts, self.hidden)}
        shapes |= {"gate.e_score_correction_bias": (self.experts,)} if self.scoring == "sigmoid" else {}
        for number in range(self.experts):
            shapes |= _gated(f"experts.{number}.", self.expert_ffn, self.hidden)
        return shapes | _gated("shared_experts.", self.shared * self.expert_ffn, self.hidden)


def _gated(name: str, ffn: int, hidden: int) -> dict[str, tuple[int, ...]]:
    wide = (ffn, hidden)
    return {f"{name}gate_proj.weight": wide, f"{name}up_proj.weight": wide, f"{name}down_proj.weight": wide[::-1]}


def read(fields: Fields, generation: Fields, name: str) -> DeepseekConfig:
    """From config.json and generation_config.json of transformers' DeepseekV2 or DeepseekV3. Raises ConfigError."""
    third = fields.values["model_type"] == "deepseek_v3"
    positions, turned = fields.integer("max_position_embeddings"), fields.integer("qk_rope_head_dim", most=2**16)
    latent, ranked = fields.integer("kv_lora_rank", most=2**16), fields.values.get("q_lora_rank", 0) is not None
    fields.text("hidden_act", "silu", among=("silu",))
    fields.refuse_unless("mlp_bias", (False,))
    fields.refuse_unless("rope_interleave", (True,))
    fields.refuse_unless("moe_layer_freq", (1,))
    fields.refuse_unless("scoring_func", ("sigmoid" if third else "softmax",))
    methods = ("noaux_tc",) if third else ("greedy", "group_limited_greedy")
    limited = fields.text("topk_method", methods[0], among=methods) != "greedy"
    if not third:  # transformers reads it for DeepSeek-V3 alone
        fields.refuse_unless("norm_topk_prob", (False,))
    return DeepseekConfig(
        name=name,
        vocab_size=fields.integer("vocab_size", most=MOST_ROWS),
        layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
        hidden=fields.integer("hidden_size", most=MOST_WIDTH),
        heads=fields.integer("num_attention_heads", most=2**16),
        kv_heads=1,
        head_dim=latent + turned,
        ffn=fields.integer("intermediate_size", most=MOST_ROWS),
        max_positions=positions,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        eos_ids=end_ids(fields, generation),
        bos_id=first_id(fields, "bos_token_id"),
        latent=latent,
        plain=fields.integer("qk_nope_head_dim", most=2**16),
        value=fields.integer("v_head_dim", most=2**16),
        query_rank=fields.integer("q_lora_rank", most=2**16) if ranked else 0,
        rope=Rope.from_hf(fields, turned, positions),
        attention_bias=fields.flag("attention_bias", False),
        dense=fields.integer("first_k_dense_replace", 3 if third else 0, least=0),
        experts=fields.integer("n_routed_experts", most=2**16),
        used=fields.integer("num_experts_per_tok", most=2**16),
        shared=fields.integer("n_shared_experts", most=2**16),
        expert_ffn=fields.integer("moe_intermediate_size", most=MOST_ROWS),
        groups=fields.integer("n_group") if limited else 1,
        used_groups=fields.integer("topk_group") if limited else 1,
        scoring="sigmoid" if third else "softmax",
        normed=third and fields.flag("norm_topk_prob", True),
        factor=fields.number("routed_scaling_factor", 2.5 if third else 1.0),
    )


class Block:
    """One layer's weights, and what it does with them."""

    def __init__(self, config: DeepseekConfig, source: Source, layer: int) -> None:
        self.config = config
        name, bias = f"model.layers.{layer}", config.attention_bias
        attention = f"{name}.self_attn"
        self.attention_norm = RMSNorm(source.vector(f"{name}.input_layernorm.weight"), config.norm_eps)
        self.query_down = self.query_norm = None
        if config.query_rank:
            self.query_down = source.linear(f"{attention}.q_a_proj", bias=bias)
            self.query_norm = RMSNorm(source.vector(f"{attention}.q_a_layernorm.weight"), INNER_EPS)
        self.query = source.linear(f"{attention}.{'q_b_proj' if config.query_rank else 'q_proj'}")
        self.down = source.linear(f"{attention}.kv_a_proj_with_mqa", bias=bias)
        self.latent_norm = RMSNorm(source.vector(f"{attention}.kv_a_layernorm.weight"), INNER_EPS)
        heads = dense(source.tensors[f"{attention}.kv_b_proj.weight"]).view(config.heads, -1, config.latent)
        self.keys = [source.held(head[: config.plain].t()) for head in heads]
        self.values = [source.held(head[config.plain :]) for head in heads]
        self.o = source.linear(f"{attention}.o_proj", bias=bias)
        self.mlp_norm = RMSNorm(source.vector(f"{name}.post_attention_layernorm.weight"), config.norm_eps)
        self.mlp = _mlp(config, source, f"{name}.mlp", layer)

    def __call__(self, step: Chunk, index: int, x: Tensor, angles: Tensor) -> Tensor:
        """Takes a step's T tokens through the layer; see `Layer`."""
        config, count = self.config, len(x)
        down = self.down(x, after=self.attention_norm)
        latent, key = self.latent_norm(down[:, : config.latent]), down[:, config.latent :]
        step.append(index, latent=latent.unsqueeze(1), rope=pointwise.turn(key.unsqueeze(1), angles))
        q = self._queries(x).view(count, config.heads, -1)
        plain, turned = q[..., : config.plain], pointwise.turn(q[..., config.plain :].contiguous(), angles)
        absorbed = torch.stack([key(plain[:, head]) for head, key in enumerate(self.keys)], dim=1)
        out = step.attend(index, torch.cat((absorbed, turned), dim=-1), scale=config.scale).out
        values = torch.cat([value(out[:, head]) for head, value in enumerate(self.values)], dim=1)
        x = self.o(values, onto=x)
        return self.mlp(x, after=self.mlp_norm, onto=x)

    def _queries(self, x: Tensor) -> Tensor:
        if self.query_down is None:
            return self.query(x, after=self.attention_norm)
        return self.query(self.query_down(x, after=self.attention_norm), after=self.query_norm)


def _mlp(config: DeepseekConfig, source: Source, name: str, layer: int) -> FeedForward | Experts:
    def part(name: str) -> FeedForward:
        up = source.linear(f"{name}.gate_proj", f"{name}.up_proj")
        return FeedForward(up, SwiGLU(), source.linear(f"{name}.down_proj"))

    if layer < config.dense:
        return part(name)
    corrected = config.scoring == "sigmoid"
    router = Router(
        gate=source.held(source.tensors[f"{name}.gate.weight"], "f32"),
        scoring=cast(Scoring, config.scoring),
        used=config.used,
        groups=config.groups,
        used_groups=config.used_groups,
        normed=config.normed,
        factor=config.factor,
        correction=source.vector(f"{name}.gate.e_score_correction_bias") if corrected else None,
    )
    experts = [part(f"{name}.experts.{number}") for number in range(config.experts)]
    return Experts(router, experts, part(f"{name}.shared_experts"))


class Deepseek:
    """A DeepSeek-V2- or V3-style decoder.

    Attributes:
        config: its sizes.
        layers: what each layer keeps of a token.
    """

    def __init__(self, config: DeepseekConfig, source: Source) -> None:
        self.config = config
        self.layers = config.layer_shapes()
        self.embedding = source.embedding("model.embed_tokens")
        self.blocks = [Block(config, source, layer) for layer in range(config.layers)]
        self.norm = RMSNorm(source.vector("model.norm.weight"), config.norm_eps)
        self.head = self.embedding if config.tied_embeddings else source.embedding("lm_head")
        self.rotation = Rotation(config.rope, source.device)

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Takes a step's tokens through all layers; see `Llama.forward`."""
        angles = self.rotation.angles(step.positions)
        x = self.embedding.rows(tokens)
        for index, layer in enumerate(self.blocks):
            x = layer(step, index, x, angles)
        return self.head(x[rows], after=self.norm)
