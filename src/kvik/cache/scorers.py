"""Which rows matter: each method one short function, and its paper.

A scorer takes a `Seen`, packed (a lane's rows first, zeros behind them), and returns f32 [L, n]; higher stays. Sinks
and recent rows are protected elsewhere (`cache/policy.py`), how many rows each lane keeps too (`cache/allocators.py`).

| method   | looks at                                   | scores                                                      |
|----------|--------------------------------------------|-------------------------------------------------------------|
| random   | nothing                                    | a draw for each row, for good: the baseline                 |
| knorm    | keys                                       | short keys first                                            |
| keydiff  | keys                                       | keys unlike the mean key                                    |
| lagkv    | keys, values                               | rows that stick out of the range of those that follow       |
| snapkv   | the last 64 queries                        | attention, smoothed over neighbours                         |
| tova     | the last query                             | attention, the same for all lanes                           |
| h2o      | attention mass                             | its sum over all queries                                    |
| observed | attention mass                             | its mean over the queries that saw the row                  |
| expected | the last 256 queries                       | attention expected of queries to come, times value length   |
| rkv      | the last 8 queries, keys                   | attention, less what other keys repeat                      |
| kvzip    | a pass of the model that repeats the text  | the most attention received                                 |
| quest    | every query, page bounds                   | nothing: it chooses what a query reads (`cache/quest.py`)   |
| oracle   | what comes after: in evaluations only      | the attention that rows will really receive: the bound      |

`chunk(method)` keeps or drops runs of 20 positions together.

Legend: L lanes, n rows, G queries that share a lane, w observed queries, D width of keys.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from kvik.cache import weigh
from kvik.cache.methods import Method, Needs, Registry
from kvik.cache.seen import Seen

METHODS = Registry()
scorer, wrapper = METHODS.scorer, METHODS.wrapper

METHODS.register(Method("quest", None, Needs.PAGES, options=(("dense", 2),), paper="arXiv:2406.10774"))


@scorer("random")
def random(seen: Seen) -> Tensor:
    """A draw from 0 to 1 for each lane and position: the baseline that a method must beat.

    A row's draw never changes, so that what stays is an even sample of the whole text however often the trigger fires.
    """
    lanes = torch.arange(len(seen.positions), device=seen.positions.device)[:, None]
    layer = _mixed(torch.full_like(lanes, seen.seed))  # mixed first: seed 1, lane 0 must not draw as seed 0, lane 1
    draws: Tensor = _mixed(_mixed(layer + lanes) ^ seen.positions) & 0xFFFFFF
    return draws.float() / (1 << 24)


def _mixed(x: Tensor) -> Tensor:
    """int64 to int64, each bit of it dependent on all (splitmix64; sums and products wrap)."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ (x >> 31 & (1 << 33) - 1)


@scorer("knorm")
def knorm(seen: Seen) -> Tensor:
    """Keys of small length draw the most attention (arXiv:2406.11430)."""
    length: Tensor = torch.linalg.vector_norm(seen.keys, dim=-1)
    return -length


@scorer("keydiff")
def keydiff(seen: Seen) -> Tensor:
    """Keys that point away from the lane's mean direction stay: -cos(key, mean of key / |key|) (KeyDiff,
    arXiv:2504.15364)."""
    keys = functional.normalize(seen.keys, dim=-1)
    return -functional.cosine_similarity(keys, keys.sum(1, keepdim=True), dim=-1)


@scorer("lagkv")
def lagkv(seen: Seen, *, lag: int = 128, skip: int = 4) -> Tensor:
    """Rows that stick out of what follows (LagKV, arXiv:2504.04704).

    Behind the first `skip` rows, runs of `lag` rows: each is scaled channel by channel to the range of the next run,
    its rows' deviations over channels go through a softmax, keys' and values' add up, and a row's score is its rank in
    its run, from 0 to below 1. Rows without a next run, and the first, have 1.
    """
    scores = torch.ones_like(seen.keys[..., 0])
    runs = (seen.positions.shape[1] - skip) // lag
    if runs < 2:
        return scores

    def deviation(rows: Tensor) -> Tensor:
        parts = torch.unflatten(rows[:, skip : skip + runs * lag], 1, (runs, lag))
        low, high = parts[:, 1:].amin(2, keepdim=True), parts[:, 1:].amax(2, keepdim=True)
        scaled = (parts[:, :-1] - low) / torch.where(high > low, high - low, 1)
        return torch.softmax(torch.std(scaled, -1), -1)

    order = torch.sort(deviation(seen.keys) + deviation(seen.values), dim=-1, stable=True).indices
    ranks = torch.sort(order, dim=-1).indices / lag
    ends = skip + lag * torch.arange(2, runs + 1, device=order.device)  # where the next run ends: a lane must reach it
    whole = ends <= seen.lengths[:, None]
    scores[:, skip : skip + (runs - 1) * lag] = torch.where(whole[..., None], ranks, 1).flatten(1)
    return scores


@scorer("snapkv", needs=Needs.QUERIES, last=64)
def snapkv(seen: Seen, *, pool: int = 5) -> Tensor:
    """Attention of the last queries (SnapKV, arXiv:2404.14469), mean over G, then over `pool` neighbouring rows.

    The paper keeps the window whole and sums over it. Here `recent` says what is kept whole, and a row's attention is
    the mean over those queries that see it: for rows before the window the same order, for those inside it a fair one.
    """
    received = sum((w.sum(2).mean(1) for w in weigh.weights(seen)), torch.zeros_like(seen.keys[..., 0]))
    return weigh.mean_pooled(received / weigh.askers(seen), seen.held, pool)


@scorer("tova", needs=Needs.QUERIES, last=1)
def tova(seen: Seen) -> Tensor:
    """Attention of the last query, mean over all heads of the layer (TOVA, arXiv:2401.06104).

    All lanes get the same scores; where lanes hold different rows, a row's is the mean over those that hold it.
    """
    assert seen.queries is not None and seen.asking is not None
    latest = replace(seen, queries=seen.queries[-1:], asking=seen.asking[-1:])
    received = next(weigh.weights(latest))[:, :, 0].mean(1)
    total = weigh.by_position(received, seen, seen.tokens).sum(0)
    lanes = weigh.by_position(torch.ones_like(received), seen, seen.tokens).sum(0)
    return (total / lanes.clamp(min=1))[seen.positions.clamp(min=0)]


@scorer("h2o", needs=Needs.MASS)
def h2o(seen: Seen) -> Tensor:
    """Heavy hitters: attention summed over every query so far (H2O, arXiv:2306.14048), which favours early rows."""
    assert seen.mass is not None
    return seen.mass


@scorer("observed", needs=Needs.MASS)
def observed(seen: Seen) -> Tensor:
    """H2O's sum (arXiv:2306.14048) divided by the number of queries that could see the row, as the field's comparisons
    do: a mean, which favours late rows."""
    assert seen.mass is not None
    return seen.mass / (seen.tokens - seen.positions)


@scorer("expected", needs=Needs.QUERIES, last=256)
def expected(seen: Seen, *, ahead: int = 512, skip: int = 4, epsilon: float = 0.0) -> Tensor:
    """Attention to be expected of the queries to come, times the value's length (Expected Attention, arXiv:2510.00636).

    Queries are turned back to position 0; m and S are their mean and covariance, R the mean rotation of the next
    `ahead` positions. If queries are normal, E exp(q·k) = exp(k·Rm + k R S Rᵀ k / 2), with k scaled; a softmax over
    the rows of each head, the mean over G, plus `epsilon`, times |v|. The first `skip` positions, where queries and
    keys are unlike all others, count in neither, and score as high as the lane's best row. R = 1 where positions don't
    turn.
    """
    assert seen.queries is not None and seen.asking is not None
    queries, keys = seen.queries, seen.keys
    if seen.frequencies is not None:
        queries = weigh.turned(queries, weigh.turns(seen.frequencies, -seen.asking)[:, None, None])
        future = torch.arange(seen.tokens, seen.tokens + ahead, device=keys.device)
        # k·Rm = Rᵀk·m, and turning keys once is less work than turning every head's mean and covariance.
        keys = weigh.turned(keys, weigh.turns(seen.frequencies, future).mean(0).conj())
    settled = seen.asking >= skip
    queries = queries[settled] if settled.any() else queries
    mean = queries.mean(0)
    covariance = torch.einsum("wlgd,wlge->glde", queries - mean, queries - mean) / len(queries)
    squares = torch.stack([((keys @ each) * keys).sum(-1) for each in covariance], dim=1)
    logits = seen.scale * torch.einsum("lgd,lnd->lgn", mean, keys) + seen.scale**2 / 2 * squares
    counted = seen.positions >= skip
    weights = weigh.softmax(logits, ~counted[:, None]).mean(1)
    scores = (weights + epsilon) * torch.linalg.vector_norm(seen.values, dim=-1)
    return torch.where(counted, scores, scores.amax(1, keepdim=True))


@scorer("rkv", needs=Needs.QUERIES, last=8)
def rkv(seen: Seen, *, mix: float = 0.1, alike: float = 0.5, pool: int = 7) -> Tensor:
    """`mix` · importance - (1 - `mix`) · redundancy (R-KV, arXiv:2505.24133), for long answers that repeat themselves.

    Importance: of the last queries' scores the largest in each group, softmax, mean over queries, the maximum over
    `pool` neighbouring rows. Redundancy: a softmax over the mean cosines to the lane's other keys (`weigh.redundancy`;
    n² time, bounded memory).
    """
    assert seen.queries is not None
    parts = [weigh.softmax(scores.amax(1), hidden[:, 0]).sum(1) for scores, hidden in weigh.logits(seen)]
    importance = weigh.max_pooled(torch.stack(parts).sum(0) / len(seen.queries), seen.held, pool)
    return mix * importance - (1 - mix) * weigh.redundancy(seen, alike)


@scorer("kvzip", needs=Needs.PASS)
def kvzip(seen: Seen) -> Tensor:
    """What the model looks at while it repeats the text (KVzip, arXiv:2505.23416). `recalled` reduces the pass."""
    assert seen.repeated is not None
    return seen.repeated


@scorer("oracle", needs=Needs.PASS | Needs.FUTURE)
def oracle(seen: Seen) -> Tensor:
    """The attention that each row will really receive: what no method can know, and none can beat by much. Only an
    evaluation, which has the whole text, can show it (`eval/oracle.py`)."""
    assert seen.repeated is not None
    return seen.repeated


def recalled(seen: Seen) -> Tensor:
    """The most attention that each row received from the observed queries of any head: f32 [L, n] (KVzip,
    arXiv:2505.23416).

    For a pass that repeats the text chunk by chunk: `keys` are those of the sinks, of one chunk and of its repetition,
    `queries` the repetition's. The caller keeps, for each row, the maximum over the chunks in which it stood, as
    `Seen.repeated`.
    """
    packed, order = seen.packed()
    assert packed.queries is not None and packed.asking is not None, "no queries were observed"
    held, positions, keys = packed.held, packed.positions, packed.keys.mT
    best = torch.zeros_like(positions, dtype=torch.float32)
    # A whole chunk asks, so this is as much work as attention: in blocks that fit a processor's cache.
    step = max(1, (weigh.ROOM >> 5) // max(1, positions.numel() * packed.queries.shape[2]))
    for queries, asking in zip(torch.split(packed.queries, step), torch.split(packed.asking, step), strict=True):
        least, most = asking.min(), asking.max()  # columns that all of the block see, and that any of it does
        sure, end = int((held & (positions <= least)).sum(1).min()), int((held & (positions <= most)).sum(1).max())
        scores = (queries * packed.scale).permute(1, 2, 0, 3).flatten(1, 2) @ keys[..., :end]
        hidden = ~held[:, None, sure:end] | (positions[:, None, sure:end] > asking[:, None])
        hidden = hidden.repeat(1, queries.shape[2], 1)
        scores[..., sure:].masked_fill_(hidden, -torch.inf)
        weights = scores.softmax(-1)
        weights[..., sure:].masked_fill_(hidden, 0)
        torch.maximum(best[:, :end], weights.amax(1), out=best[:, :end])
    return torch.zeros_like(best).scatter_(1, order, best)


@wrapper("chunk")
def chunk(scores: Tensor, seen: Seen, *, size: int = 20) -> Tensor:
    """The mean score over each run of `size` positions, so that what belongs together stays together (ChunkKV,
    arXiv:2502.00299). Runs are of positions, not of rows: they are the same runs whatever has left before."""
    runs = seen.tokens // size + 1

    def total(rows: Tensor) -> Tensor:
        return torch.unflatten(weigh.by_position(rows, seen, runs * size), 1, (runs, size)).sum(-1)

    means = total(scores) / total(torch.ones_like(scores)).clamp(min=1)
    return means.gather(1, seen.positions.clamp(min=0) // size)
