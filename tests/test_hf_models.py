"""Every architecture gives the tokens that it gives with transformers' own cache: greedy, beams, padding, chunks."""

import pytest
import torch
from transformers import GenerationMixin

import kvik.hf
from hf_models import DECODERS, READERS, made

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


def sources(name):
    """What a model reads: three sources, two of them shorter than the first."""
    if name == "whisper":
        torch.manual_seed(1)
        return dict(input_features=torch.randn(3, 8, 32))
    inputs = padded()
    return {key: x.flip(1) for key, x in inputs.items()}


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", READERS)
def test_a_model_that_reads_a_source_keeps_it_once(name):
    model, batch = made(name), sources(name)
    one = {key: x[:1] for key, x in batch.items()}
    generate = GenerationMixin.generate  # Whisper's own would cut sound into windows
    for inputs, more in ((batch, dict(num_beams=2)), (one, dict(num_beams=4, num_return_sequences=3)), (batch, {})):
        expected = generate(model, **inputs, **more, **OPTIONS)
        with kvik.hf.Cache(model) as cache:
            got = generate(model, **inputs, **more, past_key_values=cache, **OPTIONS)
            assert torch.equal(got, expected), more
            cache.pages.check()
            assert cache.found.direct, cache.describe()
            sound = inputs.get("input_features", ())
            rows = 16 * len(sound) or int(inputs["attention_mask"].sum())
            stored = sum(block.rows for block in cache.pages.index)
            assert stored == rows, "each source once, and no padding"
