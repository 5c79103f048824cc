"""What an evaluation found, as frozen data.

Evaluation ─ Setup                 which model and text, how much of it, by which protocol
           ─ Measured, one a spec ─ Document, one a text: its KLs, its NLL, its Costs, and which rows were Kept
           ─ Needles, where asked   (eval/needles.py)
"""

from __future__ import annotations

import base64
import math
import statistics
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvik.bench.growth import Environment
from kvik.cache.methods import Needs
from kvik.cache.prefix import digest
from kvik.cache.spec import Bytes, parse_rules
from kvik.errors import UsageError
from kvik.eval.measures import interval

if TYPE_CHECKING:
    from kvik.eval.needles import Needles

Protocol = Literal["prompt", "stream"]
PROTOCOLS: tuple[Protocol, ...] = ("prompt", "stream")
FULL = "f32"  # what everything is held against


@dataclass(frozen=True)
class Setup:
    """What is measured, and with what.

    Attributes:
        model: its name.
        fingerprint: of the model: its weights as they are held, and its arithmetic.
        weights: how they are held.
        text: where the documents come from.
        prefix: tokens that are in the cache before anything is scored.
        scored: predictions of each document that are scored; each is made over a cache that the spec has had.
        documents: texts.
        protocol: prompt: the prefix is a prompt, taken in as for an answer. stream: one text without a beginning that
            would stand out.
    """

    model: str
    fingerprint: str
    weights: str
    text: str
    prefix: int
    scored: int
    documents: int
    protocol: Protocol

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise UsageError(f"protocol {self.protocol!r}: use {' or '.join(PROTOCOLS)}")
        for name in ("prefix", "scored", "documents"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)} leaves nothing to measure; use at least 1")

    @property
    def length(self) -> int:
        """Tokens of a document: the last is predicted, and never fed."""
        return self.prefix + self.scored + 1

    def cut(self, ids: Sequence[int]) -> list[list[int]]:
        """The documents of a text: evenly spread over it, none overlapping.

        Raises:
            UsageError: it is too short for them.
        """
        needed = self.documents * self.length
        if len(ids) < needed:
            raise UsageError(
                f"{self.text}: {len(ids):,} tokens are fewer than the {needed:,} that {self.documents} documents of "
                f"{self.length:,} take; give a longer --text, or a smaller --documents, --prefix or --scored"
            )
        starts = [number * len(ids) // self.documents for number in range(self.documents)]
        return [list(ids[start : start + self.length]) for start in starts]

    def key(self, spec: str, fingerprint: str, number: int, tokens: Sequence[int]) -> str:
        """Names one spec's measurement of one document: all that its figures depend on, but for the machine's speed."""
        return digest(
            kvik=b"eval-document-2", model=self.fingerprint.encode(), spec=spec.encode(), rows=fingerprint.encode(),
            protocol=self.protocol.encode(), sizes=array("q", (self.prefix, self.scored, number)).tobytes(),
            text=array("q", tokens).tobytes(),
        ).hex()  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """What the rows of one document took, measured once the prefix was in.

    Attributes:
        tokens: of the prefix.
        payload, overhead: bytes that the sequence held.
        peak: bytes that it held at most until then.
        kept: share of all rows that stayed, 0 to 1; lanes count by the bytes of their rows.
        first: seconds from nothing to the logits after the prefix, whatever the spec did with its rows included.
        step: seconds of one more token: the median of some.
    """

    tokens: int
    payload: int
    overhead: int
    peak: int
    kept: float
    first: float
    step: float

    @property
    def allocated(self) -> int:
        """Bytes: payload + overhead."""
        return self.payload + self.overhead


@dataclass(frozen=True)
class Kept:
    """Which rows one document's cache held once the prefix was in, for the map.

    Attributes:
        heads: KV heads of each layer.
        tokens: of the prefix.
        bits: which of them each lane held, layer by layer; packed, eight a byte, each lane from a byte of its own.
    """

    heads: tuple[int, ...]
    tokens: int
    bits: bytes

    @classmethod
    def of(cls, layers: Sequence[NDArray[np.bool_]]) -> Kept:
        """Of each layer: bool [heads, tokens]."""
        packed = np.packbits(np.concatenate(layers), axis=1)
        return cls(tuple(len(each) for each in layers), layers[0].shape[1], packed.tobytes())

    @property
    def rows(self) -> NDArray[np.bool_]:
        """bool [lanes, tokens], layer by layer."""
        packed = np.frombuffer(self.bits, np.uint8).reshape(sum(self.heads), -1)
        return np.unpackbits(packed, axis=1, count=self.tokens).astype(bool)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; the bits in base64."""
        return {"heads": list(self.heads), "tokens": self.tokens, "bits": base64.b64encode(self.bits).decode()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Kept:
        """What `to_dict` gave."""
        return cls(tuple(values["heads"]), values["tokens"], base64.b64decode(values["bits"], validate=True))


@dataclass(frozen=True)
class Document:
    """One spec's predictions of one document.

    Attributes:
        nll: nats a token, the mean over scored positions.
        delta: the same less that of the full cache.
        kl: nats, of each scored position.
        same: scored positions whose likeliest token is that of the full cache.
        recall: share of the attention that scored tokens give the prefix over full rows which falls on rows that
            stayed, 0 to 1; see `eval/oracle.py`.
        costs: of its rows.
        kept: which rows stayed; of the first document only.
    """

    nll: float
    delta: float
    kl: tuple[float, ...]
    same: int
    recall: float
    costs: Costs
    kept: Kept | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, for `from_dict`."""
        rows = None if self.kept is None else self.kept.to_dict()
        return {
            "nll": self.nll, "delta": self.delta, "kl": list(self.kl), "same": self.same, "recall": self.recall,
            "costs": asdict(self.costs), "kept": rows,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Document:
        """What `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        rows = None if values["kept"] is None else Kept.from_dict(values["kept"])
        costs = Costs(**values["costs"])
        figures = values["nll"], values["delta"], tuple(values["kl"]), values["same"], values["recall"]
        return cls(*figures, costs, rows)


@dataclass(frozen=True)
class Measured:
    """One spec, over all documents.

    Attributes:
        mark: of a model that is held against another: what was changed.
        spread: of several seeds that are shown as one: the least and the largest of their mean KLs; None = one.
    """

    spec: str
    documents: tuple[Document, ...]
    spread: tuple[float, float] | None = None
    mark: str = ""

    @property
    def label(self) -> str:
        """What to call it in a table."""
        return f"{self.spec}, {self.mark}" if self.mark else self.spec

    @cached_property
    def _kl(self) -> NDArray[np.float64]:
        return np.concatenate([np.asarray(each.kl, np.float64) for each in self.documents])

    @property
    def scored(self) -> int:
        """Positions, over all documents."""
        return len(self._kl)

    @property
    def kl(self) -> float:
        """Mean KL divergence, nats."""
        return float(self._kl.mean())

    @property
    def kl_interval(self) -> tuple[float, float] | None:
        """Of the mean KL, over documents; see `interval`."""
        return interval([statistics.fmean(each.kl) for each in self.documents])

    def kl_at(self, quantile: float) -> float:
        """The KL that this share of all positions stays at or below."""
        return float(np.quantile(self._kl, quantile))

    @property
    def same(self) -> float:
        """Share of positions whose likeliest token is that of the full cache."""
        return sum(each.same for each in self.documents) / self.scored

    @property
    def nll(self) -> float:
        """Nats a token."""
        return statistics.fmean(each.nll for each in self.documents)

    @property
    def delta(self) -> float:
        """Nats a token more than the full cache."""
        return statistics.fmean(each.delta for each in self.documents)

    @property
    def delta_interval(self) -> tuple[float, float] | None:
        """Of `delta`, paired over documents; see `interval`."""
        return interval([each.delta for each in self.documents])

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity by that of the full cache."""
        return math.exp(self.delta)

    @property
    def held(self) -> Bytes:
        """After the prefix, the mean over documents."""
        return Bytes(
            round(statistics.fmean(each.costs.payload for each in self.documents)),
            round(statistics.fmean(each.costs.overhead for each in self.documents)),
        )

    @property
    def peak(self) -> int:
        """Bytes held at most until the prefix was in, over all documents."""
        return max(each.costs.peak for each in self.documents)

    @property
    def bytes_a_token(self) -> float:
        """Bytes held after the prefix, by its tokens."""
        return self.held.allocated / self.documents[0].costs.tokens

    @property
    def kept(self) -> float:
        """Share of all rows that stayed."""
        return statistics.fmean(each.costs.kept for each in self.documents)

    @property
    def recall(self) -> float:
        """Share of the attention over full rows that falls on rows that stayed."""
        return statistics.fmean(each.recall for each in self.documents)

    @property
    def evicts(self) -> bool:
        """Whether any row was dropped."""
        return self.kept < 1

    @cached_property
    def foresees(self) -> bool:
        """Whether rows were chosen by what comes after them: a bound, and nothing that could be used."""
        policies = [rule.retention.policy for rule in parse_rules(self.spec)[0]]
        return any(policy is not None and Needs.FUTURE in policy.needs for policy in policies)

    @property
    def first(self) -> float:
        """Seconds to the first token, the median over documents."""
        return statistics.median(each.costs.first for each in self.documents)

    @property
    def step(self) -> float:
        """Seconds of one more token, the median over documents."""
        return statistics.median(each.costs.step for each in self.documents)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the positions one by one, as JSON values: nats, bytes, seconds."""
        held = self.held
        return {
            "spec": self.spec,
            "mark": self.mark,
            "scored": self.scored,
            "kl": {
                "mean": self.kl, "interval": self.kl_interval, "median": self.kl_at(0.5), "p99": self.kl_at(0.99),
                "max": self.kl_at(1.0), "seeds": self.spread,
            },
            "same_top": self.same,
            "nll": {"mean": self.nll, "delta": self.delta, "interval": self.delta_interval},
            "perplexity_ratio": self.perplexity_ratio,
            "bytes": {"payload": held.payload, "overhead": held.overhead, "allocated": held.allocated},
            "peak_bytes": self.peak,
            "bytes_a_token": self.bytes_a_token,
            "rows_kept": self.kept,
            "attention_recall": self.recall,
            "first_token_s": self.first,
            "token_s": self.step,
            "documents": [
                {"nll": each.nll, "delta": each.delta, "kl": statistics.fmean(each.kl), "costs": asdict(each.costs)}
                for each in self.documents
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        measured: one a spec, the full cache first.
        baselines: chance and foresight, where a spec's policy was to be held against them.
        needles: what was found again in long texts; None where nothing was hidden.
    """

    setup: Setup
    environment: Environment
    measured: tuple[Measured, ...]
    needles: Needles | None = None
    baselines: tuple[Measured, ...] = ()

    @property
    def full(self) -> Measured:
        """The full cache in f32, which everything is held against: of the unchanged model, where one was changed."""
        return self.measured[0]

    @property
    def every(self) -> tuple[Measured, ...]:
        """What was asked for, then what it is held against."""
        return (*self.measured, *self.baselines)

    @property
    def frontier(self) -> tuple[Measured, ...]:
        """Specs than which no other has both fewer bytes and a lower KL, the fewest bytes first."""
        best: list[Measured] = []
        usable = [each for each in self.measured if not each.foresees]
        for each in sorted(usable, key=lambda it: (it.bytes_a_token, it.kl)):
            if not best or each.kl < best[-1].kl:
                best.append(each)
        return tuple(best)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "setup": asdict(self.setup),
            "environment": asdict(self.environment),
            "specs": [each.to_dict() for each in self.measured],
            "baselines": [each.to_dict() for each in self.baselines],
            "frontier": [each.label for each in self.frontier],
            "needles": None if self.needles is None else self.needles.to_dict(),
        }
