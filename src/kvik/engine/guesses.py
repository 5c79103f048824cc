"""Guesses at what answers say next, to be checked in one step (speculative decoding, arXiv:2211.17192, 2302.01318).

A guess costs a row of the step; a right one saves a step. The check takes the token that the answer would have taken
anyway, at every place: chosen from the model's own logits, with the answer's own noise. Guesses stay as far as they
agree with it, and the sequence is trimmed to that. So no token is another for it, whatever the sampling and the batch.

The papers accept a guess x of probability q(x) with probability min(1, p(x) / q(x)) and else draw from what p has more
than q, so that tokens have the model's distribution p. Here each token is the model's own draw and has it for that
reason; one seed is one text, with any guesser and with none. A guess is then right as often as both draw alike. Two
draws with the same Gumbel noise do so with a probability of (1 - d) / (1 + d) at the least, d being the distance of
p and q in total variation, where the papers' rule has 1 - d, the most there is (arXiv:2408.07978): so who guesses by a
distribution draws with the answer's noise (`draft.py`). Of greedy answers both accept the same guesses.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvik.cache.methods import Needs
from kvik.cache.spec import Spec
from kvik.engine.job import Task


class Guesser:
    """Guesses nothing: what others begin from. Of the engine's thread.

    Attributes:
        most: tokens of an answer at once.
    """

    most: int = 0

    def guess(self, asks: Sequence[tuple[Task, int]], reading: int) -> list[list[int]]:
        """What may come next. Never an error for want of room: who can't guess doesn't.

        Args:
            asks: answers that go on, those that go first before others, each with the most tokens that it can use.
            reading: tokens that may be read beside, to know what answers have said so far.

        Returns:
            For each ask up to as many tokens.
        """
        return [[] for _ in asks]

    def checked(self, guessed: int, right: int) -> None:
        """Of an answer's guesses so many were right, up to the first wrong one."""

    def took(self, seconds: float, answers: int, guessed: int) -> None:
        """A step without prompts took so long, guessing included; it had so many answers and guesses."""


def most_guesses(spec: Spec, most: int) -> int:
    """Guesses that can be checked at once where a cache keeps `spec`, `most` at the most.

    None where a policy adds up attention: what a wrong guess's query gave to rows can't be taken back. A policy that
    looks at the last queries must still find them when all guesses are gone.
    """
    for group in spec.groups:
        policy = group.retention.policy
        if policy is not None and Needs.MASS in policy.needs:
            return 0
        if policy is not None and policy.last:
            most = min(most, policy.last - 1)
    return most
