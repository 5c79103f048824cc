"""What an engine's owners keep of its cache while others flood it, and what a quota refuses."""

import random
from dataclasses import replace
from fractions import Fraction

import pytest

import readers
from bench_models import tiny
from kvik.cache.arena import SLAB
from kvik.engine.engine import Engine
from kvik.engine.job import Job
from kvik.engine.quota import Quota
from kvik.engine.request import Request
from kvik.engine.scheduler import Scheduler
from kvik.errors import BudgetError, UsageError
from kvik.units import parse_part
from test_engine import alone, check_books, mixture, told

MEMORY = (1 << 20) + (1 << 16)  # tables are beside the slabs
TOKEN = 384  # bytes of rows in f32
SHARES = {"off": None, "fair": None, "a third": Quota(Fraction(1, 3), 2)}


@pytest.fixture(scope="module")
def model():
    return tiny()


def prompt(who, number, tokens):
    rng = random.Random(f"{who} {number}")
    return [rng.randrange(3, 250) for _ in range(tokens)]


def request(who, number, tokens, new=2, apart=True):
    return Request(
        prompt(who, number, tokens), max_tokens=new, ignore_end=True, salt=who, owner=who if apart else "all"
    )


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("together", [False, True])
def test_a_flood_leaves_anothers_hits_at_its_quota(model, shares, together):
    """a's prefixes fill a third; b asks for ten times the memory, one by one or all at once; a asks again."""
    count, apart = MEMORY // 3 // (256 * TOKEN), shares != "off"
    with Engine(model, "f32", memory=MEMORY, waiting=500, quota=SHARES[shares]) as engine:

        def ask_again():
            asked = (engine.submit(request("a", at, 257, apart=apart)).answers()[0] for at in range(count))
            return [each.known.cached for each in asked]

        assert ask_again() == [0] * count
        assert ask_again() == [256] * count
        new = 16 if together else 2
        flood = [request("b", at, 420, new, apart=apart) for at in range(10 * MEMORY // (420 * TOKEN))]
        if together:
            for stream in [engine.submit(each) for each in flood]:
                stream.answers()
        else:
            for each in flood:
                engine.submit(each).answers()
        assert engine.counts.evicted["a"] == 0
        assert ask_again() == [256 if apart else 0] * count
        check_books(engine)


@pytest.mark.parametrize("quota", [None, Quota(100_000, 3)])
def test_owners_change_no_token(model, quota):
    requests = [replace(each, n=1, owner="abc"[at % 3]) for at, each in enumerate(mixture(24, seed=2))]
    want = [alone(model, "f32", each) for each in requests]
    with Engine(model, "f32", memory=768 << 10, running=8, step_tokens=64, quota=quota) as engine:
        streams = [engine.submit(each) for each in requests]
        assert [told(stream.answers()) for stream in streams] == want
        assert engine.counts.evicted.total() == engine.counts.evicted_pages > 20
        check_books(engine)


def test_who_holds_the_most_waits_first(model, monkeypatch):
    """a's short text came last, but b's are in the way."""
    with Engine(model, "f32", memory=1 << 20, running=8, step_tokens=64) as engine:
        gone, preempt = [], engine._loop.scheduler.preempt

        def noted(job):
            gone.append(job.request.owner)
            preempt(job)

        monkeypatch.setattr(engine._loop.scheduler, "preempt", noted)
        streams = [engine.submit(request("b", at, 60, 560)) for at in range(5)]
        streams.append(engine.submit(request("a", 0, 100, 400)))
        assert [len(stream.answers()[0].token_ids) for stream in streams] == [560] * 5 + [400]
        assert len(gone) > 2 and set(gone) == {"b"}
        check_books(engine)


HALF, TENTH = Quota(Fraction(1, 2), 2), Quota(Fraction(1, 10), 2)


@pytest.mark.parametrize("quota", [None, HALF, TENTH], ids=["fair", "half", "a tenth"])
def test_a_request_that_fits_only_alone_takes_an_equal_part_but_no_quota(model, quota):
    large, memory = replace(request("b", 0, 300, 390), n=8), 2 * MEMORY
    with Engine(model, "f32", memory=memory, quota=quota) as engine:
        for at in range(12):
            engine.submit(request("a", at, 257)).answers()
        held = engine.asked(engine.cache.owners.held)["a"]
        assert held > memory // 2
        if quota is HALF:
            with pytest.raises(BudgetError, match="what other tenants' quotas leave of it is") as refused:
                engine.submit(large)
            needed, left = refused.value.needed, refused.value.available
            assert needed > left > memory // 2 - SLAB and f"take {needed:,} bytes" in str(refused.value)
            limited = engine.submit(replace(large, n=1, max_tokens=None)).answers()[0]
            assert len(limited.token_ids) > 100, "as much as fits"
        else:
            assert [len(each.token_ids) for each in engine.submit(large).answers()] == [390] * 8
        kept = engine.asked(engine.cache.owners.held)["a"]
        assert kept == held if quota is HALF else memory // 10 < kept < memory // 2 - SLAB // 2
        check_books(engine)


@pytest.mark.parametrize(("owner", "begins"), [("a", False), ("b", True)])
def test_nobody_begins_beside_others_on_what_is_within_anothers_share(model, owner, begins):
    """A quarter is kept, two texts of b are half. A third one of b would fit if what is kept were dropped."""
    cache, opened = model.cache("f32", memory=MEMORY), []
    for number, who in enumerate((owner, "b", "b")):
        tokens = prompt(who, number, 680)
        opened.append(cache.open(tokens, owner=who))
        model.run([(opened[-1], tokens)])
        opened[-1].settle()
    opened[0].close()
    scheduler = Scheduler(cache, 8, 512)
    first, third = (Job.of(number, request("b", number, 640), model, 2, print) for number in (8, 9))
    scheduler.add(third)
    assert scheduler.next_waiting() is third, "nothing runs: whatever it takes"
    scheduler.running.append(first)
    assert (scheduler.next_waiting() is third) == begins


def test_a_source_is_on_its_askers_account():
    reading = readers.ours(readers.drawn("t5"))
    with Engine(reading, "f32", memory=MEMORY) as engine:
        asked = Request([reading.reading.start_id], max_tokens=3, ignore_end=True, source=[5, 6, 7], owner="a")
        engine.submit(asked).answers()
        held = engine.asked(lambda: engine.cache.owners.held())
        assert set(held) == {"a"} and held["a"] > 0
        check_books(engine)


def test_quotas_that_are_more_than_the_cache_are_refused(model):
    assert Quota(parse_part("25%"), 4).bytes_of(1000) == 250 == Quota(250, 4).bytes_of(1000)
    for wrong in (Quota(251, 4), Quota(parse_part("25.1%"), 4)):
        with pytest.raises(UsageError, match="1,004 in all, more than the cache's 1,000; 250 is the most"):
            wrong.bytes_of(1000)
    with pytest.raises(UsageError, match="more than the cache's"):
        Engine(model, "f32", memory=MEMORY, quota=Quota(MEMORY, 2))
    for text in ("0%", "101%", "-5%", "1000%", "lots", "", "5 %%"):
        with pytest.raises(UsageError, match="tenant-quota"):
            parse_part(text, "tenant-quota")
