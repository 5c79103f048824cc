"""Dropping rows at four grains, at the same bytes: whole requests, layers, heads, or tokens. What does each cost?

    python benchmarks/grains.py [--budgets 50,25] [--documents 8] [--prefix 1536] [--json] [--resume FILE.jsonl]

A budget is a part of the bytes of full bf16 rows. By formula, each choice below is made as large as fits; what it then
holds is the sequence's own account once the prefix is in, and what it costs is the mean KL divergence from full rows in
f32, as `kvik eval` measures it: predictions after the prefix, weights in f32.

    requests    some keep every row, of the others the prefix is gone but for its last 32 rows: the mean over both,
                weighed so that their bytes are the budget's; each document is measured both ways
    layers      some keep every row, the others a window and sinks; which: the first, the middle, the last, or evenly
                spread ones
    heads       the same for KV heads: those keep every row that look furthest back (`kvik heads`, arXiv:2410.10819)
    tokens      every head drops rows of its own: a window and sinks, keydiff, ada(expected)

Of several choices for requests, layers and heads (which layers, how long a window) the table has the best, and says of
how many; --json has all. That favours them: the best was picked by the same documents. Heads are scored on the text's
beginning, which a document may overlap.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import kvik
from kvik.cache.retention import Retention
from kvik.cli.common import progress
from kvik.cli.files import read_text
from kvik.eval import Evaluation, Ledger, Measured, evaluate, measure_heads
from kvik.eval.heads import farthest, spec_text, stored
from kvik.eval.measures import interval
from kvik.eval.words import nats, share

CODEC, PAGE = "bf16", 16  # rows leave by pages: short ones fill a budget better


def spec(kept: str = "") -> str:
    """The spec in which every head keeps the same.

    >>> spec("+window:64")
    'bf16+window:64; page 16'
    """
    return f"{CODEC}{kept}; page {PAGE}"


FULL = spec()
GRAINS = ("requests", "layers", "heads", "tokens")
PLACES = ("first", "middle", "last", "spread")
SINKS = 4
TOKENS = {f"+window:{{:g}},sinks:{SINKS}": "window:{:g}", "+keydiff:{:g}%": "keydiff:{:.1f}%",
          "+ada(expected):{:g}%": "ada(expected):{:.1f}%"}  # fmt: skip
SCORED_HEADS = 4096  # tokens that heads are scored on


@dataclass(frozen=True)
class Choice:
    """One way to spend a budget.

    Attributes:
        budget: percent of the bytes of full bf16 rows.
        grain: one of GRAINS.
        name: what is kept, in a few words.
        specs: (share of all requests, spec); the shares add up to 1.
    """

    budget: float
    grain: str
    name: str
    specs: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Found:
    """What a choice cost: bytes of a request, also as a part of full bf16 rows; mean KL, and 95 % of it over documents;
    share of predictions whose likeliest token is that of full rows."""

    choice: Choice
    nbytes: float
    part: float
    kl: float
    between: tuple[float, float] | None
    same: float


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where all smaller ones do; 0 at the least."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def layers_at(place: str, count: int, layers: int) -> list[int]:
    """Which `count` of a model's layers keep every row.

    >>> [layers_at(place, 3, 10) for place in PLACES]
    [[0, 1, 2], [3, 4, 5], [7, 8, 9], [1, 5, 8]]
    """
    if place == "spread":
        return [(2 * number + 1) * layers // (2 * count) for number in range(count)]
    start = {"first": 0, "middle": (layers - count) // 2, "last": layers - count}[place]
    return list(range(start, start + count))


class Plans:
    """Choices for one model and one length of prefix, fitted to budgets by formula."""

    def __init__(self, model: kvik.Model, scores: Sequence[Sequence[float]], prefix: int, windows: list[int]) -> None:
        self.model, self.scores, self.prefix, self.windows = model, scores, prefix, windows
        self.heads = [len(each) for each in scores]

    def size(self, kv: str) -> int:
        """Bytes of the prefix."""
        return self.model.spec(kv).nbytes(self.prefix).allocated

    def choices(self, budget: float) -> Iterator[Choice]:
        """All ways to spend a budget, in percent, that can be fitted to it."""
        room = budget / 100 * self.size(FULL)
        for kept, name in (("+window:32", "last 32"), (f"+window:32,sinks:{SINKS}", f"first {SINKS} and last 32")):
            part = (room - self.size(spec(kept))) / (self.size(FULL) - self.size(spec(kept)))
            if 0 <= part <= 1:
                specs = ((part, FULL), (1 - part, spec(kept)))
                yield Choice(budget, "requests", f"{share(part)} all, others {name}", specs)
        for window in self.windows:
            for place in PLACES:
                yield from self._mixed(budget, "layers", window, place)
            yield from self._mixed(budget, "heads", window)
        for kept, name in TOKENS.items():
            step, most = (1, self.prefix) if "window" in kept else (0.1, 1000)

            def written(n: int, kept: str = kept, step: float = step) -> str:
                return spec(kept.format(n * step))

            n = largest(lambda n, written=written: self.size(written(n)) <= room, most)
            if n:
                yield Choice(budget, "tokens", name.format(n * step), ((1.0, written(n)),))

    def _mixed(self, budget: float, grain: str, window: int, place: str = "") -> Iterator[Choice]:
        """As many layers, or heads, as fit keep every row beside the others' window; which is then as long as fits."""
        room, total = budget / 100 * self.size(FULL), len(self.heads) if grain == "layers" else sum(self.heads)

        def kv(count: int, window: int) -> str:
            if place:
                mine = layers_at(place, count, total)
                far = frozenset((at, head) for at in mine for head in range(self.heads[at]))
            else:
                far = farthest(self.scores, count / total)
            return spec_text(stored(CODEC)[0], far, self.heads, Retention(window, SINKS), PAGE)

        count = largest(lambda n: self.size(kv(n, window)) <= room, total)
        if 0 < count < total:
            window = largest(lambda n: self.size(kv(count, n or 1)) <= room, self.prefix)
            name = f"{place} {count} of {total} all, others window:{window}".strip()
            yield Choice(budget, grain, name, ((1.0, kv(count, window)),))


def outcome(choice: Choice, measured: dict[str, Measured]) -> Found:
    """A choice's figures, from those of its specs: means over requests, document by document."""
    full = measured[FULL]
    parts = [(each, measured[kv]) for each, kv in choice.specs]
    assert sum(each for each, _ in parts) == 1, "every request is one way or another"
    nbytes = sum(each * it.held.allocated for each, it in parts)
    by_document = [
        sum(each * sum(it.documents[at].kl) / len(it.documents[at].kl) for each, it in parts)
        for at in range(len(full.documents))
    ]
    same = sum(each * it.same for each, it in parts)
    kl = sum(by_document) / len(by_document)
    return Found(choice, nbytes, nbytes / full.held.allocated, kl, interval(by_document), same)


def best(found: Sequence[Found]) -> Iterator[tuple[Found, int]]:
    """What the table shows of one budget: all for tokens, the lowest KL of the other grains; and of how many."""
    for grain in GRAINS:
        mine = sorted((each for each in found if each.choice.grain == grain), key=lambda each: each.kl)
        if grain == "tokens":
            yield from ((each, 1) for each in mine)
        elif mine:
            yield mine[0], len(mine)


def table(found: Sequence[Found], about: str) -> str:
    """Markdown: a row for each of `best`, budget by budget."""
    lines = [about, "", "| budget | dropped by | kept | bytes | mean KL | 95 % of the mean | same likeliest token |"]
    lines.append("|---|---|---|---|---|---|---|")
    for budget in dict.fromkeys(each.choice.budget for each in found):
        for each, of in best([it for it in found if it.choice.budget == budget]):
            name = each.choice.name + (f" (best of {of})" if of > 1 else "")
            between = "" if each.between is None else f"{nats(each.between[0])} to {nats(each.between[1])}"
            cells = [f"{budget:g} %", each.choice.grain, name, f"{100 * each.part:.1f} %", nats(each.kl), between]
            lines.append(f"| {' | '.join([*cells, share(each.same, 1)])} |")
    return "\n".join(lines)


def measure(
    model: kvik.Model, ids: Sequence[int], budgets: Sequence[float], windows: list[int], *, prefix: int, scored: int,
    documents: int, ledger: Ledger, show: Callable[[str, int, int], None], text: str = "the text",
) -> tuple[list[Found], Evaluation]:  # fmt: skip
    """Scores the heads, fits all choices to the budgets, and measures them together."""
    scores = measure_heads(model, ids[: min(SCORED_HEADS, model.config.max_positions)], show=show).scores
    plans = Plans(model, scores, prefix, windows)
    choices = [choice for budget in budgets for choice in plans.choices(budget)]
    specs = list(dict.fromkeys(str(model.spec(kv)) for kv in (FULL, *(kv for it in choices for _, kv in it.specs))))
    evaluation = evaluate(
        model, ids, specs, prefix=prefix, scored=scored, documents=documents, ledger=ledger, text=text, show=show
    )
    measured = {each.spec: each for each in evaluation.measured}
    return [outcome(choice, measured) for choice in choices], evaluation


def main() -> None:
    """Prints the table, or everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--weights", default="f32")
    parser.add_argument("--budgets", default="50,25", help="percent of the bytes of full bf16 rows")
    parser.add_argument("--windows", default="64,256", help="of layers and heads that don't keep every row")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=1536)
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--text", type=Path, help="a file; by default Python's topics")
    parser.add_argument("--resume", type=Path, help="a .jsonl file of what is done")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = kvik.load(options.model, weights=options.weights)
    assert model.tokenizer is not None, "a model that was loaded has a tokenizer"
    ids = model.tokenizer.encode(read_text(options.text))
    name = "Python's topics" if options.text is None else options.text.name
    with progress() as show:
        found, evaluation = measure(
            model, ids, [float(each) for each in options.budgets.split(",")],
            [int(each) for each in options.windows.split(",")], prefix=options.prefix, scored=options.scored,
            documents=options.documents, ledger=Ledger(options.resume), show=show, text=name,
        )  # fmt: skip
    if options.json:
        print(json.dumps({"found": [asdict(each) for each in found], "evaluation": evaluation.to_dict()}, indent=2))
        return
    it = evaluation.setup
    amount = f"{it.documents} documents of {it.prefix:,} + {it.scored} tokens of {it.text}"
    print(table(found, f"{options.model}, weights {it.weights}, {amount}; {FULL} is 100 %"))


if __name__ == "__main__":
    main()
