"""How a model asks for attention: found out by trying, with five tokens of two rows, one of them padded.

1. with transformers' own cache: what each layer keeps, and what comes out.
2. with handles in place of keys and values: is each layer's attention what the model's own gives over decoded rows, and
   does the same come out? (In half precision five tokens may end far apart; one layer's attention does not.)
3. if not: with decoded rows. If that differs as well, the model is refused.

So no list of architectures is needed, and none is trusted.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from kvik.cache.shape import LayerShape
from kvik.errors import ModelError
from kvik.hf.compat import layer_kinds

TOKENS, ROWS, SOURCE = 5, 2, 3
CODECS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_NEAR = {torch.float32: 2e-3, torch.bfloat16: 0.5, torch.float16: 0.2}  # of all states' length


@dataclass(frozen=True)
class Found:
    """How a model asks.

    Attributes:
        layers: what each layer keeps of a token; no heads where it keeps nothing.
        kinds: what transformers calls each layer.
        sources: what each layer keeps of a source's row; none where the model reads no source.
        dtype: of keys and values.
        attention: the model's own attention.
        direct: attention reads pages; else it is given decoded rows.
        why: why not.
    """

    layers: tuple[LayerShape, ...]
    kinds: tuple[str, ...]
    sources: tuple[LayerShape, ...]
    dtype: torch.dtype
    attention: str
    direct: bool = True
    why: str = ""

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the model still asks in this way, as far as can be seen without trying."""
        return self.attention == attention_of(model) and self.dtype == model.dtype

    @property
    def codec(self) -> str:
        """The one that keeps the model's own precision."""
        return CODECS[self.dtype]


class _Recorder(DynamicCache):  # type: ignore[misc]
    """transformers' own, which remembers what was kept."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)
        self.shapes: dict[int, tuple[torch.Size, torch.Size]] = {}
        self.dtype = torch.float32

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See transformers' Cache."""
        self.shapes[layer_idx], self.dtype = (key_states.shape, value_states.shape), value_states.dtype
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def attention_of(model: PreTrainedModel) -> str:
    """What a model's decoder uses."""
    return str(model.get_decoder().config._attn_implementation or "eager")


def kept_by(model: PreTrainedModel) -> tuple[Found, list[Tensor]]:
    """What a model's layers keep, and the states that come out with transformers' own cache.

    Raises:
        ModelError: it can't be tried, or keeps no keys and values.
    """
    config = model.config.get_text_config(decoder=True)
    recorder, cross = _Recorder(config), _Recorder(config)
    cache = EncoderDecoderCache(recorder, cross) if model.config.is_encoder_decoder else recorder
    try:
        states = tried(model, cache)
        kinds = layer_kinds(config)
    except Exception as error:
        raise _refused(model, f"can't be tried with {TOKENS} tokens ({_line(error)})") from error
    if not recorder.shapes:
        raise _refused(model, "keeps no keys and values in its cache")
    if recorder.dtype not in CODECS:
        raise _refused(model, f"keeps {recorder.dtype}, and kvik {', '.join(map(str, CODECS))}")
    count = max(len(kinds), max(recorder.shapes) + 1)
    kinds += [("full_attention", None)] * (count - len(kinds))
    layers = tuple(_shape(recorder.shapes.get(i), window) for i, (_, window) in enumerate(kinds))
    sources = tuple(_shape(cross.shapes.get(i), None, True) for i in range(count)) if cross.shapes else ()
    names = tuple(kind for kind, _ in kinds)
    return Found(layers, names, sources, recorder.dtype, attention_of(model)), states


def tried(model: PreTrainedModel, cache: object) -> list[Tensor]:
    """The states of five tokens of two rows, in two forwards; the second row's first place is padding."""
    decoder = model.get_decoder()
    embedding = decoder.get_input_embeddings()
    device = embedding.weight.device
    ids = torch.arange(ROWS * TOKENS, device=device).view(ROWS, TOKENS) % embedding.weight.shape[0]
    mask = torch.ones((ROWS, TOKENS), dtype=torch.long, device=device)
    mask[1, 0] = 0
    source: dict[str, Any] = {}
    if model.config.is_encoder_decoder:
        width = model.config.get_text_config(encoder=True).hidden_size
        noise = torch.randn((ROWS, SOURCE, width), generator=torch.Generator().manual_seed(0))
        source["encoder_hidden_states"] = noise.to(device, model.dtype)
        if "encoder_attention_mask" in inspect.signature(decoder.forward).parameters:
            source["encoder_attention_mask"] = torch.ones((ROWS, SOURCE), dtype=torch.long, device=device).tril(1)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    out = []
    try:
        with torch.inference_mode():
            for first, end in ((0, TOKENS - 1), (TOKENS - 1, TOKENS)):
                found: ModelOutput = decoder(
                    input_ids=ids[:, first:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True,
                    return_dict=True, **source,
                )  # fmt: skip
                states = found[0]  # its last states; the logits of a model that is its own decoder
                out += [states[0], states[1, 1 - first :] if first == 0 else states[1]]
    finally:
        for module, training in modes:
            module.training = training
    return out


def differ(states: list[Tensor], others: list[Tensor], dtype: torch.dtype) -> str:
    """How two runs differ, in words; nothing where they are as near as their type allows."""
    mine, theirs = (torch.cat([x.flatten().float() for x in run]) for run in (others, states))
    gap, most = float((mine - theirs).norm()), float(theirs.norm())
    return "" if gap <= _NEAR[dtype] * most else f"its states differ by {gap:.2g} of {most:.2g}"


def refused(model: PreTrainedModel, direct: str, dense: str) -> ModelError:
    """Neither way gives what the model computes."""
    return _refused(model, f"works over pages neither directly ({direct}) nor with decoded rows ({dense})")


def reason(error: Exception) -> str:
    """Why a way is closed, in a line."""
    return _line(error)


def _refused(model: PreTrainedModel, why: str) -> ModelError:
    return ModelError(f"{type(model).__name__} {why}; use transformers' own DynamicCache for it")


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _shape(kept: tuple[torch.Size, torch.Size] | None, window: int | None, source: bool = False) -> LayerShape:
    if kept is None:
        return LayerShape(heads=0, streams=(), source=source)
    k, v = kept
    return LayerShape(heads=k[1], streams=(("k", k[3]), ("v", v[3])), window=window, source=source)
