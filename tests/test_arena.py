"""The arena: slabs, pages of several sizes, budgets, real memory; and the limits of a container."""

import gc
import resource

import numpy as np
import pytest
import torch

from helpers import Toy, make_cache, sees, shapes, text
from kvik.cache import limits, tidying
from kvik.cache import sequence as sequence_module
from kvik.cache.arena import SLAB, Arena
from kvik.cache.limits import memory_available, memory_total
from kvik.errors import BudgetError, UsageError

MIB = 1 << 20


def arena_of(budget=4 * SLAB, largest=8192):
    return Arena(budget, 64 * MIB, largest, torch.device("cpu"))


def resident():
    """Bytes of real memory that this process has."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def test_what_is_reserved_does_not_count_as_used():
    """Else a process with two caches, each with the machine's whole memory reserved, could not fork."""
    arena, flags, inside = arena_of(), [], False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            head = line.split()
            if "-" in head[0] and not head[0].endswith(":"):
                low, high = (int(each, 16) for each in head[0].split("-"))
                inside = low <= arena.bytes.data_ptr() < high
            elif inside and head[0] == "VmFlags:":
                flags = head[1:]
    assert flags and "ac" not in flags, flags


# Pages.


def test_a_page_belongs_to_one_holder_and_comes_zeroed():
    arena = arena_of()
    for _ in range(3):
        pages = np.concatenate([arena.take(4096, 30), arena.take(4096, 70)])
        view = arena.page_class(4096).view
        assert len(set(pages.tolist())) == 100
        assert not view[torch.from_numpy(pages)].any()
        view[torch.from_numpy(pages)] = 0xFF
        arena.release(4096, pages)
    assert arena.held == 0


def test_a_page_leaves_with_its_last_reference():
    arena = arena_of()
    pages = arena.take(4096, 4)
    arena.retain(4096, pages[:2])
    arena.release(4096, pages)
    assert arena.page_class(4096).refs[pages].tolist() == [1, 1, 0, 0]
    assert arena.held == SLAB
    arena.release(4096, pages[:2])
    assert arena.held == 0


def test_an_empty_slab_serves_any_size():
    arena = arena_of(budget=2 * SLAB)
    small = arena.take(2048, 2 * SLAB // 2048)
    assert not arena.fits({8192: 1})
    arena.release(2048, small)
    assert arena.fits({8192: 2 * SLAB // 8192})
    arena.take(8192, 2 * SLAB // 8192)
    assert arena.held == arena.budget


@pytest.mark.parametrize("page_bytes", [320, 1000, 2048, 3264, 4224, 8192, 30000])
def test_pages_of_any_size_lie_wholly_in_slabs_and_never_overlap(page_bytes):
    arena = arena_of(budget=8 * SLAB, largest=32768)
    other = arena.take(1024, 1)
    count = 0
    while arena.fits({page_bytes: 1}):
        arena.take(page_bytes, 1)
        count += 1
    pages = np.flatnonzero(arena.page_class(page_bytes).refs)
    first, last = pages * page_bytes // SLAB, (pages * page_bytes + page_bytes - 1) // SLAB
    assert len(pages) == count
    assert (first == last).all()
    assert int(other[0]) * 1024 // SLAB not in first
    assert count >= 7 * (SLAB // page_bytes - 1)
    assert arena.held <= arena.budget


@pytest.mark.parametrize("wanted", [{4096: 1}, {4096: 65}, {4224: 61}, {4224: 62, 4096: 64}, {30000: 17, 320: 818}])
def test_a_cost_is_never_less_than_what_is_taken(wanted):
    arena = arena_of(budget=16 * SLAB, largest=32768)
    arena.take(4096, 3)
    before, cost = arena.held, arena.cost(wanted)
    for size, count in wanted.items():
        arena.take(size, count)
    assert arena.held - before <= cost


def test_a_large_page_makes_larger_slabs():
    layers = shapes(layers=1, heads=2, width=256)
    cache, toy = make_cache("f32", layers, memory=32 * MIB, page=128), Toy(layers)
    assert cache.spec.groups[0].page_bytes == 256 * 1024
    assert cache.arena.slab_bytes == 2 * MIB
    with cache.open() as sequence:
        out = toy.run([(sequence, text(300))])[0]
        assert torch.equal(out, toy.cut(make_cache("f32", layers, memory=32 * MIB, page=16), text(300), [300]))
        cache.check()
        assert cache.nbytes.allocated == 2 * MIB + sequence.tables[0].nbytes


def test_what_one_group_gives_back_another_takes_whatever_its_page_size():
    layers = shapes(layers=2, width=64)
    cache, toy = make_cache("f32+window:32; layers 1: int4", layers, memory=12 * SLAB, shares=False), Toy(layers)
    wide, narrow = (group.page_bytes for group in cache.spec.groups)
    assert wide != narrow
    with cache.open() as sequence:
        toy.fill(sequence, text(2000))
        assert cache.arena.slabs_used >= 10
        assert not cache.arena.fits({narrow: 3 * (SLAB // narrow)})
        sequence.settle()
        cache.check()
        assert cache.arena.slabs_used <= 4
        assert cache.arena.fits({narrow: 7 * (SLAB // narrow - 1)}), "nothing is stranded"
    assert cache.arena.held == 0


# Budgets.


@pytest.mark.parametrize("slabs", [0, 1, 2, 5])
def test_the_budget_is_never_exceeded(slabs):
    layers = shapes()
    cache, toy = make_cache("f32", layers, memory=slabs * SLAB + SLAB // 2), Toy(layers)
    sequence = cache.open()
    room = cache.arena.fits
    while room({4096: 8}, 100):
        toy.fill(sequence, text(32, len(sequence)))
        cache.check()
    with pytest.raises(BudgetError) as error:
        toy.fill(sequence, text(1000))
    assert cache.arena.slabs_used == slabs
    assert error.value.needed > error.value.available
    assert error.value.available == cache.budget - cache.arena.held
    cache.check()


def test_a_budget_beyond_the_machine_or_below_nothing_is_refused():
    with pytest.raises(BudgetError, match="machine has left") as error:
        make_cache(memory=1 << 60)
    assert (error.value.needed, error.value.available > 0) == (1 << 60, True)
    with pytest.raises(UsageError, match="positive"):
        make_cache(memory=-1)
    cache = make_cache()
    with pytest.raises(BudgetError):
        cache.resize(1 << 60)
    assert cache.budget == 8 * MIB


def test_a_budget_can_grow_and_shrink_while_sequences_are_open():
    layers = shapes()
    cache, toy = make_cache("f32", layers, memory=2 * SLAB), Toy(layers)
    sequence = cache.open()
    toy.fill(sequence, text(60))
    with pytest.raises(BudgetError):
        toy.fill(sequence, text(600))
    cache.resize(12 * SLAB)
    toy.fill(sequence, text(600))
    before = sequence.read(1)
    with pytest.raises(BudgetError, match="close some"):
        cache.resize(2 * SLAB)
    assert cache.budget == 12 * SLAB
    sequence.trim(100)
    cache.resize(2 * SLAB)
    cache.check()
    assert torch.equal(sequence.read(1)["k"], before["k"][:, :100])


def check_defragment(cache, toy):
    """Many interleaved sequences, most closed: a shrink moves the rest together and keeps every row."""
    sequences = [cache.open() for _ in range(40)]
    for turn in range(4):
        for i, sequence in enumerate(sequences):
            toy.fill(sequence, text(200, i)[turn * 40 : turn * 40 + 40])
    for sequence in sequences:
        sequence.settle()
    twin = sequences[0].fork()
    kept = [*sequences[::10], twin]
    before = [sequence.read(layer) for sequence in kept for layer in range(2)]
    for sequence in sequences:
        if sequence not in kept:
            sequence.close()
    held, needed = cache.arena.held, sum(s.nbytes.allocated for s in kept[:-1])
    target = 2 * len(cache.arena.classes) * SLAB + needed
    cache.resize(target)
    cache.check()
    assert cache.arena.held <= target < held
    after = [sequence.read(layer) for sequence in kept for layer in range(2)]
    assert all(torch.equal(b[name], a[name]) for b, a in zip(before, after, strict=True) for name in b)
    for i, sequence in enumerate(kept[:-1]):
        got = toy.run([(sequence, text(20, 9))])[0]
        fresh = make_cache(str(cache.spec), toy.layers)
        assert torch.equal(got, toy.cut(fresh, text(200, i * 10)[:160] + text(20, 9), [180])[160:])
        found = cache.open([*text(200, i * 10)[:160], 0])
        assert found.cached in ((160,) if cache.shares else (0,))
        found.close()
    cache.check()


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("kv", ["f32", "int8", "f32; layers 1: int4"])
def test_a_shrink_moves_pages_together_and_keeps_every_row(kv, shares):
    layers = shapes()
    check_defragment(make_cache(kv, layers, memory=32 * SLAB, shares=shares), Toy(layers))


def test_pages_that_move_without_their_tables_are_seen(monkeypatch):
    honest = Arena.defragment
    monkeypatch.setattr(Arena, "defragment", lambda self, size: honest(self, size) and None)
    layers = shapes()
    with sees(ValueError):
        check_defragment(make_cache("f32", layers, memory=32 * SLAB, shares=False), Toy(layers))


# Real memory.


def test_what_is_given_back_is_given_back_to_the_system():
    layers = shapes(layers=2, heads=8, width=128)
    cache, toy = make_cache("f32", layers, memory=256 * MIB), Toy(layers)
    sequences = [cache.open() for _ in range(4)]
    gc.collect()
    start = resident()
    for i, sequence in enumerate(sequences):
        for piece in range(8):
            toy.fill(sequence, text(128, 10 * i + piece))
    full = 4 * 1024 * 2 * 8 * 256 * 4  # tokens · layers · heads · widths · bytes
    assert cache.nbytes.payload == full == 64 * MIB
    assert resident() - start > 0.9 * full
    for sequence in sequences[:2]:
        sequence.close()
    assert resident() - start < 0.6 * full, "half closed"
    sequences[2].settle()
    sequences[2].close()
    assert resident() - start > 0.4 * full, "kept for reuse"
    cache.resize(20 * MIB)
    assert resident() - start < 0.35 * full, "dropped by the shrink"
    sequences[3].close()
    cache.resize(0)
    assert resident() - start < 0.1 * full
    assert cache.arena.held == 0


@pytest.mark.parametrize(
    "kv", ["f32+window:128,sinks:4", "f32+knorm:25%", "int8+ada(knorm):25%", "f32+window:128; layers 1: int8+knorm:25%"]
)
def test_slabs_go_back_when_rows_leave(kv, monkeypatch):
    """Also where every slab keeps a page: what is held stays near what the pages need, and no row is another."""
    layers = shapes(layers=4, heads=8, width=64)

    def told():
        cache, toy = make_cache(kv, layers, memory=64 * MIB, shares=False), Toy(layers)
        sequence, tokens = cache.open(text(1000)), text(1000)
        while tokens:
            count = min(512, len(tokens), (sequence.next_trigger or 9999) - len(sequence))
            toy.fill(sequence, tokens[:count])
            sequence.settle()
            tokens = tokens[count:]
        cache.check()
        out = toy.run([(sequence, text(20, 9))])[0]
        cache.check()
        return cache.arena.slabs_used * SLAB, sequence.nbytes.allocated, out

    held, needed, out = told()
    assert held <= 4 / 3 * needed + (tidying.LEAST + 2) * SLAB
    monkeypatch.setattr(sequence_module, "tidy", lambda cache: None)
    untidied, same, want = told()
    assert untidied > 1.5 * held and same == needed
    assert torch.equal(out, want)


def test_pages_stay_where_they_are_while_a_step_is_open():
    layers = shapes(layers=4, heads=8, width=64)
    cache, toy = make_cache("f32+window:128", layers, memory=64 * MIB, shares=False), Toy(layers)
    one, other = cache.open(), cache.open()
    toy.fill(one, text(700))
    with cache.step([(other, [1])]) as step:
        one.settle()
        held = cache.arena.slabs_used
        for layer in range(4):
            toy.append(step, layer)
    cache.check()
    tidying.tidy(cache)
    cache.check()
    assert cache.arena.slabs_used < held


# Limits of a container.


@pytest.fixture
def machine(tmp_path):
    """A fake machine: 8 GiB, of which 6 are available; and a folder for control groups."""
    (tmp_path / "meminfo").write_text(f"MemTotal: {8 << 20} kB\nMemFree: 1 kB\nMemAvailable: {6 << 20} kB\n")
    (tmp_path / "memory").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("files", "available", "total"),
    [
        ({}, 6 << 30, 8 << 30),
        ({"memory.max": "max", "memory.current": "5"}, 6 << 30, 8 << 30),
        ({"memory.max": 2 << 30, "memory.current": 1 << 29}, (2 << 30) - (1 << 29), 2 << 30),
        ({"memory.max": 2 << 30}, 2 << 30, 2 << 30),
        ({"memory.max": 1 << 30, "memory.current": 2 << 30}, 0, 1 << 30),
        ({"memory.max": 16 << 30, "memory.current": 1 << 30}, 6 << 30, 8 << 30),
        ({"memory/memory.limit_in_bytes": 3 << 30, "memory/memory.usage_in_bytes": 1 << 30}, 2 << 30, 3 << 30),
        ({"memory/memory.limit_in_bytes": 9223372036854771712}, 6 << 30, 8 << 30),
    ],
)
def test_the_least_of_machine_and_container_holds(machine, files, available, total):
    for name, value in files.items():
        (machine / name).write_text(f"{value}\n")
    assert memory_available(machine, machine / "meminfo") == available
    assert memory_total(machine, machine / "meminfo") == total


def test_a_machine_that_says_nothing_is_taken_for_a_small_one(tmp_path):
    assert memory_available(tmp_path, tmp_path / "none") == 4 << 30
    assert memory_total(tmp_path, tmp_path / "none") == 8 << 30


@pytest.mark.parametrize(("line", "folder", "names"), [
    ("0::/box/inner", "box/inner", ("memory.max", "memory.current")),
    ("4:memory:/box/inner", "memory/box/inner", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
])  # fmt: skip
@pytest.mark.parametrize("above", [0, 1])
def test_the_limits_of_this_process_own_groups_count_and_idle_files_do_not(tmp_path, line, folder, names, above):
    """The limit of its group, or of the one above: 1000 KiB, of which 700 are used, 600 of them by idle files."""
    group = tmp_path / folder
    group.mkdir(parents=True)
    holder = group.parent if above else group
    (holder / names[0]).write_text(f"{1000 * 1024}\n")
    (holder / names[1]).write_text(f"{700 * 1024}\n")
    (holder / "memory.stat").write_text(f"anon 5\ninactive_file {600 * 1024}\n")
    (tmp_path / "own").write_text(line + "\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n")
    places = (tmp_path, tmp_path / "meminfo", tmp_path / "own")
    assert limits.memory_available(*places) == 900 * 1024
    assert limits.memory_total(*places) == 1000 * 1024
