"""Models that ask something of their own: each alone, and in a left-padded batch, past the window if there is one."""

from __future__ import annotations

import torch

from kvik.hf.conformance.given import Given
from kvik.hf.conformance.models import WINDOW, text
from kvik.hf.conformance.subject import Subject
from kvik.hf.conformance.verdicts import demand

ROWS = [text(3, 1), text(14, 2), text(9, 3)]


def soft_caps(given: Given) -> str:
    """Scores that go through tanh (Gemma 2) come to the logits of the model without a cache."""
    return everything(given, "capped")


def sink_logits(given: Given) -> str:
    """Heads with a logit that no row has (GPT-OSS), past a window."""
    return everything(given, "sinks")


def alibi(given: Given) -> str:
    """A bias by distance that is made of the mask (BLOOM), also where there are pads."""
    return everything(given, "alibi")


def alibi_by_length(given: Given) -> str:
    """A bias by distance that is made of lengths (MPT), also where there are pads."""
    return everything(given, "alibi-by-length")


def learned_positions(given: Given) -> str:
    """Positions that are looked up (GPT-2): a wrong count is a wrong row."""
    return everything(given, "learned")


def latent_attention(given: Given) -> str:
    """Keys that are wider than values (DeepSeek-V3)."""
    return everything(given, "latent")


def shared_layers(given: Given) -> str:
    """Layers that read the rows of others and give none (Gemma 3n), past a window."""
    return everything(given, "shared")


def recurrent_layers(given: Given) -> str:
    """Layers that keep a state instead of rows, beside layers that keep rows (LFM2)."""
    subject = given.subject("recurrent")
    return given.near(subject, given.alone(subject, text(2 * WINDOW, 4)))


def half_precision(given: Given) -> str:
    """A model in bf16 runs, and is as near to itself without a cache as bf16 allows."""
    subject = Subject("plain")
    for each in (subject.model, subject.twin):
        each.to(torch.bfloat16)
    found = given.alone(subject, text(14, 5))
    limit = max(0.25, given.slack(given.subject("plain")))
    demand(found <= limit, f"logits off by {found:.2g}, allowed {limit:.2g}")
    return f"off by {found:.2g}"


def everything(given: Given, name: str) -> str:
    """A text alone, and a left-padded batch, past the window if there is one."""
    subject = given.subject(name)
    found = given.alone(subject, text(2 * WINDOW + 5, 6))
    output = subject.generate(given.cache(subject), ROWS, new=WINDOW)
    return given.near(subject, max(found, subject.strays(output, ROWS)))
