"""SmolLM2's real weights: the same bits however a text is cut, transformers' text, flat memory under a window."""

import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

import kvik
from kvik.engine.generation import Generation, Request, encode_prompt
from kvik.ops.layout import CODECS

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import agreement

pytestmark = pytest.mark.weights
CODEC_SPECS = [*CODECS, "k8v4"]


@pytest.fixture(scope="module")
def corpus(smollm2_in):
    return smollm2_in("int4").tokenizer.encode("\n".join(topics[name] for name in sorted(topics))[:40_000])


def last_logits(model, kv, texts, piece):
    """Every text's logits after each piece, all texts in one ragged batch: a list for each text."""
    cache = model.cache(kv, memory=512 << 20, shares=False)
    sequences = [cache.open() for _ in texts]
    out = [{} for _ in texts]
    while waiting := [i for i, text in enumerate(texts) if len(sequences[i]) < len(text)]:
        chunks = [(sequences[i], texts[i][len(sequences[i]) : len(sequences[i]) + piece]) for i in waiting]
        for i, logits in zip(waiting, model.run(chunks), strict=True):
            sequences[i].settle()
            out[i][len(sequences[i])] = logits
    for sequence in sequences:
        sequence.close()
    cache.check()
    return out


def check_cut(model, kv, text, others, pieces):
    """Law 1: logits of one text in one piece, in smaller ones, alone and among others, bit for bit."""
    whole = model_logits(model, kv, text)
    for piece in pieces:
        for batch in ([text], [others[0], others[1], text, others[2], others[3]]):
            got = last_logits(model, kv, batch, piece)[batch.index(text)]
            for length, logits in got.items():
                assert torch.equal(logits, whole[length - 1]), (
                    f"{kv}, pieces of {piece}, {len(batch)} texts, at {length}"
                )


def model_logits(model, kv, text):
    with model.cache(kv, memory=512 << 20, shares=False).open() as sequence:
        return model.run([(sequence, text)], every=True)


@pytest.fixture(scope="module")
def others(corpus):
    return [corpus[i * 700 : i * 700 + length] for i, length in enumerate((3, 90, 17, 41), start=2)]


@pytest.mark.parametrize("kv", CODEC_SPECS[::2])  # all of them: with longer texts, below
def test_the_cut_cannot_show(smollm2_in, corpus, others, kv):
    check_cut(smollm2_in("int4"), kv, corpus[:130], others, (100, 37))
    check_cut(smollm2_in("int4"), kv, corpus[:10], [other[:12] for other in others], (1,))


def test_the_cut_cannot_show_over_f32_weights(smollm2_in, corpus, others):
    check_cut(smollm2_in("f32"), "f32", corpus[:66], [other[:20] for other in others], (37,))
    check_cut(smollm2_in("f32"), "f32", corpus[:4], [other[:4] for other in others], (1,))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kv", CODEC_SPECS)
@pytest.mark.parametrize("weights", ["f32", "int4"])
def test_the_cut_of_512_tokens_cannot_show(smollm2_in, corpus, weights, kv):
    others = [corpus[i * 700 : i * 700 + length] for i, length in enumerate((3, 300, 64, 511), start=2)]
    check_cut(smollm2_in(weights), kv, corpus[:512], others, (512, 256, 37, 1))


@pytest.mark.parametrize("kv", ["bf16", "int8+window:100,sinks:4"])
def test_a_window_and_a_settle_after_every_token_cannot_show(smollm2_in, corpus, kv):
    check_cut(smollm2_in("int4"), kv, corpus[:180], [corpus[900:920]] * 4, (64, 7))


def test_greedy_text_equals_transformers_and_no_cache(smollm2_in):
    """2 prompts x 16 tokens here; benchmarks/agreement.py does 20 x 64."""
    model = smollm2_in("f32")
    prompts = [encode_prompt(model, text) for text in agreement.PROMPTS[:2]]
    want = agreement.transformers_texts(model, prompts, 16)
    assert agreement.kvik_texts(model, prompts, 16, "f32") == want
    recomputed = Generation(model, Request(prompts[1], 4), None).run()
    assert recomputed.token_ids == want[1][:4]


@pytest.mark.slow
def test_six_thousand_tokens_under_a_window_keep_memory_flat(smollm2_in, corpus):
    model = smollm2_in("int4")
    cache = model.cache("int8+window:512,sinks:4", memory=64 << 20, shares=False)
    held = []
    with cache.open() as sequence:
        for start in range(0, 6000, 500):
            model.run([(sequence, corpus[start : start + 500])])
            sequence.settle()
            held.append((cache.books.in_use, cache.arena.held))
        assert sequence.nbytes.payload == 516 * 90 * 128, "512 + 4 rows of 128 B in each of 90 lanes"
    steady = held[2:]
    assert max(pages for pages, _ in steady) - min(pages for pages, _ in steady) <= 90, "one page a lane"
    assert max(size for _, size in steady) - min(size for _, size in steady) <= 4 * cache.arena.slab_bytes
    assert max(size for _, size in steady) < 14 << 20, "all 6,000 rows would be 71 MB"


def test_weights_are_sha256_checked_files_that_load_fast():
    import time

    started = time.perf_counter()
    model = kvik.load("smollm2")
    assert time.perf_counter() - started < 30, "a sanity bound; the figure is in the README"
    assert model.weights == "int4" and model.config.max_positions == 8192 and 2 in model.config.eos_ids
