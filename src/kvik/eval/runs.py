"""Takes the measurements: each document under each spec, beside its predictions over full rows.

    prompt    open(prefix) ─ prefill ─ settle     the prefix goes in as an answer's prompt does, 512 tokens at once;
                                                  what drops rows at the end of a prompt has done so now
    stream    open() ─ chunks of 64, settled      nobody says where a prompt would end
    then      8 tokens one by one, which are timed; the rest in chunks of 64; each is what really comes next, and what
              is predicted after it is scored

Only predictions that were made after the prefix had been settled are scored. Whatever spec comes, nothing here asks
what it does: bytes and rows are the sequence's own account. An oracle is shown what is going to be scored; and beside
full rows a fork is, before anything is timed, to see where the attention of the scored tokens will go.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvik.bench.rates import Clock, clock_of
from kvik.bench.runs import environment
from kvik.cache.spec import Spec
from kvik.engine.generation import prefill
from kvik.eval.budgets import baselines as bounds_of
from kvik.eval.budgets import pooled
from kvik.eval.caches import CHUNK, Peak, distinct, forced, kept_rows, kept_share, opened
from kvik.eval.ledger import Ledger
from kvik.eval.measures import Compared, Reference, joined
from kvik.eval.needles import ask_all
from kvik.eval.oracle import Future, Lane, by_lane, recall, weighed
from kvik.eval.results import FULL, Costs, Document, Evaluation, Kept, Measured, Protocol, Setup
from kvik.models.model import Model

TIMED = 8  # tokens that go in one by one
Show = Callable[[str, int, int], None]
Take = Callable[[int, Tensor], None]


def evaluate(
    model: Model,
    ids: Sequence[int],
    specs: Sequence[str],
    *,
    prefix: int = 1536,
    scored: int = 256,
    documents: int = 8,
    protocol: Protocol = "prompt",
    needles: bool = False,
    against: Model | None = None,
    mark: str = "",
    baselines: bool = False,
    ledger: Ledger | None = None,
    name: str = "",
    text: str = "the text",
    show: Show = lambda what, done, total: None,
    clock: Clock | None = None,
) -> Evaluation:
    """Measures specs against the full cache in f32, document by document.

    Args:
        model: loaded.
        ids: the text's tokens.
        specs: spec strings; the full cache is always measured too, and first.
        prefix, scored, documents, protocol: see `Setup`.
        needles: whether keys are hidden in long texts and asked for as well; needs a tokenizer.
        against: whose full cache everything is held against, where the model is that one with something changed.
        mark: what was changed.
        baselines: whether policies are held against chance and foresight at their budgets (`eval/budgets.py`).
        ledger: what is in it is not measured again.
        name: what to call the model; by default its own name.
        text: what to call the text.
        show: called with (what is measured next, work done, work in all), never while something is timed.
        clock: seconds; by default the system's, once the device has done all.

    Raises:
        SpecError: a spec can't be read, or doesn't fit the model.
        UsageError: the text is too short, or a size is none.
        ContextError, BudgetError: a document is too long for the model or the machine.
        StorageError: the ledger's file can't be written.
    """
    named = model.fingerprint if against is None else f"{model.fingerprint} against {against.fingerprint}"
    setup = Setup(name or model.config.name, named, model.weights, text, prefix, scored, documents, protocol)
    model.check_context(prefix + scored)
    plans, cut = distinct(model, specs), setup.cut(ids)
    bounds = _bounds(plans, setup) if baselines else []
    every = distinct(model, [*map(str, plans), *(kv for bound in bounds for kv in bound)])
    every = every if against is None else [against.spec(FULL), *every]
    ledger = Ledger() if ledger is None else ledger
    runs = _Runs(model, against or model, setup, every, ledger, show, clock or clock_of(model.device))
    columns = [runs.document(number, tokens) for number, tokens in enumerate(cut)]
    known = {str(spec): tuple(column[place] for column in columns) for place, spec in enumerate(every)}
    measured = {kv: Measured(kv, documents, mark=mark) for kv, documents in known.items()}
    unchanged = () if against is None else (Measured(FULL, tuple(column[0] for column in columns)),)
    found = ask_all(model, plans, ledger, show) if needles else None
    return Evaluation(
        setup, environment(model.device), (*unchanged, *(measured[str(spec)] for spec in plans)), found,
        tuple(pooled([measured[kv] for kv in bound]) for bound in bounds),
    )  # fmt: skip


def _bounds(plans: Sequence[Spec], setup: Setup) -> list[list[str]]:
    """Chance and foresight at the budgets of all specs, each once; foresight that was asked for is there already."""
    asked = {str(spec) for spec in plans}
    found = [bound for spec in plans for bound in bounds_of(str(spec), setup.prefix, setup.protocol)]
    return [bound for bound in {tuple(bound): bound for bound in found}.values() if not asked >= set(bound)]


class _Runs:
    """The model, what is measured, and how far it is."""

    def __init__(
        self, model: Model, full: Model, setup: Setup, specs: Sequence[Spec], ledger: Ledger, show: Show, clock: Clock
    ) -> None:
        self.model, self.full, self.setup, self.specs, self.ledger = model, full, setup, specs, ledger
        self._show, self._clock = show, clock
        self._received: dict[Lane, Tensor] = {}  # of one document: attention of the scored tokens over full rows

    def document(self, number: int, tokens: Sequence[int]) -> list[Document]:
        """One document under every spec. The full cache's logits are held while this runs, and no longer."""
        keys = [self.setup.key(str(spec), spec.fingerprint, number, tokens) for spec in self.specs]
        if any(self.ledger.get(key) is None for key in keys):
            self._say(number, 0)
            reference, full = self._full(number, tokens)
            for place, key in enumerate(keys):
                if self.ledger.get(key) is not None:
                    continue
                self._say(number, place)
                spec = str(self.specs[place])
                found = self._other(number, tokens, spec, reference) if place else full
                self.ledger.put(key, f"{spec}, document {number + 1}", found.to_dict())
        return [Document.from_dict(self.ledger.get(key) or {}) for key in keys]

    def _full(self, number: int, tokens: Sequence[int]) -> tuple[Reference, Document]:
        """Over full rows. What is held against itself differs by nothing."""
        parts: list[Tensor] = []
        kept = self._follow(self.full, number, tokens, FULL, lambda _, logits: parts.append(logits))
        targets = torch.tensor(tokens[self.setup.prefix + 1 :], device=self.model.device)
        reference = Reference(torch.cat(parts), targets)
        starts = [sum(map(len, parts[:place])) for place in range(len(parts))]
        compared = [reference.compare(start, part) for start, part in zip(starts, parts, strict=True)]
        return reference, _document(compared, *kept)

    def _other(self, number: int, tokens: Sequence[int], kv: str, reference: Reference) -> Document:
        compared: list[Compared] = []

        def take(start: int, logits: Tensor) -> None:
            compared.append(reference.compare(start, logits))

        return _document(compared, *self._follow(self.model, number, tokens, kv, take))

    def _follow(
        self, model: Model, number: int, tokens: Sequence[int], kv: str, take: Take
    ) -> tuple[float, Costs, Kept | None]:
        """Feeds a document; `take` gets (place among the scored, logits) of every chunk after the prefix. Returns the
        share of attention that stayed, and what it took."""
        prefix, rest = tokens[: self.setup.prefix], tokens[self.setup.prefix : -1]
        cache, clock, peak = opened(model, kv, len(tokens)), self._clock, Peak()
        known = prefix if self.setup.protocol == "prompt" else ()
        started = clock()
        with cache.open(known) as sequence:
            size = len(prefix) if known else CHUNK
            for start in range(0, len(prefix), size):
                prefill(model, [sequence], prefix[start : start + size], watch=peak.watch, passes=Future(rest))
            first = clock() - started
            held, share = sequence.nbytes, kept_share(sequence)
            kept = Kept.of(kept_rows(sequence)) if number == 0 else None
            if kv == FULL:
                self._received = by_lane(sequence, weighed(model, sequence, [rest]))
            recalled = recall(self._received, sequence)
            seconds, at = [], 0
            for token in rest[:TIMED]:
                began = clock()
                (logits,) = forced(model, sequence, [token])
                seconds.append(clock() - began)
                take(at, logits)
                at += 1
            for logits in forced(model, sequence, rest[TIMED:]):
                take(at, logits)
                at += len(logits)
        most, step = max(peak.allocated, held.allocated), statistics.median(seconds)
        return recalled, Costs(len(prefix), held.payload, held.overhead, most, share, first, step), kept

    def _say(self, number: int, place: int) -> None:
        what = f"document {number + 1} of {self.setup.documents}: {self.specs[place]}"
        self._show(what, number * len(self.specs) + place, self.setup.documents * len(self.specs))


def _document(parts: Sequence[Compared], recalled: float, costs: Costs, kept: Kept | None) -> Document:
    whole = joined(parts)
    nll, delta = float(whole.nll.mean()), float((whole.nll - whole.full).mean())
    return Document(nll, delta, tuple(whole.kl.tolist()), int(whole.same.sum()), recalled, costs, kept)
