"""A transformers model in kvik's engine: for architectures that kvik has no network of its own for.

    model = kvik.hf.Borrowed(AutoModelForCausalLM.from_pretrained(…))
    for piece in kvik.generate(model, …): …                   # Engine(model, cache) takes it as well

A step's tokens go through the model as one row, each at its own position; attention reads each sequence's pages, so
that texts of any lengths lie side by side without padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvik.cache.prefix import digest
from kvik.cache.shape import LayerShape
from kvik.errors import ModelError, SequenceError, UsageError
from kvik.hf.attachment import attachment_of
from kvik.hf.chunk import Query
from kvik.hf.finding import CODECS, differ
from kvik.hf.fingerprint import fingerprint
from kvik.hf.handle import Handle
from kvik.hf.opening import find, positions_of
from kvik.hf.pieces import Pieces
from kvik.models.config import Config
from kvik.models.model import Model
from kvik.models.tokenizer import Tokenizer
from kvik.models.watch import Chunk

_OTHERWISE = "use kvik.hf.Cache with generate()"


@dataclass(frozen=True, kw_only=True)
class BorrowedConfig(Config):
    """The sizes of a transformers model."""

    family: ClassVar[str] = "transformers"


class Borrowed(Model):
    """See the module's docstring. Hooks stay on the model as long as this lives; see `kvik.hf.attachment`."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer | None = None, name: str = "") -> None:
        """
        Args:
            model: a decoder on the CPU whose attention can read pages.
            tokenizer: kvik's, for texts.
            name: for people; by default its class's.

        Raises:
            ModelError: its attention can't read pages, it has recurrent states or reads a source, or it can't take
                texts side by side.
        """
        self.network: Any = _Network(model, name or type(model).__name__)
        own = model.config.get_text_config(decoder=True)
        kept = [shape for shape in self.network.layers if shape.heads]
        ends = model.generation_config.eos_token_id if model.generation_config is not None else own.eos_token_id
        self.config = BorrowedConfig(
            name=name or type(model).__name__, vocab_size=model.get_input_embeddings().weight.shape[0],
            layers=len(self.network.layers), hidden=own.hidden_size, heads=own.num_attention_heads,
            kv_heads=kept[0].heads, head_dim=kept[0].streams[0][1], max_positions=positions_of(model),
            tied_embeddings=bool(model.config.tie_word_embeddings), bos_id=own.bos_token_id,
            eos_ids=tuple(ends) if isinstance(ends, list) else (() if ends is None else (ends,)),
        )  # fmt: skip
        self.device, self.tokenizer, self.centres = torch.device("cpu"), tokenizer, None
        self.reading = self.reader = self.encoding = self.encoder = self.pooling = None
        self.weights = CODECS[model.dtype]  # type: ignore[assignment]  # f16 is transformers' alone
        self.arithmetic = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.held = digest(model=fingerprint(model).encode(), held=self.arithmetic.encode()).hex()
        weights = list(model.parameters())
        self.nbytes = self.read_bytes = sum(x.nbytes for x in weights)
        self.row_weights, self.head_weights = sum(x.numel() for x in weights if x.dim() > 1), 0
        self._check()

    @torch.inference_mode()
    def _check(self) -> None:
        """Takes two texts through side by side. Raises ModelError if they aren't what each is alone."""
        model, texts = self.network.model, ([5, 6, 7, 8, 9], [6, 5, 8])
        expected = [
            model(torch.tensor([text]), past_key_values=DynamicCache(config=model.config)).logits[0] for text in texts
        ]
        cache = self.cache(CODECS[model.dtype], memory=64 << 20, shares=False)
        with cache.open() as one, cache.open() as other:
            found = self.run([(one, texts[0]), (other, texts[1])], every=True)
        gap = differ(expected, [found[:5], found[5:]], model.dtype)
        if gap:
            raise ModelError(f"{self.config.name} can't take texts side by side: {gap}; {_OTHERWISE}")


class _Network:
    """What `Model` runs: see `kvik.models.decoder.Decoder`."""

    blocks: ClassVar[list[object]] = []
    norm = head = None

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        if model.config.is_encoder_decoder:
            raise ModelError(f"{name} reads a source; {_OTHERWISE}")
        self.model = model.eval()
        self._attachment = attachment_of(model, find)
        found = self._attachment.found
        assert found is not None, "an attachment has looked"
        kinds = zip(found.kinds, found.layers, strict=False)
        recurrent = [kind for kind, shape in kinds if not shape.heads and kind != "dummy"]
        if not found.direct or recurrent:
            self._attachment.release()
            why = found.why or f"it has layers of {recurrent[0]}"
            raise ModelError(f"{name}: the engine needs attention that reads pages, and {why}; {_OTHERWISE}")
        self.layers: list[LayerShape] = list(found.layers)
        self._passing = _Passing(self._attachment, self.layers)

    def __del__(self) -> None:
        passing = vars(self).get("_passing")
        if passing is not None:
            self._attachment.release()

    def forward(self, step: Chunk, tokens: Tensor, rows: Tensor) -> Tensor:
        """Logits of the chosen rows, f32."""
        self._passing.reading = _Reading(step, self.layers)
        try:
            positions = torch.tensor([step.positions])
            out = self.model(
                input_ids=tokens[None], position_ids=positions, past_key_values=self._passing, use_cache=True,
                logits_to_keep=rows, return_dict=True,
            )  # fmt: skip
        finally:
            self._passing.reading = None
        logits: Tensor = out.logits[0].float()
        return logits if len(logits) == len(rows) else logits[rows]


class _Reading:
    """A step's queries: see `kvik.hf.chunk.Reading`."""

    causal, tried = True, False

    def __init__(self, step: Chunk, layers: list[LayerShape]) -> None:
        self.step, self._layers = step, layers

    def attend(self, layer: int, query: Query) -> Tensor:
        """Each token over its own sequence's rows."""
        if query.bias is not None:
            raise SequenceError("a bias between tokens can't be had of texts that lie side by side")
        q = query.q[0].transpose(0, 1).float()
        found = self.step.attend(layer, q, scale=query.scale, softcap=query.softcap, want_lse=query.sinks is not None)
        out = found.out
        if query.sinks is not None and found.lse is not None:
            out = out * torch.sigmoid(found.lse - query.sinks.float()).unsqueeze(-1)
        return out[None].to(query.q.dtype)

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """Never: texts side by side have no rectangle."""
        raise SequenceError("a mask of its own can't be obeyed over texts that lie side by side")

    def check(self, layer: int, window: int | None) -> None:
        """Raises UsageError where a mask has another window than the layer."""
        if window != self._layers[layer].window:
            raise UsageError(f"a layer's window is {self._layers[layer].window}, and its mask says {window}")

    def compare(self, found: Tensor, expected: Tensor) -> None:
        """Nothing is tried here."""


class _Slot:
    """What transformers asks of a layer."""

    is_compileable, is_croppable, is_initialized = False, False, True

    def __init__(self, window: int | None) -> None:
        self.is_sliding = window is not None


class _Passing(transformers.Cache):  # type: ignore[misc]
    """Takes rows to the step that is open, and gives handles back."""

    def __init__(self, attachment: Any, layers: list[LayerShape]) -> None:
        super().__init__(layers=[_Slot(shape.window) for shape in layers])
        self.attachment = attachment
        self.reading: _Reading | None = None

    def cut(self, forward: object, inputs: dict[str, Any]) -> tuple[dict[str, Any], Pieces | None]:
        """Never: the engine gives chunks that fit."""
        return inputs, None

    def enter(self, inputs: dict[str, Any]) -> None:
        """A forward begins; its step is open."""

    def leave(self, done: bool) -> None:
        """It is over; whoever opened the step ends it."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """See transformers' Cache."""
        assert self.reading is not None, "a step is open"
        k, v = (x[0].transpose(0, 1).float() for x in (key_states, value_states))
        self.reading.step.append(layer_idx, k=k, v=v)
        return tuple(Handle(self.reading, layer_idx, x, x.shape[2]) for x in (key_states, value_states))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions come with the tokens."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """0."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """No mask is made."""
        return query_length, 0

    def __bool__(self) -> bool:
        """True: there is one."""
        return True


def borrowed(name: str) -> Borrowed:
    """A model by folder, hub id, or a name that kvik has built in, loaded by transformers.

    Raises:
        ModelError: it can't be loaded, has no tokenizer.json, or can't be served.
    """
    from kvik.models.in_transformers import in_transformers
    from kvik.models.wheels import BUILT_IN

    if name in BUILT_IN:
        return Borrowed(*in_transformers(name), name=name)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name)
        place = transformers.utils.cached_file(name, "tokenizer.json")
    except (OSError, ValueError, ImportError) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{name}: transformers can't load it ({line})") from None
    from pathlib import Path

    return Borrowed(model, Tokenizer(Path(place).parent), name)
