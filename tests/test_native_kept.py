"""The kernels over rows that stayed when others left, and attention mass."""

import numpy as np
import pytest
import torch

from kvik.ops import native, reference
from kvik.ops.reads import Kept, Member, Reads
from test_native import KV, Case


class KeptCase(Case):
    """One text of 700 rows, of whose first 512 each lane has kept some, in pages of their own."""

    BOUNDARY = 512

    def __init__(self, kv, **options):
        super().__init__(kv, members=((700, 9),), **options)
        g, size = torch.Generator().manual_seed(7), self.page
        counts = [301 - 30 * lane for lane in range(self.lanes)]
        self.chosen = [torch.randperm(self.BOUNDARY, generator=g)[:n].sort().values for n in counts]
        columns = -(-max(counts) // size)
        first = len(self.pages)
        self.pages = torch.cat(
            (self.pages, torch.full((self.lanes * columns, self.pages.shape[1]), 0xFF, dtype=torch.uint8))
        )
        pages = np.arange(first, first + self.lanes * columns, dtype=np.int32).reshape(self.lanes, columns)
        positions = np.full((self.lanes, columns * size), -1, np.int32)
        for lane, chosen in enumerate(self.chosen):
            positions[lane, : len(chosen)] = chosen
            source = torch.from_numpy(self.tables[0][lane].astype(np.int64))[chosen // size] * size + chosen % size
            at = torch.arange(len(chosen))
            target = torch.from_numpy(pages[lane].astype(np.int64))[at // size] * size + at % size
            native.compact(self.pages, self.layout, size, source, target)
        self.kept = Kept(pages, np.array(counts, np.int32), positions)

    def reads(self, spans):
        if not hasattr(self, "kept"):
            return super().reads(spans)
        column = self.BOUNDARY // self.page
        table = np.ascontiguousarray(self.tables[0][:, column:])
        logical = np.arange(column, column + table.shape[1], dtype=np.int32)
        return Reads(self.layout, self.page, None, 0, (Member(table, logical, *spans[0], self.kept),))

    def seen(self, seen):
        stays = torch.zeros(self.lanes, 700, dtype=torch.bool)
        stays[:, self.BOUNDARY :] = True
        for lane, chosen in enumerate(self.chosen):
            stays[lane, chosen] = True
        return seen & stays.repeat_interleave(self.shared, 0)[:, None]


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"bias": True}], ids=["plain", "softcap", "bias"])
def test_kept_rows_come_before_the_others(isa, kv, options):
    case = KeptCase(kv)
    if "bias" in options:
        options = {"bias": torch.randn(6, 650, generator=torch.Generator().manual_seed(2))}
    case.check(isa, **options)


@pytest.mark.parametrize("page", [16, 128])
def test_kept_rows_lie_in_pages_of_any_size(isa, page):
    KeptCase("k8v4", page=page, lanes=3, shared=2, key=48, value=80).check(isa)


@pytest.mark.parametrize("kv", ["f32", "int8"])
@pytest.mark.parametrize("case", [KeptCase, Case])
def test_attention_mass_is_the_references(isa, kv, case):
    case = case(kv) if case is KeptCase else case(kv, members=((300, 40), (70, 1)), window=120, sinks=5)
    mine = case.attend(want_mass=True)
    plan = reference.plan(case.pages, case.tail)
    theirs = plan.attend(slice(0, case.lanes), case.q, scale=case.q.shape[-1] ** -0.5, want_mass=True)
    for a, b in zip(mine.mass, theirs.mass, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)
