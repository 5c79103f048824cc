"""SmolLM2's real weights inside transformers: thirty prompts, and few bits."""

import pytest
import torch

import kvik.hf
from kvik.models.in_transformers import in_transformers

pytestmark = [pytest.mark.weights, pytest.mark.filterwarnings("ignore")]  # transformers' own
OPENINGS = ("The capital of France is", "Water boils when", "Once upon a time there was", "To bake bread you need",
    "The three primary colours are", "def fibonacci(n):")  # fmt: skip
ENDINGS = (
    "",
    " In short:",
    " It is well known, and",
    " Explain this to a child.\n",
    " My grandmother always said",
)


@pytest.fixture(scope="module")
def smollm2():
    return in_transformers("smollm2")


def batch(tokenizer):
    """Thirty prompts, padded on the left."""
    texts = [tokenizer.encode(opening + ending) for opening in OPENINGS for ending in ENDINGS]
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    return dict(input_ids=ids, attention_mask=torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts]))


def test_thirty_prompts_get_the_tokens_that_they_get_with_transformers_own_cache(smollm2):
    model, tokenizer = smollm2
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    inputs = batch(tokenizer)
    expected = model.generate(**inputs, **options)
    with kvik.hf.Cache(model) as cache:
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)
        tokens = int(inputs["attention_mask"].sum()) + 30 * 7
        assert cache.nbytes.payload == tokens * 30 * 3 * 2 * 64 * 4, "rows of real tokens, and no others"


def test_few_bits_say_nearly_the_same(smollm2):
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer.encode(" ".join(OPENINGS) * 6)])
    with torch.inference_mode():
        exact = model(ids).logits[0].log_softmax(-1)
        for spec, most in (("int8", 0.01), ("k8v4", 0.05), ("int4", 0.3)):
            with kvik.hf.Cache(model, spec) as cache:
                found = model(ids, past_key_values=cache).logits[0].log_softmax(-1)
            assert 0 < float((exact.exp() * (exact - found)).sum(-1).mean()) < most, spec
