"""Runs cases, each by itself: an error in one is that one's finding."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator

import torch

from kvik.errors import UsageError
from kvik.hf.conformance.caches import Contender
from kvik.hf.conformance.cases import Case
from kvik.hf.conformance.given import Given
from kvik.hf.conformance.verdicts import BrokenError, Finding, UnfitError, Verdict, first_line


def run(contender: Contender, cases: Iterable[Case]) -> Iterator[Finding]:
    """One finding for each case, as they come.

    Raises:
        UsageError: no cache of this class can be made for a plain model.
    """
    given = Given(contender)
    try:
        given.cache(given.subject("plain"))
    except UnfitError as refusal:
        raise UsageError(f"--cache {contender.name}: {contender.how} {refusal}") from refusal
    given.close()
    for case in cases:
        yield examine(given, case)


def examine(given: Given, case: Case) -> Finding:
    """What comes of one case."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            try:
                verdict, seen = Verdict.HOLDS, case.check(given)
            finally:
                given.close()
    except BrokenError as broken:
        verdict, seen = Verdict.BROKEN, str(broken)
    except UnfitError as unfit:
        verdict, seen = Verdict.UNFIT, str(unfit)
    except Exception as crash:
        verdict, seen = Verdict.CRASHED, first_line(crash)
    return Finding(case.name, given.contender.name, verdict, seen, time.perf_counter() - start)
