"""Every architecture gives the tokens that it gives with transformers' own cache: greedy, beams, padding, chunks."""

import pytest
import torch
import transformers as hf
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


def with_images(name):
    """A tiny model that looks at images, and two prompts with one each. Where it is Gemma's, an image's tokens see each
    other in both directions."""
    torch.manual_seed(0)
    text = dict(vocab_size=160, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, head_dim=8)
    sees = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16)
    ids = torch.randint(3, 140, (2, 16))
    ids[:, 3:7] = 150
    inputs = dict(input_ids=ids, pixel_values=torch.randn(2, 3, 16, 16), attention_mask=torch.ones_like(ids))
    if name == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        own = dict(mm_tokens_per_image=4, image_token_index=150, boi_token_index=151, eoi_token_index=152)
        parts = dict(text_config={**text, "sliding_window": 6, "layer_types": kinds})
        config = hf.Gemma3Config(**parts, vision_config={**sees, "patch_size": 4}, **own)
        return hf.Gemma3ForConditionalGeneration(config), {**inputs, "token_type_ids": (ids == 150).long()}
    own = dict(image_token_index=150, image_seq_length=4)
    parts = dict(text_config=hf.LlamaConfig(**text))
    parts |= dict(vision_config=hf.CLIPVisionConfig(**sees, patch_size=8, projection_dim=16))
    model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**parts, **own))
    inputs["attention_mask"][1, :2] = 0
    return model, inputs


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_images_are_seen_as_the_model_sees_them(name):
    model, inputs = with_images(name)
    model.eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    expected = model.generate(**inputs, **OPTIONS)
    with kvik.hf.Cache(model) as cache:
        assert cache.found.direct
        assert torch.equal(model.generate(**inputs, past_key_values=cache, **OPTIONS), expected)
        cache.pages.check()
