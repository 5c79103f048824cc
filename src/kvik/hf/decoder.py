"""A transformers model as a decoder of kvik's own: tokens of many texts in one row, attention over each text's pages.

    ids         a b c | f | x y        [1, T]: three texts' new tokens, one behind the other
    positions   0 1 2 | 9 | 4 5        each text's own
    attention   the step's: who sees what is in its tables, not in a mask

So nothing is padded, and a prompt's chunk goes through the model beside other texts' single tokens.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from kvik.cache.cache import Cache as Pages
from kvik.cache.spec import LayerShape, Spec
from kvik.errors import ModelError, UsageError
from kvik.hf.attachment import Attachment, attachment_of
from kvik.hf.chunk import Query, attended
from kvik.hf.finding import differ, reason
from kvik.hf.handle import Handle
from kvik.hf.opening import find
from kvik.hf.pieces import Pieces
from kvik.models.watch import Chunk
from kvik.ops.linear import Linear

_LENGTHS = (3, 5)  # of the two texts that are tried


class Over:
    """A step's queries over its own rows: see `kvik.hf.chunk.Reading`."""

    causal, tried = True, False

    def __init__(self, step: Chunk, layers: list[LayerShape]) -> None:
        self._step, self._layers = step, layers

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores new rows, [1, heads, T, width] each."""
        self._step.append(layer, k=_packed(k), v=_packed(v))

    def attend(self, layer: int, query: Query) -> Tensor:
        """See `Reading`."""
        if query.bias is not None:
            raise UsageError("its scores have a bias, which texts in one row can't be given")
        return attended(self._step, layer, _packed(query.q), query, None).to(query.q.dtype)[None]

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """Never: a mask over columns has no meaning where texts share a row."""
        raise UsageError("its attention has a mask of its own, which texts in one row can't be given")

    def compare(self, found: Tensor, expected: Tensor) -> None:
        """Never: what is tried here is the model's logits."""

    def check(self, layer: int, window: int | None) -> None:
        """See `Reading`."""
        if window != self._layers[layer].window:
            raise UsageError(f"a layer's mask has a window of {window}, and its rows {self._layers[layer].window}")


def _packed(x: Tensor) -> Tensor:
    """[1, heads, T, width] → f32 [T, heads, width]."""
    return x[0].transpose(0, 1).float().contiguous()


class Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's way from the model to the step."""

    is_compileable = False

    def __init__(self, over: Over, index: int, window: int | None) -> None:
        self._over, self._index, self.is_sliding, self.is_initialized = over, index, window is not None, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the step has room."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Handle, Handle]:
        """Stores new rows; what comes back stands for all rows that their text has."""
        self._over.append(self._index, key_states, value_states)
        count = key_states.shape[-2]
        return tuple(Handle(self._over, self._index, x, count) for x in (key_states, value_states))  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of a text that begins."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: every text has its own length, and positions are given."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class Packed(transformers.Cache):  # type: ignore[misc]
    """One step, as transformers looks at it: see `kvik.hf.attachment.Stepping`."""

    def __init__(self, attachment: Attachment, step: Chunk, layers: list[LayerShape]) -> None:
        over = Over(step, layers)
        super().__init__(layers=[Layer(over, index, shape.window) for index, shape in enumerate(layers)])
        self.attachment = attachment

    def cut(self, forward: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], Pieces | None]:
        """Whole: chunks are the scheduler's."""
        return inputs, None

    def enter(self, inputs: dict[str, Any]) -> None:
        """Nothing: the step is open."""

    def leave(self, done: bool) -> None:
        """Nothing: whoever opened the step ends it."""


class TransformersDecoder:
    """See the module's docstring, and `kvik.models.decoder.Decoder`.

    Attributes:
        model: in evaluation mode from now on.
        found: how it asks for attention.
    """

    head: Linear  # the model's own, which nobody asks for
    blocks: tuple[object, ...] = ()
    norm = None

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Raises:
            ModelError: texts can't share a row in it: it adds a bias by distance, takes no positions, holds recurrent
                states, computes with keys and values itself, or reads a source.
        """
        self.model, name = model.eval(), type(model).__name__
        if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
            raise ModelError(f"{name} is no decoder alone, so kvik's engine can't run it; give a model for causal text")
        self._inputs = inspect.signature(model.forward).parameters
        self._attachment = attachment_of(model, find)
        weakref.finalize(self, self._attachment.release)
        found = self._attachment.found
        assert found is not None, "an attachment has looked"
        self.found, self.layers = found, list(found.layers)
        if why := self._closed():
            raise ModelError(
                f"{name} can't have many texts in one row ({why}), so kvik's engine can't run it; use it with "
                "generate() and kvik.hf.Cache"
            )

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """See `Decoder`."""
        cache = Packed(self._attachment, step, self.layers)
        few = {"logits_to_keep": rows} if "logits_to_keep" in self._inputs else {}
        positions = torch.tensor([step.positions], device=tokens.device)
        out = self.model(
            input_ids=tokens[None], position_ids=positions, past_key_values=cache, use_cache=True, return_dict=True,
            **few,
        )  # fmt: skip
        logits: Tensor = out.logits[0] if few else out.logits[0, rows]
        return logits.float()

    def _closed(self) -> str:
        """Why many texts can't share a row; nothing where they can."""
        theirs = transformers.DynamicCache(config=self.model.config.get_text_config(decoder=True)).layers
        if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in theirs):
            return "it has recurrent states"
        if not self.found.direct:
            return self.found.why
        if "position_ids" not in self._inputs:
            return "it takes no positions"
        try:
            return self._tried()
        except Exception as error:  # whatever a model does with what it can't compute with
            return reason(error)

    @torch.inference_mode()
    def _tried(self) -> str:
        """How two texts in one row differ from each alone, in two steps; nothing where they don't."""
        device, vocabulary = (
            self.model.get_input_embeddings().weight.device,
            self.model.config.get_text_config().vocab_size,
        )
        texts = [[(7 * i + 3 * n) % vocabulary for i in range(n)] for n in _LENGTHS]
        alone = [self.model(input_ids=torch.tensor([text], device=device), use_cache=False).logits[0] for text in texts]
        spec = Spec.parse(self.found.codec, self.layers)
        cache, together = Pages(spec, memory=64 << 20, shares=False, device=device), []
        sequences = [cache.open() for _ in texts]
        for first, end in ((0, 2), (2, None)):
            with cache.step([(each, text[first:end]) for each, text in zip(sequences, texts, strict=True)]) as step:
                ids = torch.tensor(step.tokens, device=device)
                logits = self.forward(step, ids, torch.arange(len(ids), device=device))
                together.append(torch.split(logits, [len(text[first:end]) for text in texts]))
        joined = [torch.cat([step[i] for step in together]) for i in range(len(texts))]
        return differ([each.float() for each in alone], joined, self.found.dtype)
