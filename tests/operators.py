"""What tests of operators share: a cache that keeps f64 rows in two halves, and the plain definition, pair by pair."""

from dataclasses import replace

import torch

from kvik.cache.cache import Cache
from kvik.cache.spec import Spec
from kvik.models.operators import Form, geometry, make
from kvik.models.watch import Watch
from kvik.ops.reads import Partial

N, WIDTH, HEADS, HEAD = 40, 12, 2, 6  # tokens, channels, heads and channels of a head
SUBSETS = ("q", "k", "v", "qk", "qv", "kv", "qkv")
CUT = (7, 1, 1, 5, 18, 1, 1, 1, 5)  # a prompt, single tokens and chunks that cross pages and blocks of queries


class Halves(Watch):
    """f64 rows through pages of f32: each number as the nearest f32 and the f32 nearest to what that leaves, 48 bits
    together. Attention over them is plain f64; which rows a query sees, and where they lie, is the cache's to say."""

    def append(self, layer, **streams):
        halves = {}
        for name, x in streams.items():
            assert x.dtype == torch.float64
            halves[name] = x.float()
            halves[f"{name}_rest"] = (x - halves[name].double()).float()
        self.step.append(layer, **halves)

    def rows(self, layer):
        found = []
        for held in self.step.rows(layer):
            names = [name for name in held.streams if not name.endswith("_rest")]
            whole = {name: held.streams[name].double() + held.streams[f"{name}_rest"].double() for name in names}
            found.append(replace(held, streams=whole))
        return found

    def attend(self, layer, q, *, scale, want_lse=False, **options):
        outs, lses, at = [], [], 0
        for held in self.rows(layer):
            mine = q[at : at + len(held.asking)]
            scores = torch.einsum("thw,hnw->thn", mine, held.streams["k"]) * scale
            scores = scores.masked_fill(~held.visible[:, None], -torch.inf)
            lses.append(scores.logsumexp(-1))
            outs.append(torch.einsum("thn,hnw->thw", scores.softmax(-1), held.streams["v"]))
            at += len(held.asking)
        return Partial(torch.cat(outs), torch.cat(lses))


def drawn(word, length=N, seed=0, double=True, causal=True):
    """A causal operator with weights of its own."""
    form = Form.parse(word)
    torch.manual_seed(seed)
    operator = make(form, WIDTH, HEADS, HEAD, geometry(form, length, causal)).requires_grad_(False)
    return operator.double() if double else operator


def inputs(n=N, seed=1, double=True):
    x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x if double else x.float()


def cache_for(operator, kv="f32", halves=True, **options):
    """A cache for one operator's rows."""
    shapes = operator.shapes()
    if halves:
        shapes = [
            replace(s, streams=tuple(each for n, w in s.streams for each in ((n, w), (f"{n}_rest", w)))) for s in shapes
        ]
    return Cache(Spec.parse(kv, shapes), memory=16 << 20, **options)


def fed(operator, sequence, x, cut=CUT, halves=True, tokens=None):
    """Outputs [n, m] of a text that comes in pieces."""
    outs, at = [], 0
    for count in cut:
        piece = x[at : at + count]
        with sequence.append([7] * len(piece) if tokens is None else tokens[at : at + count]) as step:
            outs.append(operator.step(Halves(step) if halves else step, 0, piece))
        sequence.settle()
        at += count
    return torch.cat(outs)


def by_definition(operator, x):
    """A causal Translution over x [n, d], each pair by itself, as the paper's formula has it."""
    n, heads = len(x), operator.heads

    def through(name, row, offset):
        weight = operator.get_parameter(f"{name}.weight")
        return (row @ weight[offset] if name in operator.relative else row @ weight.t()).view(heads, -1)

    out = []
    for i in range(n):
        scores = torch.stack(
            [(through("q", x[i], i - j) * through("k", x[j], i - j)).sum(-1) * operator.scale for j in range(i + 1)]
        )
        weights = scores.softmax(0)
        out.append(sum(weights[j][:, None] * through("v", x[j], i - j) for j in range(i + 1)).flatten())
    return torch.stack(out)
