"""Small builders that the cache's tests share."""

from itertools import combinations, product

import pytest
import torch

from kvik.cache.cache import Cache
from kvik.cache.spec import LayerShape, Spec
from kvik.ops import loader
from kvik.ops.layout import CODECS

VOCAB, POSITIONS = 50, 8192


def shapes(layers=2, heads=2, width=16, window=None):
    """What `layers` equal layers keep of a token."""
    return [LayerShape(heads, (("k", width), ("v", width)), window)] * layers


def make_cache(kv="f32", layers=None, memory=8 << 20, page=32, **options):
    """A cache with a small budget, so that its books are cheap."""
    return Cache(Spec.parse(kv, layers or shapes(), page), memory=memory, **options)


def text(length, seed=0):
    """Random token ids."""
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Toy:
    """What a model is to a cache: each layer's rows and queries are a function of token and position."""

    def __init__(self, layers, shared=2, seed=0):
        self.layers, self.shared = layers, shared
        generator = torch.Generator().manual_seed(seed)
        self.tables = [
            {
                name: torch.randn(VOCAB, heads, width, generator=generator)
                for name, heads, width in (
                    *((n, s.heads, w) for n, w in s.streams),
                    ("q", s.heads * shared, s.streams[0][1]),
                )
            }
            for s in layers
        ]
        self.places = torch.randn(POSITIONS, 1, max(w for s in layers for _, w in s.streams), generator=generator)

    def row(self, name, layer, tokens, positions):
        """f32 [T, heads, width] of one stream, or of the queries."""
        table = self.tables[layer][name][torch.tensor(tokens)]
        return table + self.places[torch.tensor(positions)][..., : table.shape[-1]]

    def append(self, step, layer):
        """The rows of a step's tokens, into one layer."""
        streams = [name for name, _ in self.layers[layer].streams]
        rows = {name: self.row(name, layer, step.tokens, step.positions).to(step.cache.device) for name in streams}
        step.append(layer, **rows)

    def run(self, chunks, **options):
        """One step of (sequence, tokens) pairs: a list of [tokens, layers, heads, width]."""
        with chunks[0][0].cache.step(chunks) as step:
            outs = []
            for layer in range(len(self.layers)):
                self.append(step, layer)
                q = self.row("q", layer, step.tokens, step.positions).to(step.cache.device)
                outs.append(step.attend(layer, q, scale=q.shape[-1] ** -0.5, **options).out)
        return list(torch.stack(outs, dim=1).split([len(tokens) for _, tokens in chunks]))

    def fill(self, sequence, tokens):
        """Appends without attending."""
        with sequence.append(tokens) as step:
            for layer in range(len(self.layers)):
                self.append(step, layer)

    def cut(self, cache, tokens, pieces, settle=True):
        """A new sequence's outputs over a text, given in pieces of these lengths: [tokens, layers, heads, width]."""
        sequence, outs, at = cache.open(), [], 0
        for piece in pieces:
            if chunk := tokens[at : at + piece]:
                outs += self.run([(sequence, chunk)])
                if settle:
                    sequence.settle()
            at += piece
        sequence.close()
        return torch.cat(outs)


def pages_held(sequence):
    """Pages that a sequence's tables name."""
    return sum(table.pages.size for table in sequence.tables)


def listening(cache):
    """The list that will hold every event from now on."""
    seen = []
    cache.listen(seen.append)
    return seen


BACKENDS = ("reference", *(["native"] if loader.built() else []))
KV = (*CODECS, "k8v4", "k:f16,v:int4-row")
RETAINED = ("", "+window:70", "+window:40,sinks:5")
PAGES = (16, 32, 64, 128)
LAYERS = shapes(layers=1)
TOY = Toy(LAYERS)

over_codecs = pytest.mark.parametrize("kv", KV)
over_retentions = pytest.mark.parametrize("kept", RETAINED)
over_pages = pytest.mark.parametrize("page", PAGES)


def pairwise(**axes):
    """Parametrizes over three axes or four, the longest first: any two values of different axes meet; all else is slow.

    With w of 4, x of 3, y of 2 and z of 2 values 12 are left of 48: y is (number of w + number of x) modulo 2, and z
    (half the number of w + number of x) modulo 2.
    """
    sizes = [len(values) for values in axes.values()]
    first, second, third, *fourth = sizes
    chosen = {
        (i, j, (i + j) % third, *((i // third + j) % size for size in fourth))
        for i, j in product(range(first), range(second))
    }
    pairs = {(a, at[a], b, at[b]) for at in chosen for a, b in combinations(range(len(sizes)), 2)}
    assert len(pairs) == sum(a * b for a, b in combinations(sizes, 2)), "else some two do not meet"
    every = [
        pytest.param(
            *(values[k] for values, k in zip(axes.values(), at, strict=True)),
            marks=() if at in chosen else pytest.mark.slow,
        )
        for at in product(*map(range, sizes))
    ]
    return pytest.mark.parametrize(tuple(axes), every, indirect=[name for name in axes if name in ("ops", "pair")])


over_pairs = pairwise(kv=KV, page=PAGES, kept=RETAINED)


def cache_of(kv, kept="", page=32, **options):
    return make_cache(kv + kept, LAYERS, page=page, **options)


def sees(*errors):
    """What a check raises when its law is broken."""
    return pytest.raises((AssertionError, *errors))


def state(cache, sequence):
    """All that a sequence is, but for its page numbers."""
    rows = sequence.read(0)
    tables = [(t.logical.tolist(), t.pages.shape) for t in sequence.tables]
    return (
        list(sequence.tokens),
        tables,
        cache.books,
        cache.nbytes,
        len(cache.index),
        {n: x.tolist() for n, x in rows.items()},
    )
