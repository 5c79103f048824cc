"""Laws of DESIGN.md about results and budgets: the cut (1), positions (2), budgets (7), neighbours (8), causality (9).

Each is one check. It holds over codecs, retentions and page sizes, and is seen failing once its mechanism is sabotaged.
Laws 3 (merge), 4 (facts and opinions), 5 (conservation) and 6 (keys): `test_reference.py`, `test_cache.py`.
"""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from helpers import (
    BACKENDS,
    KV,
    PAGES,
    RETAINED,
    TOY,
    VOCAB,
    Toy,
    cache_of,
    over_codecs,
    over_pages,
    over_pairs,
    over_retentions,
    pages_held,
    pairwise,
    sees,
    text,
)
from kvik.cache.arena import Arena
from kvik.cache.retention import Retention
from kvik.models import families
from kvik.models.model import Model
from kvik.ops import codecs, reference
from kvik.ops import pages as paged
from kvik.ops.linear import Linear
from kvik.ops.reads import Reads

# 1. Row law: the cut cannot show.

PIECES = (256, 37, 1)
LENGTH = 530


def check_cut(cache, toy=TOY):
    """One text in pieces of 512, 256, 37 and 1, alone and in a ragged batch of five, gives the same bits."""
    tokens = text(LENGTH)
    want = toy.cut(cache, tokens, [512, 512], settle=False)
    for piece in PIECES:
        # One by one is slow: around the edge of the first tile and at the end it shows whatever there is to see.
        pieces = [piece] * (LENGTH // piece + 1) if piece > 1 else [240, *[1] * 40, 220, *[1] * 30]
        assert torch.equal(toy.cut(cache, tokens, pieces), want), f"pieces of {piece}"
    batch = [(512, tokens), (256, text(300, 1)), (1, tokens), (37, tokens), (5, text(60, 2))]
    for i, got in enumerate(together(cache, toy, batch)):
        assert torch.equal(got, want[: len(got)]) or batch[i][1] is not tokens, f"pieces of {batch[i][0]} in a batch"


def together(cache, toy, batch):
    """All of a batch at once, each text in pieces of its own size; at most 60 steps."""
    sequences = [cache.open(salt=str(i)) for i in range(len(batch))]
    outs = [[] for _ in batch]
    for turn in range(60):
        chunks = [(i, tokens[turn * piece : (turn + 1) * piece]) for i, (piece, tokens) in enumerate(batch)]
        chunks = [(i, chunk) for i, chunk in chunks if chunk]
        for (i, _), out in zip(chunks, toy.run([(sequences[i], chunk) for i, chunk in chunks]), strict=True):
            outs[i].append(out)
            sequences[i].settle()
    for sequence in sequences:
        sequence.close()
    return [torch.cat(out) for out in outs]


@pairwise(kv=KV, page=PAGES, kept=RETAINED, ops=BACKENDS)
def test_the_cut_does_not_show(kv, page, kept, ops):
    check_cut(cache_of(kv, kept, page))


def test_the_cut_is_seen_where_attention_is_one_product_over_what_is_visible(monkeypatch, plain):
    def naive(ask, read, *rest):
        lanes, reads, q = ask.lanes, ask.reads, ask.q if read.tokens is None else ask.q[read.tokens]
        stored = paged.decoded(ask.pages[read.pages[lanes]], reads.layout, reads.page_size)
        every = [x.reshape(lanes.stop, read.items, -1, x.shape[-1]) for x in stored.values()]
        outs = []
        for item, mask in enumerate(read.visible[0]):
            seen = mask.any(0)
            k, v = (x[:, item][:, seen] for x in every)
            rows = q.view(read.items, read.chunk, lanes.stop, -1, q.shape[-1])[item].permute(1, 2, 0, 3)
            weights = (rows @ k.mT[:, None]).masked_fill(~mask[:, seen], -torch.inf).softmax(-1)
            outs.append((weights @ v[:, None]).permute(2, 0, 1, 3).flatten(1, 2))
        return torch.cat(outs), None

    monkeypatch.setattr(reference, "_attend", naive)
    with sees():
        check_cut(cache_of("f32"))


def test_the_cut_is_seen_where_rows_share_a_scale(monkeypatch, plain):
    def shared(x):
        scale = (x.abs().amax() / 127).to(torch.bfloat16).expand(*x.shape[:-1], 1)
        return (x / scale).round().to(torch.int8).view(torch.uint8), scale.contiguous().view(torch.uint8)

    monkeypatch.setattr(codecs, "_int8", shared)
    with sees():
        check_cut(cache_of("int8"))


# 2. Position law: masks read positions; the next position is tokens seen.


def check_positions(cache, kept, length=330):
    """Attention after pages were dropped equals a dense mask over every row that was ever written, by position."""
    tokens, everything = text(length), list(range(length))
    sequence, outs = cache.open(), []
    for start in range(0, length, 30):
        with sequence.append(tokens[start : start + 30]) as step:
            assert step.positions == list(range(start, start + 30))
            TOY.append(step, 0)
            outs.append(step.attend(0, TOY.row("q", 0, step.tokens, step.positions), scale=0.25).out)
        sequence.settle()
    assert len(sequence) == length
    q, k, v = (TOY.row(name, 0, tokens, everything).double() for name in "qkv")
    at = torch.arange(length)
    back = at[:, None] - at
    visible = (back >= 0) & ((back < (kept.window or length)) | (at < kept.sinks))
    scores = torch.einsum("qlgd,kld->lgqk", q.unflatten(1, (2, 2)), k) * 0.25
    dense = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    want = torch.einsum("lgqk,kld->qlgd", dense, v).flatten(1, 2)
    torch.testing.assert_close(torch.cat(outs).double(), want, atol=2e-5, rtol=1e-4)


@over_pages
@pytest.mark.parametrize("kept", [Retention(), Retention(70), Retention(40, 5), Retention(16, 33), Retention(1)])
def test_dropped_pages_leave_positions_as_they_were(kept, page, ops):
    check_positions(cache_of("f32", f"+{kept}", page), kept)


def test_slot_numbers_taken_for_positions_are_seen(monkeypatch, plain):
    honest = reference._pages_of

    def by_slot(*where):
        pages, logical, columns = honest(*where)
        return pages, np.where(logical < 0, logical, columns), columns

    monkeypatch.setattr(reference, "_pages_of", by_slot)
    with sees():
        check_positions(cache_of("f32", "+window:70"), Retention(70))


# 7. Budget law.


def check_free_budget(cache, full):
    """A window at or above the length changes no bit of any result, and no row."""
    tokens, found = text(300), []
    for each in (cache, full):
        with each.open() as sequence:
            outs = []
            for start in range(0, 300, 60):
                outs += TOY.run([(sequence, tokens[start : start + 60])])
                sequence.settle()
            found.append((torch.cat(outs), sequence.read(0), each.books, each.nbytes))
    assert torch.equal(found[0][0], found[1][0]), "outputs differ"
    assert all(torch.equal(rows, found[1][1][name]) for name, rows in found[0][1].items()), "rows differ"
    assert found[0][2:] == found[1][2:], "books differ"


@pairwise(kv=KV, page=PAGES, window=(300, 10_000), ops=BACKENDS)
def test_a_budget_that_is_not_reached_changes_nothing(kv, page, window, ops):
    check_free_budget(cache_of(kv, f"+window:{window}", page), cache_of(kv, "", page))


def test_a_budget_that_binds_is_seen():
    with sees():
        check_free_budget(cache_of("f32", "+window:299"), cache_of("f32"))


def check_frees(cache, kept, page, length=500):
    """A window frees what it hides: pages to within one a run and lane, at once; and bytes."""
    sequence, peak = cache.open(), 0
    for start in range(0, length, 100):
        TOY.fill(sequence, text(100, start))
        peak = max(peak, cache.arena.held)
        sequence.settle()
        runs = [min(kept.window, len(sequence)), *([kept.sinks] if kept.sinks else [])]
        assert pages_held(sequence) <= 2 * sum(-(-run // page) + 1 for run in runs)
        assert cache.books.in_use == pages_held(sequence)
        assert sequence.nbytes == cache.spec.nbytes(len(sequence))
    cache.check()
    assert cache.arena.held < peak or cache.arena.held == cache.arena.slab_bytes + cache.arena.tables


@over_pages
@pytest.mark.parametrize("kept", [Retention(70), Retention(40, 5), Retention(1), Retention(128, 64)])
def test_a_window_frees_what_it_hides(kept, page):
    check_frees(cache_of("f32", f"+{kept}", page, shares=False), kept, page)


def test_a_window_that_only_masks_is_seen(monkeypatch):
    monkeypatch.setattr(Retention, "live_pages", lambda self, tokens, size: list(range(-(-tokens // size))))
    with sees():
        check_frees(cache_of("f32", "+window:70", shares=False), Retention(70), 32)


@pytest.mark.parametrize("kv", ["f32+window:64", "f32+window:64,sinks:4"])
def test_a_window_streams_through_a_small_budget_though_its_past_was_published(kv):
    cache = cache_of(kv, memory=3 * 2**18)
    sequence = cache.open()
    for seed in range(100):
        TOY.fill(sequence, text(64, seed))
        sequence.settle()
    cache.check()
    assert len(sequence) == 6400


# 8. Padding law.


def check_neighbours(cache):
    """What stands in a neighbour's sequence moves no bit, whatever it is."""
    outs = []
    for filling in (1.0, -3e4, torch.nan):
        mine, other = cache.open(salt=f"mine{filling}"), cache.open(salt=f"other{filling}")
        for tokens in (text(70), text(1), text(40)):
            with cache.step([(other, tokens), (mine, tokens)]) as step:
                k, v, q = (TOY.row(name, 0, step.tokens, step.positions) for name in "kvq")
                for rows in (k, v, q):
                    rows[: len(tokens)] = filling
                step.append(0, k=k, v=v)
                outs.append(step.attend(0, q, scale=0.25).out[len(tokens) :])
        mine.close(), other.close()
    assert all(torch.equal(outs[i], outs[i % 3]) for i in range(len(outs)))


@over_pages
@over_codecs
def test_a_neighbour_moves_no_bit(kv, page, ops):
    check_neighbours(cache_of(kv, page=page))


def test_a_neighbour_that_shares_a_scale_is_seen(monkeypatch, plain):
    honest = codecs.hadamard
    monkeypatch.setattr(codecs, "hadamard", lambda x: honest(x) * (1 + x.abs().mean() / 1e6))
    with sees():
        check_neighbours(cache_of("int4"))


def poison(arena):
    """Fills every byte that nobody holds with ones: read as floats, NaN."""
    free = torch.ones((arena._next + 4) * arena.slab_bytes, dtype=torch.bool)
    for size, owner in arena.classes.items():
        for page in np.flatnonzero(owner.refs[: arena.touched(size)]).tolist():
            free[page * size : (page + 1) * size] = False
    arena.bytes[: len(free)][free] = 0xFF


def check_stale(cache):
    """Bytes that others left in a page never show."""
    want = TOY.cut(cache_of(str(cache.spec)), text(300), [100, 1, 99, 100])
    keeper = cache.open(salt="keeper")
    TOY.fill(keeper, text(70))
    for _ in range(2):
        poison(cache.arena)
        assert torch.equal(TOY.cut(cache, text(300), [100, 1, 99, 100]), want)
    assert not keeper.read(0)["k"].isnan().any()


@over_retentions
@over_codecs
def test_stale_bytes_never_show(kv, kept, ops):
    check_stale(cache_of(kv, kept, shares=False))


def test_stale_bytes_of_a_page_that_is_not_blank_are_seen(monkeypatch, plain):
    honest = Arena.take

    def take(self, size, count, *account):
        pages = honest(self, size, count, *account)
        self.page_class(size).view[torch.from_numpy(pages)] = 0xFF
        return pages

    monkeypatch.setattr(Arena, "take", take)
    with sees():
        check_stale(cache_of("f32", shares=False))


# 9. Causality.


def check_causality(cache):
    """Appending moves no stored row and no earlier output."""
    tokens = text(160)
    shorter = TOY.cut(cache, tokens[:100], [100])
    assert torch.equal(TOY.cut(cache, tokens, [160])[:100], shorter), "an earlier output moved"
    sequence = cache.open()
    TOY.fill(sequence, tokens[:100])
    before = stored(cache, sequence, 100)
    TOY.fill(sequence, tokens[100:])
    assert torch.equal(stored(cache, sequence, 100), before), "a stored row moved"


def stored(cache, sequence, count):
    table = sequence.tables[0]
    pages = cache.pages(table.group)[torch.from_numpy(table.pages.astype(np.int64))]
    return paged.packed(pages, table.group.layout, cache.spec.page_size).flatten(1, 2)[:, :count]


@over_pairs
def test_appending_moves_nothing_that_was_before(kv, kept, page, ops):
    check_causality(cache_of(kv, kept, page))


def test_attention_in_both_directions_is_seen(monkeypatch, plain):
    monkeypatch.setattr(Reads, "visible", lambda self, asking, held: (asking >= 0) & (held < 1 << 50))
    with sees():
        check_causality(cache_of("f32"))


# 1 again, through whole models: every linear product, norm and activation keeps it too.


def tiny(family, weights):
    """A random model whose width is no multiple of 64."""
    torch.manual_seed(0)
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=640))
    else:
        sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "max_position_embeddings": 640}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, **heads))
    config = families.from_hf(model.config.to_dict(), None, "tiny")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    return Model(config, {name: tensors[name] for name in config.tensor_shapes()}, weights=weights)


class Logits:
    """A model, to be run as a Toy is."""

    def __init__(self, model):
        self.model = model

    def run(self, chunks):
        return list(self.model.run(chunks, every=True).split([len(tokens) for _, tokens in chunks]))

    cut = Toy.cut


@pairwise(
    weights=("f32", "bf16", "int8", "int4"),
    family=("llama", "gpt2"),
    kv=("bf16", "int4+window:70,sinks:5"),
    ops=BACKENDS,
)
def test_the_cut_does_not_show_in_a_models_logits(weights, family, kv, ops):
    model = tiny(family, weights)
    check_cut(model.cache(kv, memory=8 << 20), Logits(model))


@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_the_cut_is_seen_where_activations_share_a_scale(weights, monkeypatch):
    honest = Linear.__call__
    model = tiny("llama", weights)

    def shared(self, x, **options):
        scale = x.abs().max() / 127
        return honest(self, (x / scale).round() * scale, **options)

    monkeypatch.setattr(Linear, "__call__", shared)
    with sees():
        check_cut(model.cache("bf16", memory=8 << 20), Logits(model))
