"""The families against transformers, on tiny random weights: prompt, 64 decoded steps, ragged batches, any cut."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from kvik.errors import ContextError, UsageError
from kvik.models import families
from kvik.models.model import Model
from kvik.models.watch import Watch
from kvik.ops.loader import native

SIZES = dict(vocab_size=157, hidden_size=64, intermediate_size=112, num_hidden_layers=3, max_position_embeddings=512)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 10000.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0},
}  # fmt: skip


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **HEADS, **changes}))


def gpt2():
    sizes = dict(vocab_size=157, n_embd=48, n_layer=3, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(GPT2Config(**sizes))


FAMILIES = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama, wide heads": lambda: llama(head_dim=32, num_key_value_heads=1),
    **{f"llama, {kind}": (lambda kind=kind: llama(rope_parameters=SCALINGS[kind])) for kind in SCALINGS},
    "mistral, window": lambda: MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=40)),
    "gpt2": gpt2,
}


@pytest.fixture(params=FAMILIES)
def pair(request):
    """(transformers' model, ours) with the same weights, in f32. Biases and norms are drawn too."""
    torch.manual_seed(0)
    theirs = FAMILIES[request.param]().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return theirs, ours(theirs)


def ours(theirs, weights="f32"):
    config = families.from_hf(theirs.config.to_dict(), None, "tiny")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    return Model(config, {name: tensors[name] for name in config.tensor_shapes()}, weights=weights)


def tokens(count, seed=0):
    return torch.randint(3, 157, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def their_logits(theirs, ids):
    return theirs(torch.tensor([ids])).logits[0]


def test_prompt_logits_equal_transformers(pair):
    theirs, model = pair
    ids = tokens(130)
    with model.cache("f32", memory=8 << 20).open() as sequence:
        got = model.run([(sequence, ids)], every=True)
    assert (got - their_logits(theirs, ids)).abs().max() < 1e-4


def test_64_greedy_steps_equal_transformers(pair):
    theirs, model = pair
    ids = tokens(30, seed=1)
    with torch.no_grad():
        want = theirs.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, 30), max_new_tokens=64, do_sample=False,
            pad_token_id=0, eos_token_id=None, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    with model.cache("f32", memory=8 << 20).open() as sequence:
        logits = model.run([(sequence, ids)])
        for step in range(64):
            assert (logits[0] - want.logits[step][0]).abs().max() < 1e-4, f"step {step}"
            token = int(logits[0].argmax())
            assert token == int(want.sequences[0, 30 + step])
            sequence.settle()
            logits = model.run([(sequence, [token])])


def test_ragged_batch_cut_anyhow_equals_transformers(pair):
    theirs, model = pair
    texts = [tokens(count, seed=count) for count in (90, 1, 47)]
    want = [their_logits(theirs, ids) for ids in texts]
    cache = model.cache("f32", memory=8 << 20)
    sequences = [cache.open() for _ in texts]
    for pieces in ((40, 1, 7), (49, 0, 1), (1, 0, 39)):
        members = [i for i, piece in enumerate(pieces) if piece]
        chunks = [(sequences[i], texts[i][len(sequences[i]) : len(sequences[i]) + pieces[i]]) for i in members]
        got = model.run(chunks)
        for row, i in enumerate(members):
            sequences[i].settle()
            assert (got[row] - want[i][len(sequences[i]) - 1]).abs().max() < 1e-4
    cache.check()


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_smaller_weights_stay_close_to_f32(weights):
    """Against f32's logits, whose spread is about 1: rounding to bf16 moves them by thousandths, 4 bits by tenths."""
    torch.manual_seed(0)
    theirs = llama()
    ids = tokens(100)
    exact, rounded = (_all_logits(ours(theirs, w), ids) for w in ("f32", weights))
    error = (exact - rounded).abs().max()
    assert 0 < error < {"bf16": 0.02, "int8": 0.04, "int4": 0.4}[weights]


def _all_logits(model, ids):
    with model.cache("f32", memory=8 << 20).open() as sequence:
        return model.run([(sequence, ids)], every=True)


def test_text_beyond_the_last_position_is_refused_and_nothing_changes(pair):
    _, model = pair
    with model.cache("f32", memory=8 << 20).open() as sequence:
        model.run([(sequence, tokens(500))])
        with pytest.raises(ContextError, match="513 tokens are more than the 512 positions"):
            model.run([(sequence, tokens(13))])
        assert len(sequence) == 500
        model.run([(sequence, tokens(12))])


def test_token_ids_outside_the_vocabulary_are_refused(pair):
    _, model = pair
    with model.cache("f32", memory=8 << 20).open() as sequence, pytest.raises(UsageError, match="0 to 156"):
        model.run([(sequence, [5, 157])])


@pytest.mark.parametrize(("family", "weights"), [("llama", "int4"), ("llama", "int8"), ("gpt2", "int4")])
@pytest.mark.parametrize("kv", ["f32", "k8v4; layers 1 heads 0: bf16"])
def test_a_layer_in_one_call_has_the_bits_of_its_parts(family, weights, kv):
    if native() is None:
        pytest.skip("there is no such call without the kernels")
    torch.manual_seed(0)
    theirs = {"llama": llama, "gpt2": gpt2}[family]()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model = ours(theirs, weights)
    prompts, found, through = [tokens(40), tokens(7, 1)], [], []

    class Counted(Watch):
        def through(self, layer, fused, x, angles):
            through.append(self.step.through(layer, fused, x, angles))
            return through[-1]

    for watch in (Counted, Watch):
        cache = model.cache(kv)
        sequences = [cache.open() for _ in prompts]
        out = [model.run(list(zip(sequences, prompts, strict=True)), watch=watch, every=True)]
        out += [model.run([(s, [3 + i]) for s in sequences], watch=watch) for i in range(3)]
        found.append(torch.cat(out))
    assert torch.equal(found[0], found[1])
    mixed = "heads" in kv  # a layer whose lanes lie in two groups goes part by part
    assert through == [layer != 1 or not mixed for _ in range(4) for layer in range(model.config.layers)]
