"""A model ready to run: configuration, weights as they are held, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from kvik.cache.cache import Cache
from kvik.cache.centres import Centres
from kvik.cache.prefix import digest
from kvik.cache.sequence import Sequence as KVSequence
from kvik.cache.spec import Spec
from kvik.cache.step import Step
from kvik.errors import ContextError, UsageError
from kvik.models import families
from kvik.models.config import Config
from kvik.models.decoder import Reader
from kvik.models.parts import Source, arithmetic, multiplied, nbytes
from kvik.models.reading import ReaderConfig
from kvik.models.tokenizer import Tokenizer
from kvik.models.watch import Chunk
from kvik.ops.grouped import GroupQuantized
from kvik.ops.linear import FORMATS, Format

Weights = Literal["auto", "f32", "bf16", "int8", "int4"]


class Model:
    """A decoder that runs chunks of many Sequences.

    Attributes:
        config: its sizes.
        decoder: the network.
        reader, reading: the same and its sizes where it also reads a source; else None.
        tokenizer: None where the folder has none and none is needed.
        weights: how linear weights are held.
        arithmetic: what computes products and rows: another gives other last bits.
        held: names the weights as they are held, and the arithmetic, for the cache's keys.
        centres: what is subtracted from keys where a cache quantises them; None = nothing. `load` finds them.
        nbytes: bytes of all weights as they are held.
        read_bytes: of those that every step reads: without tables of which it takes the rows of its tokens.
        row_weights: weights that every row is multiplied with: projections and feed-forward parts of all layers.
        head_weights: weights that a row is multiplied with whose logits are wanted.
    """

    def __init__(
        self,
        config: Config,
        tensors: dict[str, Tensor | GroupQuantized],
        *,
        weights: Weights = "auto",
        device: str | torch.device = "cpu",
        fingerprint: str = "",
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """
        Args:
            tensors: by canonical name, checked against the configuration.
            weights: auto = the smallest format that holds them as the file does.
            fingerprint: of the file.
        """
        _check_weights(weights)
        self.config = config
        self.device = torch.device(device)
        self.weights: Format = _natural(tensors) if weights == "auto" else weights
        if weights == "auto" and self.device.type != "cpu" and self.weights in ("int8", "int4"):
            self.weights = "bf16"
        with torch.inference_mode():
            self.decoder = families.build(config, Source(tensors, self.weights, self.device))
        self.reading = config if isinstance(config, ReaderConfig) else None
        self.reader = None if self.reading is None else cast(Reader, self.decoder)
        self.tokenizer = tokenizer
        self.arithmetic = arithmetic(self.decoder, self.device)
        held = f"{self.weights}, {self.arithmetic}"
        self.held = digest(file=fingerprint.encode(), held=held.encode()).hex()
        self.centres: Centres | None = None
        self.nbytes = nbytes(self.decoder)
        self.read_bytes = nbytes((self.decoder.blocks, self.decoder.norm, self.decoder.head))
        self.row_weights, self.head_weights = multiplied(self.decoder.blocks), multiplied(self.decoder.head)

    @property
    def fingerprint(self) -> str:
        """Names all that rows depend on beside their spec and the text: what `held` names, and the centres."""
        if self.centres is None:
            return self.held
        return digest(held=self.held.encode(), centres=self.centres.fingerprint.encode()).hex()

    def spec(self, kv: str = "bf16") -> Spec:
        """What a cache for this model keeps under a spec string; `tuned` is the one that `kvik tune` chose."""
        if kv == "tuned":
            from kvik.models.tuned import recall

            kv = recall(self.fingerprint, self.config.name, self.weights)
        spec = Spec.parse(kv, self.decoder.layers)
        self.longest(spec)
        return spec

    def cache(self, kv: str = "bf16", *, memory: int | None = None, shares: bool = True) -> Cache:
        """A cache for this model's rows; see `Cache`."""
        return Cache(
            self.spec(kv), memory=memory, weights=self.held, shares=shares, device=self.device, centres=self.centres
        )

    @torch.inference_mode()
    def fill(self, cache: Cache, source: Tensor | Sequence[int], salt: str = "") -> bytes:
        """Makes a source known to a cache. Its encoder runs only where that is news; `Cache.listen` hears of it.

        Args:
            cache: of this model.
            source: token ids, or features f32 [frames, channels].
            salt: only texts opened with the same salt share it.

        Returns:
            Its digest, for `Cache.open`.

        Raises:
            UsageError: the model reads no source, it is empty, or ids are out of range.
            ContextError: it is longer than the encoder's positions.
            BudgetError: the cache has no room for its rows; nothing changed.
        """
        given = self._checked(source)
        data = given.detach().cpu().contiguous()
        name = digest(kind=f"{data.dtype} {tuple(data.shape)}".encode(), data=data.numpy().tobytes())
        if not cache.knows(name, salt):
            assert self.reader is not None, "checked"
            states = self.encoded(given)
            with cache.fill(name, len(states), salt) as filling:
                for layer, rows in self.reader.given(states):
                    filling.append(layer, **rows)
        return name

    @torch.inference_mode()
    def encoded(self, source: Tensor | Sequence[int]) -> Tensor:
        """What the encoder makes of a source, f32 [rows, width]; keeps nothing. Raises as `fill` does."""
        given = self._checked(source)
        assert self.reader is not None, "checked"
        return self.reader.encode(given.to(self.device))

    def _checked(self, source: Tensor | Sequence[int]) -> Tensor:
        """A source that the encoder can read; see `fill` for what it raises."""
        if self.reader is None or self.reading is None:
            raise UsageError(f"{self.config.name} reads no source beside its text; open a sequence without one")
        given = source if isinstance(source, Tensor) else torch.tensor(list(source), dtype=torch.int64)
        if not len(given):
            raise UsageError("the source is empty; give at least one token")
        known, most = self.reading.source_vocab, self.reading.source_positions
        if given.dtype == torch.int64 and not ((given >= 0) & (given < known)).all():
            raise UsageError(f"token ids must be 0 to {known - 1}; got {int(given.min())} to {int(given.max())}")
        if most is not None and len(given) > most:
            raise ContextError(
                f"a source of {len(given):,} tokens is longer than the {most:,} positions of {self.config.name}'s "
                "encoder; shorten it or give it in parts"
            )
        return given

    @torch.inference_mode()
    def run(
        self,
        chunks: Sequence[tuple[KVSequence, Sequence[int]]],
        every: bool = False,
        watch: Callable[[Step], Chunk] | None = None,
    ) -> Tensor:
        """Appends a chunk of tokens to each sequence: prefill and decode alike.

        Args:
            chunks: sequences of one cache, and at least one new token id for each.
            every: logits of every new token instead of each chunk's last.
            watch: puts something between the decoder and the step, to look at what passes; see `Watch`.

        Returns:
            f32 [number of chunks, or of tokens; vocabulary].

        Raises:
            ContextError: a sequence would pass the model's last position; nothing changed.
            BudgetError: the cache has no room; nothing changed.
        """
        if not chunks:
            raise UsageError("run needs at least one sequence and its new tokens")
        known = self.config.vocab_size
        for sequence, tokens in chunks:
            self.check_context(len(sequence) + len(tokens), sequence.cache.spec)
            if not all(0 <= token < known for token in tokens):
                raise UsageError(f"token ids must be 0 to {known - 1}; got {min(tokens)} to {max(tokens)}")
        with chunks[0][0].cache.step(chunks) as step:
            ids = torch.tensor(step.tokens, device=self.device)
            rows = torch.arange(len(step.tokens)) if every else torch.tensor(step.last)
            return self.decoder.forward(step if watch is None else watch(step), ids, rows.to(self.device))

    def longest(self, spec: Spec | None = None) -> int:
        """The most tokens that a text can have under a spec; None = where all rows stay. See `Spec.longest`."""
        positions = self.config.most_positions
        return positions if spec is None else spec.longest(positions)

    def check_context(self, tokens: int, spec: Spec | None = None) -> None:
        """Raises ContextError if a text of so many tokens is longer than `longest`."""
        most = self.longest(spec)
        if tokens > self.config.max_positions == most:
            raise ContextError(
                f"{tokens:,} tokens are more than the {most:,} positions of {self.config.name}; shorten the prompt or "
                f"choose a model with a longer context{self.way_beyond}"
            )
        if tokens > most:
            raise ContextError(f"{tokens:,} tokens are more than the {most:,} that any sequence can have; open another")

    @property
    def way_beyond(self) -> str:
        """For messages: how a text may get longer than the model's positions; "" where it can't."""
        if any(layer.frequencies is None for layer in self.decoder.layers):
            return ""
        window = min(1024, self.config.max_positions // 2)
        return f", or let a window move along: --kv int8+window:{window},sinks:4,relative"


def load(
    model: str | Path = "smollm2",
    *,
    weights: Weights = "auto",
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> Model:
    """Loads a model: `smollm2`, a safetensors folder, a GGUF file, or a hub id. The first time it may be prepared.

    Args:
        model: name or path.
        weights: how linear weights are held; auto = as the file holds them.
        device: cpu or cuda.
        progress: called with (what happens now, steps done, steps in all) while a model is prepared.

    Raises:
        ModelError, StorageError, UsageError: see `kvik.errors`.
    """
    from kvik.models import centres, prepare

    _check_weights(weights)
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda': torch sees no CUDA device here; use --device cpu")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r}: use cpu or cuda")
    show = progress or prepare.quiet
    loaded = prepare.load(prepare.resolve(str(model), show))
    tokenizer = Tokenizer(loaded.tokenizer_folder)
    ready = Model(
        loaded.config, loaded.tensors,
        weights=weights, device=device, fingerprint=loaded.fingerprint, tokenizer=tokenizer,
    )  # fmt: skip
    ready.centres = centres.obtain(ready, show)
    return ready


def _check_weights(weights: str) -> None:
    if weights not in get_args(Weights):
        raise UsageError(f"weights {weights!r}: use {', '.join(get_args(Weights))}")


def _natural(tensors: dict[str, Tensor | GroupQuantized]) -> Format:
    """The smallest format that loses nothing, or next to nothing, of what most weights are stored as."""
    sizes: dict[Format, int] = dict.fromkeys(FORMATS, 0)
    for tensor in tensors.values():
        if len(tensor.shape) < 2:
            continue
        if isinstance(tensor, GroupQuantized):
            kind: Format = "int4" if tensor.bits == 4 else "int8"
        else:
            kind = "f32" if tensor.dtype == torch.float32 else "bf16"
        sizes[kind] += tensor.shape[0] * tensor.shape[1]
    return max(sizes, key=lambda fmt: sizes[fmt])
