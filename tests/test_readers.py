"""Models that read a source, against transformers: any source, any cut, ragged batches, sources that are shared."""

import pytest
import torch

import readers
from helpers import listening
from kvik import events
from kvik.errors import ContextError, SpecError, UsageError
from kvik.models.attention import attend_all
from kvik.models.families.t5 import backward_bias, bias_both_ways
from kvik.ops.pointwise import ACTIVATIONS, activation
from readers import READERS, drawn, ours, their_logits, tokens

MEMORY = 16 << 20


@pytest.fixture(params=READERS)
def pair(request):
    """(transformers' model, ours) with the same weights, in f32."""
    theirs = drawn(request.param)
    return theirs, ours(theirs)


def begun(model, count, seed=0):
    """A text."""
    return tokens(count, seed, model.reading.start_id)


def read(model, source, text, kv="f32", pieces=None, **options):
    """Logits of every token of a text that goes in by pieces of these lengths."""
    cache = model.cache(kv, memory=MEMORY)
    with cache.open(source=model.fill(cache, source)) as sequence:
        found = []
        for piece in pieces or [len(text)]:
            found.append(model.run([(sequence, text[len(sequence) : len(sequence) + piece])], every=True, **options))
            sequence.settle()
    return torch.cat(found)


@pytest.mark.parametrize("rows", [1, 33, 200])
def test_prompt_logits_equal_transformers(pair, rows, ops):
    theirs, model = pair
    source, text = readers.source(model, rows, rows), begun(model, 130)
    got = read(model, source, text)
    assert (got - their_logits(theirs, source, text)).abs().max() < 1e-4


def test_64_greedy_steps_equal_transformers(pair):
    theirs, model = pair
    source = readers.source(model, 60, 1)
    want = readers.generate(
        theirs, source, max_new_tokens=64, do_sample=False, eos_token_id=None, forced_eos_token_id=None,
        pad_token_id=1, return_dict_in_generate=True, output_logits=True,
        use_cache=False,  # theirs has as many layers as the encoder
    )  # fmt: skip
    cache = model.cache("f32", memory=MEMORY)
    token = model.reading.start_id
    with cache.open(source=model.fill(cache, source)) as sequence:
        for step in range(64):
            logits = model.run([(sequence, [token])])[0]
            sequence.settle()
            assert (logits - want.logits[step][0]).abs().max() < 1e-4, f"step {step}"
            token = int(want.sequences[0, step + 1])
            assert token == int(logits.argmax())


def test_a_ragged_batch_over_sources_of_which_some_are_shared(pair):
    """Four texts about three sources; the encoder runs three times, and every cut gives transformers' logits."""
    theirs, model = pair
    sources = [readers.source(model, count, seed) for count, seed in ((200, 1), (1, 2), (33, 3))]
    about = [0, 1, 2, 0]
    texts = [begun(model, count, seed=count) for count in (90, 1, 47, 61)]
    cache = model.cache("f32", memory=MEMORY)
    heard = listening(cache)
    sequences = [cache.open(source=model.fill(cache, sources[which])) for which in about]
    assert [e.rows for e in heard if isinstance(e, events.Filled)] == [readers.rows(model, n) for n in (200, 1, 33)]
    want = [their_logits(theirs, sources[which], text) for which, text in zip(about, texts, strict=True)]
    for pieces in ((40, 1, 7, 61), (49, 0, 1, 0), (1, 0, 39, 0)):
        members = [i for i, piece in enumerate(pieces) if piece]
        chunks = [(sequences[i], texts[i][len(sequences[i]) : len(sequences[i]) + pieces[i]]) for i in members]
        got = model.run(chunks)
        for row, i in enumerate(members):
            sequences[i].settle()
            assert (got[row] - want[i][len(sequences[i]) - 1]).abs().max() < 1e-4
    cache.check()


@pytest.mark.parametrize("name", ["t5", "t5 v1.1", "bart", "marian", "whisper"])
@pytest.mark.parametrize(("kv", "weights"), [("f32", "f32"), ("int8; cross: int4", "int8"), ("k8v4", "int4")])
def test_the_cut_and_neighbours_cannot_show(name, kv, weights, ops):
    model = ours(drawn(name), weights)
    source, text = readers.source(model, 75, 1), begun(model, 70)
    whole = read(model, source, text, kv)
    assert torch.equal(read(model, source, text, kv, (1, 30, 2, 37)), whole)
    cache = model.cache(kv, memory=MEMORY)
    other = cache.open(source=model.fill(cache, readers.source(model, 9, 7)))
    mine = cache.open(source=model.fill(cache, source))
    got = model.run([(other, begun(model, 33, 5)), (mine, text)], every=True)
    assert torch.equal(got[33:], whole)


@pytest.mark.parametrize("name", ["t5 v1.1", "bart", "whisper"])
def test_the_backends_agree(name, monkeypatch):
    model = ours(drawn(name))
    source, text = readers.source(model, 75, 1), begun(model, 100)
    exact = read(model, source, text)
    for kv, limit in (("f32", 1e-5), ("int8", 0.01), ("int4; cross: int8", 0.15)):  # a code flips in a deeper layer
        found = []
        for backend in ("reference", "native"):
            monkeypatch.setenv("KVIK_OPS", backend)
            found.append(read(model, source, text, kv))
        assert (found[0] - found[1]).abs().max() < limit and (found[0] - exact).abs().max() < 4 * limit


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["t5", "t5 v1.1", "bart", "marian", "whisper"])
def test_smaller_weights_stay_close_to_f32(name, weights):
    models = [ours(drawn(name), w) for w in ("f32", weights)]
    source, text = readers.source(models[0], 50, 1), tokens(60)
    exact, rounded = (read(model, source, text) for model in models)
    error = (exact - rounded).abs().max() / exact.std()
    assert 0 < error < {"bf16": 0.15, "int8": 0.3, "int4": 3.0}[weights]


def test_forks_trims_and_prefixes_read_the_same_source(pair):
    theirs, model = pair
    source, text = readers.source(model, 40, 1), begun(model, 90)
    want = their_logits(theirs, source, text)
    cache = model.cache("f32", memory=MEMORY)
    name = model.fill(cache, source)
    with cache.open(text, source=name) as sequence:
        model.run([(sequence, text[:70])])
        sequence.settle()
        twin = sequence.fork()
        sequence.trim(50)
        got = model.run([(sequence, text[50:80]), (twin, text[70:])], every=True)
        assert (got[:30] - want[50:80]).abs().max() < 1e-4 and (got[30:] - want[70:]).abs().max() < 1e-4
        sequence.settle()
        twin.close()
    with (
        cache.open(text, source=name) as again,
        cache.open(text, source=model.fill(cache, readers.source(model, 40, 2))) as other,
    ):
        assert (again.cached, other.cached) == (64, 0)
        assert (model.run([(again, text[64:])], every=True) - want[64:]).abs().max() < 1e-4
    cache.check()


@pytest.mark.parametrize(
    "kv",
    [
        "f32+window:40,sinks:4", "int8+h2o:64rows,every:32; page 16", "f32+keydiff:70rows,every:32,recent:16",
        "f32+observed:64rows,every:16; cross: int8; page 16", "f32; layers 1 heads 0-1: int8+window:20",
    ],
)  # fmt: skip
def test_what_leaves_is_the_texts_and_the_cut_cannot_show(kv, ops):
    """Rows of the text leave; all of the source's stay, and a bias by distance goes by positions."""
    model = ours(drawn("t5"))
    source, text = tokens(75, 1), begun(model, 160)
    cache = model.cache(kv, memory=MEMORY)
    name = model.fill(cache, source)
    held, found = cache.books.kept, []
    for piece in (160, 7):
        outs = []
        with cache.open(source=name) as sequence:
            while len(sequence) < len(text):
                stop = min(len(sequence) + piece, sequence.next_trigger or len(text), len(text))
                outs.append(model.run([(sequence, text[len(sequence) : stop])], every=True))
                sequence.settle()
            rows = sum(int(table.held(160)[1].sum()) for table in sequence.tables if not table.group.source)
            assert rows < 0.9 * 3 * 4 * 160
            assert [len(sequence.read(layer)["positions"]) for layer in (3, 4, 5)] == [75] * 3
        found.append(torch.cat(outs))
    assert torch.equal(*found)
    cache.check()
    assert cache.books.in_use == 0 and cache.knows(name) and held <= cache.books.kept


def test_heavy_hitters_are_those_of_attention_with_its_bias(ops):
    """The mass that h2o adds up is attention as the model computes it."""
    model = ours(drawn("t5"))
    far = torch.arange(41) >= 30
    model.decoder.bias = model.decoder.bias + 6.0 * far  # draws attention to what queries and keys don't
    cache = model.cache("f32+h2o:24rows,every:120,recent:8,sinks:0; page 16", memory=MEMORY)
    with cache.open(source=model.fill(cache, tokens(5))) as sequence:
        model.run([(sequence, begun(model, 120))])
        sequence.settle()
        stayed = sequence.read(2)["positions"]
    assert (stayed < 60).sum() >= 8 * 2, "rows that most queries see from afar"


@pytest.mark.parametrize("method", ["snapkv:64rows", "tova:64rows", "expected:64rows", "rkv:64rows", "quest:4pages"])
def test_methods_that_would_not_see_the_bias_are_refused(method):
    model = ours(drawn("t5"))
    with pytest.raises(SpecError, match="use 'h2o' or 'observed'"):
        model.spec(f"f32+{method}")
    ours(drawn("bart")).spec(f"f32+{method}")
    with pytest.raises(SpecError, match="don't turn"):
        model.spec("f32+window:64,sinks:4,relative")


def test_positions_end_where_they_are_tables_and_nowhere_else():
    bart, t5 = ours(drawn("bart")), ours(drawn("t5"))
    cache = bart.cache("f32", memory=MEMORY)
    with pytest.raises(ContextError, match="source of 301 tokens is longer than the 300 positions"):
        bart.fill(cache, tokens(301))
    with cache.open(source=bart.fill(cache, tokens(300))) as sequence:
        with pytest.raises(ContextError, match="301 tokens are more than the 300 positions"):
            bart.run([(sequence, tokens(301))])
        bart.run([(sequence, tokens(300))])
    assert t5.config.max_positions == 512
    theirs = drawn("t5")
    source, text = tokens(600, 1), begun(t5, 600)
    assert (read(t5, source, text)[-1] - their_logits(theirs, source, text)[-1]).abs().max() < 1e-4


def test_sources_that_cannot_be_are_refused():
    model = ours(drawn("marian, two vocabularies"))
    cache = model.cache("f32", memory=MEMORY)
    for source, named in (([], "is empty"), ([120], "0 to 119"), ([-1], "0 to 119")):
        with pytest.raises(UsageError, match=named):
            model.fill(cache, source)
    with cache.open(source=model.fill(cache, [119])) as sequence:
        model.run([(sequence, [156])])
        with pytest.raises(UsageError, match="0 to 156"):
            model.run([(sequence, [157])])


def test_the_bias_is_that_of_transformers():
    attention = drawn("t5").decoder.block[0].layer[0].SelfAttention
    weight = attention.relative_attention_bias.weight.detach()
    for most in (40, 128, 17):
        attention.relative_attention_max_distance = most
        for decodes, made in ((True, backward_bias(weight, most)), (False, bias_both_ways(weight, most))):
            attention.is_decoder = decodes
            want = attention.compute_bias(1, 700, past_seen_tokens=699 if decodes else 350)[0, :, 0].detach()
            back = torch.arange(699, -1, -1) if decodes else (torch.arange(700) - 350).clamp(-most, most) + most
            assert torch.equal(made[:, back.clamp(max=made.shape[1] - 1)], want)


def test_attention_over_all_rows_is_the_same_in_blocks():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(300, heads, 8, generator=g) for heads in (4, 2, 2))
    bias = torch.randn(4, 21, generator=g)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.3
    away = (torch.arange(300) - torch.arange(300)[:, None]).clamp(-10, 10) + 10
    want = torch.einsum("hqk,khd->qhd", (scores + bias[:, away]).softmax(-1), v.repeat_interleave(2, 1)).flatten(1)
    assert (attend_all(q, k, v, scale=0.3, bias=bias) - want).abs().max() < 1e-5


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations_are_torchs_in_bits_that_depend_on_no_place(name, gated):
    x = torch.randn(40, 74 if gated else 37, generator=torch.Generator().manual_seed(0)) * 3
    functional = torch.nn.functional
    theirs = {
        "relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu, "swish": functional.silu,
        "gelu_new": lambda y: functional.gelu(y, approximate="tanh"),
    }[name]  # fmt: skip
    function = activation(name, gated)
    got = function(x)
    want = theirs(x[:, :37]) * x[:, 37:] if gated else theirs(x)
    assert (got - want).abs().max() < 1e-5
    for row in range(40):
        assert torch.equal(function(x[row : row + 1].clone()), got[row : row + 1])
        assert torch.equal(function(x[row:].clone())[:1], got[row : row + 1])
