"""Batches: pads, neighbours, and texts that are dropped, repeated or swapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvik.hf.conformance.given import Given
from kvik.hf.conformance.models import text
from kvik.hf.conformance.subject import NEW, Subject, figure, off, padded, steps
from kvik.hf.conformance.verdicts import demand

RAGGED = [text(3, 1), text(11, 2), text(7, 3)]
EQUAL = [text(37, seed) for seed in (4, 5, 6)]


def padding_leak(given: Given) -> str:
    """Each text of a left-padded batch has the logits that it has alone."""
    subject = given.subject("plain")
    output = subject.generate(given.cache(subject), RAGGED)
    return given.near(subject, subject.strays(output, RAGGED))


def padding_leak_eager(given: Given) -> str:
    """Each text of a left-padded batch under eager attention, which is always given a mask."""
    subject = Subject("plain")
    subject.model.set_attn_implementation("eager")
    output = subject.generate(given.cache(subject), RAGGED)
    return given.near(subject, subject.strays(output, RAGGED))


def padding_long(given: Given) -> str:
    """Long texts, of which a class may drop rows: in a padded batch each has the logits it has alone."""
    subject = given.subject("plain")
    rows = [text(length, length) for length in (40, 150, 90)]
    alone = [_forced(given, subject, [row]) for row in rows]
    return given.near(subject, off(_forced(given, subject, rows), torch.cat(alone)))


def _forced(given: Given, subject: Subject, rows: list[list[int]]) -> torch.Tensor:
    """Logits [B, 4, V] of prompts' last tokens and of three given tokens after them."""
    cache = given.cache(subject, 160)
    ids, mask = padded([[*row, *text(3, 9)] for row in rows])
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    got, length = [], ids.shape[1]
    for start, stop in ((0, length - 3), *((at, at + 1) for at in range(length - 3, length))):
        output = subject.model(
            input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=places[:, start:stop],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        got.append(output.logits[:, -1].float())
    return torch.stack(got, dim=1)


def pad_ids(given: Given) -> str:
    """Other token ids in the pads move no logit by a single bit."""
    subject = given.subject("plain")
    logits = [steps(subject.generate(given.cache(subject), RAGGED, pad=pad)) for pad in (0, 41)]
    moved = off(*logits)
    demand(moved == 0, f"logits moved by {figure(moved)}")
    return "identical"


def neighbours(given: Given) -> str:
    """What one text of a batch says moves no other's logits by a single bit."""
    subject = given.subject("plain")
    first, second = RAGGED[:2], [text(3, 21), RAGGED[1]]
    one, other = (steps(subject.generate(given.cache(subject), rows, new=3))[1] for rows in (first, second))
    moved = off(one, other)
    demand(moved == 0, f"logits moved by {figure(moved)}")
    return "identical"


def num_return_sequences(given: Given) -> str:
    """Several drawn continuations of each prompt: each has the logits of its own text."""
    subject = given.subject("plain")
    torch.manual_seed(3)
    output = subject.generate(given.cache(subject), RAGGED, do_sample=True, num_return_sequences=3)
    demand(len(output.sequences) == 9, f"{len(output.sequences)} texts instead of 9")
    return given.near(subject, subject.strays(output, [row for row in RAGGED for _ in range(3)]))


def batch_select(given: Given) -> str:
    """batch_select_indices keeps these texts in this order, and they go on."""
    return _rearranged(given, [2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0])))


def batch_repeat(given: Given) -> str:
    """batch_repeat_interleave repeats each text in place, and each copy goes on its own way."""
    return _rearranged(given, [0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2))


def reorder(given: Given) -> str:
    """reorder_cache, twice in a row, each with a tensor that its caller then overwrites."""

    def swap(cache: Any) -> None:
        for order in ([1, 1, 0], [2, 0, 1]):
            index = torch.tensor(order)
            cache.reorder_cache(index)
            index.zero_()

    return _rearranged(given, [0, 1, 1], swap)


def _rearranged(given: Given, chosen: list[int], change: Callable[[Any], object]) -> str:
    """Reads texts, changes the batch, and reads on: NEW tokens for each text that is there now."""
    subject = given.subject("plain")
    cache = given.cache(subject)
    subject.feed(cache, [row[:-2] for row in EQUAL])
    subject.feed(cache, [row[-2:-1] for row in EQUAL])
    change(cache)
    rows = [[*EQUAL[index][:-1], *text(NEW, 30 + copy)] for copy, index in enumerate(chosen)]
    got = [
        subject.feed(cache, [row[at : at + 1] for row in rows])[:, 0]
        for at in range(len(EQUAL[0]) - 1, len(EQUAL[0]) - 1 + NEW)
    ]
    want = torch.stack([subject.exact(row)[len(EQUAL[0]) - 1 :] for row in rows])
    return given.near(subject, off(torch.stack(got, dim=1), want))
