"""Layers that see the last tokens only, alone and beside layers that see everything."""

from __future__ import annotations

import torch

from kvik.hf.conformance.given import Given
from kvik.hf.conformance.models import WINDOW, text
from kvik.hf.conformance.subject import figure, off
from kvik.hf.conformance.turns import cropped, pieces
from kvik.hf.conformance.verdicts import demand

LONG = 5 * WINDOW


def window(given: Given) -> str:
    """A text five times as long as the window, token by token, has the logits of a model without a cache."""
    subject = given.subject("window")
    return given.near(subject, given.alone(subject, text(LONG, 1)))


def window_pieces(given: Given) -> str:
    """Pieces of all sizes across the window's edge, and onto a window that is full."""
    subject, ids = given.subject("window"), text(LONG, 2)
    cuts = ((5, 1, 9, 2, 7, 16), (WINDOW, WINDOW, 1, 3, 11), (WINDOW - 1, 2, 1, 17), (13, 12, 15), (1,) * 12)
    return given.near(subject, max(pieces(given, subject, ids, cut) for cut in cuts))


def window_padded(given: Given) -> str:
    """A left-padded batch whose pads are wider than the window."""
    subject, rows = given.subject("window"), [text(3, 3), text(2 * WINDOW, 4), text(WINDOW, 5)]
    output = subject.generate(given.cache(subject), rows, new=WINDOW + 2)
    return given.near(subject, subject.strays(output, rows))


def window_turns(given: Given) -> str:
    """Turns over one cache whose window is full: each turn's first piece has several tokens."""
    subject = given.subject("window")
    cache, ids, worst = given.cache(subject), text(WINDOW + 3, 6), 0.0
    for turn in range(3):
        output = subject.generate(cache, [ids], new=4)
        worst = max(worst, subject.strays(output, [ids]))
        ids = [*output.sequences[0].tolist(), *text(5, 70 + turn)]
    return given.near(subject, worst)


def window_crop(given: Given) -> str:
    """crop takes tokens back past a full window, where the cache was told beforehand to keep what it needs."""
    subject = given.subject("window")
    cache = given.cache(subject)
    records = "activate_past_recording" in dir(cache)
    return given.near(subject, cropped(given, subject, (3, 1), records=records))


def mixed(given: Given) -> str:
    """A layer with a window and one without, in pieces and token by token, far past the window."""
    subject = given.subject("mixed")
    found = max(given.alone(subject, text(LONG, 7)), pieces(given, subject, text(LONG, 8), (5, 1, 9, 2, 7, 16)))
    return given.near(subject, found)


def mixed_padded(given: Given) -> str:
    """Layers with and without a window in a left-padded batch: each kind has a mask of its own."""
    subject, rows = given.subject("mixed"), [text(3, 9), text(2 * WINDOW + 3, 10), text(WINDOW, 11)]
    output = subject.generate(given.cache(subject), rows, new=WINDOW + 2)
    return given.near(subject, subject.strays(output, rows))


def layer_lengths(given: Given) -> str:
    """Every layer counts the tokens it has seen, however many rows it kept."""
    subject, ids = given.subject("mixed"), text(3 * WINDOW, 12)
    cache = given.cache(subject)
    got = [subject.feed(cache, [ids[:WINDOW]])[0], subject.feed(cache, [ids[WINDOW:]])[0]]
    counted = [int(cache.get_seq_length(layer)) for layer in range(2)]
    demand(counted == [len(ids)] * 2, f"layers count {counted} of {len(ids)} tokens")
    difference = off(torch.cat(got), subject.exact(ids))
    demand(difference <= given.slack(subject), f"counts hold, logits are off by {figure(difference)}")
    return f"{counted[0]} in each"
