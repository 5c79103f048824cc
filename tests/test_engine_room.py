"""The engine where there is little room: what is taken is answered, as alone, and what a request may need is known."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench_models import SIZES
from kvik import events
from kvik.cache.sequence import Sequence
from kvik.engine.engine import Engine
from kvik.engine.request import Request
from kvik.engine.sampling import Sampling
from kvik.engine.scheduler import Pace
from kvik.errors import BudgetError
from kvik.models import families
from kvik.models.model import Model

ROOM = 64 << 20


@pytest.fixture(scope="module")
def model():
    """A random one with wide heads: 32 tokens are 128 KiB in f32."""
    wide = {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**{**SIZES, **wide}))
    return Model(families.from_hf(theirs.config.to_dict(), None, "wide"), theirs.state_dict(), weights="f32")


def text(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(3, 258) for _ in range(length)]


def told(answers):
    return [(answer.token_ids, answer.logprobs, answer.prompt_logprobs, answer.finish_reason) for answer in answers]


def alone(model, kv, request):
    with Engine(model, kv, memory=ROOM) as engine:
        return told(engine.submit(request).answers())


def test_more_answers_than_may_run_at_once_run_alone(model):
    many, one = Request([3, 4], max_tokens=4, n=5, ignore_end=True), Request([5, 6], max_tokens=30, ignore_end=True)
    with Engine(model, "f32", memory=ROOM, running=2) as engine:
        streams = [engine.submit(each) for each in (one, many, one)]
        assert [len(stream.answers()) for stream in streams] == [1, 5, 1]
        engine.check()


@pytest.mark.parametrize("kv", ["f32+keydiff:96rows,every:32", "int8+tova:64rows,every:16", "f32+snapkv:96rows"])
def test_no_hit_reaches_behind_the_first_choice(model, kv):
    """Rows that the first text let go at a position were published before it; the second may not begin behind it."""
    request = Request(text(300), max_tokens=8, logprobs=0, ignore_end=True)
    want = alone(model, kv, request)
    with Engine(model, kv, memory=ROOM) as engine:
        answers = [engine.submit(request).answers() for _ in range(2)]
        assert [told(each) for each in answers] == [want, want]
        assert 32 <= answers[1][0].known.cached < 128
        shorter = engine.submit(replace(request, prompt=text(300)[:127])).answers()[0].known.cached
        assert 32 <= shorter <= 96, "before any choice pages are found as ever"


def test_little_memory_shortens_no_pass(model):
    """What a pass finds depends on how much is repeated at once; so it waits for room."""
    requests = [Request(text(length, length), max_tokens=8, n=2, logprobs=0, ignore_end=True) for length in (140, 150)]
    want = [alone(model, "f32+kvzip:50%", request) for request in requests]
    with Engine(model, "f32+kvzip:50%", memory=ROOM) as engine:
        memory = max(engine.needs(request) for request in requests)
    with Engine(model, "f32+kvzip:50%", memory=memory) as engine:
        streams = [engine.submit(request) for request in requests]
        assert [told(stream.answers()) for stream in streams] == want
        assert engine.counts.preemptions > 0
        engine.check()


SPECS = [
    "f32", "int8", "f32+window:64,sinks:4", "f32+snapkv:50%", "f32+snapkv:25%,every:32", "f32+h2o:96rows,every:32",
    "f32+ada(knorm):160rows,every:32", "f32+kvzip:50%", "bf16+quest:3pages",
]  # fmt: skip


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize(("prompt", "new", "n"), [(250, 20, 1), (100, 90, 3), (210, 40, 4)])
def test_what_a_request_needs_is_enough_for_it_alone(model, kv, prompt, new, n):
    request = Request(text(prompt), max_tokens=new, n=n, ignore_end=True, sampling=Sampling(1.0, seed=1))
    with Engine(model, kv, memory=ROOM) as engine:
        memory = engine.needs(request)
    with Engine(model, kv, memory=memory, step_tokens=512) as engine:
        engine.submit(Request(text(prompt, 9), max_tokens=1)).answers()  # leaves pages to drop
        assert [len(answer.token_ids) for answer in engine.submit(request).answers()] == [new] * n
        assert engine.counts.preemptions == 0
        engine.check()
    with Engine(model, kv, memory=memory - 1) as engine, pytest.raises(BudgetError, match="take"):
        engine.submit(request)


def test_answers_that_go_on_share_their_prompt_again(model):
    request = Request(text(150), max_tokens=40, n=3, ignore_end=True, logprobs=0, sampling=Sampling(1.0, seed=1))
    want, opened = alone(model, "f32", request), []
    with Engine(model, "f32", memory=ROOM) as engine:
        engine.cache.listen(lambda event: opened.append(event) if isinstance(event, events.Opened) else None)
        stream = engine.submit(request)
        updates = iter(stream)
        seen = [next(updates) for _ in range(30)]

        def interrupt():
            scheduler, cache = engine._loop.scheduler, engine.cache
            scheduler.preempt(scheduler.running[0])
            budget = cache.budget
            cache.resize(0)  # nothing of it is found again
            cache.resize(budget)

        engine.asked(interrupt)
        pages = []
        engine.after_steps(lambda: pages.append(engine.cache.books.in_use))
        seen += list(updates)
        assert len(opened) == 2, "once at first, and once to go on"
    tokens = [[t for update in seen if update.answer == answer for t in update.token_ids] for answer in range(3)]
    assert tokens == [each[0] for each in want]
    lanes = 2 * 4
    assert max(pages) <= lanes * (5 + 3 * 3), "the prompt's pages once, and each answer's own"


def test_who_has_no_room_to_settle_with_the_last_token_is_answered_nevertheless(model, monkeypatch):
    settle, request = Sequence.settle, Request(text(40), max_tokens=6, ignore_end=True)

    def full(self, accepted=None):
        if len(self) == 40 + 5:
            raise BudgetError("no room to settle", needed=1, available=0)
        settle(self, accepted)

    want = alone(model, "f32", request)
    monkeypatch.setattr(Sequence, "settle", full)
    with Engine(model, "f32", memory=ROOM) as engine:
        assert told(engine.submit(request).answers()) == want and not engine.broken
        engine.check()


def test_a_prompt_has_its_log_probabilities_once_though_its_answers_fork_late(model, monkeypatch):
    class Crawling(Pace):
        def prompt_tokens(self, most):
            return 1

    fork, refused = Sequence.fork, [True]

    def full(self):
        if refused:
            raise BudgetError(f"no room for tables {refused.pop()}", needed=1, available=0)
        return fork(self)

    drawn = Sampling(1.0, seed=7)
    request = Request(text(50), max_tokens=5, n=3, ignore_end=True, prompt_logprobs=1, sampling=drawn)
    request = replace(request, stop_ids=(alone(model, "f32", request)[0][0][0],))  # the first answer ends at once
    want = alone(model, "f32", request)
    assert [len(each[0]) for each in want] == [1, 5, 5]
    monkeypatch.setattr(Sequence, "fork", full)
    with Engine(model, "f32", memory=ROOM, pace=Crawling()) as engine:
        engine.cache.shares = False  # what was computed is computed again
        other, _ = (engine.submit(Request([3, 4], max_tokens=most, ignore_end=True)) for most in (400, 80))
        assert told(engine.submit(request).answers()) == want and not refused
        other.abort()


def test_stages_and_looks_from_the_engines_own_thread(model):
    request = Request(text(100), max_tokens=30, ignore_end=True)
    with Engine(model, "f32", memory=ROOM, running=1, step_tokens=40) as engine:
        found = {0: [], 1: []}

        def look():
            for job in found:
                found[job].append(engine.stage(job))
            engine.check()  # waits for nobody there
            if found[0].count("answer") == 5:
                engine._loop.scheduler.preempt(engine._loop.scheduler.running[0])
                found[0].append(engine.stage(0))

        engine.after_steps(look)
        streams = [engine.submit(request), engine.submit(request)]
        assert all(len(stream.answers()[0].token_ids) == 30 for stream in streams)
        engine.asked(look)
    order = [list(dict.fromkeys(each)) for each in found.values()]
    assert order[0] == ["prompt", "answer", "preempted", None]
    assert order[1][0] == "queued" and order[1][-1] is None
