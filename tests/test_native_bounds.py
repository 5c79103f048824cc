"""The kernels at the edges of memory: nothing to do, tables that lead nowhere, parts that do not fit. They know
addresses only, so that what is wrong must be refused before them: an error, no crash, no byte that nobody asked for."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvik.ops import fused, loader, native, quest, reference
from kvik.ops.linear import Linear
from kvik.ops.pointwise import GELU, LayerNorm, RMSNorm, SwiGLU, turn
from kvik.ops.reads import Kept, Member, Select
from test_native import Case, threads  # noqa: F401 - a fixture

module = loader.native()
pytestmark = pytest.mark.skipif(module is None, reason="kvik was built without its native part, or it is switched off")
CPU = torch.device("cpu")
ONE = slice(0, 2)


def linear(outputs, inputs, bias=None):
    return Linear(torch.ones(outputs, inputs), bias, "int8", CPU)


# Nothing to do.


def test_nothing_is_done_with_nothing(isa):
    assert linear(5, 32).rows(torch.zeros(0, dtype=torch.int64)).shape == (0, 32)
    assert linear(0, 32)(torch.ones(3, 32)).shape == (3, 0)
    assert linear(5, 32)(torch.ones(0, 32)).shape == (0, 5)
    assert torch.equal(linear(5, 0, torch.ones(5))(torch.ones(3, 0)), torch.ones(3, 5))
    assert turn(torch.ones(0, 3, 8), torch.ones(0, 1, 4, dtype=torch.complex64)).shape == (0, 3, 8)
    for function in (RMSNorm(torch.ones(4), 1e-5), SwiGLU(), GELU(), LayerNorm(torch.ones(4), torch.ones(4), 1e-5)):
        assert function(torch.ones(0, 4)).shape == (0, 4 // function.takes)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_queries_that_see_nothing_get_zeros(isa, threads, count):  # noqa: F811
    """A window of 0 without sinks hides every row, and at a tile's last position no tile is left."""
    threads(count)
    case = Case("int8", members=((256, 1), (512, 1), (300, 2)), window=0)
    for _ in range(3):
        used = torch.full((4, 6, 64), torch.nan)
        del used  # what is allocated next may lie there
        got = case.attend()
        assert not got.out.any() and (got.lse < -1e29).all()


# Tables and rows.


def wrong(**changes):
    return lambda member: replace(member, **{name: change(member) for name, change in changes.items()})


KEPT = Kept(np.zeros((2, 1), np.int32), np.full(2, 32, np.int32), np.zeros((2, 32), np.int32))
MEMBERS = {
    "a page behind the last": wrong(pages=lambda m: m.pages + 1000),
    "a page before the first": wrong(pages=lambda m: m.pages - 1000),
    "64 bits": wrong(pages=lambda m: m.pages.astype(np.int64)),
    "gaps": wrong(pages=lambda m: np.repeat(m.pages, 2, axis=1)[:, ::2]),
    "fewer pages than places": wrong(pages=lambda m: np.ascontiguousarray(m.pages[:, :-1])),
    "no place for new tokens": wrong(pages=lambda m: m.pages[:, :0].copy(), logical=lambda m: m.logical[:0]),
    "tokens behind the table": wrong(start=lambda m: m.start + 32),
    "positions of 32 bits": wrong(start=lambda m: (1 << 31) - 1),
    "more kept rows than pages": wrong(kept=lambda m: replace(KEPT, counts=KEPT.counts + 1)),
    "kept rows of one lane": wrong(kept=lambda m: Kept(*(x[:1] for x in (KEPT.pages, KEPT.counts, KEPT.positions)))),
    "kept pages that are not there": wrong(kept=lambda m: replace(KEPT, pages=KEPT.pages + 1000)),
    "kept rows without positions": wrong(kept=lambda m: replace(KEPT, positions=KEPT.positions[:, :16].copy())),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_table_that_leads_nowhere_is_refused(name):
    case = Case("int8", members=((70, 3),))
    (member,) = case.tail.members
    with pytest.raises(AssertionError):
        native.plan(case.pages, replace(case.tail, members=(MEMBERS[name](member),)))


@pytest.mark.parametrize("there", [[0, 1, 3], [0, 3], [3], []])
def test_a_row_without_a_page_is_refused_and_nothing_is_written(there):
    case = Case("int8", members=((128, 1),))
    member = Member(case.tables[0][:, there].copy(), np.array(there, np.int32), 60, 68, KEPT)
    before = case.pages.clone()
    plan = native.plan(case.pages, replace(case.tail, members=(member,)))
    with pytest.raises(IndexError, match="no page for a new row"):
        plan.append(ONE, {name: x[:68] for name, x in case.rows.items()})
    assert torch.equal(case.pages, before)


def test_pages_lanes_and_tensors_that_do_not_fit_are_refused():
    case = Case("int8", members=((70, 3),))
    plan = native.plan(case.pages, case.tail)
    new = {name: x[:3] for name, x in case.rows.items()}
    bad = [
        lambda: native.plan(case.pages[:, 1:].contiguous(), case.tail),
        lambda: native.plan(case.pages, replace(case.tail, page_size=8)),
        lambda: native.plan(case.pages, replace(case.tail, centre=torch.zeros(1, 64))),
        lambda: plan.append(slice(1, 3), new),
        lambda: plan.append(ONE, {**new, "k": new["k"].double()}),
        lambda: plan.append(ONE, {**new, "k": new["k"][:2]}),
        lambda: plan.attend(slice(1, 3), case.q, scale=1),
        lambda: plan.attend(slice(-1, 1), case.q, scale=1),
        lambda: plan.attend(ONE, case.q[:2], scale=1),
        lambda: plan.attend(ONE, case.q, scale=1, bias=torch.zeros(6, 0)),
        lambda: plan.attend(ONE, case.q, scale=1, masses=(torch.zeros(2, 64),)),
        lambda: native.compact(case.pages, case.layout, 32, torch.tensor([0]), torch.tensor([-1])),
        lambda: native.compact(case.pages, case.layout, 32, torch.tensor([len(case.pages) * 32]), torch.tensor([0])),
    ]
    for attempt in bad:
        with pytest.raises(AssertionError):
            attempt()


def choosing(pages, recent, blocks=1):
    """A text of 150 rows whose last 3 queries choose from pages of 16; extremes with room for so many runs of pages."""
    case = Case("f32", members=((150, 3),), page=16)
    case.pages.zero_()  # as the reference wants them
    native.plan(case.pages, case.reads([(0, 150)])).append(ONE, case.rows)
    (member,) = case.tail.members
    room = quest.room(2, blocks * 16, 64)
    keys, _ = case.stored(0)
    quest.put(room, 0, quest.extremes(keys[:, :144].float().unflatten(1, (9, 16))))
    members = (replace(member, extremes=room),)
    return case, replace(case.tail, members=members, select=Select(pages, 0, recent, 0))


@pytest.mark.parametrize(("pages", "recent"), [(1, 40), (4, 16), (3, 200)])
def test_mass_lies_where_the_chosen_pages_stand(isa, pages, recent):
    """Also where nothing is chosen beside the last pages."""
    case, reads = choosing(pages, recent)
    got, want = (
        ops.plan(case.pages, reads).attend(ONE, case.q, scale=0.125, want_mass=True) for ops in (native, reference)
    )
    assert (got.out - want.out).abs().max() < 1e-4
    assert (got.mass[0] - want.mass[0]).abs().max() < 1e-4 and abs(got.mass[0].sum() - 18) < 1e-3


def test_extremes_of_more_pages_than_the_table_has_are_refused():
    """The kernels find a lane's extremes by the table's length."""
    case, reads = choosing(4, 16, blocks=2)
    with pytest.raises(AssertionError, match="room for all pages"):
        native.plan(case.pages, reads)


# Products, functions and layers.


def test_parts_that_do_not_fit_are_refused():
    weight, x = torch.ones(32), torch.ones(3, 64)
    bad = [
        lambda: RMSNorm(weight, 1e-5)(x),
        lambda: LayerNorm(weight, weight[:31], 1e-5)(x[:, :32]),
        lambda: RMSNorm(weight.double(), 1e-5)(x[:, :32]),
        lambda: linear(8, 64)(x, after=RMSNorm(weight, 1e-5)),
        lambda: linear(8, 64)(x[:, :32]),
        lambda: linear(8, 64)(x, onto=torch.ones(3, 7)),
        lambda: linear(8, 64, torch.ones(1)),
        lambda: turn(torch.ones(2, 3, 7), torch.ones(2, 1, 3, dtype=torch.complex64)),
        lambda: turn(torch.ones(2, 3, 8), torch.ones(2, 1, 4, dtype=torch.complex128)),
        lambda: turn(torch.ones(2, 3, 8), torch.ones(1, 1, 4, dtype=torch.complex64)),
    ]
    for attempt in bad:
        with pytest.raises(AssertionError):
            attempt()


SIZES = ((96, 48), (48, 64), (80, 48), (48, 40))  # qkv, o, up and down of 4 heads of 16 on 1 lane


def fuse(sizes=SIZES, norms=(48, 48), heads=4, lanes=1):
    products = tuple(linear(*size) for size in sizes)
    functions = (*(RMSNorm(torch.ones(n), 1e-5) for n in norms), SwiGLU())
    return fused.fuse(products, functions, heads=heads, lanes=lanes, width=16, scale=0.25), products, functions


def test_a_layer_whose_products_do_not_fit_is_refused():
    assert fuse()[0] is not None
    for number in range(4):
        for side in range(2):
            sizes = [list(size) for size in SIZES]
            sizes[number][side] += 16
            with pytest.raises((ValueError, AssertionError), match=r"fit one another|model's width"):
                fuse(tuple(tuple(size) for size in sizes))
    for changes in ({"heads": 5}, {"lanes": 2}, {"lanes": 0}):
        with pytest.raises(ValueError, match="fit one another"):
            fuse(**changes)
    with pytest.raises(AssertionError, match="model's width"):
        fuse(norms=(48, 47))


def test_rows_that_are_not_a_layers_are_refused():
    layer, *_ = fuse()
    x, angles = torch.ones(3, 48), torch.ones(3, 1, 8, dtype=torch.complex64)
    assert layer.check(x, angles, 3) == (x.data_ptr(), angles.data_ptr())
    for bad in ((x.double(), None), (x[:2], None), (x, angles.to(torch.complex128)), (x, angles[:2])):
        with pytest.raises(AssertionError):
            layer.check(*bad, 3)


# Threads.


def test_a_child_has_its_parents_settings_and_no_thread_before_there_is_work():
    code = """
import os
from kvik import _native
_native.set_threads(3), _native.set_spin(77)
data = bytearray(1 << 20)
address = __import__("ctypes").addressof(__import__("ctypes").c_char.from_buffer(data))
_native.bandwidth(address, len(data), 1)
child = os.fork()
if not child:
    before = len(os.listdir("/proc/self/task"))
    _native.bandwidth(address, len(data), 1)
    right = (_native.threads(), _native.spin(), before, len(os.listdir("/proc/self/task"))) == (3, 77, 1, 3)
    os._exit(0 if right else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, timeout=60)
    assert done.returncode == 0


def test_more_threads_than_can_be_counted_are_refused():
    before = module.threads()
    with pytest.raises(ValueError, match="can't be counted"):
        module.set_threads(1 << 15)
    assert module.threads() == before
