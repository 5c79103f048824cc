"""Policies that need a pass of the model: what it finds, what it leaves behind (nothing), and where it can't be."""

import math

import pytest
import torch

import kvik.engine.reread as rereading
from bench_models import ids, tiny
from eval_models import reader
from kvik.cache.cache import Cache
from kvik.chat import Chat
from kvik.engine.generation import prefill
from kvik.engine.sampling import Sampling
from kvik.errors import BudgetError, ContextError, SequenceError, SpecError
from kvik.models.model import Model
from kvik.models.watch import Watch
from test_compaction import held
from tiny_models import gpt2, llama, ours

SIZE = 16
KV = ["f32", "bf16", "int8", "int8-rot", "int4", "k8v4"]


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    return reader(tmp_path_factory)[1]


@pytest.fixture
def short(monkeypatch):
    """Several repetitions, in several pieces each."""
    for name, value in {"CHUNK": 64, "PIECE": 25, "LEAST": 8}.items():
        monkeypatch.setattr(rereading, name, value)


@pytest.fixture
def heard(monkeypatch):
    """(sequence's number, positions) of every step of a fork, as it goes on."""
    found, opened = [], Cache.fork

    def fork(self, sequence):
        twin = opened(self, sequence)
        found.append(twin)
        return twin

    monkeypatch.setattr(Cache, "fork", fork)
    return found


def taken(model, kv, tokens, **options):
    """A sequence that has taken a prompt in."""
    sequence = model.cache(f"{kv}; page {SIZE}", **{"shares": False, **options}).open(tokens)
    prefill(model, [sequence], tokens)
    return sequence


def received(sequence, group=0):
    return sequence._observed[group].repeated


class Passing(Watch):
    """Notes queries and keys as they pass."""

    def __init__(self, step, found):
        super().__init__(step)
        self.found = found

    def append(self, layer, **streams):
        self.found.setdefault(layer, []).append(streams["k"].double())
        super().append(layer, **streams)

    def attend(self, layer, q, **options):
        self.found[layer].append((q.double(), options["scale"]))
        return super().attend(layer, q, **options)


def plain_pass(model, text, parts, sinks=4):
    """By layer, f64 [lanes, len(text)]: the most attention that each row receives, by dense sums over plain keys."""
    out = {}
    for start, stop in parts:
        order = [] if model.tokenizer is None else model.tokenizer.encode(rereading.GO_ON if start else rereading.ORDER)
        again = [*order, *text[max(start - 8, 0) : start], *text[start:stop]]
        found, n = {}, len(text)
        with model.cache("f32", shares=False).open() as sequence:
            model.run([(sequence, [*text, *again])], watch=lambda step, found=found: Passing(step, found))
        rows = [*range(sinks), *range(max(start, sinks), stop), *range(n, n + len(again))]
        for layer, (keys, (q, scale)) in found.items():
            lanes, heads = keys.shape[1], q.shape[1]
            for head in range(heads):
                lane = head * lanes // heads
                scores = q[n:, head] @ keys[rows, lane].T * scale
                later = torch.tensor(rows)[None] > torch.arange(n, n + len(again))[:, None]
                best = scores.masked_fill(later, -math.inf).softmax(-1).amax(0)
                layered = out.setdefault(layer, torch.zeros(lanes, n, dtype=torch.float64))
                at = [i for i, row in enumerate(rows) if start <= row < stop]
                where = [rows[i] for i in at]
                layered[lane, where] = torch.maximum(layered[lane, where], best[at])
    return out


# What is found.


@pytest.mark.parametrize("which", ["llama", "gpt2", "a tokenizer"])
def test_a_pass_finds_the_most_attention_that_each_row_receives(which, speaking, short, ops):
    torch.manual_seed(1)
    model = speaking if which == "a tokenizer" else ours({"llama": llama, "gpt2": gpt2}[which]())
    text = [token % 150 for token in ids(150)]
    sequence = taken(model, "f32+kvzip:30%", text)
    wanted = plain_pass(model, text, [(0, 50), (50, 100), (100, 150)])
    lanes = [lane for layer in sorted(wanted) for lane in wanted[layer]]
    torch.testing.assert_close(received(sequence).double(), torch.stack(lanes), atol=2e-6, rtol=2e-4)
    size = len(text) - len(text) % SIZE
    for lane, rows in enumerate(held(sequence)[0]):
        kept = [p for p in rows if 4 <= p < 118]
        gone = [p for p in range(4, 118) if p not in kept]
        assert received(sequence)[lane, kept].min() >= received(sequence)[lane, gone].max(), "the best stay"
        assert {*range(4), *range(118, 150)} <= set(rows) and size == 144
    assert sum(map(len, held(sequence)[0])) / len(lanes) == pytest.approx(45, abs=7)


@pytest.mark.parametrize("kv", KV)
def test_pages_leave_whatever_the_codec(kv, model, short, ops):
    text = ids(200)
    sequence = taken(model, f"{kv}+kvzip:25%", text)
    sequence.cache.check()
    lanes = held(sequence)[0]
    assert len(sequence) == 200 and [len(lane) for lane in lanes] == [50] * 4
    assert sequence.cache.books.in_use == 4 * (-(-42 // SIZE) + 1), "42 rows moved together, 8 in the open page"
    assert model.run([(sequence, [5])]).isfinite().all()
    close = taken(model, f"f32+{'kvzip:25%'}", text)
    same = sum(len({*a} & {*b}) for a, b in zip(lanes, held(close)[0], strict=True))
    assert same >= (170 if kv == "int4" else 185), "what stays hardly depends on how it is stored"


@pytest.mark.parametrize("policy", ["global(kvzip)", "ada(kvzip)", "chunk(kvzip)"])
def test_lanes_may_share_a_budget(policy, model, short):
    sequence = taken(model, f"int8+{policy}:25%", ids(200))
    sequence.cache.check()
    lanes = [len(lane) for lane in held(sequence)[0]]
    assert sum(lanes) <= 4 * (50 + SIZE) and (policy == "chunk(kvzip)" or len({*lanes}) > 1)


def test_a_budget_as_large_as_the_text_changes_no_bit_and_takes_no_pass(model, heard):
    text, outs = ids(200), []
    for kv in ("int8", "int8+kvzip:100%"):
        sequence = taken(model, kv, text)
        outs.append(model.run([(sequence, text[:40])], every=True))
        assert not any(table.kept for table in sequence.tables)
    assert torch.equal(*outs) and not heard


def test_sequences_side_by_side_are_each_shown_their_own(model, short):
    text = ids(240)
    cache = model.cache(f"int8+kvzip:40%; page {SIZE}", shares=False)
    a, b = cache.open(text[:120]), cache.open([*text[120:160], *text[:80]])
    prefill(model, [a], text[:40]), prefill(model, [b], text[120:160])
    prefill(model, [a], text[40:120]), prefill(model, [b], text[:80])
    c, d = (cache.open(text[:120]) for _ in range(2))
    prefill(model, [c, d], text[:120])
    cache.check()
    assert held(a) == held(c) == held(d) != held(b)
    assert torch.equal(received(a), received(c)) and torch.equal(received(a), received(d))
    assert held(taken(model, "int8+kvzip:40%", b.tokens)) == held(b)


def test_layers_may_have_other_policies(model, short):
    spec = "int8+kvzip:25%; layers 0 heads 1: f32+h2o:40%; layers 1 heads 0: bf16+window:40,sinks:2"
    sequence = taken(model, spec, ids(200))
    sequence.cache.check()
    counts = [[len(lane) for lane in group] for group in held(sequence)]
    assert sorted(counts, key=str) == sorted([[50, 50], [80], [16 + 40]], key=str), counts
    sequence = taken(model, "int8+keydiff:64rows,every:32; layers 1: f32+kvzip:25%", ids(200))
    sequence.cache.check()
    assert {len(lane) for lane in held(sequence)[1]} == {50} and max(map(len, held(sequence)[0])) < 112
    alone = taken(model, "f32+keydiff:64rows,every:32; layers 1: f32+kvzip:25%", ids(200))
    assert held(alone)[0][0] != held(alone)[1][0]


# What is left behind.


def test_a_pass_leaves_no_trace(model, short, heard):
    """Beside the same rows and the same figures in a bare cache, which made no pass."""
    text, found, shown = ids(200), [], torch.empty(0)
    for bare in (False, True):
        cache = model.cache(f"int8+kvzip:25%; page {SIZE}")
        with cache.open(text[:64]) as first:
            prefill(model, [first], text[:64])
        neighbour = cache.open([*text[:64], 7])
        prefill(model, [neighbour], [7])
        assert neighbour.cached == 64
        before = {name: rows.clone() for name, rows in neighbour.read(1).items()}
        sequence = cache.open(text)
        if bare:
            model.run([(sequence, text[64:])])
            sequence.remember(0, shown)
            sequence.settle()
        else:
            prefill(model, [sequence], text[64:])
            shown = received(sequence)
        cache.check()
        assert sequence.tokens == text and cache.sequences == [neighbour, sequence]
        for name, rows in neighbour.read(1).items():
            assert torch.equal(rows.nan_to_num(), before[name].nan_to_num())
        more = model.run([(sequence, [9])])
        found.append((held(sequence), cache.books, cache.nbytes, len(cache.index), more, sequence.nbytes))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    assert heard and all(fork.closed and not fork._publishes for fork in heard)
    sequence.settle()
    assert len(cache.index) == 200 // SIZE, "what was published before rows left stays, and no more comes"


def test_a_known_prefix_is_repeated_like_any_other(model, short):
    text = ids(200)
    cache = model.cache(f"int8+kvzip:25%; page {SIZE}")
    with cache.open(text) as first:
        prefill(model, [first], text)
        wanted, figures = held(first), received(first)
    with cache.open(text) as again:
        assert again.cached == 192
        prefill(model, [again], text[192:])
        assert held(again) == wanted and torch.equal(received(again), figures)
    cache.check()


def test_forks_and_trims_take_what_was_found_along(model, short):
    text = ids(200)
    sequence = taken(model, "int8+kvzip:25%", text)
    twin = sequence.fork()
    prefill(model, [sequence], text[:20])
    sequence.trim(205)
    assert received(sequence).shape == (4, 200) == received(twin).shape
    twin.close()
    fresh = model.cache(f"int8+kvzip:25%; page {SIZE}", shares=False).open(text)
    model.run([(fresh, text)])
    fresh.remember(0, torch.rand(4, 200))
    fresh.trim(150)
    assert received(fresh).shape == (4, 150)
    prefill(model, [fresh], text[150:])
    assert received(fresh).shape == (4, 200)
    fresh.cache.check()


# A conversation.


def test_later_turns_ask_at_true_positions_and_repeat_only_what_is_new(speaking, short, heard, monkeypatch):
    """Query-agnostic: the first text is chosen once; another question finds the same rows, where they always were."""
    steps, run = [], Model.run

    def noted(self, chunks, every=False, watch=None):
        if chunks[0][0] in heard:
            steps.append((len(chunks[0][0]), len(chunks[0][1])))
        return run(self, chunks, every, watch)

    monkeypatch.setattr(Model, "run", noted)
    tokenizer = speaking.tokenizer
    monkeypatch.setattr(
        tokenizer, "chat", lambda messages: "".join(f"{m['role'][0]}: {m['content']}\n" for m in messages)
    )
    chat = Chat(speaking, speaking.cache(f"int8+kvzip:30%; page {SIZE}"), Sampling(), 4, ())
    chat.hear(chat.ask("A long text that is going to be asked about, twice. " * 3).run())
    sequence, first = chat.sequence, held(chat.sequence)[0]
    end, before = sequence.prompt, received(chat.sequence)
    steps.clear()
    chat.hear(chat.ask("And what of the cat?").run())
    assert chat.sequence is sequence and sequence.prompt > end
    sequence.cache.check()
    new = sequence.prompt - end
    lead = len(tokenizer.encode(rereading.GO_ON)) + 8
    assert sum(count for _, count in steps) == new + lead, "the first text was not repeated again"
    assert {start for start, _ in steps} <= {sequence.prompt + at for at in range(0, new + lead, 25)}
    assert torch.equal(received(sequence)[:, :end], before)
    for mine, earlier in zip(held(sequence)[0], first, strict=True):
        assert {p for p in mine if p < end} <= set(earlier) and mine == sorted(mine)
        assert set(range(sequence.prompt, len(sequence))) <= set(mine)
    chat.hear(chat.ask("And of the dog?").run())
    sequence.cache.check()


# Where it can't be.


def test_a_bare_cache_says_who_makes_the_pass(model):
    text = ids(150)
    sequence = model.cache(f"int8+kvzip:25%; page {SIZE}").open(text)
    model.run([(sequence, text)])
    for settle in (sequence.settle, lambda: sequence.settle(150)):
        with pytest.raises(SequenceError, match=r"position 150: kvzip:25% chooses by a pass .*generation\.prefill"):
            settle()
        assert len(sequence) == 150 and len(sequence.cache.index) == 0, "nothing changed"
    sequence.settle(100)
    for wrong, start in ((torch.rand(4, 99), 0), (torch.rand(3, 100), 0), (torch.rand(4, 50), 50)):
        with pytest.raises(SequenceError, match="remember: got"):
            sequence.remember(0, wrong, start)
    with pytest.raises(SequenceError, match="no policy that asks"):
        model.cache("int8+knorm:25%").open(text).remember(0, torch.rand(4, 0))
    prefill(model, [sequence], text[100:])
    assert {len(lane) for lane in held(sequence)[0]} == {37}
    sequence.settle()
    sequence.cache.check()


def test_a_text_that_leaves_no_positions_is_refused_before_anything_is_computed(model, monkeypatch):
    sequence = model.cache("int8+kvzip:25%").open(ids(670))
    monkeypatch.setattr(Model, "run", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ContextError, match=r"kvzip:25% .* 40 positions or more after its 670, and tiny has 700"):
        prefill(model, [sequence], ids(670))
    assert len(sequence) == 0


def test_few_positions_make_short_repetitions(model):
    """700 - 650 - 8 positions are left for each: 16 parts of the text, ten of 41 and six of 40."""
    text = ids(650)
    sequence = taken(model, "f32+kvzip:25%", text)
    wanted = plain_pass(model, text, [(0, 41), (610, 650)])
    for part in (slice(4, 41), slice(610, 650)):
        mine, theirs = received(sequence)[:2, part].double(), wanted[0][:, part]
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=2e-4)
    assert received(sequence).shape == (4, 650) and (received(sequence) > 0).all()


def test_little_memory_makes_short_repetitions_and_too_little_none(model, heard):
    text = ids(640)
    small = taken(model, "f32+kvzip:25%", text[:500], memory=270 << 10)
    small.cache.check()
    assert {len(lane) for lane in held(small)[0]} == {125} and len(heard) == 1
    cache = model.cache(f"f32+kvzip:25%; page {SIZE}", memory=270 << 10, shares=False)
    sequence = cache.open(text)
    with pytest.raises(
        BudgetError, match=r"kvzip:25% lets the model repeat the text, 32 tokens at once.*raise the bud"
    ):
        prefill(model, [sequence], text)
    cache.check()
    assert len(sequence) == 512 and cache.sequences == [sequence] and heard[-1].closed, "as before the last chunk"
    cache.resize(600 << 10)
    prefill(model, [sequence], text[512:])
    cache.check()
    wanted = taken(model, "f32+kvzip:25%", text)
    assert held(sequence) == held(wanted)


def test_a_pass_that_is_stopped_or_fails_leaves_the_text_before_its_last_chunk(model, short, heard, monkeypatch):
    monkeypatch.setattr("kvik.engine.generation.CHUNK", 50)
    text = ids(180)
    cache = model.cache(f"int8+kvzip:25%; layers 1: f32+h2o:50%; page {SIZE}", shares=False)
    sequence = cache.open(text)
    prefill(model, [sequence], text, stopping=lambda: bool(heard) and len(heard[-1]) > 200)
    assert len(sequence) == 150 and heard[-1].closed
    cache.check()
    run = Model.run

    def failing(self, chunks, every=False, watch=None):
        if len(chunks[0][0]) > 200:
            raise KeyboardInterrupt
        return run(self, chunks, every, watch)

    monkeypatch.setattr(Model, "run", failing)
    with pytest.raises(KeyboardInterrupt):
        prefill(model, [sequence], text[150:])
    assert len(sequence) == 150 and cache.sequences == [sequence]
    cache.check()
    monkeypatch.setattr(Model, "run", run)
    prefill(model, [sequence], text[150:])
    assert held(sequence) == held(taken(model, "int8+kvzip:25%; layers 1: f32+h2o:50%", text))
    cache.check()


def test_all_that_is_pending_may_be_rejected_though_every_query_leaves_a_mark(model):
    text, found = ids(160), []
    for rejected in (0, 30):
        sequence = model.cache(f"f32+h2o:50%; page {SIZE}", shares=False).open(text)
        prefill(model, [sequence], text[:100])
        if rejected:
            model.run([(sequence, text[:rejected])])
            sequence.settle(0)
        model.run([(sequence, text[100:160])])
        sequence.settle(60)
        found.append(held(sequence))
    assert found[0] == found[1]


def test_the_oracle_is_not_for_use(model, monkeypatch):
    sequence = model.cache("int8+oracle:25%").open(ids(100))
    with pytest.raises(SpecError, match=r"seen the future.*only 'kvik eval'.*kvzip:25%"):
        prefill(model, [sequence], ids(100))
    model.run([(sequence, ids(100))])
    with pytest.raises(SequenceError, match="'kvik eval' alone"):
        sequence.settle()


def test_a_wrong_pass_is_seen(speaking, short, monkeypatch):
    """What these tests are worth: figures that are shifted by one row fail them."""
    cat = torch.cat
    monkeypatch.setattr(rereading.torch, "cat", lambda parts, dim=0: cat(parts, dim).roll(1, -1))
    with pytest.raises(AssertionError):
        test_a_pass_finds_the_most_attention_that_each_row_receives("llama", speaking, None, None)
