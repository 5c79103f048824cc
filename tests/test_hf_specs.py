"""Every kind of spec inside transformers: the logits are those of kvik's own engine, rows leave where they leave there,
and the bytes are the spec's."""

import pytest
import torch

import kvik.hf
from kvik.engine.generation import prefill
from kvik.errors import SequenceError, SpecError, UsageError
from tiny_models import drawn, gemma, llama, ours, tokens

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

SPECS = ["f32", "int8", "k8v4", "int4", "k:int8,v:bf16; layers 1: f32", "int8; page 64", "f32+window:40,sinks:4",
    "int8+snapkv:25%", "f32+keydiff:64rows,recent:16", "f32+h2o:64rows,every:32,recent:16", "f32+quest:4pages",
    "f32+snapkv:25%,every:16", "f32; layers 0 heads 1: f32+window:40,sinks:4"]  # fmt: skip
FOLLOWING = 24


@pytest.fixture(scope="module")
def pair():
    theirs = drawn(llama)
    return theirs, ours(theirs)


def engine_logits(model, spec, text, following):
    """kvik's own: after the prompt, and after each token behind it; and what it holds."""
    with model.cache(spec, shares=False).open(text) as sequence:
        found = [prefill(model, [sequence], text)[0]]
        for token in following:
            found.append(model.run([(sequence, [token])])[0])
            sequence.settle()
        return torch.stack(found), sequence.nbytes.payload


def check_near(found, expected):
    gap = (found - expected).abs().max() / expected.abs().max()
    assert gap < 0.02, f"logits are {gap:.3g} apart"


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_gives_the_logits_that_it_gives_in_kviks_own_engine(pair, spec):
    theirs, mine = pair
    text, following = tokens(150), tokens(FOLLOWING, seed=1)
    expected, payload = engine_logits(mine, spec, text, following)
    with kvik.hf.Cache(theirs, spec) as cache, torch.inference_mode():
        found = [theirs(torch.tensor([text]), past_key_values=cache, logits_to_keep=1).logits[0, -1]]
        for token in following:
            found.append(theirs(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
        assert cache.get_seq_length() == 150 + FOLLOWING
        assert cache.nbytes.payload == payload
        cache.pages.check()
    check_near(torch.stack(found), expected)


@pytest.mark.parametrize("spec", ["k8v4", "f32+snapkv:40%,recent:8", "f32+keydiff:48rows,recent:8,every:32"])
def test_a_padded_batch_is_cut_row_by_row(pair, spec):
    theirs, mine = pair
    texts = [tokens(count, seed) for seed, count in enumerate((120, 75, 31))]
    ids, mask = torch.zeros((3, 120), dtype=torch.long), torch.zeros((3, 120), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, -len(text) :], mask[row, -len(text) :] = torch.tensor(text), 1
    following = tokens(4, seed=9)
    with kvik.hf.Cache(theirs, spec) as cache, torch.inference_mode():
        places = (mask.cumsum(1) - 1).clamp_min(0)
        found = [theirs(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits[:, -1]]
        for token in following:
            mask, places = torch.cat((mask, torch.ones((3, 1), dtype=torch.long)), 1), places[:, -1:] + 1
            new = torch.full((3, 1), token)
            found.append(theirs(new, attention_mask=mask, position_ids=places, past_key_values=cache).logits[:, -1])
        cache.pages.check()
    for row, text in enumerate(texts):
        check_near(torch.stack(found)[:, row], engine_logits(mine, spec, text, following)[0])


def test_a_forward_that_is_cut_gives_the_logits_of_every_token(pair):
    theirs, _ = pair
    text = torch.tensor([tokens(150)])
    whole = kvik.hf.Cache(theirs)
    with kvik.hf.Cache(theirs, "f32+keydiff:512rows") as cut, torch.inference_mode():
        expected = theirs(text, past_key_values=whole).logits
        found = theirs(text, past_key_values=cut).logits
        assert found.shape == expected.shape
        check_near(found[0], expected[0])
        with pytest.raises(SequenceError, match="output_hidden_states"):
            theirs(text, past_key_values=cut, output_hidden_states=True)
    whole.close()


def test_rows_that_leave_are_given_back(pair):
    theirs, _ = pair
    text = torch.tensor([tokens(400)])
    with kvik.hf.Cache(theirs, "f32+snapkv:25%") as cache, kvik.hf.Cache(theirs) as full, torch.inference_mode():
        theirs(text, past_key_values=cache), theirs(text, past_key_values=full)
        assert cache.nbytes.payload == full.nbytes.payload // 4
        assert cache.get_seq_length() == 400, "positions go on"


def test_guesses_over_dropped_rows_leave_no_trace(pair):
    theirs, _ = pair
    options = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    text = torch.tensor([tokens(12) * 8])
    for spec in ("int8+snapkv:50%", "int8+window:40,sinks:4"):
        with kvik.hf.Cache(theirs, spec) as one, kvik.hf.Cache(theirs, spec) as other:
            expected = theirs.generate(text, past_key_values=one, **options)
            found = theirs.generate(text, past_key_values=other, prompt_lookup_num_tokens=4, **options)
            assert torch.equal(found, expected), spec
            assert other.batch.sequences[0].tokens == one.batch.sequences[0].tokens


def test_a_models_own_window_stays_the_narrower_one():
    theirs = drawn(lambda: gemma(3))
    text, following = tokens(100), tokens(8, seed=1)
    expected, _ = engine_logits(ours(theirs), "int8+window:64", text, following)
    with kvik.hf.Cache(theirs, "int8+window:64") as cache, torch.inference_mode():
        found = [theirs(torch.tensor([text]), past_key_values=cache).logits[0, -1]]
        for token in following:
            found.append(theirs(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    check_near(torch.stack(found), expected)


def test_what_needs_more_than_rows_is_refused(pair):
    for spec, words in (
        ("int8+kvzip:25%", "a pass of the model"),
        ("f32+window:40,sinks:4,relative", "positions don't"),
    ):
        with pytest.raises(SpecError, match=words):
            kvik.hf.Cache(pair[0], spec)


@pytest.mark.parametrize("policy", ["snapkv:50%", "h2o:50%"])
def test_a_mask_of_ones_own_is_refused_where_a_policy_must_see_queries(pair, policy):
    ids = torch.tensor([tokens(40)])
    own = torch.full((1, 1, 40, 40), -1e9).triu(1)
    with kvik.hf.Cache(pair[0], f"f32+{policy}") as cache:
        with pytest.raises(UsageError, match=f"where {policy} sees no queries; leave the mask out"):
            pair[0](ids, attention_mask=own, past_key_values=cache)
        cache.reset()
        pair[0](ids, past_key_values=cache)
        assert cache.get_seq_length() == 40
