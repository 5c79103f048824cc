"""What transformers asks of its own caches in tests/utils/test_cache_utils.py, asked of kvik's rows; what it asks of
texts is in `test_hf_conformance.py`.

Left out is what speaks of other things than a cache: export and compilation (a page table grows), fixed capacities and
their overflow (`StaticCache`), moving layers to a GPU and back, the pickle of data-parallel training, and texts of
models that would have to be downloaded.
"""

import pytest
import torch
from transformers import DynamicCache

import kvik.hf
from hf_models import made

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
OPTIONS = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, return_dict_in_generate=True)


@pytest.fixture(scope="module")
def model():
    return made("llama")


def prompt(columns, seed=2, rows=1):
    torch.manual_seed(seed)
    return torch.randint(3, 150, (rows, columns))


def fed(model, cache, *pieces):
    """The logits of each piece."""
    with torch.inference_mode():
        return [model(piece, past_key_values=cache).logits for piece in pieces]


@pytest.mark.parametrize("rows", [1, 2])
def test_an_answer_goes_on_where_its_cache_ends(model, rows):
    ids = prompt(9, rows=rows)
    expected = model.generate(ids, **{**OPTIONS, "max_new_tokens": 24}).sequences
    with kvik.hf.Cache(model) as cache:
        first = model.generate(ids, past_key_values=cache, **OPTIONS)
        second = model.generate(first.sequences, past_key_values=first.past_key_values, **OPTIONS)
        assert torch.equal(second.sequences, expected)


def test_rows_come_in_are_cropped_and_come_in_again(model):
    ids, own = prompt(12), DynamicCache(config=model.config)
    with kvik.hf.Cache(model) as cache:
        for change in (None, -3, -4, 0):
            if change is not None:
                cache.crop(change), own.crop(change)
            assert cache.get_seq_length() == own.get_seq_length()
            mine, theirs = fed(model, cache, ids[:, :4])[0], fed(model, own, ids[:, :4])[0]
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
            for ours, other in zip(cache.layers, own.layers, strict=True):
                torch.testing.assert_close(ours.keys, other.keys, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(ours.values, other.values, rtol=1e-3, atol=1e-4)


def test_rows_of_a_batch_are_chosen_and_reordered(model):
    own = DynamicCache(config=model.config)
    with kvik.hf.Cache(model) as cache:
        fed(model, cache, prompt(6, rows=4)), fed(model, own, prompt(6, rows=4))
        for change in (lambda c: c.reorder_cache(torch.tensor([1, 1, 3, 0])),
                       lambda c: c.batch_select_indices(torch.tensor([0, 3])),
                       lambda c: c.batch_repeat_interleave(2)):  # fmt: skip
            change(cache), change(own)
            for ours, other in zip(cache.layers, own.layers, strict=True):
                torch.testing.assert_close(ours.keys, other.keys, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pieces", [(4, 1, 1), (5, 1), (6, 1), (9, 2), (20, 1), (3, 3, 3, 3)])
def test_a_window_holds_what_the_next_token_sees(pieces):
    model = made("mistral")  # a window of 6
    own, ids = DynamicCache(config=model.config), prompt(sum(pieces))
    with kvik.hf.Cache(model) as cache:
        for piece in ids.split(pieces, dim=1):
            assert cache.get_mask_sizes(piece.shape[1], 0) == own.get_mask_sizes(piece.shape[1], 0)
            mine, theirs = fed(model, cache, piece)[0], fed(model, own, piece)[0]
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(cache.layers[0].keys, own.layers[0].keys, rtol=1e-3, atol=1e-4)
        assert cache.is_sliding == own.is_sliding and cache.get_max_length(0) == own.get_max_length(0) == 6


def test_layers_of_two_kinds_lie_in_one_cache():
    model = made("gemma2")
    own, ids = DynamicCache(config=model.config), prompt(15)
    with kvik.hf.Cache(model) as cache:
        fed(model, cache, ids), fed(model, own, ids)
        assert [layer.keys.shape for layer in cache.layers] == [layer.keys.shape for layer in own.layers]
        assert cache.get_seq_length() == own.get_seq_length() == 15
