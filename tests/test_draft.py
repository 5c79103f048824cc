"""Answers guessed by a draft: the same tokens as alone, whatever the draft, its room and what becomes of requests."""

import random
import time
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import encoders
import readers
from bench_models import SIZES, tiny
from kvik import events
from kvik.engine import engine as engines
from kvik.engine.draft import agreed, share
from kvik.engine.engine import Engine
from kvik.engine.paying import EVERY, SELDOM, TRIAL, Paying, best
from kvik.engine.request import Request
from kvik.engine.sampling import Sampling, choose
from kvik.errors import EngineError, UsageError
from kvik.models import families
from kvik.models.model import Model, load
from served import save_tiny
from test_engine import ROOM, SPECS, TIGHT, alone, mixture, told


def drawn(seed=1, **sizes):
    """A random model of one layer that knows nothing of `tiny`."""
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1, **sizes}))
    return Model(families.from_hf(theirs.config.to_dict(), None, "drawn"), theirs.state_dict(), weights="f32")


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def other():
    return drawn()


@pytest.fixture(scope="module")
def near():
    """The model with its weights in int4: often right."""
    return tiny(weights="int4")


@pytest.fixture
def eager(monkeypatch):
    """As many guesses as are allowed, in every step, whatever they cost."""
    monkeypatch.setattr(Paying, "best", lambda self, answers: self.most)


def check_books(engine):
    """Both caches have everything back, and their books add up."""
    for cache in filter(None, (engine.cache, engine.draft_cache)):
        engine.asked(cache.check)
        books, left = engine.asked(lambda cache=cache: (cache.books, cache.sequences))
        assert books.in_use == 0 and not left


@pytest.mark.parametrize("kv", SPECS)
def test_no_token_is_another_and_a_draft_like_the_model_is_always_right(model, kv, eager):
    requests = mixture(12, seed=4)
    want = [alone(model, kv, request) for request in requests]
    with Engine(model, kv, memory=ROOM, running=8, step_tokens=64, draft=model, draft_kv="f32", guesses=3) as engine:
        streams = [engine.submit(request) for request in requests]
        assert [told(stream.answers()) for stream in streams] == want
        check_books(engine)
        counts = engine.counts
    assert (counts.guessed_tokens > 100) == ("h2o" not in kv)
    assert counts.accepted_tokens == counts.guessed_tokens or kv != "f32"


@pytest.mark.parametrize("kv", ["int8+snapkv:50%,every:32,last:9", "int8+tova:96rows,every:32", "int8+quest:4pages"])
def test_policies_that_look_at_queries_choose_as_if_nothing_was_guessed(model, near, other, kv, eager):
    requests = mixture(8, seed=7)
    want = [alone(model, kv, request) for request in requests]
    for draft in (near, other):
        with Engine(model, kv, memory=ROOM, running=8, step_tokens=64, draft=draft, guesses=12) as engine:
            assert [told(stream.answers()) for stream in [engine.submit(each) for each in requests]] == want
            check_books(engine)
            assert (engine.draft_cache is None) == ("tova" in kv), "it looks at the last query alone"
            assert engine.draft_cache is None or engine._loop.scheduler.guesser.most == (8 if "last" in kv else 12)


@pytest.mark.parametrize(
    ("kv", "draft_kv"),
    [
        ("f32", "int8"),
        ("int4+window:64,sinks:4", "k8v4+window:32,sinks:2"),
        ("f32", "int4+window:64,sinks:4,relative"),
    ],
)
def test_a_draft_that_knows_nothing_changes_nothing(model, other, kv, draft_kv, eager):
    requests = mixture(8, seed=5)
    want = [alone(model, kv, request) for request in requests]
    with Engine(model, kv, memory=ROOM, running=8, step_tokens=64, draft=other, draft_kv=draft_kv) as engine:
        streams = [engine.submit(request) for request in requests]
        assert [told(stream.answers()) for stream in streams] == want
        check_books(engine)
        assert 0 <= engine.counts.accepted_tokens < engine.counts.guessed_tokens / 5


def test_as_many_guesses_as_pay_change_nothing_either(model, other):
    requests = mixture(12, seed=6)
    want = [alone(model, "f32", request) for request in requests]
    for draft in (model, other):
        with Engine(model, "f32", memory=ROOM, running=8, draft=draft) as engine:
            assert [told(stream.answers()) for stream in [engine.submit(each) for each in requests]] == want
            check_books(engine)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_every_step_gives_the_guesses_and_one_more(model, eager, temperature):
    request = Request(list(range(3, 60)), max_tokens=41, sampling=Sampling(temperature, seed=7), ignore_end=True)
    with Engine(model, "f32", memory=ROOM, draft=model, draft_kv="f32", guesses=4) as engine:
        assert told(engine.submit(request).answers()) == alone(model, "f32", request)
        counts = engine.counts
        assert (counts.steps, counts.guessed_tokens, counts.accepted_tokens) == (1 + 40 // 5, 32, 32)


def test_all_answers_are_guessed_at_in_the_same_passes(model, eager, monkeypatch):
    passes, run = [], Model.run

    def counted(self, chunks, **options):
        passes.append(len(chunks))
        return run(self, chunks, **options)

    draft = tiny()
    monkeypatch.setattr(draft, "run", counted.__get__(draft))
    request = Request([3, 4, 5], max_tokens=13, ignore_end=True, n=4)
    with Engine(model, "f32", memory=ROOM, draft=draft, draft_kv="f32", guesses=3) as engine:
        engine.submit(request).answers()
    assert passes == [4] * 9, "three passes in each of three steps"


def test_little_memory_preempts_and_changes_no_token(model, eager):
    requests = mixture(24, seed=2)
    want = [alone(model, "f32", request) for request in requests]
    with Engine(
        model, "f32", memory=2 * TIGHT, running=8, step_tokens=64, draft=model, draft_kv="f32", guesses=3
    ) as engine:
        assert engine.cache.budget == engine.draft_cache.budget == TIGHT
        streams = [engine.submit(request) for request in requests]
        assert [told(stream.answers()) for stream in streams] == want
        assert engine.counts.preemptions > 5 and engine.counts.accepted_tokens > 50
        check_books(engine)


@pytest.mark.parametrize("slabs", [0, 1.2, 3.2])
def test_a_draft_without_room_goes_without_answers(model, slabs, eager, monkeypatch):
    monkeypatch.setattr(engines, "share", lambda *_: int(slabs * 2**18))
    rng = random.Random(8)
    requests = [
        Request([rng.randrange(3, 100) for _ in range(size)], max_tokens=80, ignore_end=True)
        for size in (600, *rng.choices(range(100, 250), k=9))
    ]
    want = [alone(model, "f32", request) for request in requests]
    gone = []
    with Engine(model, "f32", memory=ROOM, running=8, draft=model, draft_kv="f32", guesses=3) as engine:
        give_up = engine._loop.scheduler.guesser._give_up
        engine._loop.scheduler.guesser._give_up = lambda line: (gone.append(line), give_up(line))
        assert [told(stream.answers()) for stream in [engine.submit(each) for each in requests]] == want
        check_books(engine)
        assert (engine.counts.guessed_tokens > 0) == (slabs > 0)
        assert (gone or slabs > 3) and len(gone) < 40, "who has no room does not try at every step"
        assert engine.counts.preemptions == 0, "nobody gives way for a guess"


@pytest.mark.parametrize("memory", [ROOM, 2 * TIGHT])
def test_aborts_at_any_moment_leave_nothing_in_either_cache(model, memory, eager):
    rng, requests = random.Random(3), [replace(request, n=1) for request in mixture(20, seed=3)]
    want = [alone(model, "f32", request) for request in requests]
    with Engine(model, "f32", memory=memory, running=6, step_tokens=64, draft=model, draft_kv="f32") as engine:
        streams = []
        for number, request in enumerate(requests):
            streams.append(engine.submit(request))
            time.sleep(rng.random() * 0.01)
            if rng.random() < 0.4:
                streams[rng.randrange(number + 1)].abort()
        for stream, ((ids, _, _),) in zip(streams, want, strict=True):
            (found,) = stream.answers()
            assert found.token_ids == ids[: len(found.token_ids)]
            assert len(found.token_ids) == len(ids) or found.finish_reason == "interrupted"
        check_books(engine)


def test_closing_in_the_middle_closes_the_drafts_sequences(model, eager):
    engine = Engine(model, "f32", memory=ROOM, draft=model)
    stream = engine.submit(Request([3, 4], max_tokens=600, ignore_end=True))
    next(iter(stream))
    engine.close()
    with pytest.raises(EngineError):
        stream.answers()
    for cache in (engine.cache, engine.draft_cache):
        cache.check()
        assert not cache.sequences


def test_the_draft_finds_prompts_again_but_under_no_other_salt(model, other, eager):
    opened, request = [], Request(list(range(3, 80)), max_tokens=6, ignore_end=True)
    with Engine(model, "f32", memory=ROOM, draft=other) as engine:
        engine.draft_cache.listen(lambda event: opened.append(event) if isinstance(event, events.Opened) else None)
        for salt in "aabb":
            engine.submit(replace(request, salt=salt)).answers()
        engine.submit(replace(request, n=3, salt="c", max_tokens=40)).answers()
    assert [event.cached > 0 for event in opened] == [False, True, False, True, False, True, True]


def test_only_what_is_certain_is_published(model, near, eager):
    request = Request(list(range(3, 40)), max_tokens=250, sampling=Sampling(0.05, seed=1), ignore_end=True)
    with Engine(model, "f32", memory=ROOM, draft=near, draft_kv="int4", guesses=5) as engine:
        (answer,) = engine.submit(request).answers()
        text = [*request.prompt, *answer.token_ids]
        blocks = engine.asked(lambda: [(block.start, list(block.tokens)) for block in engine.draft_cache.index])
        assert 0.5 < engine.counts.accepted_tokens / engine.counts.guessed_tokens < 1
    assert len(blocks) > 6 and all(tokens == text[start : start + len(tokens)] for start, tokens in blocks)


def test_penalties_and_least_tokens_hold_for_guesses_too(model, eager):
    sampling = Sampling(0.7, seed=3, presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.3, top_k=40)
    request = Request([3, 4, 5], max_tokens=61, sampling=sampling, ignore_end=True, stop_ids=(9, 10), min_tokens=61)
    with Engine(model, "f32", memory=ROOM, draft=model, draft_kv="f32", guesses=5) as engine:
        assert told(engine.submit(request).answers()) == alone(model, "f32", request)
        assert engine.counts.accepted_tokens == engine.counts.guessed_tokens == 50


def test_a_stop_ends_an_answer_within_its_guesses(tmp_path, eager):
    model = load(str(save_tiny(tmp_path)), weights="f32")
    free = Request(list(b"hello"), max_tokens=60, sampling=Sampling(1.5, seed=2), ignore_end=True)
    with Engine(model, "f32", memory=ROOM) as engine:
        text = engine.submit(free).answers()[0].text
        asked = [replace(free, stop=(text[at : at + 2],)) for at in (7, 16, 23)]
        asked += [replace(free, stop_ids=(engine.submit(free).answers()[0].token_ids[11],))]
        want = [engine.submit(each).answers()[0] for each in asked]
    with Engine(model, "f32", memory=ROOM, draft=model, draft_kv="f32", guesses=5) as engine:
        found = [engine.submit(each).answers()[0] for each in asked]
        check_books(engine)
    assert [(a.text, a.token_ids, a.finish_reason) for a in found] == [
        (a.text, a.token_ids, "stop") for a in want
    ] and all(len(a.token_ids) < 60 for a in want)


def test_a_draft_with_fewer_positions_guesses_as_far_as_it_goes(model, eager):
    short = drawn(max_position_embeddings=96)
    request = Request(list(range(3, 60)), max_tokens=90, ignore_end=True)
    with Engine(model, "f32", memory=ROOM, draft=short, guesses=4) as engine:
        assert told(engine.submit(request).answers()) == alone(model, "f32", request)
        assert 20 < engine.counts.guessed_tokens < 4 * 45
        check_books(engine)


def test_a_draft_reads_the_same_source(eager):
    reading = readers.ours(readers.drawn("t5"))
    request = Request([reading.reading.start_id], max_tokens=31, ignore_end=True, source=[5, 6, 7, 8])
    with Engine(reading, "f32", memory=ROOM, draft=reading, draft_kv="f32", guesses=5) as engine:
        found = told(engine.submit(request).answers())
        assert engine.counts.accepted_tokens == engine.counts.guessed_tokens == 25
        engine.asked(engine.draft_cache.check)
    assert found == alone(reading, "f32", request)


def test_what_can_be_no_draft_is_refused(model, other, tmp_path):
    for draft, options, reason in (
        (drawn(vocab_size=300), {}, "other tokens than tiny \\(300 and 258\\)"),
        (readers.ours(readers.drawn("t5")), {}, "does not read what tiny reads"),
        (encoders.ours(encoders.drawn("bert")), {}, "does not read what tiny reads"),
        (other, {"draft_kv": "int8+snapkv:50%"}, "policy"),
        (other, {"guesses": 0}, "nothing to do"),
    ):
        with pytest.raises(UsageError, match=reason):
            Engine(model, "f32", memory=ROOM, draft=draft, **options)
    made = load(str(save_tiny(tmp_path)), weights="f32")
    spelled = made.tokenizer.spelled
    twin = load(str(save_tiny(tmp_path)), weights="f32")
    twin.tokenizer.folder = tmp_path / "elsewhere"
    Engine(made, "f32", memory=ROOM, draft=twin).close()
    twin.tokenizer.spelled = lambda token: b"!" if token == 7 else spelled(token)
    with pytest.raises(UsageError, match="token 7 is b'!' and "):
        Engine(made, "f32", memory=ROOM, draft=twin)


def test_both_caches_have_room_for_the_same_texts(model, other):
    with Engine(model, "f32", memory=ROOM, draft=other, draft_kv="f32") as engine:
        assert engine.draft_cache.budget == pytest.approx(ROOM / 3, rel=0.01), "one layer, and two"
        assert engine.cache.budget + engine.draft_cache.budget == ROOM
    with Engine(model, "int8+h2o:64rows", memory=ROOM, draft=other) as engine:
        assert engine.draft_cache is None and engine.cache.budget == ROOM, "nothing can be guessed"
    full, window = model.spec("f32"), model.spec("f32+window:64")
    assert share(1000, window, full, 600) == 500, "half at the most"


def test_what_a_sequence_keeps_of_its_guesses():
    assert agreed([1, 2, 3, 4], [1, 2, 3, 4, 5], 3) == 4
    assert agreed([1, 2, 3, 4], [1, 2, 9, 4, 5], 3) == 2
    assert agreed([1, 2, 3, 4], [1, 2, 3, 4], 3) == 3, "the last is read again, for what comes after it"
    assert agreed([1, 2], [1, 2, 3, 4], 3) == 2 and agreed([], [1], 3) == 0


def test_two_draws_with_the_same_noise_agree_often():
    g = torch.Generator().manual_seed(0)
    for spread in (0.3, 1.0, 3.0):
        p, q = torch.randn(40, generator=g), torch.randn(40, generator=g) * spread
        q = p + q
        far = float((p.softmax(0) - q.softmax(0)).abs().sum() / 2)
        same = [choose(p, Sampling(1.0, seed=at), 5) == choose(q, Sampling(1.0, seed=at), 5) for at in range(2000)]
        apart = [choose(p, Sampling(1.0, seed=at), 5) == choose(q, Sampling(1.0, seed=at), 6) for at in range(2000)]
        share = sum(same) / 2000
        assert (1 - far) / (1 + far) - 0.03 < share < 1 - far + 0.03 and share > 1.5 * sum(apart) / 2000


def test_the_best_number_of_guesses_is_that_of_the_formula():
    for rate in (0.0, 0.3, 0.7, 0.95):
        for cost in (0.02, 0.2, 0.6, 2.0):
            speed = [(1 - rate ** (k + 1)) / (1 - rate) / (1 + cost * k) for k in range(9)]
            assert best(rate, cost, 8) == (speed.index(max(speed)) if max(speed) > 1.05 else 0)
    assert best(1.0, 0.5, 8) == 8 and best(1.0, 1.0, 8) == 0


def lived(paying, steps, right, plain=0.1, each=0.01, answers=2):
    """Guesses in each of so many steps, of a world in which `right` of them are right."""
    counts = []
    for _ in range(steps):
        count = paying.best(answers)
        counts.append(count)
        for _ in range(answers):
            paying.checked(count, min(right, count))
        paying.took(plain + each * count, answers, count * answers)
    return counts


def test_guesses_follow_what_they_bring():
    paying = Paying(8)
    counts = lived(paying, 200, right=8)
    assert counts[:TRIAL] == [0] * TRIAL and set(counts[10:]) == {0, 8}
    assert counts[10:].count(0) == 190 // EVERY + 1, "t is measured again now and then"
    counts = lived(paying, 600 + 2 * SELDOM, right=0)
    assert set(counts[300:]) == {0, 4} and counts[600:].count(4) <= 3 * TRIAL, "only trials are left, and few"
    assert 8 in lived(paying, SELDOM + 100, right=8)[-50:], "and it comes back"
    assert lived(Paying(8), 100, right=2, each=0.2)[-50:].count(0) > 40, "too dear"


def test_batches_of_other_sizes_have_costs_of_their_own():
    paying = Paying(8)
    lived(paying, 100, right=6, each=0.001, answers=1)
    assert lived(paying, 100, right=6, each=0.5, answers=16)[20:].count(0) > 70
    assert lived(paying, 20, right=6, each=0.001, answers=1).count(0) < 3
