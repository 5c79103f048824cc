"""Sequences and the prefix index: facts and opinions (law 4), conservation (5), keys (6), events."""

import contextlib

import pytest
import torch

from helpers import (
    TOY,
    cache_of,
    listening,
    over_codecs,
    over_pages,
    over_retentions,
    pages_held,
    sees,
    state,
    text,
)
from kvik import events
from kvik.cache import prefix
from kvik.cache.arena import Arena
from kvik.cache.cache import Cache
from kvik.cache.prefix import PrefixIndex
from kvik.cache.sequence import Sequence, Table
from kvik.errors import SequenceError


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
