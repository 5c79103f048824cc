"""Sequences that begin alike are read together by the kernels, and no bit is another for it."""

import pytest
import torch

from helpers import KV, TOY, cache_of, text
from kvik.ops import loader

pytestmark = pytest.mark.skipif(loader.built() is None, reason="the kernels are not built")
TILE = 256


def crowd(cache, shared, behind):
    """Sequences with `shared` tokens in common, and so many of their own behind them."""
    first = cache.open()
    TOY.run([(first, text(shared))])
    first.settle()
    found = [first.fork() for _ in behind]
    first.close()
    for number, (sequence, own) in enumerate(zip(found, behind, strict=True)):
        if own:
            TOY.run([(sequence, text(own, number + 1))])
            sequence.settle()
    return found


def check(cache, sequences, counts, **options):
    """What each gets beside the others is what it gets alone."""
    forks = [sequence.fork() for sequence in sequences]
    chunks = [text(count, 50 + number) for number, count in enumerate(counts)]
    beside = TOY.run(list(zip(sequences, chunks, strict=True)), **options)
    alone = [TOY.run([pair], **options)[0] for pair in zip(forks, chunks, strict=True)]
    assert all(torch.equal(x, y) for x, y in zip(beside, alone, strict=True))
    for sequence in (*sequences, *forks):
        sequence.close()


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("shared", [TILE - 1, TILE, 2 * TILE + 40])
def test_no_bit_depends_on_who_reads_along(kv, shared):
    cache = cache_of(kv)
    check(cache, crowd(cache, shared, [0, 5, 33, 300, 1]), [1, 2, 1, 3, 1])


@pytest.mark.parametrize("kept", ["", "+window:100", "+window:700,sinks:4", "+knorm:50%"])
def test_windows_and_policies_go_by_themselves(kept):
    cache = cache_of("int8", kept)
    check(cache, crowd(cache, 600, [3, 0, 120, 40]), [1, 1, 2, 1])


def test_softcaps_go_together_and_a_bias_goes_alone():
    cache = cache_of("int8")
    check(cache, crowd(cache, 600, [3, 0, 120, 40]), [1, 1, 2, 1], softcap=3.0)
    bias = torch.randn(TOY.layers[0].heads * TOY.shared, 50, generator=torch.Generator().manual_seed(1))
    check(cache, crowd(cache, 600, [3, 0, 120, 40]), [1, 1, 2, 1], bias=bias)


def test_two_crowds_strangers_and_long_chunks_in_one_step():
    cache = cache_of("k8v4")
    stranger = cache.open()
    TOY.run([(stranger, text(400, 9))])
    stranger.settle()
    sequences = [*crowd(cache, 520, [1, 2, 3]), stranger, *crowd(cache, 300, [7] * 40), *crowd(cache, 900, [0, 0])]
    check(cache, sequences, [1, 1, 90, 2, *[1] * 40, 1, 60])


def test_masses_are_those_of_everybody_alone():
    cache = cache_of("int8")
    sequences = crowd(cache, 600, [3, 0, 40])
    forks = [sequence.fork() for sequence in sequences]
    chunk = text(1, 7)

    def masses(pairs):
        with cache.step(pairs) as step:
            TOY.append(step, 0)
            q = TOY.row("q", 0, step.tokens, step.positions)
            return step.attend(0, q, scale=0.3, want_lse=True, want_mass=True)

    beside = masses([(sequence, chunk) for sequence in sequences])
    for number, fork in enumerate(forks):
        alone = masses([(fork, chunk)])
        assert torch.equal(alone.lse[0], beside.lse[number]) and torch.equal(alone.mass[0], beside.mass[number])
