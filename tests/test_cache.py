"""Sequences and the prefix index: facts and opinions (law 4), conservation (5), keys (6), hits, eviction, events."""

import contextlib

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
    over_retentions,
    pages_held,
    sees,
    shapes,
    state,
    text,
)
from kvik import events
from kvik.cache import prefix, pressure
from kvik.cache.arena import Arena
from kvik.cache.cache import Cache
from kvik.cache.prefix import PrefixIndex
from kvik.cache.sequence import Sequence, Table
from kvik.errors import BudgetError, SequenceError

# 4. Facts and opinions: fork, trim, settle.


def check_fork(cache):
    """What either twin does next, the other never sees; and the past is the same rows, not copies of them."""
    parent, tokens = cache.open(), text(45)
    TOY.run([(parent, tokens)])
    before, held = parent.read(0), pages_held(parent)
    used = cache.books.in_use
    child = parent.fork()
    assert cache.books.in_use == used == held
    alone = [TOY.cut(cache, tokens + more, [45, 30]) for more in (text(30, 1), text(30, 2))]
    got = TOY.run([(parent, text(30, 1)), (child, text(30, 2))])
    assert all(torch.equal(a[45:], b) for a, b in zip(alone, got, strict=True)), "a twin's output moved"
    for twin in (parent, child):
        assert all(
            torch.equal(rows[..., :45, :], twin.read(0)[n][..., :45, :]) for n, rows in before.items() if n in "kv"
        )
    child.close()
    parent.trim(45)
    assert torch.equal(parent.read(0)["k"], before["k"])
    parent.close()
    cache.check()


@over_pages
@over_codecs
def test_a_fork_and_its_parent_never_see_each_other(kv, page):
    check_fork(cache_of(kv, page=page))


def test_a_fork_that_shares_its_open_page_is_seen(monkeypatch):
    monkeypatch.setattr(Cache, "_unshare", lambda self, table: None)
    with sees():
        check_fork(cache_of("f32"))


def check_rejected(cache_maker, accepted):
    """Tokens that settle() rejects leave no trace: the state, and what follows, are as if never seen."""
    states, outs = [], []
    for draft in (text(40, 3), text(40, 3)[:accepted]):
        cache = cache_maker()
        sequence = cache.open()
        TOY.run([(sequence, text(50))])
        sequence.settle()
        if draft:
            TOY.run([(sequence, draft)])
        sequence.settle(accepted)
        states.append(state(cache, sequence))
        outs.append(TOY.run([(sequence, text(60, 4))])[0])
        cache.check()
    assert states[0] == states[1], "the state differs"
    assert torch.equal(*outs), "what follows differs"


@over_pages
@over_retentions
@pytest.mark.parametrize("accepted", [0, 1, 14, 39])
def test_rejected_tokens_leave_no_trace(kept, page, accepted):
    check_rejected(lambda: cache_of("int8", kept, page), accepted)


def test_rejected_tokens_that_stay_are_seen(monkeypatch):
    monkeypatch.setattr(Sequence, "trim", lambda self, length: None)
    with sees():
        check_rejected(lambda: cache_of("f32"), 3)


def check_no_numbers(kv, way):
    """Rows of tokens that were rejected never show, even where they are no numbers (0 · NaN is NaN)."""
    cache, tokens = cache_of(kv), text(100)
    want = TOY.cut(cache_of(kv), tokens, [40, 60])
    sequence = cache.open()
    TOY.run([(sequence, tokens[:40])])
    broken = torch.full((30, 2, 16), torch.nan)
    with contextlib.suppress(ZeroDivisionError), sequence.append(text(30, 1)) as step:
        step.append(0, k=broken, v=broken)
        1 / (way != "aborted")
    twin = sequence.fork() if way == "forked" else None
    if way == "published":
        sequence.settle()
    sequence.trim(40)
    if twin is not None:
        twin.close()
    got = [TOY.run([(sequence, [token])])[0] for token in tokens[40:45]] + TOY.run([(sequence, tokens[45:])])
    assert torch.equal(torch.cat(got), want[40:])


@pytest.mark.parametrize("way", ["rejected", "aborted", "forked", "published"])
@pytest.mark.parametrize("kv", ["f32", "bf16", "int4"])
def test_rows_of_rejected_tokens_never_show(kv, way):
    check_no_numbers(kv, way)


@pytest.mark.parametrize("way", ["rejected", "aborted", "forked", "published"])
def test_rows_of_rejected_tokens_that_are_not_blanked_are_seen(monkeypatch, plain, way):
    monkeypatch.setattr(Table, "stale", property(lambda self: False, lambda self, value: None), raising=False)
    with sees():
        check_no_numbers("f32", way)


def check_trim(cache):
    """A trim to rows that are gone is refused, and names the position; a trim to later ones is not."""
    sequence = cache.open()
    TOY.fill(sequence, text(150))
    sequence.settle()
    TOY.fill(sequence, text(40))
    with pytest.raises(SequenceError, match="settled at position 150"):
        sequence.trim(149)
    assert len(sequence) == 190
    sequence.trim(150)
    assert len(sequence) == 150


def test_a_trim_below_what_was_dropped_names_the_position():
    check_trim(cache_of("f32", "+window:40,sinks:5"))


def test_a_trim_into_what_was_dropped_is_seen(monkeypatch):
    honest = Sequence._drop
    monkeypatch.setattr(Sequence, "_drop", lambda self: (honest(self), setattr(self, "_floor", 0)))
    with sees(pytest.fail.Exception):
        check_trim(cache_of("f32", "+window:40,sinks:5"))


def test_append_drops_nothing_before_settle():
    sequence = cache_of("f32", "+window:16").open()
    for seed in range(5):
        TOY.fill(sequence, text(20, seed))
    assert sequence.read(0)["positions"].tolist() == list(range(100))
    sequence.settle()
    assert sequence.read(0)["positions"].tolist() == list(range(64, 100))


# 5. Conservation: the state machine checks it after every step; here its check is seen failing.


@pytest.mark.parametrize("method", ["release", "retain"])
def test_pages_that_are_lost_or_given_twice_are_seen(monkeypatch, method):
    cache = cache_of("f32")
    sequence = cache.open()
    TOY.fill(sequence, text(50))
    monkeypatch.setattr(Arena, method, lambda *_: None)
    twin = sequence.fork()
    twin.close()
    with sees():
        cache.check()


# 6. Key law.


def check_keys(maker=cache_of):
    """Rows are found under exactly their weights, spec, salt, past and tokens."""
    tokens = text(200)
    cache = maker("int8", weights="w")
    with cache.open(salt="a") as sequence:
        TOY.fill(sequence, tokens)
        sequence.settle()
    known = {block.key for block in cache.index}
    assert cache.open(tokens, salt="a").cached == 192
    assert cache.open(tokens, salt="b").cached == 0, "another salt"
    assert cache.open(tokens[32:], salt="a").cached == 0, "another past"
    assert cache.open([*tokens[:40], 99, *tokens[41:]], salt="a").cached == 40, "other tokens from there on"
    other = [*tokens[:40], 49, *tokens[41:]]
    with cache.open(salt="a") as sequence:
        TOY.fill(sequence, other)
        sequence.settle()
    assert [cache.open(each, salt="a").cached for each in (tokens, other)] == [192, 192], "each finds its own"
    for other in (maker("int8", weights="v"), maker("int4", weights="w"), maker("int8", page=16, weights="w")):
        with other.open(salt="a") as sequence:
            TOY.fill(sequence, tokens)
            sequence.settle()
        assert not known & {block.key for block in other.index}, "other weights, another spec, another page size"


def test_rows_are_found_under_no_other_key():
    check_keys()


@pytest.mark.parametrize("part", ["weights", "spec", "salt", "parent", "tokens"])
def test_a_part_that_is_missing_in_the_key_is_seen(monkeypatch, part):
    honest = prefix.digest
    monkeypatch.setattr(prefix, "digest", lambda **parts: honest(**{n: p for n, p in parts.items() if n != part}))
    with sees():
        check_keys()


def check_forged(cache):
    """A block with the right key and other tokens is no hit."""
    tokens = text(40)
    sequence = cache.open(tokens)
    TOY.fill(sequence, tokens)
    sequence.settle()
    (block,) = cache.index
    block.tokens = (*block.tokens[:-1], block.tokens[-1] + 1)
    assert cache.open(tokens).cached == 31, "so far they agree, and that much can be copied"


def test_a_hit_compares_the_tokens():
    check_forged(cache_of("f32"))


def test_a_hit_by_key_alone_is_seen(monkeypatch):
    def find(self, root, tokens):
        block = self._blocks.get(prefix.block_key(root, tokens[:32]))
        return [block] if block else []

    monkeypatch.setattr(PrefixIndex, "find", find)
    with sees():
        check_forged(cache_of("f32"))


# The prefix index: what is found, what leaves.


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


def test_events_tell_the_life_of_a_sequence_in_order():
    cache = cache_of("f32", "+window:32")
    seen = listening(cache)
    with cache.open(text(100)) as first:
        TOY.fill(first, text(100))
        first.settle()
    cache.open(text(100)).close()
    cache.resize(4 << 20)
    assert seen == [
        events.Opened(0, asked=100, cached=0),
        *(events.Published(0, start, start + 32) for start in (0, 32, 64)),
        events.Dropped(0, tokens=100, pages=4),
        events.Closed(0, tokens=100),
        events.Opened(1, asked=100, cached=96),
        events.Closed(1, tokens=96),
        events.Resized(4 << 20),
    ]


@pytest.mark.parametrize("kv", ["f32", "f32; layers 0 heads 1: int4+window:40"])
def test_an_empty_cache_has_books(kv):
    cache = cache_of(kv)
    for sequence in (None, cache.open()):
        cache.check()
        assert (cache.books.all, cache.nbytes.payload, cache.nbytes.allocated) == (0, 0, 0)
        assert sequence is None or sequence.nbytes.allocated == 0


def test_a_cache_that_does_not_share_finds_nothing():
    cache = cache_of("f32", shares=False)
    remember(cache, text(90))
    assert cache.open(text(90)).cached == cache.books.all == 0


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


# Lanes of one layer that are kept differently.


def test_heads_of_one_layer_may_differ_in_codec_and_window():
    mixed, tokens = cache_of("f32; layers 0 heads 1: int8+window:40"), text(130)
    plain, narrow = (TOY.cut(cache_of(kv), tokens, [60, 70]) for kv in ("f32", "int8+window:40"))
    sequence = mixed.open()
    out = torch.cat([*TOY.run([(sequence, tokens[:60])]), *TOY.run([(sequence, tokens[60:])])])
    assert torch.equal(out[:, :, :2], plain[:, :, :2])
    assert torch.equal(out[:, :, 2:], narrow[:, :, 2:])
    sequence.settle()
    rows = sequence.read(0)
    assert rows["positions"].tolist() == list(range(130))
    want = TOY.row("k", 0, tokens, range(130)).transpose(0, 1)
    assert torch.equal(rows["k"][0], want[0])
    assert rows["k"][1, :64].isnan().all(), "what only this head dropped"
    torch.testing.assert_close(rows["k"][1, 64:], want[1, 64:], atol=0.03, rtol=0)


# A page of which a text has a beginning: it is copied.


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
