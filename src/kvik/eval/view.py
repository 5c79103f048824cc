"""An evaluation as tables and what follows from them, for a terminal of 80 columns or a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvik.bench.view import columns
from kvik.bench.words import three, time_text
from kvik.eval.budgets import SEEDS
from kvik.eval.needles import KINDS, Needles
from kvik.eval.results import Evaluation, Measured, Setup
from kvik.eval.words import change, nats, share
from kvik.units import format_bytes

HOW = {
    "prompt": "taken in as a prompt and settled",
    "stream": "fed in chunks of 64, each settled",
}
PICTURES = ("pictures", "--plot frontier.png draws bytes against KL, --map map.png which rows stayed")


def render_evaluation(found: Evaluation, console: Console, *, pictures: bool = False) -> None:
    """Prints all figures, and how they came about.

    Args:
        found: measured.
        console: where to.
        pictures: whether any is drawn; if not, the last line says how to get them.
    """
    console.print(title(found))
    for caption, table in (
        ("How far predictions are from those over full rows, in nats (KL divergence)", _divergence(found)),
        ("The text itself: nats a token, and 95 % of the difference over documents", _likelihood(found)),
        (f"What it takes, after {found.setup.prefix:,} tokens", _costs(found)),
    ):
        _section(console, caption, table)
    if found.needles is not None:
        _section(console, "Keys that were found again", _needles(found.needles))
    console.print()
    console.print(lines(facts(found), None if pictures else PICTURES))


def title(found: Evaluation) -> Text:
    """What was measured, and where, in two lines."""
    where, it = found.environment, found.setup
    device = where.cpu if where.device == "cpu" else where.device
    return Text.assemble(
        (it.model, "bold"), f"  weights {it.weights} · {amount(it)}\n",
        (f"{device}, {where.threads} threads · torch {where.torch}", "dim"),
    )  # fmt: skip


def amount(setup: Setup) -> str:
    """How much text.

    >>> amount(Setup("m", "", "f32", "a.txt", 1536, 256, 8, "prompt"))
    '8 documents of 1,536 + 256 tokens'
    """
    plural = "" if setup.documents == 1 else "s"
    return f"{setup.documents} document{plural} of {setup.prefix:,} + {setup.scored:,} tokens"


def by_spec(*heads: str) -> Table:
    """A table of figures, a spec a row: the spec's text may take several lines."""
    table = columns("spec", *heads)
    first = table.columns[0]
    first.justify, first.no_wrap, first.overflow = "left", False, "fold"
    return table


def lines(pairs: Iterator[tuple[str, str]], last: tuple[str, str] | None = None) -> Table:
    """(About what, in a line or two), below one another."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in [*pairs, *([last] if last else [])]:
        table.add_row(Text(label), Text(text))
    return table


def _section(console: Console, caption: str, table: Table) -> None:
    console.print()
    console.print(Text(caption, "bold"))
    console.print(table)


def _rows(found: Sequence[Measured], table: Table, figures: Callable[[Measured], Sequence[str]]) -> Table:
    for each in found:
        seeds = "" if each.spread is None else f" ×{SEEDS}"
        table.add_row(Text(each.label + seeds), *figures(each))
    return table


def _divergence(found: Evaluation) -> Table:
    def figures(each: Measured) -> list[str]:
        quantiles = [nats(each.kl_at(quantile)) for quantile in (0.5, 0.99, 1.0)]
        return [nats(each.kl), *quantiles, share(each.same, 1), share(each.recall)]

    heads = "mean", "median", "99 %", "largest", "same\nlikeliest", "attention\nkept"
    return _rows(found.every, by_spec(*heads), figures)


def _likelihood(found: Evaluation) -> Table:
    def figures(each: Measured) -> list[str]:
        between = _interval(each.delta_interval, change)
        return [f"{each.nll:.4f}", change(each.delta), between, f"{each.perplexity_ratio:.4f}"]

    heads = "nats", "more than\nf32", "95 % of\nthe difference", "perplexity\nby f32's"
    return _rows(found.every, by_spec(*heads), figures)


def _interval(bounds: tuple[float, float] | None, text: Callable[[float], str]) -> str:
    return "" if bounds is None else f"{text(bounds[0])} to {text(bounds[1])}"


def _costs(found: Evaluation) -> Table:
    full = found.full.held.allocated

    def figures(each: Measured) -> list[str]:
        sizes = [three(each.bytes_a_token), share(each.held.allocated / full), format_bytes(each.peak)]
        return [*sizes, share(each.kept), time_text(each.first), time_text(each.step)]

    heads = "bytes\na token", "of\nf32", "at\nmost", "rows\nkept", "first\ntoken", "each\nmore"
    return _rows(found.every, by_spec(*heads), figures)


def _needles(needles: Needles) -> Table:
    table = by_spec(*(f"{kind}\nright" for kind in KINDS), "of the full\ncache's", "probability\na digit")
    for spec, answers in zip(needles.specs, needles.answers, strict=True):
        counts = []
        for kind in KINDS:
            mine = [each.right for each in answers if each.kind == kind]
            counts.append(f"{sum(mine)} of {len(mine)}")
        retained = needles.retained(spec)
        kept = "" if retained is None else share(retained)
        table.add_row(Text(spec), *counts, kept, share(needles.probability(spec)))
    return table


def facts(found: Evaluation) -> Iterator[tuple[str, str]]:
    """How the figures came about: (about what, in a line or two)."""
    it = found.setup
    yield "text", f"{it.text}; each document's first {it.prefix:,} tokens were {HOW[it.protocol]}, the next scored"
    changed = any(each.mark for each in found.measured)
    model = "the model as its weights were trained" if changed else "the same model"
    yield "against", f"{model}, over full rows in f32; {found.full.scored:,} predictions each"
    if any(each.evicts for each in found.measured):
        yield "attention", "kept: of what scored tokens give the prefix over full rows, the share of rows that stayed"
    seeds = [(each.spec, *map(nats, each.spread)) for each in found.baselines if each.spread is not None]
    if seeds:
        spreads = "; ".join(f"{spec} {low} to {high}" for spec, low, high in seeds)
        yield f"×{SEEDS}", f"rows by chance, seeds 0 to {SEEDS - 1} side by side; their mean KLs: {spreads}"
    if any(each.foresees for each in found.every):
        yield "oracle", "keeps the rows that the scored tokens look at: a bound, and nothing that could be used"
    yield "times", f"of this run, weights in {it.weights}; 'kvik bench speed' takes them apart"
    if it.documents == 1:
        yield "interval", "one document says nothing about others; use more --documents"
    idle = [each.spec for each in found.measured if not each.evicts and "+" in each.spec]
    if idle:
        way = "use --protocol prompt, or a longer --prefix" if it.protocol == "stream" else "use a longer --prefix"
        yield "rows", f"none was dropped of this text by {', '.join(idle)}; {way}"
    yield "frontier", "; ".join(f"‘{each.label}’" for each in found.frontier) + ": no other has fewer bytes and less KL"
    if found.needles is not None and found.needles.retained(found.full.spec) is None:
        yield "keys", "the full cache finds none, so nothing can be retained; use a model that follows questions"
