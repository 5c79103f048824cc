"""`kvik.hf.Cache` under everything that `generate()` and its users do to a cache."""

import copy
import gc

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import kvik.hf
from hf_models import made
from kvik.errors import BudgetError, KvikError, ModelError, SequenceError, SpecError
from test_hf_models import OPTIONS, padded

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(scope="module")
def llama():
    return made("llama")


@pytest.fixture(scope="module")
def windowed():
    return made("gemma3")


@pytest.fixture
def cache(llama):
    with kvik.hf.Cache(llama) as cache:
        yield cache
        cache.pages.check()


def prompt(columns=20, seed=2, rows=1):
    torch.manual_seed(seed)
    return torch.randint(3, 150, (rows, columns))


def logits(model, cache, ids, **more):
    with torch.inference_mode():
        return model(ids, past_key_values=cache, **more).logits


def test_what_stands_in_a_pad_moves_no_bit(llama):
    found = []
    for pad in (0, 7, 149):
        batch = padded()
        batch["input_ids"][batch["attention_mask"] == 0] = pad
        with kvik.hf.Cache(llama) as cache:
            first = logits(llama, cache, ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            mask = torch.cat((batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)), 1)
            found.append((first[:, -1], logits(llama, cache, prompt(1, rows=3), attention_mask=mask)))
            assert [len(s) for s in cache.batch.sequences] == [15, 10, 6], "tokens alone are stored"
    for first, second in found[1:]:
        assert torch.equal(first, found[0][0]) and torch.equal(second, found[0][1])


def test_a_padded_row_is_what_it_is_alone(llama, cache):
    batch = padded()
    together = logits(llama, cache, batch["input_ids"], attention_mask=batch["attention_mask"],
                      position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp_min(0))  # fmt: skip
    for row, pads in enumerate((0, 5, 9)):
        with kvik.hf.Cache(llama) as alone:
            torch.testing.assert_close(
                logits(llama, alone, batch["input_ids"][row : row + 1, pads:])[0],
                together[row, pads:],
                rtol=1e-3,
                atol=1e-3,
            )


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "t5"])
def test_many_turns_go_over_one_cache(name):
    model, ours, theirs = made(name), prompt(9), prompt(9)
    reads = name == "t5"
    with kvik.hf.Cache(model) as cache:
        own = None if reads else DynamicCache(config=model.config)
        for turn in range(3):
            if reads:
                cache.reset()
            ours = model.generate(ours, past_key_values=cache, **OPTIONS)
            theirs = model.generate(theirs, **({} if reads else {"past_key_values": own}), **OPTIONS)
            assert torch.equal(ours, theirs)
            new = prompt(4, seed=turn)
            ours, theirs = torch.cat((ours, new), 1), torch.cat((theirs, new), 1)
        cache.pages.check()


def test_padded_turns_keep_the_padding_between_them(llama, cache):
    batch, own = padded(), DynamicCache(config=llama.config)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for seed in (3, 4):
        ours = llama.generate(ids, attention_mask=mask, past_key_values=cache, **OPTIONS)
        assert torch.equal(ours, llama.generate(ids, attention_mask=mask, past_key_values=own, **OPTIONS))
        more = torch.ones((3, 4), dtype=torch.long)
        more[1, :2] = 0  # a turn that is shorter in one row
        answered = torch.ones((3, ours.shape[1] - ids.shape[1]), dtype=torch.long)
        ids, mask = torch.cat((ours, prompt(4, seed, 3)), 1), torch.cat((mask, answered, more), 1)


def test_crop_forgets_the_last_columns(llama, cache):
    ids = prompt()
    whole = logits(llama, cache, ids)
    cache.crop(-6)
    assert cache.get_seq_length() == 14
    torch.testing.assert_close(logits(llama, cache, ids[:, 14:]), whole[:, 14:], rtol=1e-4, atol=1e-4)
    cache.crop(0)
    assert cache.get_seq_length() == 20
    with pytest.raises(ValueError, match="give -3 to remove"):
        cache.crop(3)
    with pytest.raises(SequenceError, match="the cache has 20"):
        cache.crop(-21)


def test_a_crop_counts_columns_where_rows_have_padding(llama, cache):
    batch, own = padded(), DynamicCache(config=llama.config)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for held in (cache, own):
        logits(llama, held, ids, attention_mask=mask)
        held.crop(-7)
    assert [len(s) for s in cache.batch.sequences] == [7, 2, 0], "of the third row padding alone is left"
    more = dict(ids=ids[:, 7:], attention_mask=mask)
    mine, theirs = logits(llama, cache, **more), logits(llama, own, **more)
    torch.testing.assert_close(mine[:, -1], theirs[:, -1], rtol=1e-3, atol=1e-3)


def test_crop_beyond_a_window_needs_recording(windowed):
    ids, states = prompt(), []
    with kvik.hf.Cache(windowed) as cache:
        cache.activate_past_recording()
        states.append(logits(windowed, cache, ids))
        cache.crop(-4)
        states.append(logits(windowed, cache, ids[:, 16:]))
        torch.testing.assert_close(states[1], states[0][:, 16:], rtol=1e-3, atol=1e-3)
    with kvik.hf.Cache(windowed, "f32; page 16") as cache:
        logits(windowed, cache, prompt(60))
        with pytest.raises(SequenceError, match="rows were dropped"):
            cache.crop(-30)
        assert cache.get_seq_length() == 60


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "bloom", "deepseek_v3"])
@pytest.mark.parametrize("assisted", [False, True])
def test_guesses_change_no_token(name, assisted):
    model, ids = made(name), prompt(6).repeat(1, 4)
    more = dict(assistant_model=made("llama", seed=5)) if assisted else dict(prompt_lookup_num_tokens=4)
    options = {**OPTIONS, "no_repeat_ngram_size": None}
    expected = model.generate(ids, **options)
    with kvik.hf.Cache(model) as cache:
        assert torch.equal(model.generate(ids, past_key_values=cache, **more, **options), expected)
        cache.pages.check()


def test_an_assistant_may_have_kvik_under_it_too(llama):
    ids, options = prompt(), {**OPTIONS, "no_repeat_ngram_size": None}
    helper = made("llama", seed=5)
    expected = llama.generate(ids, **options)
    with kvik.hf.Cache(llama) as cache:
        assert torch.equal(llama.generate(ids, past_key_values=cache, assistant_model=helper, **options), expected)


def test_sampling_draws_what_it_draws_with_transformers_own_cache(llama, cache):
    options = {**OPTIONS, "do_sample": True, "num_return_sequences": 4}
    torch.manual_seed(0)
    expected = llama.generate(prompt(), **options)
    torch.manual_seed(0)
    assert torch.equal(llama.generate(prompt(), past_key_values=cache, **options), expected)
    assert len({tuple(row) for row in expected.tolist()}) == 4


def test_rows_of_one_prompt_share_its_pages(llama):
    ids = prompt(128)
    with kvik.hf.Cache(llama) as one, kvik.hf.Cache(llama) as four:
        logits(llama, one, ids)
        logits(llama, four, ids.repeat(4, 1))
        assert four.nbytes.payload == one.nbytes.payload
        logits(llama, four, prompt(1, rows=4))
        assert four.nbytes.payload < 1.2 * one.nbytes.payload
        four.pages.check()


def test_beams_go_over_a_prefix_of_one_row(llama, cache):
    ids = prompt(40)
    expected = llama.generate(ids, num_beams=3, **OPTIONS)
    logits(llama, cache, ids[:, :39])
    assert torch.equal(llama.generate(ids, num_beams=3, past_key_values=cache, **OPTIONS), expected)


def test_rows_are_repeated_selected_and_reordered(llama, cache):
    ids, own = prompt(10, rows=2), DynamicCache(config=llama.config)
    logits(llama, cache, ids), logits(llama, own, ids)
    for change in (
        lambda c: c.batch_repeat_interleave(3),
        lambda c: c.reorder_cache(torch.tensor([5, 0, 0, 3, 2, 1])),
        lambda c: c.batch_select_indices(torch.tensor([4, 1, 0])),
        lambda c: c.batch_select_indices(torch.tensor([True, False, True])),
    ):
        change(cache), change(own)
        new = prompt(2, rows=len(cache.batch.sequences))
        torch.testing.assert_close(logits(llama, cache, new), logits(llama, own, new), rtol=1e-3, atol=1e-3)
        cache.pages.check()
    with pytest.raises(SequenceError, match="rows \\[7\\] of a batch of 2"):
        cache.reorder_cache(torch.tensor([7]))


def test_a_copy_shares_pages_until_it_differs(llama, cache):
    ids = prompt(64)
    logits(llama, cache, ids)
    before = cache.nbytes.payload
    twin = copy.deepcopy(cache)
    assert cache.nbytes.payload == before, "no row was copied"
    a, b = logits(llama, cache, prompt(3, 5)), logits(llama, twin, prompt(3, 6))
    own = DynamicCache(config=llama.config)
    logits(llama, own, ids)
    torch.testing.assert_close(b, logits(llama, own, prompt(3, 6)), rtol=1e-3, atol=1e-3)
    assert not torch.equal(a, b)
    twin.close()


def test_it_says_what_transformers_asks_a_cache(llama, cache):
    assert cache and len(cache) == 3 and not cache.is_compileable and cache.is_croppable
    assert (cache.get_seq_length(), cache.batch_size, cache.max_cache_len, cache.get_max_length()) == (0, -1, -1, -1)
    assert cache.layers[0].keys is None and not cache.is_initialized
    logits(llama, cache, prompt())
    assert (cache.get_seq_length(), cache.get_mask_sizes(2, 1), cache.batch_size) == (20, (22, 0), 1)
    own = DynamicCache(config=llama.config)
    logits(llama, own, prompt())
    for mine, theirs in zip(cache.layers, own.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-3, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.pages.books.in_use == 0


def test_windows_are_seen_where_a_model_has_them(windowed):
    with kvik.hf.Cache(windowed) as cache:
        own = DynamicCache(config=windowed.config)
        for ids in (prompt(), prompt(1)):
            logits(windowed, cache, ids), logits(windowed, own, ids)
        assert cache.is_sliding == own.is_sliding == [True, False, True]
        assert [cache.get_mask_sizes(3, i) for i in range(3)] == [own.get_mask_sizes(3, i) for i in range(3)]
        torch.testing.assert_close(cache.layers[0].keys, own.layers[0].keys, rtol=1e-3, atol=1e-4)


def test_the_model_is_as_it_was_when_the_last_cache_is_closed(llama):
    hooks = [dict(module._forward_pre_hooks) for module in llama.modules()]
    names = set(AttentionInterface().keys())
    a, b = kvik.hf.Cache(llama), kvik.hf.Cache(llama)
    assert llama.config._attn_implementation == "sdpa"
    logits(llama, a, prompt())
    assert llama.config._attn_implementation == "sdpa", "it is set within a forward alone"
    a.close(), a.close()
    logits(llama, b, prompt())
    del b
    gc.collect()
    assert [dict(module._forward_pre_hooks) for module in llama.modules()] == hooks
    assert {name for name in AttentionInterface() if "kvik" not in name} <= names
    with pytest.raises(SequenceError, match="the cache is closed"):
        a.reset()


def test_a_forward_that_fails_leaves_no_trace(llama, cache):
    logits(llama, cache, prompt())
    before = cache.pages.books

    def fail(*_):
        raise RuntimeError("no")

    hook = llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        logits(llama, cache, prompt(3))
    hook.remove()
    assert llama.config._attn_implementation == "sdpa" and cache.pages.books == before
    cache.pages.check()
    own = DynamicCache(config=llama.config)
    logits(llama, own, prompt())
    torch.testing.assert_close(logits(llama, cache, prompt(3)), logits(llama, own, prompt(3)), rtol=1e-3, atol=1e-3)


def test_a_model_without_a_kvik_cache_is_as_it_was(llama, cache):
    expected = llama.generate(prompt(), **OPTIONS)
    own = DynamicCache(config=llama.config)
    assert torch.equal(llama.generate(prompt(), past_key_values=own, **OPTIONS), expected)


def test_a_mask_of_its_own_is_obeyed(llama, cache):
    ids, own = prompt(8), DynamicCache(config=llama.config)
    mask = torch.zeros(1, 1, 8, 8).masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(2), float("-inf"))
    expected = logits(llama, own, ids, attention_mask=mask)
    torch.testing.assert_close(logits(llama, cache, ids, attention_mask=mask), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_as_it_is(dtype):
    model = made("llama").to(dtype)
    own, ids = DynamicCache(config=model.config), prompt()
    with kvik.hf.Cache(model) as cache:
        expected = logits(model, own, ids)
        assert str(cache.spec) == {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
        torch.testing.assert_close(logits(model, cache, ids), expected, rtol=0.1, atol=0.1)
        assert torch.equal(cache.layers[0].keys, own.layers[0].keys)


def test_what_does_not_fit_is_refused_in_a_line(llama, cache):
    refused = [
        (SpecError, lambda: kvik.hf.Cache(llama, "int9"), "int9"),
        (SpecError, lambda: kvik.hf.Cache(llama, "int8", budget="1MiB"), "both given"),
        (SpecError, lambda: kvik.hf.Cache(made("bloom"), "int8+snapkv:25%"), "lets rows leave"),
        (SpecError, lambda: kvik.hf.Cache(made("bloom"), "int8+window:8"), "lets rows leave"),
        (BudgetError, lambda: kvik.hf.Cache(llama, budget="4KiB"), "drops rows"),
        (SequenceError, lambda: logits(llama, cache, prompt(), use_cache=False), "use_cache=True"),
        (SequenceError, lambda: logits(llama, cache, prompt(), attention_mask=torch.ones(1, 7)), "give the whole mask"),
    ]
    for kind, call, words in refused:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert issubclass(kind, KvikError) and "\n" not in str(caught.value)
    logits(llama, cache, prompt(rows=2))
    with pytest.raises(SequenceError, match="batch_repeat_interleave"):
        logits(llama, cache, prompt(rows=4))
    with pytest.raises(SequenceError, match="the model that the cache was made for"):
        logits(made("llama"), cache, prompt(rows=2))
    changed = torch.ones(2, 21)
    changed[0, 3] = 0
    with pytest.raises(SequenceError, match="says other than before"):
        logits(llama, cache, prompt(1, rows=2), attention_mask=changed)


def test_a_model_that_keeps_no_rows_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(ModelError, match="use transformers' own"):
        kvik.hf.Cache(model)


def test_a_budget_takes_the_most_exact_spec_that_fits(llama):
    specs = []
    for budget in ("4MiB", "1MiB", "900KiB", 700_000):
        with kvik.hf.Cache(llama, budget=budget, tokens=4096) as cache:
            specs.append(str(cache.spec))
            assert cache.pages.budget <= 4 << 20
    assert specs == sorted(specs, key=["f32", "bf16", "int8", "k8v4", "int4"].index) and len(set(specs)) > 1


def test_describe_says_what_is_kept_and_where_attention_reads(llama, cache):
    logits(llama, cache, padded()["input_ids"], attention_mask=padded()["attention_mask"])
    for words in ("f32", "as they are stored", "3 of 3", "3 rows, 28 tokens; 14 places of padding"):
        assert words in cache.describe()
    with kvik.hf.Cache(made("bloom")) as dense:
        assert "over decoded rows" in dense.describe()
