"""The engine: the same tokens alone and in any mix, room that runs out, and nothing left behind."""

import random
import threading
import time
from dataclasses import replace

import pytest
import torch

import readers
from bench_models import tiny
from kvik.cache.cache import Cache
from kvik.engine.engine import Engine
from kvik.engine.lookup import look_up
from kvik.engine.request import Request
from kvik.engine.sampling import Sampling, changed, choose
from kvik.engine.scheduler import LEAST, Pace
from kvik.errors import BudgetError, ContextError, EngineError, QueueError, UsageError

ROOM, TIGHT = 64 << 20, 512 << 10
SPECS = ["f32", "int8", "int4+window:64,sinks:4", "int8+snapkv:50%", "int8+h2o:96rows,every:32", "k8v4+kvzip:50%"]


@pytest.fixture(scope="module")
def model():
    return tiny()


def mixture(count, seed):
    """Requests with shared and divergent beginnings, of every kind."""
    rng = random.Random(seed)
    base = [rng.randrange(3, 100) for _ in range(450)]
    found = []
    for number in range(count):
        own = [rng.randrange(3, 100) for _ in range(rng.randrange(1, 60))]
        found.append(
            Request(
                base[: rng.choice([0, 20, 100, 300, 400])] + own,
                max_tokens=rng.randrange(1, 60),
                sampling=Sampling(rng.choice([0, 0, 1.0]), seed=number),
                n=rng.choice([1, 1, 1, 2, 3]),
                ignore_end=True,
                logprobs=rng.choice([None, 0, 2]),
                prompt_logprobs=rng.choice([None, None, None, 1]),
                priority=rng.choice([0, 0, 1]),
            )
        )
    return found


def told(answers):
    return [(answer.token_ids, answer.logprobs, answer.prompt_logprobs) for answer in answers]


def alone(model, kv, request):
    """The same request with nothing else about."""
    with Engine(model, kv, memory=ROOM) as engine:
        return told(engine.submit(request).answers())


def check_books(engine):
    """Everything was given back, and the books add up."""
    engine.asked(engine.cache.check)
    books = engine.asked(lambda: engine.cache.books)
    assert books.in_use == 0 and not engine.asked(lambda: engine.cache.sequences)


@pytest.mark.parametrize("kv", SPECS)
def test_no_token_and_no_probability_depends_on_what_else_is_in_a_step(model, kv):
    requests = mixture(12, seed=1)
    want = [alone(model, kv, request) for request in requests]
    for guesses in (0, 3):
        with Engine(model, kv, memory=ROOM, running=8, step_tokens=64, guesses=guesses) as engine:
            streams = [engine.submit(request) for request in requests]
            assert [told(stream.answers()) for stream in streams] == want
            check_books(engine)
            assert (engine.counts.accepted_tokens > 0) == (guesses > 0 and "h2o" not in kv), "h2o can't undo"
            assert engine.counts.requests == 12


def test_little_memory_takes_every_rung_and_changes_no_token(model):
    requests = mixture(24, seed=2)
    want = [alone(model, "f32", request) for request in requests]
    with Engine(model, "f32", memory=TIGHT, running=8, step_tokens=64) as engine:
        streams = [engine.submit(request) for request in requests]
        assert [told(stream.answers()) for stream in streams] == want
        assert engine.counts.preemptions > 5 and engine.counts.evicted_pages > 100
        check_books(engine)


@pytest.mark.parametrize("memory", [ROOM, TIGHT])
def test_aborts_at_any_moment_leave_nothing_and_stop_nobody(model, memory):
    rng, requests = random.Random(3), [replace(request, n=1) for request in mixture(24, seed=3)]
    want = [alone(model, "f32", request) for request in requests]
    with Engine(model, "f32", memory=memory, running=6, step_tokens=64) as engine:
        streams, gone = [], set()
        for number, request in enumerate(requests):
            streams.append(engine.submit(request))
            time.sleep(rng.random() * 0.01)
            if rng.random() < 0.4:
                gone.add(at := rng.randrange(number + 1))
                streams[at].abort()
                streams[at].abort()
        for number, stream in enumerate(streams):
            for found, alike in zip(stream.answers(), want[number], strict=True):
                whole = found.finish_reason != "interrupted"
                assert whole or number in gone
                assert found.token_ids == alike[0] if whole else found.token_ids == alike[0][: len(found.token_ids)]
        check_books(engine)


def test_a_prompt_that_many_ask_for_at_once_is_computed_once(model):
    base = list(range(3, 90)) * 4
    requests = [Request([*base, 3 + number], max_tokens=4, ignore_end=True) for number in range(12)]
    with Engine(model, "f32", memory=ROOM, running=12, step_tokens=64) as engine:
        streams = [engine.submit(request) for request in requests]
        known = [stream.answers()[0].known for stream in streams]
        assert [each.tokens for each in known] == [len(base) + 1] * 12
        assert known[0].cached == 0 and all(each.cached >= 320 for each in known[1:]), "all full pages"
        assert engine.counts.cached_tokens == sum(each.cached for each in known)


def test_another_salt_knows_nothing(model):
    request = Request(list(range(3, 80)), max_tokens=2, ignore_end=True, salt="a")
    with Engine(model, "f32", memory=ROOM) as engine:
        known = [engine.submit(replace(request, salt=salt)).answers()[0].known.cached for salt in "aabb"]
    assert known == [0, 64, 0, 64]


def test_answers_of_one_request_have_seeds_of_their_own_and_share_the_prompt(model):
    request = Request(list(range(3, 80)), max_tokens=12, sampling=Sampling(1.0, seed=5), n=3, ignore_end=True)
    with Engine(model, "f32", memory=ROOM) as engine:
        together = engine.submit(request).answers()
        one_by_one = [
            engine.submit(replace(request, n=1, sampling=Sampling(1.0, seed=5 + at))).answers()[0] for at in range(3)
        ]
        pages = engine.asked(lambda: engine.cache.index and len(engine.cache.index))
    assert [each.token_ids for each in together] == [each.token_ids for each in one_by_one]
    assert len({tuple(each.token_ids) for each in together}) == 3 and pages


def test_log_probabilities_are_those_of_the_model_on_a_hit_too(model):
    prompt = list(range(3, 80))
    request = Request(prompt, max_tokens=5, logprobs=3, prompt_logprobs=2, ignore_end=True)
    with Engine(model, "f32", memory=ROOM) as engine:
        first, again = (engine.submit(request).answers()[0] for _ in range(2))
    assert told([first]) == told([again]) and again.known.cached == 0, "cached rows hold no logits"
    assert "log-probabilities" in again.known.why
    text = [*prompt, *first.token_ids]
    with model.cache("f32", memory=ROOM).open() as sequence:
        logprobs = torch.log_softmax(model.run([(sequence, text)], every=True), -1)
    likely = [*first.prompt_logprobs, *first.logprobs]
    assert [each.token for each in likely] == text[1:]
    for row, each in zip(logprobs, likely, strict=False):
        assert each.logprob == float(row[each.token]) and each.rank == int((row > row[each.token]).sum())
        assert each.top == tuple((token, float(row[token])) for token in row.topk(len(each.top)).indices.tolist())
    assert [len(each.top) for each in likely] == [2] * 76 + [3] * 5


def test_what_can_never_fit_is_refused_at_once_with_both_numbers(model):
    with Engine(model, "f32", memory=TIGHT) as engine:
        with pytest.raises(BudgetError, match=r"take [\d,]+ bytes of the cache, and all of it is 524,288") as refused:
            engine.submit(Request([3] * 600, max_tokens=90))
        assert refused.value.needed > refused.value.available == TIGHT
        with pytest.raises(ContextError):
            engine.submit(Request([3] * 700))
        with pytest.raises(UsageError, match="token ids"):
            engine.submit(Request([3, 258]))
        limited = engine.submit(Request([3] * 300, ignore_end=True)).answers()[0]
        assert limited.finish_reason == "length" and len(limited.token_ids) > 10, "as much as fits"


def test_a_full_queue_refuses_and_recovers(model):
    request = Request([3, 4], max_tokens=30, ignore_end=True)
    with Engine(model, "f32", memory=ROOM, running=1, waiting=2) as engine:
        held = threading.Event()
        engine._loop.inbox.put(held.wait)
        streams = [engine.submit(request) for _ in range(3)]
        with pytest.raises(QueueError, match="2 requests wait"):
            engine.submit(request)
        held.set()
        assert all(stream.answers() for stream in streams)
        assert engine.submit(request).answers() and engine.counts.refused == 1


def test_closing_ends_what_runs_and_says_so(model):
    engine = Engine(model, "f32", memory=ROOM)
    stream = engine.submit(Request([3, 4], max_tokens=600, ignore_end=True))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        stream.answers()
    with pytest.raises(EngineError):
        engine.submit(Request([3]))


def test_an_engine_that_breaks_tells_everybody(model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a wire came loose")

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine = Engine(model, "f32", memory=ROOM)
    monkeypatch.setattr(engine.model.decoder, "forward", broken)
    with pytest.raises(EngineError, match="a wire came loose"):
        engine.submit(Request([3, 4])).answers()
    engine._thread.join()
    with pytest.raises(EngineError, match="broken"):
        engine.submit(Request([3, 4]))


def test_a_long_prompt_leaves_room_for_answers_and_short_prompts(model):
    long, short = Request([5] * 600, max_tokens=1), Request([6, 7, 8], max_tokens=3, ignore_end=True)
    order = []
    with Engine(model, "f32", memory=ROOM, running=8, step_tokens=32) as engine:
        held = threading.Event()
        engine._loop.inbox.put(held.wait)
        streams = {}
        for name, request in (("long", long), ("short", short)):
            streams[name] = engine.submit(request, lambda update, name=name: order.append((name, update.last)))
        held.set()
        while ("long", True) not in order:
            time.sleep(0.01)
    assert order.index(("short", True)) < order.index(("long", True))


def test_a_step_gives_prompts_what_its_pace_allows():
    pace = Pace()
    assert pace.prompt_tokens(500) == 4 * LEAST, "nothing is known yet"
    pace.saw(0.010, 0, mixed=False)
    pace.saw(0.010 + 0.001 * 40, 40, mixed=True)
    assert pace.prompt_tokens(500) == 20, "twice as long again as a step without"
    assert pace.prompt_tokens(18) == 18
    pace.saw(0.010 + 1.0, 10, mixed=True)
    assert pace.prompt_tokens(500) == LEAST


def test_the_end_of_a_text_is_looked_up_in_it():
    assert look_up([1, 2, 3, 4, 9, 1, 2, 3], 2) == [4, 9]
    assert look_up([1, 2, 3, 7, 2, 3, 8, 2, 3], 3) == [8, 2, 3], "the last time, of the longest end"
    assert look_up([1, 2, 3, 4, 8, 9, 3, 4, 7, 2, 3, 4], 1) == [8]
    assert look_up([1, 2, 3], 4) == [] == look_up([1], 4)


def test_stop_ids_and_least_tokens(model):
    free = Request([3, 4, 5], max_tokens=20, ignore_end=True)
    with Engine(model, "f32", memory=ROOM) as engine:
        text = engine.submit(free).answers()[0].token_ids
        stop = text[4]
        first = text.index(stop)
        stopped = engine.submit(replace(free, stop_ids=(stop,))).answers()[0]
        later = engine.submit(replace(free, stop_ids=(stop,), min_tokens=12)).answers()[0]
    assert (stopped.token_ids, stopped.finish_reason) == (text[: first + 1], "stop")
    assert len(later.token_ids) >= 12 and stop not in later.token_ids[:12]


def test_penalties_bias_and_least_probability():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    both = Sampling(presence_penalty=0.5, frequency_penalty=0.25, bias={3: 5.0})
    assert changed(logits, both, [1], [0, 0, 2]).tolist() == [1.0, 1.0, -0.75, 4.0]
    again = Sampling(repetition_penalty=2.0)
    assert changed(logits, again, [0], [3]).tolist() == [1.0, 1.0, 0.0, -2.0]
    assert changed(logits, Sampling(), [0], [1]) is logits
    draws = {choose(logits, Sampling(1.0, seed=at, min_p=0.3), 0) for at in range(200)}
    assert draws == {0, 1}, "exp(-1) is 0.37 of the likeliest, exp(-2) 0.14"
    for wrong in (dict(min_p=2), dict(presence_penalty=3), dict(repetition_penalty=0), dict(bias={1: 200.0})):
        with pytest.raises(UsageError):
            Sampling(**wrong)


def test_the_sum_of_top_p_goes_over_what_top_k_and_min_p_left():
    logits = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]).log()

    def kept(**rules):
        return {choose(logits, Sampling(1.0, seed=at, **rules), at) for at in range(400)}

    assert kept(top_p=0.79) == {0, 1}
    assert kept(top_p=0.6, top_k=2) == {0}, "0.5 is 0.63 of what two have"
    assert kept(top_p=0.63, min_p=0.5) == {0, 1}, "0.5 is 0.625 of 0.8"
    assert kept(top_p=0.62, min_p=0.5) == {0}


def test_many_short_requests_leave_memory_as_it_was(model):
    with Engine(model, "int8", memory=TIGHT, running=16) as engine:
        for _ in range(20):
            streams = [engine.submit(Request([3 + at, 4, 5], max_tokens=2, ignore_end=True)) for at in range(50)]
            assert all(len(stream.answers()[0].token_ids) == 2 for stream in streams)
        check_books(engine)
        assert engine._loop.jobs == {} and engine._loop.scheduler._keys == {} and engine.counts.requests == 1000


def test_a_source_that_cannot_be_read_is_its_askers_error_alone():
    reading = readers.ours(readers.drawn("t5"))
    start = [reading.reading.start_id]
    with Engine(reading, "f32", memory=ROOM) as engine:
        good = Request(start, max_tokens=3, ignore_end=True, source=[5, 6, 7])
        for wrong in ([10**6], []):
            with pytest.raises(UsageError):
                engine.submit(replace(good, source=wrong)).answers()
        assert len(engine.submit(good).answers()[0].token_ids) == 3


def test_who_finds_no_room_to_begin_waits_and_begins_later(model, monkeypatch):
    opened, refuse = Cache.open, [True]

    def full(self, *given):
        if len(self.sequences) == 1 and refuse.pop(0) if refuse else False:
            raise BudgetError("no room for tables", needed=1, available=0)
        return opened(self, *given)

    monkeypatch.setattr(Cache, "open", full)
    request = Request([3, 4, 5], max_tokens=300, ignore_end=True)
    with Engine(model, "f32", memory=ROOM) as engine:
        first = engine.submit(request)
        begun = iter(first)
        next(begun)
        second = engine.submit(replace(request, priority=-1, max_tokens=20))  # the first is the youngest
        assert len(second.answers()[0].token_ids) == 20 and sum(len(update.token_ids) for update in begun) == 299
        assert engine.counts.preemptions == 1 and not refuse
