"""The kernels against the specification: rows bit for bit, attention within a bound of float64, on every instruction
set that the machine has, and nothing but positions and rows in any bit of a result (law 1)."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import KV, Toy, cache_of, make_cache, sees, shapes, text
from kvik.cache.spec import LayerShape, Spec
from kvik.errors import UsageError
from kvik.ops import backend, loader, native, reference
from kvik.ops import pages as paged
from kvik.ops.codecs import unrotated
from kvik.ops.reads import Member, Reads

pytestmark = pytest.mark.skipif(loader.built() is None, reason="the kernels are not built")
KERNELS = loader.built()
ISAS = KERNELS.available() if KERNELS else []
WIDTHS = (16, 24, 32, 40, 64, 80, 96, 128, 256)


@pytest.fixture
def threads():
    """Sets how many threads work, for this test."""
    before = KERNELS.threads()
    yield KERNELS.set_threads
    KERNELS.set_threads(before)


def bound(kv, kernels):
    """The largest error of an output or log-sum-exp beside float64 over the same stored rows, values and scores being
    of size 1: f32 sums; 16-bit fixed point; where the machine multiplies bf16 and bytes, bf16 queries and weights over
    bf16, and 8-bit queries over 4-bit keys."""
    if kernels == "avx512x" and ("bf16" in kv or kv.startswith(("int4", "k4"))):
        return 1e-2 if "bf16" in kv else 2e-2
    return 1e-5 if kv in ("f32", "bf16", "f16") else 1e-3


class Case:
    """Ragged texts in random pages, appended by the kernels."""

    def __init__(
        self, kv, key=64, value=64, lanes=2, shared=3, page=32, members=((300, 1),), window=None, sinks=0, seed=0
    ):
        g = torch.Generator().manual_seed(seed)
        self.kv, self.lanes, self.shared, self.page = kv, lanes, shared, page
        self.layout = Spec.parse(kv, [LayerShape(lanes, (("k", key), ("v", value)))]).groups[0].layout
        columns = [-(-length // page) for length, _ in members]
        total = lanes * sum(columns) + 3
        # What nobody wrote is NaN in every format: it must never show.
        self.pages = torch.full((total, page * self.layout.row_bytes), 0xFF, dtype=torch.uint8)
        order, at, self.tables = torch.randperm(total, generator=g).numpy().astype(np.int32), 0, []
        for count in columns:
            self.tables.append(np.ascontiguousarray(order[at : at + lanes * count].reshape(lanes, count)))
            at += lanes * count
        self.members, self.window, self.sinks = members, window, sinks
        g.manual_seed(1)  # the same rows, however large the pages
        tokens = sum(length for length, _ in members)
        self.rows = {n: torch.randn(tokens, lanes, w, generator=g) for n, w in (("k", key), ("v", value))}
        self.q = torch.randn(sum(n for _, n in members), lanes * shared, key, generator=g)
        native.plan(self.pages, self.reads([(0, length) for length, _ in members])).append(slice(0, lanes), self.rows)

    def reads(self, spans):
        members = [
            Member(table, np.arange(table.shape[1], dtype=np.int32), start, count)
            for table, (start, count) in zip(self.tables, spans, strict=True)
        ]
        return Reads(self.layout, self.page, self.window, self.sinks, tuple(members))

    @property
    def tail(self):
        return self.reads([(length - n, n) for length, n in self.members])

    def attend(self, **options):
        plan = native.plan(self.pages, self.tail)
        return plan.attend(slice(0, self.lanes), self.q, scale=self.q.shape[-1] ** -0.5, want_lse=True, **options)

    def stored(self, member):
        """Keys and values of one text as they were stored, f64 [lanes, rows, width]."""
        pages = self.pages[torch.from_numpy(self.tables[member]).long()]
        rows = paged.decoded(pages, self.layout, self.page)
        length = self.members[member][0]
        return (unrotated(self.layout, n, rows[n]).flatten(1, 2)[:, :length].double() for n in "kv")

    def dense(self, softcap=None, bias=None):
        """(out, lse) in float64."""
        outs, first = [], 0
        for i, (length, n) in enumerate(self.members):
            k, v = self.stored(i)
            q = self.q[first : first + n].double()
            first += n
            scores = torch.einsum("qhd,hkd->hqk", q, k.repeat_interleave(self.shared, 0)) * q.shape[-1] ** -0.5
            back = torch.arange(length - n, length)[:, None] - torch.arange(length)
            if softcap:
                scores = (scores / softcap).tanh() * softcap
            if bias is not None:
                scores = scores + bias.double()[:, back.clamp(0, bias.shape[1] - 1)]
            seen = (back >= 0) & ((back < (self.window or length)) | (torch.arange(length) < self.sinks))
            scores = scores.masked_fill(~self.seen(seen), -torch.inf)
            outs.append((torch.einsum("hqk,hkd->qhd", scores.softmax(-1), v.repeat_interleave(self.shared, 0)),
                         scores.logsumexp(-1).T))  # fmt: skip
        return tuple(torch.cat(parts) for parts in zip(*outs, strict=True))

    def seen(self, seen):
        """Which rows a query sees, bool [n, length], or for each head."""
        return seen

    def check(self, kernels, **options):
        got, want = self.attend(**options), self.dense(**options)
        limit = bound(self.kv, kernels)
        assert (got.out - want[0]).abs().max() <= limit, "out"
        assert (got.lse - want[1]).abs().max() <= limit, "lse"


# append


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_encoded_bit_for_bit(isa, kv, width):
    case = Case(kv, width, WIDTHS[-1] - width or 40, page=16, members=((37, 1), (5, 1)))
    sizes = torch.logspace(-42, 30, 42)[torch.randperm(42, generator=torch.Generator().manual_seed(3))]
    rows = {name: x * sizes[:, None, None] for name, x in case.rows.items()}
    rows["k"][3] = 0.0
    rows["v"][4, :, ::2] = rows["v"][4, :, 1:2]  # ties
    mine, theirs = case.pages.clone(), case.pages.clone()
    reads = case.reads([(0, 37), (0, 5)])
    for pages, ops in ((mine, native), (theirs, reference)):
        strided = {n: x.transpose(0, 1).contiguous().transpose(0, 1) for n, x in rows.items()}
        ops.plan(pages, reads).append(slice(0, 2), strided)
    assert torch.equal(mine, theirs)


def test_rows_that_are_no_numbers_stay_in_their_slots(isa):
    for kv in KV:
        case = Case(kv, members=((40, 1),))
        rows = {n: x.clone() for n, x in case.rows.items()}
        rows["k"][7], rows["v"][7], rows["k"][8, 0, 0] = torch.nan, torch.inf, -torch.inf
        before = paged.packed(case.pages, case.layout, 32)
        native.plan(case.pages, case.reads([(0, 40)])).append(slice(0, 2), rows)
        after = paged.packed(case.pages, case.layout, 32)
        changed = (before != after).any(-1).nonzero().tolist()
        allowed = {(int(case.tables[0][lane, 0]), slot) for lane in range(2) for slot in (7, 8)}
        assert {tuple(x) for x in changed} <= allowed, kv


# attend


@pytest.mark.parametrize("kv", KV)
def test_attention_is_within_its_bound_of_float64(isa, kv):
    Case(kv, members=((700, 37), (33, 1), (1, 1))).check(isa)
    Case(kv, 80, 40, shared=1, page=16, members=((300, 2),)).check(isa)
    Case(kv, 24, 96, shared=5, page=128, members=((520, 100),), window=100, sinks=3).check(isa)


@pytest.mark.parametrize("kv", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reach", [None, 1, 30])
def test_softcap_and_bias(isa, kv, softcap, reach):
    bias = None if reach is None else torch.randn(6, reach, generator=torch.Generator().manual_seed(1))
    Case(kv, members=((300, 40),), window=200, sinks=2).check(isa, softcap=softcap, bias=bias)


@settings(max_examples=40)
@given(st.data())
def test_any_shape_is_within_its_bound(data):
    lengths = st.one_of(st.integers(1, 300), st.sampled_from([255, 256, 257, 1024, 5000, 20_000]))
    members = data.draw(st.lists(st.tuples(lengths, st.sampled_from([1, 2, 7, 40])), min_size=1, max_size=3))
    kernels = data.draw(st.sampled_from(ISAS))
    KERNELS.use(kernels)
    case = Case(
        data.draw(st.sampled_from(KV)),
        data.draw(st.sampled_from(WIDTHS)),
        data.draw(st.sampled_from(WIDTHS)),
        lanes=data.draw(st.integers(1, 2)),
        shared=data.draw(st.sampled_from([1, 2, 3, 4, 7, 16])),
        page=data.draw(st.sampled_from([16, 32, 64, 128])),
        members=tuple((max(length, n), n) for length, n in members),
        window=data.draw(st.sampled_from([None, 1, 20, 300, 100_000])),
        sinks=data.draw(st.sampled_from([0, 4, 300])),
    )
    case.check(kernels)
    KERNELS.use(ISAS[-1])


def test_a_bound_that_is_passed_is_seen():
    case = Case("int8")
    case.q = case.q.clone()
    want = case.dense()
    case.dense = lambda: (want[0] * 1.05, want[1])
    with sees():
        case.check(ISAS[-1])


@pytest.mark.parametrize("kv", KV)
def test_holes_are_not_seen(isa, kv):
    """Pages that the table does not name hold nothing, wherever they are missing."""
    case = Case(kv, members=((400, 3),))
    whole = case.tail
    keep = np.array([0, 1, 4, 5, 9, 12])
    member = Member(np.ascontiguousarray(case.tables[0][:, keep]), keep.astype(np.int32), 397, 3)
    reads = Reads(whole.layout, 32, None, 0, (member,))
    got = native.plan(case.pages, reads).attend(slice(0, 2), case.q, scale=0.125, want_lse=True)
    want = reference.plan(case.pages, reads)
    for number in case.tables[0][:, -1].tolist():
        paged.blank(case.pages, case.layout, 32, torch.tensor([number]), 400 % 32)
    found = want.attend(slice(0, 2), case.q, scale=0.125, want_lse=True)
    assert (got.out - found.out).abs().max() <= bound(kv, isa)
    assert (got.lse - found.lse).abs().max() <= bound(kv, isa)


# The cut cannot show.


@pytest.mark.parametrize("kv", ["f32", "bf16", "f16", "int8", "int4", "k8v4"])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (90, 5)])
def test_no_cut_batch_page_or_thread_shows(isa, threads, kv, window, sinks):
    length = 900
    want = None
    for page, count in ((32, 1), (16, 2), (128, 5)):
        threads(count)
        case = Case(kv, shared=3, page=page, members=((length, length), (70, 70)), window=window, sinks=sinks)
        out = case.attend()
        want = want or out
        assert torch.equal(out.out[:length], want.out[:length]), f"pages of {page}, {count} threads"
        assert torch.equal(out.lse[:length], want.lse[:length]), f"pages of {page}, {count} threads"
        for start, n in ((length - 1, 1), (256, 1), (255, 2), (100, 333)):
            reads = case.reads([(start, n), (69, 1)])
            q = torch.cat((case.q[start : start + n], case.q[-1:]))
            got = native.plan(case.pages, reads).attend(slice(0, 2), q, scale=0.125)
            assert torch.equal(got.out[:n], want.out[start : start + n]), f"{n} queries from {start}"
            one = native.plan(case.pages, reads).attend(slice(1, 2), q[:, 3:].contiguous(), scale=0.125)
            assert torch.equal(one.out, got.out[:, 3:]), "a lane by itself"


def test_a_sum_that_depends_on_its_place_is_seen(threads):
    case = Case("f32", members=((900, 900),))
    honest, shifted = case.attend().out, case.tables[0]
    case.tables[0] = np.roll(shifted, 1, axis=1)  # the same rows, elsewhere
    assert not torch.equal(case.attend().out, honest)


@pytest.mark.parametrize("kv", KV)
def test_bytes_that_nobody_wrote_never_show(isa, kv):
    case = Case(kv, page=128, members=((130, 5), (3, 2)))
    want = case.attend()
    assert want.out.isfinite().all()
    used = torch.zeros(len(case.pages), 128, dtype=torch.bool)
    for table, (length, _) in zip(case.tables, case.members, strict=True):
        for position in range(length):
            used[torch.from_numpy(table[:, position // 128]).long(), position % 128] = True
    slots = (~used).flatten().nonzero().flatten()
    for filling in (0x00, 0x7F):
        source = torch.full_like(case.pages, filling)
        joined = torch.cat((source, case.pages))
        reference.compact(joined, case.layout, 128, slots, slots + len(source) * 128)
        case.pages.copy_(joined[len(source) :])
        got = case.attend()
        assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)


def test_a_row_that_is_no_number_shows(isa):
    for kv in ("f32", "bf16", "f16"):
        case = Case(kv, members=((300, 1),))
        case.rows["k"][10] = torch.nan
        native.plan(case.pages, case.reads([(0, 300)])).append(slice(0, 2), case.rows)
        assert case.attend().out.isnan().all(), kv


def test_attention_mass_comes_with_the_same_output():
    case = Case("int8", members=((300, 20), (50, 1)))
    plain, asked = case.attend(), case.attend(want_mass=True)
    assert torch.equal(plain.out, asked.out)
    total = torch.stack([mass.sum(1) for mass in asked.mass]).sum(0)
    torch.testing.assert_close(total, torch.full((2,), 3.0 * 21), atol=1e-3, rtol=0)


# compact


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("page", [16, 64])
def test_rows_move_verbatim(kv, page):
    case = Case(kv, 40, 24, page=page, members=((200, 1),))
    count = len(case.pages) * page
    order = torch.randperm(count, generator=torch.Generator().manual_seed(5))
    source, target = order[:90], order[60:150]  # some are read and written
    before = paged.packed(case.pages, case.layout, page).flatten(0, 1)
    want = before.clone()
    want[target] = before[source]
    for ops in (native, reference):
        pages = case.pages.clone()
        ops.compact(pages, case.layout, page, source, target)
        assert torch.equal(paged.packed(pages, case.layout, page).flatten(0, 1), want)


# Through the cache, and what decides who serves it.


def test_forks_trims_and_windows_equal_the_reference(monkeypatch):
    layers, outs = shapes(layers=2, width=32), []
    for name in ("reference", "native"):
        monkeypatch.setenv("KVIK_OPS", name)
        toy, cache, found = Toy(layers), make_cache("k8v4+window:100,sinks:5", layers, page=16), []
        a = cache.open()
        found += toy.run([(a, text(150))])
        a.settle()
        b = a.fork()
        a.trim(150)
        found += toy.run([(a, text(40, 1)), (b, text(3, 2))])
        a.trim(170)
        found += toy.run([(b, text(1, 3)), (a, text(90, 4))])
        cache.check()
        outs.append(torch.cat(found))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("name", "value"), [("KVIK_OPS", "cuda"), ("KVIK_ISA", "avx9")])
def test_an_unknown_name_is_an_error_that_says_so(monkeypatch, name, value):
    monkeypatch.delenv("KVIK_OPS", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=value):
        cache_of("f32")


def test_the_reference_serves_where_it_is_asked_to(monkeypatch):
    monkeypatch.setenv("KVIK_OPS", "reference")
    assert backend.backend(torch.device("cpu")) is reference
    monkeypatch.setenv("KVIK_OPS", "native")
    assert backend.backend(torch.device("cpu")) is native


def test_without_kernels_everything_is_served_and_asking_for_them_is_an_error(monkeypatch):
    monkeypatch.setattr(loader, "built", lambda: None)
    monkeypatch.delenv("KVIK_OPS", raising=False)
    assert backend.backend(torch.device("cpu")) is reference
    monkeypatch.setenv("KVIK_OPS", "native")
    with pytest.raises(UsageError, match="not built"):
        backend.backend(torch.device("cpu"))


@pytest.mark.parametrize("name", ISAS)
def test_an_instruction_set_can_be_forced(name):
    code = "from kvik.ops import loader; print(loader.chosen().isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KVIK_OPS": "", "KVIK_ISA": name},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == name


def test_sums_of_widest_rows_fit():
    """512 channels, all codes at their largest: the integers come within a few percent of 32 bits."""
    case = Case("int8", 512, 512, shared=1, members=((256, 1),))
    rows = {name: torch.full_like(x, 1.0) for name, x in case.rows.items()}
    native.plan(case.pages, case.reads([(0, 256)])).append(slice(0, 2), rows)
    case.q = torch.ones_like(case.q)
    got = case.attend()
    torch.testing.assert_close(got.out, torch.ones_like(got.out), atol=5e-3, rtol=0)
    torch.testing.assert_close(got.lse, torch.full_like(got.lse, 512**0.5 + math.log(256)), atol=0.1, rtol=0)
