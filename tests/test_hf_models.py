"""Every architecture gives the tokens that it gives with transformers' own cache: greedy, beams, padding, chunks."""

import pytest
import torch

import kvik.hf
from hf_models import DECODERS, made

DENSE = {"gptj", "codegen", "gpt_neo", "falcon", "falcon_alibi", "bloom", "mpt", "deepseek_v2", "deepseek_v3", "xglm",
    "llama4"}  # fmt: skip
# No token twice: tiny models with tied embeddings would say one for ever.
OPTIONS = dict(use_cache=True, max_new_tokens=10, do_sample=False, pad_token_id=0, no_repeat_ngram_size=1)


def padded(rows=3, columns=14, seed=1):
    """Token ids and their mask, left-padded by 5 and 9."""
    torch.manual_seed(seed)
    ids, mask = torch.randint(3, 150, (rows, columns)), torch.ones((rows, columns), dtype=torch.long)
    for row, count in enumerate((0, 5, 9)[:rows]):
        mask[row, :count] = ids[row, :count] = 0
    return dict(input_ids=ids, attention_mask=mask)


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", DECODERS)
def test_an_architecture_gives_the_tokens_that_it_gives_with_transformers_own_cache(name):
    model, batch = made(name), padded()
    one = {"input_ids": batch["input_ids"][:1]}
    cases = [(batch, {}), (one, dict(num_beams=3, num_return_sequences=2)), (one, dict(prefill_chunk_size=5))]
    for inputs, more in cases:
        expected = model.generate(**inputs, **more, **OPTIONS)
        with kvik.hf.Cache(model) as cache:
            assert cache.found.direct == (name not in DENSE), cache.describe()
            assert torch.equal(model.generate(**inputs, past_key_values=cache, **more, **OPTIONS), expected), more
            cache.pages.check()
