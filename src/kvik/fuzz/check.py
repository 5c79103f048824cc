"""What was heard in the mix against what is right: equal bit for bit, or, of those who left, as far as it came."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvik.engine.answers import Answer
from kvik.engine.job import Likely
from kvik.engine.request import Request
from kvik.errors import KvikError
from kvik.fuzz.oracle import Oracle
from kvik.fuzz.replay import Heard, Run


@dataclass(frozen=True)
class Difference:
    """Something that one asker heard and should not have.

    Attributes:
        ask: whose.
        what: in words.
    """

    ask: int
    what: str


@dataclass
class Verdict:
    """What came of a run.

    Attributes:
        compared: whole answers that were held against the right ones.
        begun: answers that were cut off, and held against the beginning of the right ones.
        tokens: of both.
        others: answers with other tokens than alone, where that is allowed.
        worst: the largest difference between two log-probabilities that should be equal.
        differences: everything that is wrong with what was heard.
    """

    compared: int = 0
    begun: int = 0
    tokens: int = 0
    others: int = 0
    worst: float = 0.0
    differences: list[Difference] = field(default_factory=list)


def judge(run: Run, requests: Mapping[int, Request], oracle: Oracle, bound: float = 0.0) -> Verdict:
    """Holds all that was heard against the oracle's answers.

    Args:
        bound: 0 = all must be equal, bit for bit. Else an answer may have other tokens than alone, and each of its
            log-probabilities must be as one pass over prompt and answer gives it, up to this.
    """
    verdict = Verdict()
    for number, heard in run.heard.items():
        if not heard.refused:
            _judge(verdict, number, heard, requests[number], oracle, bound)
    _judge_known(verdict, run, requests, oracle)
    if run.again is not None and not run.problem:
        last = Verdict()
        _judge(last, *run.again, requests[run.again[0]], oracle, bound)
        for each in last.differences:
            verdict.differences.append(Difference(each.ask, f"made again at the end, {each.what}"))
        verdict.worst = max(verdict.worst, last.worst)
    return verdict


def judge_oracle(oracle: Oracle, requests: Mapping[int, Request], bound: float = 0.0) -> tuple[int, Verdict]:
    """Holds right answers that take the likeliest tokens against one pass over prompt and answer each.

    Returns:
        How many there were, and what came of it.
    """
    verdict, count = Verdict(), 0
    for number, right in oracle.known.items():
        first, request = right[0], requests.get(number)
        if request is None or not first.logprobs or request.sampling.temperature > 0:
            continue
        count += 1
        found = oracle.forced(request, first.token_ids)
        verdict.worst = max(verdict.worst, _worst(first.logprobs, found))
        if (wrong := _unequal(first.logprobs, found, bound)) is not None:
            verdict.differences.append(Difference(number, f"alone, and in one pass over prompt and answer: {wrong}"))
    return count, verdict


def _judge(verdict: Verdict, number: int, heard: Heard, request: Request, oracle: Oracle, bound: float) -> None:
    def wrong(what: str) -> None:
        verdict.differences.append(Difference(number, what))

    if heard.error:
        return wrong(f"it was taken, and ended by {heard.error}")
    try:
        right = oracle.answers(number, request)
    except KvikError as error:
        return wrong(f"it was answered, and can't be answered alone: {error}")
    for at, (told, wanted) in enumerate(zip(heard.answers, right, strict=True)):
        whole = told.finish_reason not in ("interrupted", None)
        if not whole and heard.left is None:
            wrong(f"answer {at} never ended")
            continue
        verdict.compared, verdict.begun = verdict.compared + whole, verdict.begun + (not whole)
        verdict.tokens += len(told.token_ids)
        if bound == 0:
            verdict.worst = max(verdict.worst, _worst(told.logprobs, wanted.logprobs))
            found = _differs(told, wanted, whole)
        else:
            verdict.others += told.token_ids != wanted.token_ids[: len(told.token_ids)]
            forced = oracle.forced(request, told.token_ids) if told.logprobs else ()
            verdict.worst = max(verdict.worst, _worst(told.logprobs, forced))
            found = _unequal(told.logprobs, forced, bound)
        if found is not None:
            wrong(f"answer {at}: {found}")
    return None


def _judge_known(verdict: Verdict, run: Run, requests: Mapping[int, Request], oracle: Oracle) -> None:
    """Nobody may know more of a prompt than texts of the same salt have of it."""
    texts: dict[str, list[tuple[tuple[int, ...], int]]] = {}
    for number, right in oracle.known.items():
        if number in run.heard and not run.heard[number].refused:
            prompt, mine = tuple(requests[number].prompt), texts.setdefault(requests[number].salt, [])
            mine += [(prompt + tuple(answer.token_ids), number) for answer in right]
    for each in texts.values():
        each.sort()
    for number, heard in run.heard.items():
        prompt, others = tuple(requests[number].prompt), texts.get(requests[number].salt, [])
        if heard.cached and heard.cached > (most := _shared(prompt, number, others)):
            what = f"it knew {heard.cached} tokens of its prompt, and others of its salt have only {most} of them"
            verdict.differences.append(Difference(number, what))


def _shared(prompt: tuple[int, ...], number: int, texts: Sequence[tuple[tuple[int, ...], int]]) -> int:
    """How many first tokens of a prompt some other text has: the most, by its neighbours in their order."""
    at, found = bisect_left(texts, (prompt, -1)), 0
    for side in (reversed(texts[:at]), iter(texts[at:])):
        near = next((text for text, whose in side if whose != number), ())
        alike = (i for i, (a, b) in enumerate(zip(prompt, near, strict=False)) if a != b)
        found = max(found, next(alike, min(len(prompt), len(near))))
    return found


def _differs(told: Answer, wanted: Answer, whole: bool) -> str | None:
    """The first thing that is not as it should be."""
    mine, right = told.token_ids, wanted.token_ids
    for at, (a, b) in enumerate(zip(mine, right, strict=False)):
        if a != b:
            return f"token {at} is {a} and should be {b}"
    if len(mine) > len(right) or (whole and len(mine) < len(right)):
        return f"it has {len(mine)} tokens and should have {len(right)}"
    if (found := _unequal(told.logprobs, wanted.logprobs[: len(mine)], 0.0)) is not None:
        return found
    if (whole or told.prompt_logprobs) and told.prompt_logprobs != wanted.prompt_logprobs:
        return "log-probabilities of the prompt are others"
    if whole and told.finish_reason != wanted.finish_reason:
        return f"it ended by {told.finish_reason!r} and should by {wanted.finish_reason!r}"
    return f"its text is {told.text!r} and should be {wanted.text!r}" if whole and told.text != wanted.text else None


def _unequal(told: Sequence[Likely], wanted: Sequence[Likely], bound: float) -> str | None:
    """The first of two answers' log-probabilities that differ by more than a bound; at 0, ranks and likeliest tokens
    must be equal too."""
    if len(told) != len(wanted):
        return f"it has {len(told)} log-probabilities and should have {len(wanted)}"
    for at, (a, b) in enumerate(zip(told, wanted, strict=True)):
        if a.token != b.token or abs(a.logprob - b.logprob) > bound or math.isnan(a.logprob - b.logprob):
            return f"token {at} ({a.token}) has log-probability {a.logprob!r} and should have {b.logprob!r}"
        if bound == 0 and a != b:
            return f"token {at} ({a.token}) has rank {a.rank} beside {a.top}, and should have {b.rank} beside {b.top}"
    return None


def _worst(told: Sequence[Likely], wanted: Sequence[Likely]) -> float:
    """The largest difference, as far as tokens are the same."""
    found = 0.0
    for a, b in zip(told, wanted, strict=False):
        if a.token != b.token:
            break
        found = max(found, abs(a.logprob - b.logprob))
    return found
