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
from kvik.cache.sharing import first_late
from kvik.cache.spec import Spec
from kvik.cache.step import Step
from kvik.errors import ContextError, UsageError
from kvik.models import families
from kvik.models.config import Config
from kvik.models.decoder import Decoder, Encoder, Reader
from kvik.models.embedding import Pooling
from kvik.models.encoding import EncoderConfig
from kvik.models.families.masked import MASK, Masked, MaskedConfig
from kvik.models.parts import Source, arithmetic, multiplied, nbytes
from kvik.models.reading import ReaderConfig
from kvik.models.text.tokenizer import Tokenizer
from kvik.models.watch import Chunk
from kvik.ops.grouped import GroupQuantized
from kvik.ops.linear import FORMATS, Format
from kvik.units import parse_bytes

Weights = Literal["auto", "f32", "bf16", "int8", "int4"]


class Model:
    """A decoder that runs chunks of many Sequences, or an encoder, which sees a source whole and keeps nothing.

    Attributes:
        config: its sizes.
        network: what runs.
        reader, reading: the same and its sizes where it also reads a source beside its text; else None.
        encoder, encoding: the same and its sizes where it only encodes; else None.
        pooling: how a text's embedding is made of its states; None = its files don't say. `load` finds it.
        tokenizer: None where the folder has none and none is needed.
        weights: how linear weights are held.
        arithmetic: what computes products and rows: another gives other last bits.
        held: names the weights as they are held, and the arithmetic, for the cache's keys.
        centres: what is subtracted from keys where a cache quantises them; None = nothing. `load` finds them.
        nbytes: bytes of all weights as they are held.
        read_bytes: of those that every step reads: without tables of which it takes the rows of its tokens.
        row_weights: weights that every row is multiplied with: projections and feed-forward parts of all layers, up to
            the last that keeps rows.
        head_weights: weights that a row is multiplied with whose logits are wanted: of the layers after it, and the
            head.
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
        where = torch.device(device)
        held_as: Format = _natural(tensors) if weights == "auto" else weights
        if weights == "auto" and where.type != "cpu" and held_as in ("int8", "int4"):
            held_as = "bf16"
        with torch.inference_mode():
            network = families.build(config, Source(tensors, held_as, where))
        self._take(config, network, held_as, where, arithmetic(network, where), fingerprint, tokenizer)
        self.nbytes = nbytes(network)
        head = None if self.encoder is not None else self.decoder.head
        self.read_bytes = nbytes((network.blocks, network.norm, head))
        late = first_late(network.layers) if self.encoder is None else len(network.blocks)
        self.row_weights = multiplied(network.blocks[:late])
        self.head_weights = multiplied(head) + multiplied(network.blocks[late:])

    def _take(
        self,
        config: Config,
        network: Decoder | Encoder,
        weights: Format,
        device: torch.device,
        arithmetic: str,
        fingerprint: str,
        tokenizer: Tokenizer | None,
    ) -> None:
        """What every model has, however its network came to be."""
        self.config, self.network, self.weights, self.device = config, network, weights, device
        self.reading = config if isinstance(config, ReaderConfig) else None
        self.reader = None if self.reading is None else cast(Reader, network)
        self.encoding = config if isinstance(config, EncoderConfig) else None
        self.encoder = None if self.encoding is None else cast(Encoder, network)
        self.pooling: Pooling | None = None
        self.tokenizer = tokenizer
        self.arithmetic = arithmetic
        held = f"{weights}, {arithmetic}"
        owners = tuple(layer.reads for layer in network.layers)
        if any(owner is not None for owner in owners):
            held += f", rows of {owners}"
        self.held = digest(file=fingerprint.encode(), held=held.encode()).hex()
        self.centres: Centres | None = None

    @property
    def decoder(self) -> Decoder:
        """The network, of a model that continues texts. Raises UsageError of one that only encodes."""
        self._check_keeps()
        return cast(Decoder, self.network)

    def _check_keeps(self) -> None:
        if self.encoder is not None:
            raise UsageError(
                f"{self.config.name} is an encoder and sees both sides: each new token changes every earlier state, "
                "so nothing stays valid to keep; use Model.encode, or Model.embed for a text's embedding"
            )

    def check_attends(self, what: str) -> None:
        """Raises UsageError where an operator does more with its rows than attention, of which `what` speaks alone."""
        if any(layer.use != "attend" for layer in self.decoder.layers):
            raise UsageError(
                f"{what} speaks of attention, and {self.config.name}'s operator reads its rows in its own way; use a "
                "model with attention, or 'kvik plan' and docs/translution.md for what the operator costs"
            )

    @property
    def fingerprint(self) -> str:
        """Names all that rows depend on beside their spec and the text: what `held` names, and the centres."""
        if self.centres is None:
            return self.held
        return digest(held=self.held.encode(), centres=self.centres.fingerprint.encode()).hex()

    def spec(self, kv: str = "bf16") -> Spec:
        """What a cache for this model keeps under a spec string; `tuned` is the one that `kvik tune` chose. An
        encoder's has no groups: 0 bytes at any length."""
        if kv == "tuned":
            from kvik.models.tuned import recall

            kv = recall(self.fingerprint, self.config.name, self.weights)
        spec = Spec.parse(kv, self.network.layers)
        self.longest(spec)
        return spec

    def cache(self, kv: str = "bf16", *, memory: int | str | None = None, shares: bool = True) -> Cache:
        """A cache for this model's rows; see `Cache`. Memory may be text, such as "2GiB". Raises UsageError of an
        encoder, see `decoder`."""
        self._check_keeps()
        memory = parse_bytes(memory, "memory") if isinstance(memory, str) else memory
        return Cache(
            self.spec(kv), memory=memory, weights=self.held, shares=shares, device=self.device, centres=self.centres
        )

    @torch.inference_mode()
    def encode(self, source: Tensor | Sequence[int], every: bool = False) -> Tensor:
        """States of a source that is seen whole: by an encoder, or by what a model reads beside its text with. Nothing
        is kept: see `decoder`, and `fill`.

        Args:
            source: token ids; a picture for `Encoder.states`, or features for `Reader.encode`.
            every: the states of every layer, those that enter the first one before them; of an encoder alone.

        Returns:
            f32 [rows, width], of the last layer, behind a norm where there is one; or [layers + 1, rows, width].

        Raises:
            UsageError: the model has no encoder, or this is no source of it.
            ContextError: it is longer than the encoder's positions.
        """
        seeing, checks = self.encoder or self.reader, self.encoding or self.reading
        if seeing is None or checks is None or (every and self.encoder is None):
            raise UsageError(
                f"{self.config.name} is no encoder; use Model.run, which keeps what it computed in a cache"
            )
        given = _tensor(source)
        checks.check_source(given)
        given = given.to(self.device)
        return torch.stack(list(self.encoder.states(given))) if every and self.encoder else seeing.encode(given)

    def embed(self, text: str) -> Tensor:
        """What a text means, as its makers take it from an encoder's states: f32 [width]; see `Pooling`.

        Raises:
            UsageError: the model is no encoder of texts, or its files don't say how states become an embedding.
            ContextError: the text has more tokens than the model embeds.
        """
        if self.pooling is None or self.tokenizer is None:
            raise UsageError(
                f"{self.config.name}: its files don't say how embeddings are made of its states (no modules.json "
                "beside an encoder); use an embedding model such as minilm, or Model.encode"
            )
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        self.pooling.check_length(len(ids), self.config.name)
        return self.pooling(self.encode(ids))

    @torch.inference_mode()
    def unmask(self, text: str) -> str:
        """A text with the likeliest token at each `[MASK]`, by an encoder that `kvik train lm --masked` made.

        Raises:
            UsageError: the model is no such encoder, or nothing is hidden.
            ContextError: the text is longer than its positions.
        """
        config, network, tokenizer = self.config, self.network, self.tokenizer
        if not isinstance(network, Masked) or not isinstance(config, MaskedConfig) or tokenizer is None:
            raise UsageError(f"{config.name} has no head for hidden tokens; train one with 'kvik train lm --masked'")
        ids = _tensor(tokenizer.encode(text))
        hidden = ids == config.mask_id
        if not hidden.any():
            raise UsageError(f"the text hides nothing; write {MASK} where the model is to say what stands there")
        config.check_source(ids)
        found = network.logits(ids.to(self.device)).cpu()
        found[:, config.mask_id] = -torch.inf
        return tokenizer.decode(torch.where(hidden, found.argmax(-1), ids).tolist())

    @torch.inference_mode()
    def fill(self, cache: Cache, source: Tensor | Sequence[int], salt: str = "", owner: str = "") -> bytes:
        """Makes a source known to a cache. Its encoder runs only where that is news; `Cache.listen` hears of it.

        Args:
            cache: of this model.
            source: token ids, or features f32 [frames, channels].
            salt: only texts opened with the same salt share it.
            owner: on whose account its rows are; see `cache/owners.py`.

        Returns:
            Its digest, for `Cache.open`.

        Raises:
            UsageError: the model reads no source; or see `ReaderConfig.check_source`.
            ContextError: it is longer than the encoder's positions.
            BudgetError: the cache has no room for its rows; nothing changed.
        """
        if self.reader is None or self.reading is None:
            raise UsageError(f"{self.config.name} reads no source beside its text; open a sequence without one")
        given = _tensor(source)
        self.reading.check_source(given)
        data = given.detach().cpu().contiguous()
        name = digest(kind=f"{data.dtype} {tuple(data.shape)}".encode(), data=data.numpy().tobytes())
        if not cache.knows(name, salt):
            states = self.encode(given)
            with cache.fill(name, len(states), salt, owner) as filling:
                for layer, rows in self.reader.given(states):
                    filling.append(layer, **rows)
        return name

    @torch.inference_mode()
    def run(
        self,
        chunks: Sequence[tuple[KVSequence, Sequence[int]]],
        every: bool = False,
        watch: Callable[[Step], Chunk] | None = None,
        last: Sequence[int] | None = None,
    ) -> Tensor:
        """Appends a chunk of tokens to each sequence: prefill and decode alike.

        Args:
            chunks: sequences of one cache, and at least one new token id for each.
            every: logits of every new token instead of each chunk's last.
            watch: puts something between the decoder and the step, to look at what passes; see `Watch`.
            last: logits of so many last tokens of each chunk, one or more of every.

        Returns:
            f32 [number of chunks, or of tokens; vocabulary].

        Raises:
            ContextError: a sequence would pass the model's last position; nothing changed.
            BudgetError: the cache has no room; nothing changed.
        """
        decoder = self.decoder
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
            if last is not None:
                rows = torch.cat(
                    [torch.arange(end - count, end) + 1 for end, count in zip(step.last, last, strict=True)]
                )
            return decoder.forward(step if watch is None else watch(step), ids, rows.to(self.device))

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
    share: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Model:
    """Loads a model: `smollm2`, a safetensors folder, a GGUF file, or a hub id. The first time it may be prepared.

    Args:
        model: name or path.
        weights: how linear weights are held; auto = as the file holds them.
        device: cpu or cuda.
        share: layers read the rows of others: pairs, last-half or last:N (`cache/sharing.py`). It changes the model,
            and its answers for the worse unless it was trained so; `kvik eval --share` measures how much.
        progress: called with (what happens now, steps done, steps in all) while a model is prepared.

    Raises:
        ModelError, StorageError, UsageError: see `kvik.errors`.
    """
    from kvik.models import centres, embedding
    from kvik.models.files import prepare

    _check_weights(weights)
    check_device(device)
    show = progress or prepare.quiet
    loaded = prepare.load(prepare.resolve(str(model), show))
    config = loaded.config if share is None else loaded.config.sharing(share)
    tokenizer = Tokenizer(loaded.tokenizer_folder) if loaded.config.vocab_size else None
    ready = Model(
        config, loaded.tensors,
        weights=weights, device=device, fingerprint=loaded.fingerprint, tokenizer=tokenizer,
    )  # fmt: skip
    if ready.encoder is None:
        ready.centres = centres.obtain(ready, show)
    else:
        ready.pooling = embedding.read(loaded.tokenizer_folder)
    return ready


def _tensor(source: Tensor | Sequence[int]) -> Tensor:
    return source if isinstance(source, Tensor) else torch.tensor(list(source), dtype=torch.int64)


def check_device(device: str) -> None:
    """Raises UsageError for a device that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda': torch sees no CUDA device here; use --device cpu")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r}: use cpu or cuda")


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
