"""What the tests of `kvik eval` and `kvik tune` share: a tiny model that reads text, made-up figures, the command."""

import sys

import pytest

import kvik
import kvik.cli
from bench_models import write_model
from kvik.bench.growth import Environment
from kvik.eval.results import Costs, Document, Evaluation, Kept, Measured, Setup

WHERE = Environment("A processor", "cpu", 2, "2.13.0", "3.12")
SETUP = Setup("tiny", "f" * 64, "f32", "a text", 100, 4, 2, "prompt")


def command(monkeypatch, *arguments):
    """`kvik` with these arguments, in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["kvik", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        kvik.cli.main()
    return stopped.value.code


def reader(tmp_path_factory):
    """(folder, model): 700 positions, a tokenizer of bytes, weights in f32."""
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny-llama")
    return folder, kvik.load(folder, weights="f32")


def made(spec, kl, size, kept=1.0, apart=0.5, rows=None, recall=1.0):
    """A spec of two documents: mean KL `kl`, `size` bytes a token of 100."""

    def document(mean, number):
        costs = Costs(100, round(size * 80), round(size * 20), round(size * 130), kept, 0.25 + number, 0.01)
        same = 4 if kl == 0 else 3
        return Document(
            3.0 + kl / 2, kl / 2, (mean / 2, mean, mean, 1.5 * mean), same, recall, costs, None if number else rows
        )

    return Measured(spec, (document(kl * (1 - apart), 0), document(kl * (1 + apart), 1)))


def bits(rows, heads):
    """A map of bool [lanes, tokens], every layer with so many heads."""
    return Kept.of([rows[start : start + heads] for start in range(0, len(rows), heads)])


def evaluation(*measured, needles=None, setup=SETUP):
    """Made-up figures; the full cache is put first."""
    return Evaluation(setup, WHERE, (made("f32", 0.0, 512.0), *measured), needles)
