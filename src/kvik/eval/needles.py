"""What a cache still finds: keys hidden in long texts, and asked for once the text is in.

    The library closes at six. … The pass key is 71432. Remember it. … A bicycle leans against the wall.
    └──────────────── the prefix: taken in, settled, compressed by the spec ────────────────────────────┘
    What is the pass key? The pass key is                                       71432
    └─ the question: comes after, so that nothing could be kept for its sake    └─ the answer, token by token

passkey: one key in a text, at several depths (Mohtashami and Jaggi, arXiv:2305.16300). keys: five keys, each with a
name, one at each depth of one text; each is asked for in turn (RULER's multi-key needles, arXiv:2404.06654). An answer
is right where every token of it is the likeliest: that is what greedy decoding would say, in one chunk instead of six.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from kvik.cache.prefix import digest
from kvik.cache.sequence import Sequence as KVSequence
from kvik.cache.spec import Spec
from kvik.engine.generation import prefill
from kvik.errors import UsageError
from kvik.eval.caches import forced, opened
from kvik.eval.ledger import Ledger
from kvik.eval.measures import log_probabilities
from kvik.eval.oracle import Future
from kvik.models.model import Model
from kvik.models.text.tokenizer import Tokenizer

Kind = Literal["passkey", "keys"]
KINDS: tuple[Kind, ...] = ("passkey", "keys")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = (512, 1024, 2048, 4096)
DIGITS = 5
SPARE = 64  # positions for a question and its answer
LEAST = 384  # tokens: five keys fit in, even letter by letter
NAMES = ("Anna", "Boris", "Clara", "David", "Emma")
INTRODUCTION = "Somewhere in this text a key is hidden. Find it and remember it."
FILLER = (
    "The library closes at six.", "A bicycle leans against the wall.", "Rain is expected in the afternoon.",
    "The train was on time today.", "Somebody left a window open.", "The soup needs a little more salt.",
    "Two boats are crossing the lake.", "The road turns left behind the mill.", "A cat sleeps on the warm stones.",
    "The shop sells paper and ink.", "Many people walk home this way.", "The old clock is slow again.",
    "There is bread on the table.", "The garden is quiet in winter.", "Children play near the fountain.",
    "A letter came from the coast.", "The lamp in the hall is broken.", "Snow covers the hills in the north.",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What is asked after a text.

    Attributes:
        depth: where in the text the answer lies: 0 at its beginning, 1 at its end.
        tokens: of the question.
        answer: tokens of what is right.
    """

    depth: float
    tokens: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Haystack:
    """A text with keys in it.

    Attributes:
        kind: passkey or keys.
        length: tokens that it has at most; `tokens` are whole sentences.
        questions: each is asked after the text alone.
    """

    kind: Kind
    length: int
    tokens: tuple[int, ...]
    questions: tuple[Question, ...]

    @property
    def about(self) -> str:
        """For the progress and the ledger."""
        depths = ", ".join(f"{each.depth:g}" for each in self.questions)
        return f"{self.kind} in {self.length:,} tokens at {depths}"


@dataclass(frozen=True)
class Answer:
    """What one spec made of one question.

    Attributes:
        kind, length, depth: which it was.
        right: whether greedy decoding says all digits.
        log_probability: nats a digit, of the right answer.
    """

    kind: Kind
    length: int
    depth: float
    right: bool
    log_probability: float


@dataclass(frozen=True)
class Needles:
    """What every spec found again.

    Attributes:
        specs: the full cache first.
        answers: of each spec, to the same questions in the same order.
    """

    specs: tuple[str, ...]
    answers: tuple[tuple[Answer, ...], ...]

    def right(self, spec: str) -> int:
        """Right answers."""
        return sum(each.right for each in self._of(spec))

    def log_probability(self, spec: str) -> float:
        """Nats a digit, the mean over all questions."""
        found = self._of(spec)
        return sum(each.log_probability for each in found) / len(found)

    def probability(self, spec: str) -> float:
        """Of a right digit: the geometric mean over all questions, 0 to 1."""
        return math.exp(self.log_probability(spec))

    def retained(self, spec: str) -> float | None:
        """Of what the full cache answers, the share that a spec answers too; None where it answers nothing."""
        pairs = list(zip(self.answers[0], self._of(spec), strict=True))
        known = [mine.right for full, mine in pairs if full.right]
        return sum(known) / len(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            spec: {
                "right": self.right(spec), "asked": len(answers), "retained": self.retained(spec),
                "log_probability": self.log_probability(spec), "answers": [asdict(each) for each in answers],
            }
            for spec, answers in zip(self.specs, self.answers, strict=True)
        }  # fmt: skip

    def _of(self, spec: str) -> tuple[Answer, ...]:
        return self.answers[self.specs.index(spec)]


def lengths(positions: int) -> list[int]:
    """Those of LENGTHS that leave a model's positions for question and answer; a longer one is cut to what does.

    Raises:
        UsageError: the model has too few positions for any.

    >>> lengths(8192), lengths(2048), lengths(700)
    ([512, 1024, 2048, 4096], [512, 1024, 1984], [512, 636])
    """
    most = positions - SPARE
    if most < LEAST:
        raise UsageError(
            f"needles take texts of {LEAST} tokens and {SPARE} for a question, and the model has {positions} "
            "positions; leave --needles out"
        )
    return sorted({min(length, most) for length in LENGTHS})


def haystacks(tokenizer: Tokenizer, positions: int) -> list[Haystack]:
    """All texts: for each length five with one key, and one with five. Equal for equal tokenizers."""
    found = []
    for length in lengths(positions):
        found += [_hidden(tokenizer, "passkey", length, (depth,)) for depth in DEPTHS]
        found.append(_hidden(tokenizer, "keys", length, DEPTHS))
    return found


def _hidden(tokenizer: Tokenizer, kind: Kind, length: int, depths: Sequence[float]) -> Haystack:
    chance = random.Random(f"{kind} {length} {depths}")
    texts, questions = [], []
    for depth, name in zip(depths, NAMES, strict=False):
        key = str(chance.randrange(10 ** (DIGITS - 1), 10**DIGITS))
        whose = f"The pass key of {name}" if kind == "keys" else "The pass key"
        texts.append(f" {whose} is {key}. Remember it.")
        asked = f" What is {whose[0].lower()}{whose[1:]}? {whose} is"
        questions.append(Question(depth, tuple(tokenizer.encode(asked)), tuple(tokenizer.encode(f" {key}"))))
    introduction = tokenizer.encode(INTRODUCTION)
    needles = [tokenizer.encode(text) for text in texts]
    sentences = [tokenizer.encode(f" {text}") for text in FILLER]
    room = length - len(introduction) - sum(map(len, needles))
    filler: list[list[int]] = []
    while len(chosen := chance.choice(sentences)) <= room:
        filler.append(chosen)
        room -= len(chosen)
    places = [round(depth * len(filler)) for depth in depths]
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        filler.insert(place, needle)
    tokens = [token for sentence in (introduction, *filler) for token in sentence]
    return Haystack(kind, length, tuple(tokens), tuple(questions))


def ask_all(model: Model, specs: Sequence[Spec], ledger: Ledger, show: Callable[[str, int, int], None]) -> Needles:
    """Every question under every spec.

    Args:
        model: with a tokenizer.
        specs: the full cache first.
        ledger: what is in it is not asked again.
        show: called with (what is asked next, tokens done, tokens in all).

    Raises:
        UsageError: the model has too few positions.
    """
    assert model.tokenizer is not None, "text needs a tokenizer"
    texts = haystacks(model.tokenizer, model.config.max_positions)
    done, total = 0, len(specs) * sum(len(text.tokens) for text in texts)
    answers: list[tuple[Answer, ...]] = []
    for spec in specs:
        mine: list[Answer] = []
        for text in texts:
            show(f"{spec}: {text.about}", done, total)
            key = _key(model, spec, text)
            value = ledger.get(key)
            if value is None:
                value = {"answers": [asdict(each) for each in _ask(model, str(spec), text)]}
                ledger.put(key, f"{spec}, {text.about}", value)
            mine += [Answer(**each) for each in value["answers"]]
            done += len(text.tokens)
        answers.append(tuple(mine))
    return Needles(tuple(map(str, specs)), tuple(answers))


def _ask(model: Model, kv: str, text: Haystack) -> list[Answer]:
    """Takes the text in once; each question goes to a fork, so that none hears another."""
    found = []
    with opened(model, kv, len(text.tokens) + SPARE * (len(text.questions) + 1)).open(text.tokens) as sequence:
        prefill(model, [sequence], text.tokens, passes=Future(*((*q.tokens, *q.answer[:-1]) for q in text.questions)))
        for question in text.questions:
            with sequence.fork() as listener:
                found.append(_answer(model, listener, text, question))
    return found


def _answer(model: Model, sequence: KVSequence, text: Haystack, question: Question) -> Answer:
    asked, answer = question.tokens, question.answer
    logits = torch.cat(list(forced(model, sequence, (*asked, *answer[:-1]))))[len(asked) - 1 :]
    right = logits.argmax(dim=-1).tolist() == list(answer)
    chances = log_probabilities(logits)[range(len(answer)), list(answer)]
    return Answer(text.kind, text.length, question.depth, right, float(chances.sum()) / DIGITS)


def _key(model: Model, spec: Spec, text: Haystack) -> str:
    """Names one spec's answers to the questions about one text: all that they depend on."""
    asked = [token for each in text.questions for token in (*each.tokens, *each.answer)]
    return digest(
        kvik=b"eval-needles-1", model=model.fingerprint.encode(), spec=str(spec).encode(),
        rows=spec.fingerprint.encode(), text=array("q", text.tokens).tobytes(), asked=array("q", asked).tobytes(),
    ).hex()  # fmt: skip
