"""The pass of the model that some policies ask for before they choose: it repeats what it has read, and what it looks
at while it does stays (KVzip, arXiv:2505.23416).

    the sequence      [ the text ························· ]                        every row is still there
    a fork of it      [ the text ························· ][ order ][ chunk 1 ]    and is trimmed back after it
                      [ the text ························· ][ order ][ 8 ][ chunk 2 ]   8: those before chunk 2
    then              sequence.remember(…): the most attention that each row received; settling lets the policy choose

The order is a sentence of plain text, without the roles of a chat: a text may end within a turn or after one, and some
models know no turns. Without a tokenizer there is none; the tokens before a chunk say where to go on in either case.
Nothing of a pass is left: its rows go with the fork, in which no policy chooses and which publishes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvik.cache.methods import Needs
from kvik.cache.policy import Policy
from kvik.cache.recall import Repeated
from kvik.cache.sequence import Sequence as KVSequence
from kvik.cache.step import Step
from kvik.errors import BudgetError, ContextError, SpecError
from kvik.models.model import Model
from kvik.models.watch import Chunk, Watch
from kvik.ops.reads import Partial

CHUNK = 2048  # tokens that are repeated at once, as in the paper: rows are weighed against those of their chunk
LEAST = 32  # tokens that a repetition is worth the trouble of an order
PIECE = 512  # tokens that go through the model at once: bounds memory
LEAD = 8  # tokens from before a chunk
ORDER = "\n\nRepeat the text above, word for word, from its beginning:\n\n"
GO_ON = "\n\nRepeat the text above, word for word, going on from here:\n\n"

Watched = Callable[[Step], Chunk]


class Pass(Protocol):
    """Shows policies what they ask for, once a text is in and before it settles."""

    def check(self, model: Model, sequence: KVSequence, at: int) -> None:
        """Complains before anything is computed about a pass at position `at` that will not be possible."""

    def take(self, model: Model, sequence: KVSequence, *, watch: Watched | None, stopping: Callable[[], bool]) -> bool:
        """Makes what the sequence's policies ask for here known to it, if anything. False: it was stopped."""


class Repetition:
    """The pass that answers use: the model repeats the text."""

    def __init__(self, *, shrinks: bool = True) -> None:
        """
        Args:
            shrinks: little memory makes the parts shorter that are repeated at once. Rows are weighed against those of
                their part, so that others may stay then.
        """
        self._shrinks = shrinks

    def check(self, model: Model, sequence: KVSequence, at: int) -> None:
        """See `Pass`.

        Raises:
            ContextError: the text and its repetition are more than the model's positions.
            SpecError: the policy is one of evaluation.
        """
        asking = sequence.asking(at)
        for policy in asking.values():
            refuse_foresight(policy)
        if not asking:
            return
        first, positions = min(map(sequence.remembered, asking)), model.config.max_positions
        least = _lead_most(model) + min(LEAST, at - first)
        if at + least > positions:
            raise ContextError(
                f"{next(iter(asking.values()))} lets the model repeat the text, which takes {least} positions or more "
                f"after its {at:,}, and {model.config.name} has {positions:,}; shorten the prompt, or use a method "
                "without a pass, such as 'snapkv'"
            )

    def take(self, model: Model, sequence: KVSequence, *, watch: Watched | None, stopping: Callable[[], bool]) -> bool:
        """See `Pass`. The text goes in parts of equal length, CHUNK at the most; in shorter ones where positions or
        memory leave less.

        Raises:
            ContextError, SpecError: as `check`.
            BudgetError: not even a short part has room, or no part may be shorter for that; nothing changed.
        """
        asking, end = sequence.asking(), len(sequence)
        if not asking:
            return True
        self.check(model, sequence, end)
        first = start = min(map(sequence.remembered, asking))
        most = min(CHUNK, model.config.max_positions - end - _lead_most(model))
        found: dict[int, list[Tensor]] = {group: [] for group in asking}
        with sequence.aside() as fork:
            while start < end:
                heard = Repeated(fork, asking, _next(start, end, most))
                try:
                    if not _repeat(model, fork, heard, watch, stopping):
                        return False
                except BudgetError as error:
                    if not self._shrinks:
                        raise
                    if most <= LEAST:
                        raise BudgetError(
                            f"{next(iter(asking.values()))} lets the model repeat the text, {LEAST} tokens at once at "
                            f"least: {error}", needed=error.needed, available=error.available,
                        ) from None  # fmt: skip
                    most = max(min(most, len(heard.chunk)) // 2, LEAST)
                    continue
                finally:
                    fork.trim(end)
                for group, best in heard.best.items():
                    found[group].append(best)
                start = heard.chunk.stop
        for group, parts in found.items():
            sequence.remember(group, torch.cat(parts, dim=1), first)
        return True


def pass_tokens(model: Model, text: int) -> int:
    """The most tokens that a pass over a text of so many appends at once."""
    return _lead_most(model) + min(text, CHUNK)


def refuse_foresight(policy: Policy) -> None:
    """Raises SpecError if a policy chooses by what nobody can know who uses it."""
    if Needs.FUTURE in policy.needs:
        raise SpecError(
            f"{policy}: an oracle has seen the future, the tokens that come after the prompt, so only 'kvik eval' can "
            f"run it; use a method such as 'kvzip:{policy.budget}'"
        )


class _Listening(Watch):
    """Lets a repetition hear a step's queries, once the step's rows are in."""

    def __init__(self, step: Chunk, heard: Repeated) -> None:
        super().__init__(step)
        self._heard = heard

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        bias: Tensor | None = None,
        want_lse: bool = False,
        want_mass: bool = False,
    ) -> Partial:
        """See `Chunk.attend`."""
        self._heard.hear(layer, q, scale)
        return super().attend(layer, q, scale=scale, softcap=softcap, bias=bias, want_lse=want_lse, want_mass=want_mass)

    def only(self, rows: Sequence[int]) -> None:
        """Never: every query is looked at."""


def _next(start: int, end: int, most: int) -> range:
    """The next of parts of equal length, `most` at the most.

    >>> _next(0, 2500, 2048), _next(1250, 2500, 2048)
    (range(0, 1250), range(1250, 2500))
    """
    parts = -(-(end - start) // most)
    return range(start, start + -(-(end - start) // parts))


def _repeat(
    model: Model, fork: KVSequence, heard: Repeated, watch: Watched | None, stopping: Callable[[], bool]
) -> bool:
    """Takes one repetition through the model. False: it was stopped."""

    def listening(step: Step) -> Chunk:
        return _Listening(step if watch is None else watch(step), heard)

    tokens = _lead(model, fork.tokens, heard.chunk.start) + fork.tokens[heard.chunk.start : heard.chunk.stop]
    for start in range(0, len(tokens), PIECE):
        if stopping():
            return False
        model.run([(fork, tokens[start : start + PIECE])], watch=listening)
    return True


def _lead(model: Model, text: list[int], start: int) -> list[int]:
    """What is said before a repetition from position `start` on: the order, and where to go on."""
    order = [] if model.tokenizer is None else model.tokenizer.encode(GO_ON if start else ORDER)
    return [*order, *text[max(start - LEAD, 0) : start]]


def _lead_most(model: Model) -> int:
    """Tokens of the longest lead."""
    return LEAD + max(len(_lead(model, [], start)) for start in (0, 1))
