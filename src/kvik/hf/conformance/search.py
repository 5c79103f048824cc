"""Beams, and guesses that are checked: what `generate` does to a cache beside appending to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvik.hf.conformance.batches import RAGGED
from kvik.hf.conformance.given import Given
from kvik.hf.conformance.models import text
from kvik.hf.conformance.subject import Row, Subject, figure
from kvik.hf.conformance.turns import croppable
from kvik.hf.conformance.verdicts import demand

BEAMS = 3


def beams(given: Given) -> str:
    """Beam search over one prompt: each text's score is what the model says of it, and no other text is found."""
    subject = given.subject("plain")
    row = text(9, 1)
    output = beamed(given, subject, given.cache(subject), [row], num_return_sequences=BEAMS)
    return scored(given, subject, output, [row] * BEAMS)


def beams_padded(given: Given) -> str:
    """Beam search over a left-padded batch: each text's score is what the model says of it alone."""
    subject = given.subject("plain")
    output = beamed(given, subject, given.cache(subject), RAGGED, num_return_sequences=2)
    return scored(given, subject, output, [row for row in RAGGED for _ in range(2)])


def beams_mixed(given: Given) -> str:
    """Beam search in a model of layers with and without a window, past the window."""
    subject = given.subject("mixed")
    rows = [text(4, 2), text(13, 3)]
    return scored(given, subject, beamed(given, subject, given.cache(subject), rows), rows)


def beams_over_a_prefix(given: Given) -> str:
    """A prefix that was read once and repeated for each beam: the search goes on from there."""
    subject, row = given.subject("plain"), text(12, 4)
    cache = given.cache(subject)
    subject.feed(cache, [row[:8]])
    cache.batch_repeat_interleave(BEAMS)
    return scored(given, subject, beamed(given, subject, cache, [row]), [row])


def beamed(given: Given, subject: Subject, cache: Any, rows: list[list[int]], **settings: Any) -> Any:
    """Beam search with BEAMS beams."""
    settings = {"num_beams": BEAMS, "output_scores": True, "length_penalty": 1.0, **settings}
    return subject.generate(cache, rows, new=7, **settings)


def scored(given: Given, subject: Subject, output: Any, rows: list[list[int]]) -> str:
    """Each text's score against the model's alone; for an exact class, also the texts that it finds without a cache."""
    worst = 0.0
    for index, row in enumerate(rows):
        ids = [*row, *_told(output.sequences[index], 7)]
        worst = max(worst, abs(subject.score(ids, len(row)) - float(output.sequences_scores[index])))
    remark = given.near(subject, worst, "scores")
    if not given.contender.lossy:
        best = best_beam(subject, rows[0], 7)
        found = [*rows[0], *_told(output.sequences[0], 7)]
        worse = subject.score(best, len(rows[0])) - subject.score(found, len(rows[0]))
        demand(worse < 1e-4, f"a text was found whose score is {figure(worse)} below the one without a cache")
    return remark


def best_beam(subject: Subject, row: Row, new: int) -> list[int]:
    """The best text of beam search, without a cache."""
    alive: list[tuple[float, list[int]]] = [(0.0, list(row))]
    for _ in range(new):
        grown = []
        for total, ids in alive:
            chances = subject.exact(ids)[-1].log_softmax(dim=0)
            best = chances.topk(BEAMS)
            grown += [
                (total + float(chance), [*ids, int(token)])
                for chance, token in zip(best.values, best.indices, strict=True)
            ]
        alive = sorted(grown, reverse=True)[:BEAMS]
    return alive[0][1]


def _told(row: Tensor, new: int) -> list[int]:
    return [int(token) for token in row[-new:]]


def prompt_lookup(given: Given) -> str:
    """Guesses from the prompt: what was guessed wrong is taken back, and every token is the likeliest."""
    return guessed(given, given.subject("plain"), prompt_lookup_num_tokens=4)


def assisted(given: Given) -> str:
    """Guesses of a second model, right now and then: every token is the likeliest, and only those are counted."""
    subject = given.subject("plain")
    return guessed(given, subject, assistant_model=subject.draft)


def assisted_window(given: Given) -> str:
    """Guesses of a second model where every layer has a window, and the text is longer than it."""
    subject = given.subject("window")
    draft = subject.draft
    draft.config.sliding_window = None  # or its own cache, which is not under test, would have to be cropped as well
    return guessed(given, subject, assistant_model=draft)


def prompt_lookup_mixed(given: Given) -> str:
    """Guesses from the prompt in a model of layers with and without a window, past the window."""
    return guessed(given, given.subject("mixed"), prompt_lookup_num_tokens=4)


def guessed(given: Given, subject: Subject, **settings: Any) -> str:
    """Greedy generation with guesses over a cache; it must count what was accepted and nothing else."""
    cache = croppable(given, subject)
    prompt = subject.greedy(text(5, 5), 12) + text(3, 6)
    prompt += prompt[4:9]
    ids = subject.model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        past_key_values=cache, max_new_tokens=20, do_sample=False, pad_token_id=0, **settings,
    )[0].tolist()  # fmt: skip
    remark = given.near(subject, subject.regret(ids, len(prompt)), "a token's logit below the best:")
    seen = int(cache.get_seq_length())
    demand(seen == len(ids) - 1, f"it counts {seen} tokens after {len(ids)}, the last of which was not read")
    return remark
