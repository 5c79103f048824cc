"""Sampling and generation, on a tiny random model with a byte tokenizer."""

import math

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import LlamaConfig, LlamaForCausalLM

from kvik.engine.generation import Generation, Request, generate, prefill
from kvik.engine.sampling import Sampling, choose
from kvik.errors import ContextError, UsageError
from kvik.models import families
from kvik.models.model import Model
from kvik.models.text.tokenizer import Tokenizer

EOS = (256, 257)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))} | {"<end>": 256, "<turn>": 257}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<turn>"])
    backend.save(str(folder / "tokenizer.json"))
    torch.manual_seed(3)
    sizes = dict(vocab_size=258, hidden_size=64, intermediate_size=96, num_hidden_layers=2, max_position_embeddings=160)
    theirs = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=list(EOS))
    )
    config = families.from_hf(theirs.config.to_dict(), None, "tiny")
    return Model(config, theirs.state_dict(), weights="f32", tokenizer=Tokenizer(folder))


def answer(model, kv="f32", text="hello", **request):
    prompt = model.tokenizer.encode(text)
    if kv == "none":
        return Generation(model, Request(prompt, **request), None).run()
    with model.cache(kv, memory=4 << 20).open() as sequence:
        return Generation(model, Request(prompt, **request), sequence).run()


def test_no_cache_writes_the_same_text_as_a_cache(model):
    hot = Sampling(temperature=1.0, seed=5)
    for sampling in (Sampling(), hot):
        with_cache = answer(model, max_tokens=40, sampling=sampling)
        without = answer(model, kv="none", max_tokens=40, sampling=sampling)
        assert with_cache.token_ids == without.token_ids
        assert without.nbytes.allocated == 0 < with_cache.nbytes.allocated


def test_a_prompt_goes_in_by_chunks_that_are_settled(model, monkeypatch):
    monkeypatch.setattr("kvik.engine.generation.CHUNK", 10)
    text, sizes, run = list(range(100, 125)), [], Model.run

    def counted(self, chunks, **options):
        sizes.append([len(tokens) for _, tokens in chunks])
        return run(self, chunks, **options)

    monkeypatch.setattr(Model, "run", counted)
    cache = model.cache("f32", memory=4 << 20)
    with cache.open() as a, cache.open() as b, cache.open() as whole:
        logits = prefill(model, [a, b], text)
        assert sizes == [[5, 5]] * 5 and a.tokens == b.tokens == text
        assert torch.equal(logits, run(model, [(whole, text)]).expand(2, -1)), "the cut cannot show"
    sizes.clear()
    with cache.open() as sequence:
        stopped = prefill(model, [sequence], text, stopping=lambda: len(sizes) == 2)
        assert sizes == [[10], [10]] and sequence.tokens == text[:20] and len(stopped) == 1
        assert len(prefill(model, [sequence], text, stopping=lambda: True)) == 0


def test_text_is_the_pieces_and_what_the_tokenizer_decodes(model):
    with model.cache("f32", memory=4 << 20).open() as sequence:
        generation = Generation(model, Request([5], 50, sampling=Sampling(1.5, seed=1)), sequence)
        pieces = list(generation)
    assert "".join(pieces) == generation.text == model.tokenizer.decode(generation.token_ids)
    assert len(pieces) > 5, "it streams"


def test_max_tokens_ends_with_length_and_says_so(model):
    generation = answer(model, max_tokens=7)
    assert (generation.finish_reason, len(generation.token_ids)) == ("length", 7)
    assert "--max-tokens" in generation.note


def test_the_last_position_ends_with_length_and_names_the_way_out(model):
    generation = answer(model, text="x" * 150, sampling=Sampling(2.0, seed=9))
    while generation.finish_reason != "length":  # an early end token is possible; another seed is not stopped by it
        seed = generation.request.sampling.seed + 1
        generation = answer(model, text="x" * 150, sampling=Sampling(2.0, seed=seed))
    assert len(generation.token_ids) == 10
    assert "160" in generation.note and "shorten" in generation.note


def test_a_prompt_without_room_for_an_answer_is_refused(model):
    with pytest.raises(ContextError, match="161 tokens are more than the 160"):
        answer(model, text="x" * 160)


@pytest.mark.parametrize("end", EOS)
def test_every_end_token_ends_the_text(model, monkeypatch, end):
    monkeypatch.setattr("kvik.engine.generation.choose", lambda *_: end)
    generation = answer(model)
    assert (generation.finish_reason, generation.token_ids, generation.text) == ("stop", [end], "")


def test_stop_text_ends_the_answer_even_across_tokens_and_is_left_out(model, monkeypatch):
    script = iter(model.tokenizer.encode("one STOP two"))
    monkeypatch.setattr("kvik.engine.generation.choose", lambda *_: next(script))
    pieces = []
    with model.cache("f32", memory=4 << 20).open() as sequence:
        generation = Generation(model, Request([5], stop=("STOP", "never")), sequence)
        for piece in generation:
            pieces.append(piece)
            assert "S" not in "".join(pieces), "what may become a stop text is held back"
    assert (generation.text, generation.finish_reason) == ("one ", "stop")


def test_text_held_back_for_a_stop_that_never_comes_is_given_at_the_end(model, monkeypatch):
    script = iter([*model.tokenizer.encode("ends in STO"), EOS[0]])
    monkeypatch.setattr("kvik.engine.generation.choose", lambda *_: next(script))
    assert answer(model, stop=("STOP",)).text == "ends in STO"


def test_stop_ends_between_steps_and_leaves_the_sequence_usable(model):
    cache = model.cache("int8", memory=4 << 20)
    with cache.open() as sequence:
        generation = Generation(model, Request([5], 50, sampling=Sampling(1.5, seed=1)), sequence)
        for _ in generation:
            generation.stop()
        assert generation.finish_reason == "interrupted"
        assert len(generation.token_ids) < 50
        cache.check()
        Generation(model, Request([*sequence.tokens, 7], 5), sequence).run()
    cache.check()


def test_an_error_inside_a_step_keeps_the_books_right(model, monkeypatch):
    cache = model.cache("int8", memory=4 << 20)
    with cache.open() as sequence:
        pieces = iter(Generation(model, Request([5], 50, sampling=Sampling(1.5, seed=1)), sequence))
        next(pieces)
        monkeypatch.setattr(model.decoder, "forward", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(pieces)
        cache.check()


def _interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("held", [[5, 6, 7], [5, 6], [9]])
def test_a_sequence_that_does_not_begin_the_prompt_is_refused(model, held):
    with model.cache("f32", memory=4 << 20).open() as sequence:
        model.run([(sequence, held)])
        with pytest.raises(UsageError, match="begin the prompt"):
            Generation(model, Request([5, 6]), sequence)


def test_an_answer_is_given_once(model):
    generation = answer(model, max_tokens=3)
    with pytest.raises(UsageError, match="started already"):
        generation.run()


def test_generate_gives_everything_back(model):
    assert "".join(generate(model, "hi", raw=True, max_tokens=9, memory=4 << 20))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(temperature=-1),
        dict(temperature=math.nan),
        dict(temperature=1e-320),
        dict(top_p=0),
        dict(top_p=1.1),
        dict(top_k=-1),
        dict(seed=-1),
    ],
)
def test_sampling_outside_its_range_is_refused(wrong):
    with pytest.raises(UsageError, match="use"):
        Sampling(**wrong)


@pytest.mark.parametrize("wrong", [dict(prompt=[]), dict(prompt=[1], max_tokens=0), dict(prompt=[1], stop=("",))])
def test_requests_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError):
        Request(**wrong)


def frequencies(logits, sampling, draws=4000):
    counts = torch.zeros(len(logits))
    for position in range(draws):
        counts[choose(logits, sampling, position)] += 1
    return counts / draws


def test_noise_follows_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    for temperature in (0.5, 1.0, 2.0):
        want = torch.softmax(logits / temperature, 0)
        assert (frequencies(logits, Sampling(temperature, seed=11)) - want).abs().max() < 0.03


def test_top_k_and_top_p_keep_only_the_likeliest_and_their_proportions():
    logits = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04]).log()[torch.tensor([3, 1, 0, 4, 2])]
    by_k = frequencies(logits, Sampling(1.0, top_k=2, seed=1))
    by_p = frequencies(logits, Sampling(1.0, top_p=0.8, seed=2))
    kept = torch.tensor([0, 3 / 8, 5 / 8, 0, 0])  # .5 and .3 reach .8
    assert (by_k - kept).abs().max() < 0.03
    assert (by_p - kept).abs().max() < 0.03
    tiny = frequencies(logits, Sampling(1.0, top_p=1e-9, seed=3), draws=50)
    assert tiny[2] == 1, "the likeliest always stays"


def test_noise_is_a_function_of_seed_and_position_alone():
    logits = torch.randn(500, generator=torch.Generator().manual_seed(0))
    first = [choose(logits, Sampling(1.0, seed=7), p) for p in range(40)]
    torch.manual_seed(99)
    torch.rand(17)
    assert first == [choose(logits, Sampling(1.0, seed=7), p) for p in range(40)]
    assert first != [choose(logits, Sampling(1.0, seed=8), p) for p in range(40)]
    large = [[choose(logits, Sampling(1.0, seed=2**64 - n), p) for p in range(40)] for n in (1, 2)]
    assert large[0] != large[1], "all 64 bits of a seed count"
    assert len(set(first)) > 20
