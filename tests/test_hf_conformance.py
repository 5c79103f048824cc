"""What transformers asks of its own caches in tests/utils/test_cache_utils.py, where no download is needed: of any.

Truth is the model without a cache. Rows are looked at only where `update` gives tensors (ROWS).
"""

import copy

import pytest
import torch
import transformers

from kvik.hf.conformance.caches import contender
from kvik.hf.conformance.given import Given
from kvik.hf.conformance.models import VOCAB, text
from kvik.hf.conformance.subject import Subject, off, padded, steps

CACHES = ["dynamic", "kvik"]
ROWS = ["dynamic"]
NEAR = 1e-4


@pytest.fixture(params=CACHES)
def given(request):
    """Makes caches of one kind; closed at the end."""
    made = Given(contender(request.param))
    with torch.no_grad():
        yield made
    made.close()


@pytest.fixture(params=ROWS)
def rows_of(request):
    """An empty cache of one kind, whose `update` gives tensors, for a model's configuration."""
    make = contender(request.param).make
    return lambda config: make(transformers.PreTrainedConfig() if config is None else _Holder(config), 64)


class _Holder:
    """A model that is nothing but its configuration."""

    def __init__(self, config):
        self.config = config


def llama(heads=4, **changes):
    sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    return transformers.LlamaConfig(**sizes, num_key_value_heads=heads, **changes)


def subject_of(model):
    """A model as a Subject: it and a copy."""
    made = Subject.__new__(Subject)
    made.name, made.model, made.twin = "plain", model, copy.deepcopy(model)
    return made


def drawn(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = kind(config).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data.normal_(0.0, 1.5 / weight.shape[-1] ** 0.5)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_as_many_kv_heads_as_queries_some_or_one(given, heads):
    subject = subject_of(drawn(transformers.LlamaForCausalLM, llama(heads)))
    assert given.alone(subject, text(17)) < NEAR


def test_two_texts_of_a_batch_are_told_as_alone(given):
    subject, rows = given.subject("plain"), [text(9, 1), text(5, 2)]
    output = subject.generate(given.cache(subject), rows, new=10)
    for index, row in enumerate(rows):
        assert output.sequences[index, -10:].tolist() == subject.greedy(row, 10)[-10:]


def test_the_cache_that_was_given_comes_back_and_is_one_of_transformers(given):
    subject = given.subject("plain")
    cache = given.cache(subject)
    output = subject.generate(cache, [text(4)])
    assert output.past_key_values is cache and isinstance(cache, transformers.Cache)


def test_beam_search_reorders_and_finds_what_it_finds_without_a_cache(given):
    subject, ids = given.subject("plain"), torch.tensor([text(6, 3)])
    settings = dict(
        max_new_tokens=10, num_beams=4, num_return_sequences=4, do_sample=False, return_dict_in_generate=True,
        attention_mask=torch.ones_like(ids), pad_token_id=0,
    )  # fmt: skip
    found = subject.model.generate(ids, past_key_values=given.cache(subject), **settings)
    want = subject.twin.generate(ids, use_cache=False, **settings)
    assert torch.equal(found.sequences, want.sequences)
    assert any(len({int(beam) for beam in row if beam >= 0}) > 1 for row in found.beam_indices)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("extra", [1, 20])
def test_pads_that_nobody_needs_change_no_token(given, attention, extra):
    subject, row = Subject("plain"), text(7, 4)
    subject.model.set_attn_implementation(attention)
    ids, mask = padded([row, [0] * (len(row) + extra)])
    ids, mask = ids[:1], mask[:1]
    assert mask.sum() == len(row) and mask.shape[1] == len(row) + extra
    output = subject.model.generate(
        ids, attention_mask=mask, past_key_values=given.cache(subject), max_new_tokens=8, do_sample=False,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert output.sequences[0, -8:].tolist() == subject.greedy(row, 8)[-8:]
    assert subject.strays(output, [row]) < NEAR


def test_what_is_drawn_depends_on_the_seed_alone(given):
    subject, row = given.subject("plain"), text(5, 5)
    told = []
    for cache in (given.cache(subject), None):
        torch.manual_seed(11)
        told.append(subject.generate(cache, [row], do_sample=True, new=12).sequences)
    assert torch.equal(*told)


def test_prompts_over_copies_of_one_prefix(given):
    subject, prefix = given.subject("plain"), text(16, 6)
    cache = given.cache(subject)
    subject.feed(cache, [prefix])
    for seed in (7, 8):
        row = [*prefix, *text(6, seed)]
        output = subject.generate(copy.deepcopy(cache), [row], new=8)
        assert output.sequences[0].tolist() == subject.greedy(row, 8)
        assert int(cache.get_seq_length()) == len(prefix)
    assert off(subject.feed(cache, [text(3, 9)])[0], subject.exact([*prefix, *text(3, 9)])[-3:]) < NEAR


def test_a_model_without_an_attention_interface(given):
    sizes = dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=128, rotary_dim=8)
    config = transformers.GPTJConfig(**sizes, bos_token_id=1, eos_token_id=None)
    subject = subject_of(drawn(transformers.GPTJForCausalLM, config))
    assert given.alone(subject, text(15)) < NEAR
    rows = [text(3), text(9)]
    assert subject.strays(subject.generate(given.cache(subject), rows), rows) < NEAR


def test_more_than_a_window_at_once_then_one_then_two(given):
    """A prompt longer than the window; then the window is full, and one token comes, and two at once."""
    for name in ("window", "mixed"):
        subject, ids = given.subject(name), text(24, 10)
        cache = given.cache(subject)
        got = [subject.feed(cache, [ids[start:stop]])[0] for start, stop in ((0, 20), (20, 21), (21, 23), (23, 24))]
        assert off(torch.cat(got), subject.exact(ids)) < NEAR


def test_a_cache_is_used_again_after_reset(given):
    subject = given.subject("plain")
    cache = given.cache(subject)
    first = steps(subject.generate(cache, [text(9, 11)]))
    cache.reset()
    assert torch.equal(steps(subject.generate(cache, [text(9, 11)])), first)


def line(*values):
    """Rows [1, 1, T, 1] that can be told apart."""
    return torch.tensor(values)[None, None, :, None]


def seen(rows):
    return rows[0, 0, :, 0].tolist()


def put(cache, layer, *values):
    """What a layer shows after an update: keys; values must be the same, negated."""
    keys, shown = cache.update(line(*values), -line(*values), layer)
    assert torch.equal(keys, -shown)
    return seen(keys)


def test_rows_are_shown_in_order_each_layer_by_itself(rows_of):
    cache = rows_of(llama())
    assert put(cache, 0, 1.0, 2.0) == [1, 2] and put(cache, 1, 10.0, 20.0) == [10, 20]
    assert put(cache, 0, 3.0) == [1, 2, 3] and put(cache, 0, 4.0) == [1, 2, 3, 4]
    assert put(cache, 1, 30.0) == [10, 20, 30]
    assert [int(cache.get_seq_length(layer)) for layer in (0, 1)] == [4, 3]


def windowed():
    sizes = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1)
    kinds = ["full_attention", "sliding_attention"]
    return transformers.Gemma2Config(**sizes, head_dim=1, sliding_window=3, layer_types=kinds)


def test_a_window_shows_what_each_new_row_may_see_and_no_more(rows_of):
    cache = rows_of(windowed())
    assert put(cache, 0, 1.0, 2.0, 3.0, 4.0) == [1, 2, 3, 4]
    assert put(cache, 1, 1.0, 2.0, 3.0, 4.0) == [1, 2, 3, 4], "the first rows see the first rows"
    for layer, shown in ((0, [1, 2, 3, 4, 5]), (1, [3, 4, 5])):
        assert cache.get_mask_sizes(1, layer) == (len(shown), 5 - len(shown))
        assert put(cache, layer, 5.0) == shown
    assert put(cache, 1, 6.0, 7.0) == [4, 5, 6, 7]
    assert int(cache.get_seq_length(1)) == 7


def test_reordered_rows_are_those_of_other_texts(rows_of):
    cache = rows_of(llama())
    keys, values = torch.rand(4, 4, 8, 16), torch.rand(4, 4, 8, 16)
    for layer in range(2):
        cache.update(keys, values, layer)
    order = torch.tensor([3, 3, 0, 1])
    cache.reorder_cache(order)
    new = torch.rand(4, 4, 1, 16)
    for layer in range(2):
        shown = cache.update(new, new, layer)
        assert torch.equal(shown[0], torch.cat([keys[order], new], 2))
        assert torch.equal(shown[1], torch.cat([values[order], new], 2))
