"""What a text finds of earlier ones: whole blocks, copies of part of one, and what leaves under pressure."""

import pytest
import torch

from helpers import (
    TOY,
    Toy,
    cache_of,
    listening,
    make_cache,
    over_codecs,
    over_pages,
    shapes,
    text,
)
from kvik import events
from kvik.cache import pressure
from kvik.errors import BudgetError


def remember(cache, tokens, salt=""):
    """Makes a text known, and closes."""
    with cache.open(tokens, salt) as sequence:
        TOY.run([(sequence, tokens[len(sequence) :])])
        sequence.settle()


@over_pages
@over_codecs
def test_what_follows_a_hit_is_bit_for_bit_what_follows_no_hit(kv, page):
    cache, tokens = cache_of(kv, "+window:200,sinks:3", page), text(300)
    want = TOY.cut(cache_of(kv, "+window:200,sinks:3", page), tokens, [300])
    remember(cache, tokens[:280])
    sequence = cache.open(tokens)
    assert sequence.cached == len(sequence) == 280 // page * page
    assert torch.equal(TOY.run([(sequence, tokens[len(sequence) :])])[0], want[sequence.cached :])


@pytest.mark.parametrize(
    ("asked", "cached"), [(0, 0), (1, 0), (2, 1), (32, 31), (33, 32), (64, 63), (65, 64), (96, 64), (200, 64)]
)
def test_a_hit_goes_as_far_as_the_texts_agree_and_leaves_the_last_token(asked, cached):
    cache = cache_of("f32")
    remember(cache, text(90))
    tokens = (text(90)[:64] + text(200, 1))[:asked]
    assert cache.open(tokens).cached == cached


def test_under_pressure_the_least_recently_used_leaves_first_and_ends_before_beginnings():
    cache = cache_of("f32", memory=3 * 2**18)  # room for 128 pages; a text has 40
    seen, texts = listening(cache), [text(641, seed) for seed in range(3)]
    for tokens in texts:
        remember(cache, tokens[:640])
    assert cache.books.kept == 120
    cache.open(texts[0]).close()
    with cache.open() as busy:
        TOY.fill(busy, text(300, 9))
        cache.check()
    gone = [event.start for event in seen if isinstance(event, events.Evicted)]
    assert gone == [608, 576, 544, 512, 480, 448]
    assert [cache.open(tokens).cached for tokens in texts] == [640, 448, 640]


def test_what_is_in_use_never_leaves():
    cache, tokens = cache_of("f32", memory=3 * 2**18), text(300)
    remember(cache, tokens)
    mine = cache.open(tokens)
    before = mine.read(0)["k"]
    with cache.open() as greedy, pytest.raises(BudgetError):
        TOY.fill(greedy, text(3000, 1))
    assert torch.equal(mine.read(0)["k"], before)
    assert cache.open(tokens).cached == len(mine) == 288
    cache.check()


def test_a_window_needs_its_last_rows_and_sinks_and_no_others():
    cache, tokens = cache_of("f32", "+window:64,sinks:4"), text(300)
    remember(cache, tokens)
    blocks = list(cache.index)
    by_start = {block.start: block for block in blocks}
    for start in (32, 64, 96, 128, 160):  # 288 - 64 = 224: neither sinks nor window
        pressure.drop(cache, by_start[start], [0])
    assert cache.open(tokens).cached == 288
    assert cache.open(tokens[:200]).cached == 32, "the longest chain whose rows are all there"
    pressure.drop(cache, by_start[0], [0])
    assert cache.open(tokens).cached == 0, "no sinks"
    cache.check()


@pytest.mark.parametrize(
    "kv", ["f32+window:64", "f32+window:64; layers 1: int8", "f32+window:64; layers 0 heads 1: f32"]
)
def test_pages_that_windows_have_passed_make_room_while_their_sequence_is_open(kv):
    layers = shapes(layers=2)
    cache, toy = make_cache(kv, layers, memory=5 * 2**18), Toy(layers)
    sequence = cache.open()
    while cache.spec.nbytes(len(sequence)).allocated < 2 * 2**18 and len(sequence) < 3000:
        toy.fill(sequence, text(50, len(sequence)))
        sequence.settle()
    cache.check()
    assert len(sequence) > 1200, "without the published pages of the past there is room for many more"


def test_a_chain_ends_where_a_block_is_missing():
    cache, tokens = cache_of("f32"), text(200)
    remember(cache, tokens)
    block = next(block for block in cache.index if block.start == 64)
    cache.index.remove(block)
    cache.arena.release(cache.spec.groups[0].page_bytes, block.pages[0])
    cache.check()
    assert cache.open(tokens).cached == 64


@pytest.mark.parametrize("codec", ["f32", "int8", "int4"])
@pytest.mark.parametrize("retention", ["", "+window:64,sinks:4"])
@pytest.mark.parametrize("agree", [1, 33, 70, 95, 100])
def test_a_page_is_copied_as_far_as_texts_agree(codec, retention, agree):
    cache, alone = cache_of(codec, retention), cache_of(codec, retention)
    first, other = text(130), [*text(130)[:agree], *text(60, 5)]
    with cache.open(first) as sequence:
        TOY.fill(sequence, first)
        sequence.settle()
        held = {block.key: [None if p is None else p.copy() for p in block.pages] for block in cache.index}
        with cache.open(other) as second, alone.open(other) as plain:
            assert second.cached == len(second) == min(agree, 128 if agree >= 128 else agree)
            assert second.tokens == other[:agree]
            want = TOY.run([(plain, other)])[0][agree:]
            assert torch.equal(TOY.run([(second, other[agree:])])[0], want), "no bit differs"
            second.settle()
            again = {k: v.cpu() for k, v in sequence.read(0).items()}
        assert all(torch.equal(again[k], v.cpu()) for k, v in sequence.read(0).items())
    assert all((cache.index.get(k).pages[i] == p).all() for k, pages in held.items() for i, p in enumerate(pages))
    cache.check()


def test_the_block_that_agrees_longest_is_taken_and_a_policy_copies_none():
    cache = cache_of("f32")
    for end in (10, 25, 20):
        remember(cache, [*text(40)[:end], *text(60, end)])
    assert cache.open(text(40)).cached == 25
    cache = cache_of("f32", "+knorm:50%")
    remember(cache, text(64))
    assert cache.open([*text(64)[:50], 1, 2, 3]).cached == 32


def test_what_is_copied_does_not_come_from_another_salt():
    cache = cache_of("f32")
    remember(cache, text(64), salt="a")
    assert (cache.open(text(20), salt="b").cached, cache.open(text(20), salt="a").cached) == (0, 19)


def test_a_cache_that_does_not_share_finds_nothing():
    cache = cache_of("f32", shares=False)
    remember(cache, text(90))
    assert cache.open(text(90)).cached == cache.books.all == 0
