"""Which spec to take: a few candidates, measured on a text; those that are too large or too far away fall out.

    memory given      of what fits, the lowest KL: bytes within the budget are free
    only max KL       of what is close enough, the fewest bytes

Bytes are by the formula for one sequence of `context` tokens, so what is too large is known before it is measured. What
must fit is the most that it takes at any time: a policy that chooses at the prompt's end has taken all of it in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvik.bench.growth import Environment
from kvik.bench.runs import environment
from kvik.cache.spec import Bytes, Spec
from kvik.errors import UsageError
from kvik.eval.caches import every_row
from kvik.eval.results import Measured, Setup
from kvik.eval.runs import evaluate
from kvik.eval.words import nats
from kvik.models.model import Model
from kvik.units import format_bytes

PREFIX = 1024  # tokens, where every candidate keeps every row


@dataclass(frozen=True)
class Candidate:
    """One spec.

    Attributes:
        nbytes: of one sequence of `Tuning.context` tokens, by formula.
        peak: the most bytes that it allocates on the way there.
        measured: None where it was not: it takes more than the memory.
    """

    spec: str
    nbytes: Bytes
    peak: int
    measured: Measured | None

    @property
    def size(self) -> int:
        """Bytes allocated."""
        return self.nbytes.allocated


@dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Attributes:
        context: tokens of the sequence whose bytes count.
        memory: bytes that it may take; None = any.
        max_kl: mean KL that it may have, nats; None = any.
        candidates: in the order in which they were given.
    """

    setup: Setup
    environment: Environment
    context: int
    memory: int | None
    max_kl: float | None
    candidates: tuple[Candidate, ...]

    def fits(self, candidate: Candidate) -> bool:
        """Whether its bytes are within the memory at any time."""
        return self.memory is None or candidate.peak <= self.memory

    def close(self, candidate: Candidate) -> bool:
        """Whether its KL was measured and is low enough."""
        found = candidate.measured
        return found is not None and (self.max_kl is None or found.kl <= self.max_kl)

    @property
    def winner(self) -> Candidate | None:
        """The best that fits and is close; None where none is."""
        left = [each for each in self.candidates if self.fits(each) and self.close(each)]

        def worse(each: Candidate) -> tuple[float, float]:
            assert each.measured is not None, "what is close was measured"
            pair = each.measured.kl, float(each.size)
            return pair if self.memory is not None else pair[::-1]

        return min(left, key=worse, default=None)

    @property
    def frontier(self) -> tuple[Candidate, ...]:
        """Measured candidates than which no other has both fewer bytes and a lower KL, the fewest bytes first."""
        best: list[tuple[float, Candidate]] = []
        known = [(each.size, each.measured.kl, each) for each in self.candidates if each.measured is not None]
        for _, kl, each in sorted(known, key=lambda it: it[:2]):
            if not best or kl < best[-1][0]:
                best.append((kl, each))
        return tuple(each for _, each in best)

    @property
    def why_none(self) -> str:
        """Where there is no winner: what the nearest candidate would need, and the way out, in a line."""
        assert self.winner is None, "there is a winner"
        fitting = [each for each in self.candidates if self.fits(each)]
        if not fitting and self.memory is not None:
            least = min(self.candidates, key=lambda each: each.peak)
            return (
                f"no spec tried holds {self.context:,} tokens in {format_bytes(self.memory)}: the smallest, "
                f"{least.spec!r}, takes {format_bytes(least.peak)}; raise --memory, lower --context, or try --lossy"
            )
        known = [(each.measured.kl, each.spec) for each in fitting if each.measured is not None]
        (kl, spec), limit = min(known), nats(self.max_kl or 0.0)
        of, way = ("", "") if self.memory is None else (" that fits", " or --memory")
        return (
            f"no spec tried{of} has a mean KL of at most {limit}: the closest, {spec!r}, has {nats(kl)}; "
            f"raise --max-kl{way}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        winner = self.winner
        return {
            "setup": asdict(self.setup),
            "environment": asdict(self.environment),
            "context": self.context,
            "memory": self.memory,
            "max_kl": self.max_kl,
            "candidates": [
                {
                    "spec": each.spec,
                    "bytes": asdict(each.nbytes) | {"allocated": each.size, "peak": each.peak},
                    "fits": self.fits(each),
                    "close": self.close(each),
                    "measured": None if each.measured is None else each.measured.to_dict(),
                }
                for each in self.candidates
            ],
            "frontier": [each.spec for each in self.frontier],
            "winner": None if winner is None else winner.spec,
        }

    def reasons(self) -> dict[str, Any]:
        """What the winner was chosen by, for the file that keeps it."""
        winner = self.winner
        assert winner is not None and winner.measured is not None, "only a winner is kept"
        asked = {"memory": self.memory, "max_kl": self.max_kl, "context": self.context}
        found = {"kl": winner.measured.kl, "kl_interval": winner.measured.kl_interval, "bytes": winner.size}
        it = self.setup
        amount = {"text": it.text, "documents": it.documents, "prefix": it.prefix, "scored": it.scored}
        return {"asked": asked, "measured": found | amount}


def ladder(layers: int, context: int, *, lossy: bool = False) -> list[str]:
    """Candidates for a model, from the most bytes down.

    Mixtures give some layers more bits: the first half, the middle, the first two. Which layers need them differs by
    model; in SmolLM2 those from 10 to 14 account for a third of what int4 costs, and the first two for next to nothing.

    Args:
        layers: of the model.
        context: tokens that a sequence will have.
        lossy: also such as drop rows, to a half and a quarter: windows, and the policies that were nearest to the full
            cache for their cost (`docs/fidelity.md`): one that needs a pass of the model, two that look at rows.

    >>> ladder(30, 4096)[-2:]
    ['int4; layers 0-1: int8', 'int4']
    """
    specs = ["bf16", "int8-rot", "int8", "k:int8-rot,v:int4", "k8v4"]
    if layers >= 6:
        half, third = layers // 2, layers // 3
        specs += [f"int4; layers {first}-{half - 1}: k8v4" for first in (0, third)] + ["int4; layers 0-1: int8"]
    specs.append("int4")
    if lossy:
        for part in (2, 4):
            kept = f"window:{max(context // part, 1)},sinks:4"
            specs += [f"int8+{kept}", f"k8v4+{kept}"]
            specs += [f"int8+{name}:{100 // part}%" for name in ("global(kvzip)", "ada(keydiff)", "expected")]
    return specs


def tune(
    model: Model,
    ids: Sequence[int],
    specs: Sequence[str],
    *,
    context: int,
    memory: int | None = None,
    max_kl: float | None = None,
    prefix: int | None = None,
    scored: int = 256,
    documents: int = 4,
    name: str = "",
    text: str = "the text",
    show: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Tuning:
    """Measures the candidates that fit.

    Args:
        model: loaded.
        ids: the text's tokens.
        specs: candidates.
        context, memory, max_kl: see `Tuning`.
        prefix: tokens before the scored ones; None = 1,024, or the whole context where a candidate drops rows of it.
        scored, documents: see `Setup`.
        name, text: what to call the model and the text.
        show: called with (what is measured next, work done, work in all).

    Raises:
        SpecError: a spec can't be read, or doesn't fit the model.
        UsageError: the text is too short, or shorter than what a candidate drops rows of.
        ContextError, BudgetError: a document is too long for the model or the machine.
    """
    plans = list({str(spec): spec for spec in map(model.spec, specs)}.values())
    model.check_context(context)
    prefix = _prefix(model, plans, context, prefix, scored)
    setup = Setup(
        name or model.config.name, model.fingerprint, model.weights, text, prefix, scored, documents, "prompt"
    )
    sizes = {str(spec): (spec.nbytes(context), spec.peak(context).allocated) for spec in plans}
    fitting = [spec for spec, (_, peak) in sizes.items() if memory is None or peak <= memory]
    known: dict[str, Measured] = {}
    if fitting:
        found = evaluate(
            model, ids, fitting, prefix=prefix, scored=scored, documents=documents, name=name, text=text, show=show
        )
        known = {each.spec: each for each in found.measured if each.spec in fitting}
    candidates = tuple(Candidate(spec, *size, known.get(spec)) for spec, size in sizes.items())
    return Tuning(setup, environment(model.device), context, memory, max_kl, candidates)


def _prefix(model: Model, plans: Sequence[Spec], context: int, prefix: int | None, scored: int) -> int:
    """How much of a text is taken in before predictions are scored. What drops rows of a long text does nothing to a
    short one, so its quality is that of the whole context or nothing."""
    dropping = [spec for spec in plans if spec.nbytes(context).payload < every_row(spec, context)]
    if prefix is None:
        most = context if dropping else min(PREFIX + scored, model.config.max_positions)
        return max(most - scored, 1)
    if dropping and prefix + scored < context:
        raise UsageError(
            f"'{dropping[0]}' drops rows of {context:,} tokens, which --prefix {prefix} with --scored {scored} would "
            f"not show; leave --prefix out, use {context - scored}, or lower --context"
        )
    return prefix
