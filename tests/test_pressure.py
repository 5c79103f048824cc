"""What happens under pressure: what can't fit empties nothing, and what fits once tidied up does fit."""

import pytest
import torch

from helpers import TOY, Toy, cache_of, make_cache, shapes, text
from kvik.errors import BudgetError, SequenceError
from kvik.ops.layout import CODECS


def test_a_request_that_can_never_fit_drops_no_block():
    cache = cache_of("f32", memory=1 << 20)
    for seed in range(6):
        with cache.open() as sequence:
            TOY.run([(sequence, text(64, seed))])
            sequence.settle()
    kept = len(cache.index)
    with cache.open() as sequence, pytest.raises(BudgetError), sequence.append(text(9000)):
        pass
    assert len(cache.index) == kept == 12
    cache.check()


def test_pages_of_one_size_do_not_strand_those_of_another():
    """57 sequences leave a page in each of many slabs; one of them grows into what the others left."""
    layers = shapes(layers=2, heads=1, width=64)
    toy = Toy(layers)
    cache = make_cache("f32+window:64; layers 0: bf16", layers, memory=7 << 18, shares=False)
    opened = [cache.open() for _ in range(57)]
    for sequence in opened:
        toy.fill(sequence, text(32))
    for index, sequence in enumerate(opened):
        if index % 8:
            sequence.close()
    rows = opened[0].read(1)["k"].clone()
    grown = opened[8]
    for _ in range(62):
        toy.fill(grown, text(32))
        grown.settle()
    assert len(grown) == 63 * 32
    assert torch.equal(opened[0].read(1)["k"], rows)
    cache.check()


def test_sinks_stay_out_of_sight_where_the_models_own_window_binds():
    layers = shapes(window=8)
    toy, tokens = Toy(layers), text(40)
    plain, kept = (toy.cut(make_cache(kv, layers), tokens, [40]) for kv in ("f32", "f32+window:1000,sinks:4"))
    assert torch.equal(plain, kept)


@pytest.mark.parametrize("when", ["before", "after", "twice"])
def test_a_step_is_good_only_inside_its_with(when):
    cache = cache_of("f32")
    sequence = cache.open()
    step = sequence.append([1, 2])
    if when != "before":
        with step:
            TOY.append(step, 0)
    use = step.__enter__ if when == "twice" else lambda: TOY.append(step, 0)
    with pytest.raises(SequenceError, match="used already" if when == "twice" else "not open"):
        use()
    cache.check()


@pytest.mark.parametrize("kv", [*CODECS, "k8v4"])
def test_laws_hold_on_an_accelerator_too(kv):
    """Law 1, and closeness to the CPU's result; needs CUDA."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    tokens, runs = text(300), (("cpu", [300]), ("cuda", [300]), ("cuda", [37] * 8 + [4]))
    on_cpu, whole, cut = (TOY.cut(cache_of(kv, device=device), tokens, pieces) for device, pieces in runs)
    assert torch.equal(whole, cut)
    assert (on_cpu - whole.cpu()).abs().max() < 1e-3
