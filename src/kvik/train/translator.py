"""Trains a small encoder-decoder on `phrases`: transformers' own network, so that its folder is one as any other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

import torch
from torch import Tensor

from kvik.models import families
from kvik.models.files.weights import check
from kvik.models.model import Model
from kvik.train.examination import Exam, examine
from kvik.train.phrases import LANGUAGES, Item, draw
from kvik.train.recipe import Recipe
from kvik.train.vocabulary import learn

POSITIONS = 128  # tokens that a text may have: twice what the longest phrases do
_POOL = 32  # batches that are drawn at once, and sorted by length
_LEARNT_FROM = 20_000  # sentences from which the tokenizer is learnt
_LOOKS = 10  # how often held-out sentences are tried on the way
_LOOK = 40  # sentences then, in each language
_NOT_SCORED = -100  # a target that counts for nothing, to transformers


@dataclass(frozen=True)
class Progress:
    """Where a training is.

    Attributes:
        step: steps that were made.
        done: how much of it, 0 to 1.
        loss: nats a token, of the last batch.
        exam: the last look at held-out sentences; None before the first.
        seconds: of processor time.
    """

    step: int
    done: float
    loss: float
    exam: Exam | None
    seconds: float


Show = Callable[[Progress], None]


class Training:
    """One training. `run` it, then take `network` and `tokenizer`.

    Attributes:
        network: transformers' T5 in the form of v1.1, in f32.
        tokenizer: of the `tokenizers` library.
        steps: that were made.
        losses: of each of them.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.steps = recipe, 0
        self.losses: list[float] = []
        self.tokenizer: Any = learn(_texts(recipe.seed), recipe.vocabulary)
        torch.manual_seed(recipe.seed)
        self.network: Any = _network(recipe, self.tokenizer.get_vocab_size())

    def run(self, show: Show = lambda _: None, stopping: Callable[[], bool] = lambda: False) -> None:
        """Trains to the end, or until told to stop between two steps."""
        recipe, began, exam, looks = self.recipe, time.process_time(), None, 0
        optimiser = torch.optim.AdamW(self.network.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        self.network.train()
        for source, target in self._batches():
            seconds = time.process_time() - began
            done = self.steps / recipe.steps if recipe.minutes is None else seconds / (recipe.minutes * 60)
            if done >= 1 or stopping():
                break
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate_at(done)
            loss = self.network(input_ids=source, attention_mask=(source != 0).long(), labels=target).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            self.steps += 1
            self.losses.append(loss.item())
            if done * _LOOKS >= looks + 1:
                looks, exam = looks + 1, examine(self.as_kvik(), Cuts(self.tokenizer), recipe.seed, _LOOK)
            show(Progress(self.steps, done, self.losses[-1], exam, seconds))

    def as_kvik(self) -> Model:
        """The network as kvik runs it, with its present weights, in f32."""
        config = families.from_hf(self.network.config.to_dict(), None, "in training")
        weights = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}
        return Model(config, dict(check(weights, config)), weights="f32")

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids of sources and of targets, i64 [pairs, longest], without an end."""
        rng, items, size = Random(self.recipe.seed), draw(self.recipe.seed), self.recipe.pairs
        while True:
            pool = list(islice(items, size * _POOL // len(LANGUAGES)))
            pairs = sorted(self._pairs(pool), key=lambda pair: (len(pair[0]), len(pair[1])))
            starts = list(range(0, len(pairs), size))
            rng.shuffle(starts)
            for start in starts:
                sources, targets = zip(*pairs[start : start + size], strict=True)
                yield _padded(sources, 0), _padded(targets, _NOT_SCORED)

    def _pairs(self, items: list[Item]) -> list[tuple[list[int], list[int]]]:
        sources = [mark + item.source for item in items for mark in LANGUAGES.values()]
        targets = [item.targets[language] for item in items for language in LANGUAGES]
        cut = [self.tokenizer.encode_batch(texts) for texts in (sources, targets)]
        return [(source.ids, target.ids) for source, target in zip(*cut, strict=True)]


class Cuts:
    """The library's tokenizer by the names of kvik's."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text


def _texts(seed: int) -> Iterator[str]:
    for item in islice(draw(seed), _LEARNT_FROM):
        yield item.source
        yield from item.targets.values()


def _network(recipe: Recipe, vocabulary: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=vocabulary, d_model=recipe.width, d_kv=recipe.width // recipe.heads, d_ff=recipe.ffn,
        num_heads=recipe.heads, num_layers=recipe.encoder_layers, num_decoder_layers=recipe.decoder_layers,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, relative_attention_max_distance=64, n_positions=POSITIONS,
    )  # fmt: skip
    network = T5ForConditionalGeneration(config)
    # transformers 5 ties a new model's head; a tensor of its own, and small, so that the first guesses are even
    network.lm_head.weight = torch.nn.Parameter(torch.randn(vocabulary, recipe.width) * recipe.width**-0.5)
    return network


def _padded(rows: tuple[list[int], ...], filler: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
