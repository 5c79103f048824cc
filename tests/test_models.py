"""The families against transformers, on tiny random weights: prompt, 64 decoded steps, ragged batches, any cut."""

import pytest
import torch

from kvik.cache.methods import Needs
from kvik.cache.scorers import METHODS
from kvik.cache.spec import Spec
from kvik.engine.generation import prefill
from kvik.errors import ContextError, SpecError, UsageError
from kvik.models import families
from kvik.models.parts import multiplied
from kvik.models.shapes.wellknown import CONFIGS
from kvik.models.watch import Watch
from kvik.ops.linear import Linear
from kvik.ops.loader import native
from kvik.plan import from_config, make_plan, run_plan
from tiny_models import FAMILIES, deepseek, drawn, llama, ours, their_logits, tokens


@pytest.fixture(params=FAMILIES)
def pair(request):
    """(transformers' model, ours) with the same weights, in f32."""
    theirs = drawn(FAMILIES[request.param])
    return theirs, ours(theirs)


def test_prompt_logits_equal_transformers(pair):
    theirs, model = pair
    ids = tokens(130)
    with model.cache("f32", memory=8 << 20).open() as sequence:
        got = model.run([(sequence, ids)], every=True)
        formula = model.spec("bf16").nbytes(130)
    want = their_logits(theirs, ids)
    assert want.std() > 0.5 and (got - want).abs().max() < 1e-4
    planned = make_plan(from_config(theirs.config.to_dict()), kv="bf16", context=130)
    assert planned.total == formula and planned.shape.parameters == sum(p.numel() for p in theirs.parameters())


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


@pytest.mark.parametrize(("weights", "kv"), [("f32", "int4"), ("int4", "int8")])
def test_any_cut_beside_any_neighbour_gives_the_same_bits(made, weights, kv):
    model, ids, other = ours(made, weights), tokens(100), tokens(100, 1)
    cache = model.cache(kv, memory=8 << 20, shares=False)
    whole, cut, neighbour = (cache.open() for _ in range(3))
    want = model.run([(whole, ids)], every=True)
    at, found = 0, []
    for piece in (1, 62, 1, 30, 6):
        now = slice(at, at + piece)
        logits = model.run([(neighbour, other[now]), (cut, ids[now])], every=True)
        found.append(logits[piece:])
        at += piece
    assert torch.equal(torch.cat(found), want)
    assert want.isfinite().all() and want.std() > 0.1


def test_forks_trims_and_known_prefixes_give_the_same_bits(made):
    model, ids = ours(made), tokens(100)
    cache = model.cache("int8", memory=8 << 20)
    sequence = cache.open(ids)
    want = model.run([(sequence, ids)], every=True)
    sequence.trim(70)
    assert torch.equal(model.run([(sequence, ids[70:])], every=True), want[70:])
    sequence.settle()
    twin = sequence.fork()
    left, right = (model.run([(each, [5])]) for each in (sequence, twin))
    assert torch.equal(left, right)
    with cache.open(ids) as again:
        assert again.cached == 96
        assert torch.equal(model.run([(again, ids[96:])]), want[-1:])
    cache.check()


@pytest.fixture(params=FAMILIES)
def made(request):
    """transformers' model."""
    return drawn(FAMILIES[request.param])


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


@pytest.mark.parametrize(("family", "weights"), [("llama", "int4"), ("gpt2", "int4"), ("qwen2", "int8")])
@pytest.mark.parametrize("kv", ["f32", "k8v4; layers 1 heads 0: bf16"])
def test_a_layer_in_one_call_has_the_bits_of_its_parts(family, weights, kv):
    if native() is None:
        pytest.skip("there is no such call without the kernels")
    torch.manual_seed(0)
    theirs = FAMILIES[family]()
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


def test_layers_of_another_kind_go_part_by_part():
    for name in ("opt", "qwen3", "gemma2"):
        assert all(block.fused is None for block in ours(drawn(FAMILIES[name]), "int4").decoder.blocks)


# Latent attention.


@pytest.fixture(scope="module")
def latent():
    return ours(drawn(FAMILIES["deepseek3"]))


@pytest.mark.parametrize(
    ("kv", "most"),
    [("bf16", 1e-5), ("f16", 1e-6), ("int8", 1e-4), ("int8-rot", 1e-4), ("int4", 2e-2), ("int4-plain", 2e-2),
     ("int4-row", 2e-2), ("latent:int4,rope:bf16", 2e-2)],
)  # fmt: skip
def test_every_codec_works_on_a_latent(kv, most):
    """Mean KL from f32 rows. Without experts: the smallest difference may make a token choose another."""
    model, ids = ours(drawn(lambda: deepseek(3, first_k_dense_replace=3))), tokens(120)
    exact = _all_logits(model, ids)
    with model.cache(kv, memory=8 << 20).open() as sequence:
        found = model.run([(sequence, ids)], every=True)
        assert sequence.nbytes.payload == model.spec(kv).nbytes(120).payload
    p, q = exact.double().log_softmax(-1), found.double().log_softmax(-1)
    assert 0 < (p.exp() * (p - q)).sum(-1).mean() < most


@pytest.mark.parametrize("method", sorted(METHODS.methods))
def test_policies_choose_among_latents_or_refuse_in_a_line(latent, method):
    policy = f"{method}:4pages" if method == "quest" else f"{method}:40%,recent:8"
    if method == "oracle":
        pytest.skip("it is shown what comes later, in evaluations alone")
    if METHODS.methods[method].needs & Needs.PAGES:
        with pytest.raises(SpecError) as refused:
            latent.spec(f"int8+{policy}")
        assert "\n" not in str(refused.value)
        return
    ids = tokens(100)
    with latent.cache(f"int8+{policy}", memory=8 << 20).open(ids) as sequence:
        prefill(latent, [sequence], ids)
        rows = sequence.read(0)["latent"].shape[1]
        assert rows < 60, "rows have left"
        assert latent.run([(sequence, [7])]).isfinite().all()


def test_latents_turn_back_for_texts_past_the_window(latent):
    """Sinks right before the window: the queries' turned part alone is turned back."""
    window, ids = latent.cache("f32+window:40,sinks:4"), tokens(44)
    relative = latent.cache("f32+window:40,sinks:4,relative")
    with window.open() as a, relative.open() as b:
        assert torch.equal(latent.run([(a, ids)]), latent.run([(b, ids)]))
        for token in tokens(60, 2):
            a.settle(), b.settle()
            plain, turned = latent.run([(a, [token])]), latent.run([(b, [token])])
        assert not torch.equal(plain, turned) and turned.isfinite().all()


def test_deepseek_v3_leaves_70272_bytes_a_token_as_published():
    config = {**CONFIGS["deepseek-v3"], **deepseek(3).config.to_diff_dict(), **CONFIGS["deepseek-v3"]}
    config |= {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
    shapes = families.from_hf(config, None, "deepseek-v3").layer_shapes()
    assert Spec.parse("bf16", shapes).nbytes(1).payload == 70_272
    assert run_plan("deepseek-v3", kv="bf16").per_token.payload == 70_272


def test_a_row_of_an_expert_does_not_depend_on_who_else_chose_it(latent):
    mlp = latent.decoder.blocks[1].mlp
    x = torch.randn(60, 64, generator=torch.Generator().manual_seed(1))
    whole = mlp(x, after=latent.decoder.norm, onto=torch.zeros(60, 64))
    for row in range(60):
        assert torch.equal(mlp(x[row : row + 1], after=latent.decoder.norm, onto=torch.zeros(1, 64))[0], whole[row])
    assert len({tuple(sorted(each)) for each in mlp.router(x)[0].tolist()}) > 5, "they choose differently"


def test_weights_that_a_row_passes_leave_out_experts_that_it_does_not_take(latent):
    dense, *mixed = latent.decoder.blocks
    assert latent.row_weights == sum(multiplied(block) for block in latent.decoder.blocks)
    idle = (8 - 2) * 3 * 64 * 24
    for block in mixed:
        assert sum(x.outputs * x.inputs for x in linears(block)) - multiplied(block) == idle
    assert sum(x.outputs * x.inputs for x in linears(dense)) == multiplied(dense)


def linears(item):
    if isinstance(item, Linear):
        return [item]
    values = item if isinstance(item, list) else vars(item).values() if hasattr(item, "__dict__") else ()
    return [found for value in values for found in linears(value)]
