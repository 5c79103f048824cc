"""Owners of rows: who gives way when room is short, what is within a share, and accounts that add up."""

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import LAYERS, TOY, cache_of, listening, make_cache, sees, text
from kvik import events
from kvik.cache import pressure
from kvik.cache.books import in_use
from kvik.cache.owners import level
from kvik.cache.tidying import defragment
from kvik.errors import BudgetError
from test_sources import LAYERS as READING
from test_sources import TOY as READER

SLAB, BLOCK = 2**18, 2 * 4096  # a block of TOY's cache: 32 rows of two lanes
ROOM = 8 * SLAB + 2**16  # tables are beside the slabs


def warm(cache, owner, count, seed, tokens=321, salt=None):
    """Texts of ten blocks that an owner leaves behind."""
    texts = [text(tokens, 1000 * seed + at) for at in range(count)]
    for each in texts:
        with cache.open(each, owner if salt is None else salt, owner=owner) as sequence:
            TOY.fill(sequence, each[len(sequence) :])
            sequence.settle()
    return texts


def grow(sequence, times):
    for at in range(times):
        TOY.fill(sequence, text(96, at))


def grow_all(sequences, times):
    for sequence in sequences:
        grow(sequence, times)


def known(cache, owner, texts, salt=None):
    """How many tokens of each are found, the last asked for first: that changes nothing of what others find."""
    found = []
    for each in reversed(texts):
        with cache.open(each, owner if salt is None else salt, owner=owner) as sequence:
            found.insert(0, sequence.cached)
    return found


@given(st.lists(st.integers(0, 50), max_size=6), st.integers(0, 120))
def test_a_level_is_the_highest_at_which_all_fit(held, room):
    found = level(held, room)
    assert sum(min(each, found) for each in held) <= room
    assert sum(held) <= room or sum(min(each, found + 1) for each in held) > room


@pytest.mark.parametrize("apart", [True, False])
def test_a_flood_leaves_anothers_rows_where_they_have_owners(apart):
    """Ten times the memory, by somebody else. With one account for both, all is gone: the least recently used first."""
    cache = cache_of("f32", memory=ROOM)
    mine = warm(cache, "a" if apart else "", 10, seed=1, salt="a")
    warm(cache, "b" if apart else "", 10 * ROOM // BLOCK // 10, seed=2, salt="b")
    assert known(cache, "a" if apart else "", mine, salt="a") == [320 if apart else 0] * 10
    cache.check()


def test_memory_that_nobody_wants_is_anybodys_and_who_comes_gets_an_equal_part():
    cache = cache_of("f32", memory=ROOM)
    first = warm(cache, "a", 40, seed=1)
    held = cache.owners.held()["a"]
    assert held > 0.9 * ROOM, "alone: everything"
    second = warm(cache, "b", 40, seed=2)
    held = cache.owners.held()
    assert abs(held["a"] - held["b"]) <= 2 * 10 * BLOCK and sum(held.values()) > 0.9 * ROOM
    assert known(cache, "b", second[-10:]) == [320] * 10
    assert known(cache, "a", first[-10:]) == [320] * 10, "of each, what was used last"
    assert known(cache, "a", first[:2]) == [0, 0]
    third = warm(cache, "c", 5, seed=3)
    warm(cache, "a", 40, seed=4)
    warm(cache, "b", 40, seed=5)
    assert known(cache, "c", third) == [320] * 5, "who wants little keeps all of it"
    cache.check()


def test_evictions_name_their_owner():
    cache = cache_of("f32", memory=ROOM)
    seen = listening(cache)
    warm(cache, "a", 5, seed=1)
    warm(cache, "b", 60, seed=2)
    gone = {event.owner for event in seen if isinstance(event, events.Evicted)}
    assert gone == {"b"}


def test_who_last_opened_a_text_has_its_blocks_on_its_account():
    cache = cache_of("f32", memory=ROOM)
    shared = warm(cache, "a", 4, seed=1, salt="")
    before = cache.owners.held()["a"]
    assert known(cache, "b", shared[:2], salt="") == [320] * 2
    assert cache.owners.held() == {"a": before // 2, "b": before // 2}
    cache.check()
    warm(cache, "a", 80, seed=2, salt="")
    assert known(cache, "b", shared[:2], salt="") == [320] * 2, "the flood was a's, and these are b's now"
    assert max(known(cache, "b", shared[2:], salt="")) < 32, "those were not"
    cache.check()


def test_an_owner_gives_way_for_a_base_that_others_texts_stand_on():
    """b has the beginning of a's text. Nothing of a's may leave for b, so b's pages go, and the chain keeps a link."""
    cache = cache_of("f32", memory=ROOM)
    (whole,) = warm(cache, "a", 1, seed=1, tokens=641, salt="")
    assert known(cache, "b", [whole[:321]], salt="") == [320]
    assert cache.owners.held() == {"a": 10 * BLOCK, "b": 10 * BLOCK}
    assert pressure.evict(cache, {"b": BLOCK}, firm=True)
    assert cache.owners.held() == {"a": 10 * BLOCK, "b": 9 * BLOCK}
    cache.check()
    assert known(cache, "a", [whole], salt="") != [640]


@pytest.mark.parametrize("quota", [None, 2 * SLAB])
def test_rows_in_use_leave_no_less_than_a_share_where_it_is_firm(quota):
    """b asks for more and more without giving anything back. Firm: it is refused before a has less than its share, and
    nothing more is dropped. Else it gets everything in the end."""
    cache = cache_of("f32", memory=ROOM)
    cache.owners.quota = quota
    mine = warm(cache, "a", 10 if quota is None else 20, seed=1)
    share = cache.owners.held()["a"] if quota is None else quota
    cache.owners.firm = True
    seen = listening(cache)
    with cache.open(owner="b") as greedy:
        with pytest.raises(BudgetError, match=r"and [\d,]+ are within others' shares"):
            grow(greedy, 1000)
        held = cache.owners.held()
        assert share - BLOCK < held["a"] <= max(share, held["a"]) and in_use(cache)["b"] > ROOM - share - 2 * SLAB
        dropped, length = len([each for each in seen if isinstance(each, events.Evicted)]), len(greedy)
        with pytest.raises(BudgetError), greedy.append(text(4000)):
            pass
        assert dropped == len([each for each in seen if isinstance(each, events.Evicted)]), "it could never fit"
        kept = known(cache, "a", mine)
        assert sum(kept) // 32 * BLOCK == held["a"] and (quota is not None or kept == [320] * 10)
        cache.owners.firm = False
        grow(greedy, 20)
        assert len(greedy) > length and cache.owners.held()["a"] < share - BLOCK
        cache.check()


def test_a_quota_holds_where_pages_have_two_sizes():
    cache = make_cache("f32; layers 0 heads 1: int8", LAYERS, memory=ROOM)
    cache.owners.quota, cache.owners.firm = 2 * SLAB, True
    for at in range(8):
        warm(cache, "a", 4, seed=2 * at, tokens=200 + 32 * at)
        warm(cache, "b", 8, seed=2 * at + 1, tokens=100)
    before, greedy = cache.owners.held()["a"], [cache.open(owner="b") for _ in range(20)]
    with pytest.raises(BudgetError):
        grow_all(greedy, 8)
    assert before > 2 * SLAB > cache.owners.held()["a"] > 2 * SLAB - BLOCK
    cache.check()


def test_pages_keep_their_account_where_they_are_moved():
    cache = cache_of("f32", memory=ROOM)
    for at in range(10):
        for owner in "ab":
            warm(cache, owner, 2, seed=at + 100 * (owner == "b"), salt=owner)
    for _ in range(70):
        pressure.evict(cache, {"a": ROOM})
    before, pages = cache.owners.held(), [block.pages[0].copy() for block in cache.index]
    defragment(cache)
    assert any((new.pages[0] != old).any() for new, old in zip(cache.index, pages, strict=True)), "some were moved"
    assert cache.owners.held() == before and len(before) == 2
    cache.check()


def test_who_is_over_its_quota_gives_way_to_who_is_not():
    cache = cache_of("f32", memory=ROOM)
    cache.owners.quota, cache.owners.firm = 3 * SLAB, True
    warm(cache, "b", 40, seed=1)
    with cache.open(owner="a") as sequence:
        while cache.owners.held().get("a", 0) < 3 * SLAB - 3 * BLOCK:
            TOY.fill(sequence, text(64))
    cache.check()


def test_a_sources_rows_are_on_the_account_of_who_filled_them():
    cache = make_cache("f32", READING)
    with cache.fill(b"x", 75, owner="a") as filling:
        for layer in (2, 3):
            filling.append(layer, **{name: READER.row(name, layer, text(75), range(75)) for name in "kv"})
    before = cache.owners.held()
    assert before["a"] > 0 and set(before) == {"a"}
    cache.check()
    with cache.open(text(10), source=b"x", owner="b"):
        assert cache.owners.held() == {"b": before["a"]} == dict(in_use(cache))
        cache.check()


class Run:
    """Any order of texts by three owners, who share what they write: each keeps what is within its share."""

    def __init__(self, kv, quota, memory=3 * SLAB):
        self.cache, self.open = cache_of(kv, memory=memory), []
        self.cache.owners.quota, self.cache.owners.firm = quota, True

    def do(self, what, who, length, seed):
        owner = "abc"[who]
        if what == "open":
            tokens = text(length, seed)
            found = self.cache.open(tokens, owner=owner)
            self.open.append((found, tokens[len(found) :]))
        elif what == "grow" and self.open:
            sequence, rest = self.open[who % len(self.open)]
            self.grow(sequence, rest or text(length, 99))
            self.open[who % len(self.open)] = sequence, []
        elif what == "fork" and self.open:
            self.open.append((self.open[who % len(self.open)][0].fork(), []))
        elif what == "close" and self.open:
            self.open.pop(who % len(self.open))[0].close()
        self.cache.check()

    def grow(self, sequence, tokens):
        group, before = self.cache.spec.groups[0], self.cache.owners.held()
        columns = -(-(len(sequence) + len(tokens)) // group.page_size) - -(-len(sequence) // group.page_size)
        wanted = self.cache.owners.held({sequence.owner: columns * len(group.lanes) * group.page_bytes})
        share, block = self.cache.owners.share(wanted), len(group.lanes) * group.page_bytes
        with contextlib.suppress(BudgetError):
            TOY.fill(sequence, tokens)
        held, most = self.cache.owners.held(), max(wanted.values())
        for owner in before.keys() - {sequence.owner}:
            kept = held.get(owner, 0) >= min(before[owner], share - block)
            assert kept or most <= share, "but where pages of several sizes don't fill their slabs"
        sequence.settle()


@pytest.mark.parametrize("kv", ["f32", "f32+window:64,sinks:4"])
@pytest.mark.parametrize("quota", [None, SLAB // 2])
def test_in_any_order_accounts_add_up_and_shares_are_kept(kv, quota):
    steps = st.tuples(
        st.sampled_from(["open", "open", "grow", "grow", "fork", "close"]), st.integers(0, 2),
        st.integers(1, 700), st.integers(0, 5),
    )  # fmt: skip

    @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(steps, min_size=15, max_size=40))
    def run(taken):
        machine = Run(kv, quota)
        for each in taken:
            machine.do(*each)
        for sequence, _ in machine.open:
            sequence.close()
        assert not in_use(machine.cache)
        machine.cache.check()

    run()


@pytest.mark.parametrize("sabotage", ["arena", "block"])
def test_accounts_that_do_not_add_up_are_seen(sabotage):
    cache = cache_of("f32", memory=ROOM)
    warm(cache, "a", 2, seed=1)
    cache.check()
    if sabotage == "arena":
        cache.arena.accounts[1] += 1
    else:
        next(iter(cache.index)).owner = "b"
    with sees():
        cache.check()
