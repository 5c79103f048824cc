"""Blocks that lost pages get them back, and a sequence in the middle of a step can't be closed under it."""

import pytest

from helpers import TOY, cache_of, text
from kvik.cache import pressure
from kvik.errors import SequenceError


def fill(cache, tokens):
    """Appends and settles a text page by page; returns the open sequence."""
    sequence = cache.open(tokens)
    for start in range(len(sequence), len(tokens), 32):
        TOY.run([(sequence, tokens[start : start + 32])])
        sequence.settle()
    return sequence


def test_a_block_without_pages_is_completed_by_the_next_that_computes_it():
    cache, tokens = cache_of("f32+window:64"), text(32 * 8)
    fill(cache, tokens).close()
    assert cache.open([*tokens, 1]).cached == len(tokens)
    blocks = sorted(cache.index, key=lambda block: block.start)
    for block in blocks[-3:]:  # as if pressure had taken what every window has passed
        pressure.drop(cache, block, [0])
    again = fill(cache, [*tokens, 1])
    assert again.cached < len(tokens)
    again.close()
    assert cache.open([*tokens, 1]).cached == len(tokens)
    cache.check()


def test_a_sequence_can_not_be_closed_inside_its_step():
    cache = cache_of("f32")
    sequence = cache.open()
    with pytest.raises(SequenceError, match="in the middle of a step"), sequence.append([1, 2]):
        sequence.close()
    cache.check()
    assert len(sequence) == 0
    sequence.close()
    assert cache.books.in_use == 0
