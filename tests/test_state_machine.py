"""Conservation (law 5): any order of any operations against a plain dict, and steps that end by an error."""

import contextlib
from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from helpers import TOY, Toy, cache_of, make_cache, over_retentions, sees, shapes, state, text
from kvik.cache import pressure
from kvik.cache.arena import SLAB
from kvik.cache.cache import Cache
from kvik.cache.sequence import Sequence
from kvik.cache.step import Step
from kvik.errors import BudgetError, SequenceError, UsageError
from kvik.ops.codecs import decode, encode, unrotated

LAYERS = shapes(layers=2, heads=2, width=64)  # in f32 a slab holds 128 tokens
RUNS = Toy(LAYERS)


class Oracle:
    """What a sequence should be: its tokens, how many are settled, and how far it can be trimmed."""

    def __init__(self, tokens):
        self.tokens, self.settled, self.floor = list(tokens), len(tokens), 0


class Machine(RuleBasedStateMachine):
    """Texts are short repeats of few tokens, so that prefixes meet often."""

    kv = "f32"

    def __init__(self):
        super().__init__()
        self.cache = make_cache(self.kv, LAYERS, memory=6 * SLAB, page=16)
        self.known: dict[Sequence, Oracle] = {}

    def pick(self, data):
        return data.draw(st.sampled_from(list(self.known)), label="sequence")

    @rule(seed=st.integers(0, 1), length=st.integers(0, 150), salt=st.sampled_from(["", "", "a"]))
    def open(self, seed, length, salt):
        tokens = text(400, seed)[:length]
        try:
            sequence = self.cache.open(tokens, salt)
        except BudgetError:
            return
        assert sequence.tokens == tokens[: sequence.cached]
        assert sequence.cached % 16 == 0 or not self.cache._policies, "what a policy may choose from is never copied"
        assert sequence.cached < max(length, 1)
        self.known[sequence] = self.found(sequence)

    def found(self, sequence):
        """What a Sequence that was just opened should be."""
        oracle, count = Oracle(sequence.tokens), sequence.cached
        hides = any(len(g.retention.live_pages(count, 16)) < -(-count // 16) for g in self.cache.spec.groups)
        oracle.floor = count if hides else 0
        return oracle

    def final(self, sequence, oracle, accepted):
        """Settles, and checks what leaves: exactly the pages that no later query sees."""
        before = [{p for p in t.logical.tolist() if p * 16 < len(oracle.tokens)} for t in sequence.tables]
        sequence.settle(accepted)
        oracle.settled = len(oracle.tokens)
        after = [set(table.logical.tolist()) for table in sequence.tables]
        live = [set(t.group.retention.live_pages(oracle.settled, 16)) for t in sequence.tables]
        assert after == [held & kept for held, kept in zip(before, live, strict=True)]
        if after != before:
            oracle.floor = oracle.settled

    @rule(seed=st.integers(0, 1), length=st.integers(17, 150), stays=st.booleans())
    def serve(self, seed, length, stays):
        """What most uses are: open, append the rest, settle, and perhaps close."""
        tokens = text(400, seed)[:length]
        try:
            sequence = self.cache.open(tokens)
        except BudgetError:
            return
        oracle = self.found(sequence)
        try:
            RUNS.run([(sequence, tokens[len(sequence) :])])
        except BudgetError:
            sequence.close()
            return
        oracle.tokens = list(tokens)
        self.final(sequence, oracle, None)
        if stays:
            self.known[sequence] = oracle
        else:
            sequence.close()

    def grown(self, data, count):
        """Some sequences, each with the tokens that follow its text, or others."""
        chosen = data.draw(st.lists(st.sampled_from(list(self.known)), min_size=1, max_size=count, unique=True))
        each = st.tuples(st.integers(0, 1), st.integers(1, 70))
        return [(s, text(1000, seed)[len(s) :][:n]) for s in chosen for seed, n in [data.draw(each)]]

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def append(self, data):
        chunks = [(s, tokens) for s, tokens in self.grown(data, 3) if tokens]
        if not chunks:
            return
        try:
            outs = RUNS.run(chunks)
        except BudgetError:
            return
        for (sequence, tokens), out in zip(chunks, outs, strict=True):
            self.known[sequence].tokens += tokens
            assert out.isfinite().all()

    @precondition(lambda self: self.known)
    @rule(data=st.data(), layer=st.integers(-1, 1))
    def abort(self, data, layer):
        chunks = [(s, tokens) for s, tokens in self.grown(data, 2) if tokens]
        with (
            contextlib.suppress(ZeroDivisionError, BudgetError),
            self.cache.step(chunks or [(self.pick(data), [1])]) as step,
        ):
            for each in range(layer + 1):
                RUNS.append(step, each)
            raise ZeroDivisionError

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def fork(self, data):
        sequence = self.pick(data)
        try:
            twin = sequence.fork()
        except BudgetError:
            return
        oracle = self.known[sequence]
        self.known[twin] = Oracle(oracle.tokens)
        self.known[twin].settled, self.known[twin].floor = oracle.settled, oracle.floor

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def trim(self, data):
        sequence = self.pick(data)
        oracle = self.known[sequence]
        length = data.draw(st.integers(0, len(oracle.tokens)))
        if length < oracle.floor:
            with pytest.raises(SequenceError, match=str(oracle.floor)):
                sequence.trim(length)
            return
        sequence.trim(length)
        del oracle.tokens[length:]
        oracle.settled = min(oracle.settled, length)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), everything=st.booleans())
    def settle(self, data, everything):
        sequence = self.pick(data)
        oracle = self.known[sequence]
        pending = len(oracle.tokens) - oracle.settled
        accepted = pending if everything else data.draw(st.integers(0, pending))
        del oracle.tokens[oracle.settled + accepted :]
        self.final(sequence, oracle, None if everything else accepted)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def close(self, data):
        sequence = self.pick(data)
        sequence.close()
        sequence.close()
        del self.known[sequence]

    @rule(slabs=st.integers(2, 9))
    def resize(self, slabs):
        before = self.cache.budget
        try:
            self.cache.resize(slabs * SLAB)
        except BudgetError:
            assert self.cache.budget == before
        else:
            assert self.cache.arena.held <= self.cache.budget == slabs * SLAB

    @rule()
    def evict(self):
        before = self.cache.books
        if pressure.evict(self.cache):
            assert self.cache.books.in_use == before.in_use
            assert self.cache.books.kept <= before.kept
        else:
            assert before.kept == 0

    @invariant()
    def the_books_add_up(self):
        self.cache.check()
        books, arena = self.cache.books, self.cache.arena
        assert books.all * min(arena.classes, default=0) <= arena.slabs_used * arena.slab_bytes
        assert self.cache.nbytes.allocated == arena.held

    @invariant()
    def every_row_is_the_one_that_was_written(self):
        for sequence, oracle in self.known.items():
            assert sequence.tokens == oracle.tokens
            rows = sequence.read(0)
            positions = rows["positions"].tolist()
            retention = self.cache.spec.groups[0].retention
            live = retention.live_pages(oracle.settled, 16)
            needed = [p for p in range(len(oracle.tokens)) if p // 16 in live or p >= oracle.settled]
            assert set(needed) <= set(positions) <= set(range(len(oracle.tokens)))
            assert positions == sorted(positions)
            if positions:
                layout, tokens = self.cache.spec.groups[0].layout, tuple(oracle.tokens[p] for p in positions)
                for name, want in stored_rows(layout, tokens, tuple(positions)).items():
                    assert torch.equal(rows[name], want)

    def teardown(self):
        for sequence in list(self.known):
            sequence.close()
        assert self.cache.books.in_use == 0
        self.cache.check()


@lru_cache(maxsize=256)
def stored_rows(layout, tokens, positions):
    """What encoding a text afresh gives: {stream: [heads, rows, width]}. Most texts are looked at after many steps."""
    packed = encode(layout, {name: RUNS.row(name, 0, tokens, positions).transpose(0, 1) for name in "kv"})
    return {name: unrotated(layout, name, x) for name, x in decode(layout, packed).items()}


def run_machine(kv, examples=15, phases=tuple(Phase)):
    machine = type("Chosen", (Machine,), {"kv": kv})
    quiet = list(HealthCheck)
    run = settings(
        max_examples=examples, stateful_step_count=30, suppress_health_check=quiet, phases=phases, database=None
    )
    run_state_machine_as_test(machine, settings=run)


MACHINES = ["f32", "int8", "k8v4+window:50", "int4+window:30,sinks:3", "bf16+window:40; layers 1: f32", "f16; page 16"]


@pytest.mark.parametrize("kv", MACHINES)
def test_any_order_of_operations_agrees_with_a_dict_and_the_books_add_up(kv):
    run_machine(kv)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kv", MACHINES)
def test_many_more_orders_of_operations_agree_too(kv):
    run_machine(kv, examples=500)


@pytest.mark.parametrize("sabotage", ["unshare", "undo", "drop", "floor"])
def test_the_machine_sees(monkeypatch, sabotage):
    if sabotage == "unshare":
        monkeypatch.setattr(Cache, "_unshare", lambda self, table: None)
    elif sabotage == "undo":
        monkeypatch.setattr(Step, "_undo", lambda self: None)
    elif sabotage == "drop":
        monkeypatch.setattr(pressure, "drop", lambda cache, block, groups: cache.index.remove(block) or True)
    else:
        monkeypatch.setattr(Sequence, "_floor", property(lambda self: 0, lambda self, value: None), raising=False)
    with sees(pytest.fail.Exception, ExceptionGroup, SequenceError, IndexError):
        run_machine("f32" if sabotage == "unshare" else "f32+window:30", examples=200, phases=[Phase.generate])


# Steps: refused, aborted, out of room.


def test_misuse_is_refused_by_name():
    cache, toy = cache_of("f32"), TOY
    a, b, closed = cache.open(), cache.open(), cache.open()
    closed.close()
    closed.close()
    for chunks, message in (
        ([(closed, [1])], "closed"),
        ([(a, [1]), (a, [2])], "twice"),
        ([(a, [])], "at least one token"),
        ([], "at least one sequence"),
        ([(cache_of("f32").open(), [1])], "another cache"),
    ):
        with pytest.raises(SequenceError, match=message), cache.step(chunks):
            pass
    with a.append([1, 2]) as step:
        q = toy.row("q", 0, step.tokens, step.positions)
        for broken, message in (
            (lambda: step.attend(0, q, scale=1.0), "before it appended"),
            (lambda: step.append(0, k=q, v=q), "needs"),
            (lambda: step.append(0, k=q[:, :2]), "stream v: got nothing"),
            (lambda: a.append([3]), "middle of a step"),
            (a.fork, "middle of a step"),
            (a.settle, "middle of a step"),
            (lambda: a.trim(0), "middle of a step"),
            (lambda: b.append([3]).__enter__(), "another step is open"),
            (lambda: cache.resize(1 << 20), "middle of a step"),
        ):
            with pytest.raises(SequenceError, match=message):
                broken()
        toy.append(step, 0)
    for broken in (lambda: a.trim(3), lambda: a.trim(-1), lambda: a.settle(3), lambda: a.settle(-1)):
        with pytest.raises(SequenceError, match="give 0 to 2"):
            broken()
    with pytest.raises(SequenceError, match=r"layers \[0\]"), a.append([3]):
        pass
    with pytest.raises(UsageError, match="positive"):
        cache.resize(-1)
    assert len(a) == 2
    cache.check()


def check_abort(make, fail):
    """A step that an error ends leaves all as if it had never been."""
    layers = shapes(layers=3)
    toy, cache = Toy(layers), make(layers)
    sequences = [cache.open(), cache.open()]
    toy.run([(s, text(45, i)) for i, s in enumerate(sequences)])
    sequences.append(sequences[0].fork())
    chunks = [(s, text(40, i)) for i, s in enumerate(sequences)]
    before = [state(cache, s) for s in sequences], cache.arena.held
    with pytest.raises(ZeroDivisionError):
        fail(cache, toy, chunks)
    cache.check()
    assert cache.active is None
    after = [state(cache, s) for s in sequences]
    assert [(t, c, r) for t, c, *_, r in after] == [(t, c, r) for t, c, *_, r in before[0]]
    fresh = make(layers)
    for i in (0, 1):
        assert torch.equal(
            toy.run([(sequences[i], text(40, i))])[0], toy.cut(fresh, text(45, i) + text(40, i), [85])[45:]
        )


def fail_in_layer(layer):
    def fail(cache, toy, chunks):
        with cache.step(chunks) as step:
            for each in range(layer + 1):
                toy.append(step, each)
            raise ZeroDivisionError

    return fail


@over_retentions
@pytest.mark.parametrize("layer", [-1, 0, 1, 2])
def test_an_error_in_any_layer_leaves_no_trace(kept, layer):
    check_abort(lambda layers: make_cache("int8" + kept, layers), fail_in_layer(layer))


def test_an_error_on_the_way_into_a_step_leaves_no_trace(monkeypatch):
    def fail(cache, toy, chunks):
        with monkeypatch.context() as patch:
            patch.setattr(Step, "_reads_of", lambda *_: 1 / 0)
            cache.step(chunks).__enter__()

    check_abort(lambda layers: make_cache("f32", layers), fail)


def test_an_error_that_keeps_its_pages_is_seen(monkeypatch):
    monkeypatch.setattr(Step, "_undo", lambda self: None)
    with sees(KeyError, SequenceError, IndexError):
        check_abort(lambda layers: make_cache("f32", layers), fail_in_layer(1))


def test_a_step_made_early_starts_where_its_sequence_is_when_it_is_entered():
    cache = cache_of("f32")
    sequence = cache.open()
    early = sequence.append([7])
    TOY.fill(sequence, [5, 6])
    with early as step:
        assert step.positions == [2]
        TOY.append(step, 0)
    assert torch.equal(sequence.read(0)["k"].transpose(0, 1), TOY.row("k", 0, [5, 6, 7], [0, 1, 2]))


def test_a_step_that_does_not_fit_changes_nothing_and_says_what_it_needs():
    cache = cache_of("f32", memory=2 * 2**18)
    sequences = [cache.open(), cache.open()]
    for i, sequence in enumerate(sequences):
        TOY.fill(sequence, text(200, i))
    before = [state(cache, s) for s in sequences], cache.arena.held, cache.arena.tables
    refs = {size: owner.refs[:200].tolist() for size, owner in cache.arena.classes.items()}
    with pytest.raises(BudgetError) as error, cache.step([(s, text(2000)) for s in sequences]):
        pass
    assert error.value.needed > error.value.available == cache.budget - cache.arena.held
    assert ([state(cache, s) for s in sequences], cache.arena.held, cache.arena.tables) == before
    assert {size: owner.refs[:200].tolist() for size, owner in cache.arena.classes.items()} == refs
    cache.check()
    TOY.fill(sequences[0], text(20))
