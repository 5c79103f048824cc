"""The claims and their verdicts, written from figures: `render(figures)` is docs/claims.md, word for word.

Each verdict is carried by an assertion over its figures, so that it can't outlive them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One claim: what is said, what the formula says, what was measured, and the verdict."""

    said: str
    verdict: str
    because: str
    formula: str
    measured: str


def linear(f: Figures) -> Claim:
    n = f["tokens"]
    assert (f["rows_with"], f["rows_without"]) == (n, n * (n + 1) // 2)
    assert (f["pairs_with"], f["pairs_without"]) == (n * (n + 1) // 2, n * (n + 1) * (n + 2) // 6)
    return Claim(
        "A KV cache turns O(n²) into O(n).",
        "half right",
        "Right for rows computed, and so for projections and feed-forward parts. Attention falls from cubic to "
        "quadratic over a text; of one step, it stays linear.",
        "Over a text of n tokens, one a step: rows of k and v a lane n(n+1)/2 → n; query-key pairs a head "
        "n(n+1)(n+2)/6 → n(n+1)/2.",
        f"{n} tokens, counted as they ran: {f['rows_without']:,} → {f['rows_with']:,} rows a lane; "
        f"{f['pairs_without']:,} → {f['pairs_with']:,} pairs a head.",
    )


def faster(f: Figures) -> Claim:
    t = f["timed"]
    grid = [point for point in t["points"] if point["tokens"] in t["shown"]]
    assert grid[-1]["speedup"] > 4 > grid[0]["speedup"], "the speed-up grows through the range that is claimed"
    each = ", ".join(f"{p['tokens']:,}: {p['speedup']:.1f}×" for p in grid)
    return Claim(
        "A KV cache makes generation two to four times faster.",
        "depends on the length",
        "There is no such constant: the speed-up grows with the text. Short texts gain little, since a step that reads "
        "all weights computes a few rows in not much more than the time of one.",
        "Without a cache a step computes n rows instead of 1: up to n times the operations, once they and not the "
        "reading of the weights take the time.",
        f"One more token at length n, without over with a cache: {each}. Of one more token the speed-up passes 2× at "
        f"{t['twice']:,.0f} tokens and 4× at {t['four_times']:,.0f}; of a whole text at {t['twice_text']:,.0f} and "
        f"{t['four_times_text']:,.0f}.",
    )


def constant(f: Figures) -> Claim:
    t = f["timed"]
    first, last = t["points"][0], t["points"][-1]
    assert last["with_ms"] > 1.5 * first["with_ms"]
    return Claim(
        "With a cache, each new token takes constant work.",
        "wrong",
        "Projections and feed-forward parts are constant; attention reads and weighs every row that is kept. The slope "
        "is what long contexts cost.",
        f"{f['products'] / 1e6:,.0f} MFLOP of products, whatever the length, + {f['attention_a_token']:,} FLOP of "
        f"attention for each token so far; equal at {f['equal_work']:,} tokens.",
        f"{first['with_ms']:.1f} ms at {first['tokens']:,} tokens, {last['with_ms']:.1f} ms at {last['tokens']:,}: "
        f"+{t['slope_us']:,.0f} µs for every 1,000 tokens of context.",
    )


def loaded(f: Figures) -> Claim:
    n = f["tokens"]
    assert f["rows_read_last"] == n and f["row_bytes"] * f["equal_bytes"] >= f["weight_bytes"]
    return Claim(
        "Earlier keys and values need not be loaded again.",
        "wrong",
        "They are not computed again. They are loaded at every step, all of them: decoding is bound by what it reads, "
        "and that is why smaller rows are faster.",
        f"A step at length n reads n rows of every lane: n · {f['row_bytes']:,} B in bf16, beside "
        f"{f['weight_bytes']:,} B of weights in 4 bits. Equal at {f['equal_bytes']:,} tokens.",
        f"The step for token {n} computed 1 row a lane and read {f['rows_read_last']}; so did the step that computed "
        f"all {n} again. A cache saves no reading.",
    )


def query(f: Figures) -> Claim:
    assert f["last_step"] == {"q": 1, "k": 1, "v": 1}
    return Claim(
        "Only the new token's query is computed.",
        "half right",
        "Its key and value are computed too, and its pass through every projection and feed-forward part; then they "
        "are kept. The query is not: no later token asks for it.",
        "One row each of q, k and v a head; then one query against n keys.",
        f"Rows in the step for token {f['tokens']}: q {f['last_step']['q']}, k {f['last_step']['k']}, "
        f"v {f['last_step']['v']}.",
    )


def gpt3(f: Figures) -> Claim:
    assert f["gpt3_matrix"] == 24_576 and f["gpt3_token"] == 4_718_592 == 2 * f["gpt3_layers"] * f["gpt3_matrix"]
    return Claim(
        "GPT-3 needs about 20 KB of cache a token.",
        "wrong",
        f"{f['gpt3_matrix']:,} B is one matrix (k or v) of one layer. There are two in each of its "
        f"{f['gpt3_layers']} layers.",
        f"2 (k, v) · 2 B · {f['gpt3_layers']} layers · 12,288 = {f['gpt3_token']:,} B: "
        f"{f['gpt3_token'] // f['gpt3_matrix']} times as much.",
        "`kvik plan gpt3-175b --context 2048` adds it up by its layers and heads. About 20 KB is what a token of "
        f"SmolLM2-135M takes: {f['row_bytes']:,} B.",
    )


def opt(f: Figures) -> Claim:
    assert f["opt"] == 180_388_626_432 and f["opt"] > 2.9 * f["opt_weights"]
    return Claim(
        "OPT-30B needs 180 GB of cache at 1,024 tokens × 128 sequences.",
        "right",
        f"In decimal GB: {f['opt'] / 1e9:.1f} GB = {f['opt'] / 2**30:.1f} GiB, three times its f16 weights "
        f"({f['opt_weights'] / 1e9:.1f} GB).",
        f"2 (k, v) · 2 B · 48 layers · 7,168 · 1,024 tokens · 128 sequences = {f['opt']:,} B.",
        "`kvik plan opt-30b --context 1024 --batch 128`.",
    )


def unchanged(f: Figures) -> Claim:
    assert f["stored_changed"] == 0 == f["moved"] and f["stored_numbers"] > 0 < f["compared"]
    return Claim(
        "A token's keys and values never change once they are computed.",
        "right",
        "For causal models, as long as weights and positions stay: that is why a cache is valid at all. What a cache "
        "drops or stores in fewer bits is its own doing.",
        "A token's state is a function of itself and what came before it, by the causal mask.",
        f"{f['tokens'] // 2} more tokens behind {f['tokens'] // 2}: {f['stored_changed']} of {f['stored_numbers']:,} "
        f"stored numbers changed, and {f['moved']} of the {f['compared']:,} earlier rows of queries, keys, values, "
        "attention and logits, bit for bit.",
    )


def same_text(f: Figures) -> Claim:
    assert f["logits_different"] == 0
    return Claim(
        "A cache changes the result a little.",
        "wrong",
        "It need not. Where it does, products or attention were cut another way and rounded another way, or the rows "
        "are stored in fewer bits than the model computes in.",
        "The same numbers, computed once instead of n times.",
        f"{f['tokens']} steps with a cache, and everything again at each step, both over bf16 rows: "
        f"{f['logits_different']} of {f['tokens'] * f['vocabulary']:,} logits differ in any bit.",
    )


def meeting(f: Figures) -> Claim:
    assert f["later_changed_attending"] == f["later"] and f["later_changed_alone"] == 0
    assert f["earlier_changed_attending"] == 0 == f["earlier_changed_alone"]
    return Claim(
        "Attention is the only place where tokens meet.",
        "right",
        "Everything else is computed a token at a time, which is why keys and values are all that must be kept.",
        "Norms, projections, rotation and feed-forward parts are functions of one row.",
        f"Another token in one place: of the {f['later']} later tokens' predictions, {f['later_changed_attending']} "
        f"change; {f['later_changed_alone']} where each token attends to itself alone. Of the {f['earlier']} earlier "
        "ones, none either way.",
    )


def encoder(f: Figures) -> Claim:
    assert f["moved_both_ways"] == f["compared_later"] and f["encoder_moved"] == f["encoder_states"] > 0
    return Claim(
        "An encoder such as BERT has nothing to cache.",
        "right",
        "Every token sees later ones, so one more word gives every earlier token another state, and other keys and "
        "values, from the second layer on.",
        "Without the causal mask a token's state is a function of the whole text.",
        f"all-MiniLM-L6-v2, one more word behind a sentence: {f['encoder_moved']} of {f['encoder_states']} earlier "
        "states moved, in every layer (`kvik compare-context`). "
        f"SmolLM2 with its mask taken away, {f['tokens'] // 2} more tokens behind {f['tokens'] // 2}: "
        f"{f['moved_both_ways']:,} of {f['compared_later']:,} earlier rows moved (all but the first layer's queries, "
        "keys and values, which have met no other token).",
    )


def memory(f: Figures) -> Claim:
    t = f["timed"]
    last = t["points"][-1]
    assert last["payload"] == last["tokens"] * f["row_bytes"]
    return Claim(
        "Memory is the price.",
        "right",
        "It grows with every token, layer, KV head and request, without an end, and past some length it is larger than "
        "the model.",
        f"n tokens · {f['row_bytes']:,} B in bf16 for SmolLM2; as large as its weights in 4 bits at "
        f"{f['equal_bytes']:,} tokens.",
        f"{last['tokens']:,} tokens: {last['payload']:,} B of rows + {last['overhead']:,} B for the table and the open "
        f"page = {last['payload'] + last['overhead']:,} B; the weights hold {f['weight_bytes']:,} B.",
    )


CLAIMS: list[Callable[[Figures], Claim]] = [
    linear, faster, constant, loaded, query, gpt3, opt, unchanged, same_text, meeting, encoder, memory,
]  # fmt: skip

HEAD = """# What is said about KV caches, and what is so

Written by `python benchmarks/claims.py` from what it measured on SmolLM2-135M-Instruct (30 layers, 9 query heads that
share 3 KV heads of 64), weights in 4 bits, rows in bf16. `--exact` measures again all that no clock decides. A verdict
that its figures no longer carry stops the script. Counts are the same everywhere; times differ from machine to machine,
and these are of {where}.
"""


def render(figures: Figures) -> str:
    """docs/claims.md."""
    claims = [claim(figures) for claim in CLAIMS]
    lines = [HEAD.format(where=figures["timed"]["where"]), "| it is said | verdict |", "|---|---|"]
    lines += [f"| {claim.said} | **{claim.verdict}** |" for claim in claims]
    for number, claim in enumerate(claims, start=1):
        lines += ["", f"## {number}. “{claim.said}”", "", f"**{claim.verdict.capitalize()}.** {claim.because}", ""]
        lines += [f"- Formula: {claim.formula}", f"- Measured: {claim.measured}"]
    return "\n".join(lines) + "\n"
