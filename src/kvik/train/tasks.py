"""What is learnt: the next token, hidden tokens, or a picture's class; and how well, on what was held out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kvik.train.loop import Batch
from kvik.train.network import ViT

HIDDEN = 0.15  # of a text's tokens, in masked language modelling (arXiv:1810.04805)
_AT_ONCE = 64  # windows or pictures in one pass of an examination


def windows(ids: Tensor, length: int) -> Callable[[torch.Generator, int], Batch]:
    """Draws texts of `length` tokens and what follows each of them."""

    def draw(generator: torch.Generator, count: int) -> Batch:
        starts = torch.randint(len(ids) - length, (count, 1), generator=generator)
        found = ids[starts + torch.arange(length + 1)]
        return found[:, :-1], found[:, 1:]

    return draw


def hidden(ids: Tensor, length: int, mask: int) -> Callable[[torch.Generator, int], Batch]:
    """Draws texts some of whose tokens are hidden behind `mask`, and those tokens; -100 where nothing is asked."""

    def draw(generator: torch.Generator, count: int) -> Batch:
        starts = torch.randint(len(ids) - length, (count, 1), generator=generator)
        return masked(ids[starts + torch.arange(length)], mask, generator)

    return draw


def masked(texts: Tensor, mask: int, generator: torch.Generator) -> Batch:
    """Texts with hidden tokens, and those."""
    behind = torch.rand(texts.shape, generator=generator) < HIDDEN
    behind[:, 0] |= ~behind.any(1)
    return texts.masked_fill(behind, mask), texts.masked_fill(~behind, -100)


def pictures(given: Batch) -> Callable[[torch.Generator, int], Batch]:
    """Draws pictures and their classes."""

    def draw(generator: torch.Generator, count: int) -> Batch:
        chosen = torch.randint(len(given[0]), (count,), generator=generator)
        return given[0][chosen], given[1][chosen]

    return draw


def cross_entropy(network: nn.Module, batch: Batch) -> Tensor:
    """Nats a token, or a picture."""
    where = place(network)
    logits = network(batch[0].to(where))
    return nn.functional.cross_entropy(logits.flatten(0, -2), batch[1].to(where).flatten())


def place(network: nn.Module) -> torch.device:
    """The device that a network is on."""
    return next(network.parameters()).device


@torch.inference_mode()
def nats(network: nn.Module, held: Tensor, length: int, most: int | None = None) -> float:
    """Of a held-out token, on average, in windows that don't overlap.

    Args:
        most: tokens at the most; None = all.
    """
    network.eval()
    whole = (min(len(held) - 1, most or len(held)) // length) * length
    texts, targets = held[:whole].view(-1, length), held[1 : whole + 1].view(-1, length)
    return _mean(network, texts, targets)


@torch.inference_mode()
def hidden_nats(network: nn.Module, held: Tensor, length: int, mask: int, most: int | None = None) -> float:
    """Of a held-out hidden token, on average; the same tokens are hidden every time."""
    network.eval()
    whole = (min(len(held), most or len(held)) // length) * length
    return _mean(network, *masked(held[:whole].view(-1, length), mask, torch.Generator().manual_seed(0)))


@torch.inference_mode()
def accuracy(network: ViT, given: Batch) -> float:
    """Of pictures whose class is the likeliest one."""
    network.eval()
    right, where = 0, place(network)
    for start in range(0, len(given[0]), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        right += int((network(given[0][some].to(where)).argmax(-1).cpu() == given[1][some]).sum())
    return right / len(given[0])


def bits_a_byte(nats_a_token: float, tokens: int, length: int) -> float:
    """What texts with other tokens can be compared by.

    Args:
        tokens, length: tokens of a text, and its bytes.
    """
    return nats_a_token * tokens / length / math.log(2)


def _mean(network: nn.Module, texts: Tensor, targets: Tensor) -> float:
    total = asked = 0.0
    for start in range(0, len(texts), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        count = int((targets[some] != -100).sum())
        total += float(cross_entropy(network, (texts[some], targets[some]))) * count
        asked += count
    return total / asked
