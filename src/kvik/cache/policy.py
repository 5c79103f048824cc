"""Which rows stay by what they are worth: a method, how its scores are shared out, how much stays, and when.

A policy stands in a spec behind a `+`, where a window would stand:

    snapkv:25%                    a quarter of the prompt's rows, when the prompt ends; later rows all stay
    snapkv:25%,every:128          and again at every 128th position after the prompt: a quarter of the text so far
    keydiff:1024rows              never more than 1024 + 128 rows a lane, during the prompt too
    rkv:512rows,every:64          looked at every 64 positions: never more than 512 + 64
    pyramid(snapkv):25%           lower layers keep more; `ada`: lanes of a layer share; `global`: all lanes share
    ada(chunk(expected)):30%      runs of 20 positions stay or go together
    global(kvzip):25%             as the model looks at them while it repeats the prompt, which the engine sees to
    quest:16pages                 nothing goes; each query after the prompt reads 16 pages of each lane
    h2o:25%,sinks:8,recent:64     the first 8 positions and the last 64 stay whatever they score (by default 4 and 32)

Everything here is arithmetic on counts and positions; tensors come in with `apply`, and torch with the first name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from kvik.cache.methods import COUNTS, FROM_ZERO, Method, Needs, Options, one_of, options_of
from kvik.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from kvik.cache.seen import Seen

EVERY = 128  # positions between two looks at a bound on rows


class When(Enum):
    """At which positions a policy may drop rows."""

    PROMPT = "the prompt ends"
    FULL = "more rows are held than the budget"
    NEVER = "never"


@dataclass(frozen=True)
class Trigger:
    """The positions at which rows may be dropped. A position is the number of tokens seen; positions, and not ends of
    chunks, so that the cut can't show.

    Attributes:
        when: PROMPT: at the prompt's end, and every so many positions after it where `every` says so. FULL: at all
            multiples of `every`, from 0. NEVER.
        every: positions between two of them; None = once.
    """

    when: When
    every: int | None = None

    def next(self, position: int, prompt: int | None) -> int | None:
        """The first such position after `position`; None = there is none. Without a known prompt it never ends."""
        if self.when is When.FULL and self.every is not None:
            return (position // self.every + 1) * self.every
        if self.when is not When.PROMPT or prompt is None:
            return None
        if position < prompt:
            return prompt
        return None if self.every is None else prompt + ((position - prompt) // self.every + 1) * self.every

    def latest(self, position: int, prompt: int | None) -> int | None:
        """The last such position up to `position`, itself included; None = there was none."""
        if self.when is When.FULL and self.every is not None:
            return position // self.every * self.every or None
        if self.when is not When.PROMPT or prompt is None or not 0 < prompt <= position:
            return None
        return prompt if self.every is None else prompt + (position - prompt) // self.every * self.every


@dataclass(frozen=True)
class Budget:
    """How much stays.

    Attributes:
        amount: percent of the tokens seen, or rows a lane on average, or pages that a query reads of each lane.
        unit: which of them.
    """

    amount: Fraction
    unit: Literal["%", "rows", "pages"]

    def __str__(self) -> str:
        return f"{float(self.amount):g}%" if self.unit == "%" else f"{int(self.amount)}{self.unit}"


@dataclass(frozen=True)
class Policy:
    """Which rows stay by what they are worth.

    Rows that a policy drops are gone: later queries don't see them, and later rows depend on that.

    Attributes:
        method: name of a method in `cache/scorers.py`, with what stands around it: `chunk(snapkv)`.
        allocator: name in `cache/allocators.py`: how lanes share the budget.
        budget: `p%` is a part of the tokens seen when the trigger fires; `Nrows` bounds the rows held; `Npages` is what
            a query reads, and nothing is dropped.
        trigger: when rows are dropped.
        sinks: first positions that stay whatever they score.
        recent: last positions that stay whatever they score.
        options: what the method and the allocator take, where it isn't their default.
        seed: for what is random.
    """

    method: str
    allocator: str
    budget: Budget
    trigger: Trigger
    sinks: int = 4
    recent: int = 32
    options: tuple[tuple[str, int | float], ...] = ()
    seed: int = 0

    @classmethod
    def parse(cls, part: str, spec: str | None = None) -> Policy:
        """Reads one policy, such as `ada(snapkv):25%,recent:64`.

        Args:
            part: the policy.
            spec: the whole spec that it stands in, for messages.

        Raises:
            SpecError: one line that names the part that is wrong and what would be right there.
        """
        try:
            return _parsed(part)
        except SpecError as error:
            shown = part if spec is None else spec
            shown = shown if len(shown) <= 200 else shown[:200] + "…"
            raise SpecError(f"{'policy' if spec is None else 'spec'} {shown!r}: {error}") from None

    @property
    def scoring(self) -> Method:
        """The method itself."""
        return _method(self.method)

    @property
    def needs(self) -> Needs:
        """What the method must be shown beside keys, values and positions."""
        return self.scoring.needs

    @property
    def last(self) -> int:
        """How many of the last queries the method looks at; 0 = none."""
        return int(dict(self.options).get("last", self.scoring.last))

    @property
    def pages(self) -> int | None:
        """Pages that a query reads of each lane; None where rows are dropped instead."""
        return int(self.budget.amount) if self.budget.unit == "pages" else None

    def option(self, name: str) -> int | float:
        """An option's value: the policy's, else the method's or allocator's default."""
        return dict(self.options).get(name, dict(_settings(self.method, self.allocator))[name])

    def fires(self, position: int, prompt: int | None, held_rows: float) -> bool:
        """Whether rows are dropped now: it is a position of the trigger, and more is held than the budget.

        Args:
            position: tokens seen, that is the next position.
            prompt: tokens of the prompt; None = not known, and a part of it is then never taken.
            held_rows: rows a lane holds, on average over the policy's lanes.
        """
        return self.trigger.latest(position, prompt) == position and held_rows > self.budget_at(position)

    def first(self, prompt: int) -> int | None:
        """The first position at which rows are dropped; None = none up to the prompt's end, that end aside."""
        if self.trigger.when is not When.FULL:
            return None
        at = self.trigger.next(int(self.budget.amount), prompt)
        return at if at is not None and at <= prompt else None

    def next_trigger(self, position: int, prompt: int | None, page_size: int) -> int | None:
        """The first position after `position` at which rows may be dropped: a chunk must not reach beyond it.
        None = there is none.

        Where queries choose pages: the end of the prompt, whose queries read everything, and then each page's end,
        where its keys' extremes become known.
        """
        if self.pages is None:
            return self.trigger.next(position, prompt)
        return prompt if prompt and position < prompt else (position // page_size + 1) * page_size

    def budget_at(self, tokens: int) -> int:
        """Rows a lane keeps, on average, if the trigger fires after `tokens` tokens: `p%` is rounded down. Sinks and
        recent rows stay even where they are more."""
        if self.budget.unit == "%":
            return int(tokens * self.budget.amount // 100)
        return tokens if self.pages is not None else int(self.budget.amount)

    def rows(self, tokens: int, prompt: int | None = None, page_size: int = 1) -> int:
        """Rows a lane holds of a text of `tokens` tokens, on average, once settled: exact where the allocator uses its
        whole budget, never too few.

        Args:
            tokens: of the text.
            prompt: how many of them are the prompt; None = all.
            page_size: of pages that stay whole while they are open.
        """
        fired = self.trigger.latest(tokens, tokens if prompt is None else prompt)
        return tokens if fired is None else self._left(fired, page_size) + tokens - fired

    def peak(self, tokens: int, prompt: int | None = None) -> int:
        """The most rows a lane holds, on average, at any time until `tokens` tokens are seen."""
        prompt = tokens if prompt is None else prompt
        fired = self.trigger.latest(tokens, prompt)
        if fired is None:
            return tokens
        before = self.rows(fired - 1, prompt) + 1
        return max(before, self.rows(tokens, prompt), prompt if self.trigger.when is When.PROMPT else 0)

    def staying(self, fired: int, page_size: int) -> int:
        """How many last positions stay whatever they score: `recent`, and no fewer than the open page has."""
        return max(self.recent, fired % page_size)

    def _left(self, fired: int, page_size: int = 1) -> int:
        """Rows a lane holds at most when the trigger has fired."""
        return min(fired, max(self.budget_at(fired), self.sinks + self.staying(fired, page_size)))

    def __str__(self) -> str:
        name = self.method if self.allocator == "uniform" else f"{self.allocator}({self.method})"
        usual = EVERY if self.trigger.when is When.FULL else None
        parts = [("sinks", self.sinks, 4), ("recent", self.recent, 32), ("every", self.trigger.every, usual)]
        items = [f"{key}:{value}" for key, value, default in [*parts, ("seed", self.seed, 0)] if value != default]
        return ",".join([f"{name}:{self.budget}", *items, *(f"{key}:{_digits(value)}" for key, value in self.options)])


def apply(policy: Policy, seens: Iterable[Seen]) -> list[Tensor]:
    """Which rows stay, now that the trigger fires: bool [L, n] for each layer, never a row that isn't held.

    Scores each layer, protects positions < `sinks` and ≥ tokens - `recent`, and shares out `budget_at(tokens)`.
    Modifies nothing.

    Args:
        policy: of the group; one that drops rows.
        seens: a layer each, in order; all after the same number of tokens. Each is let go before the next is asked for,
            so that a generator needs one layer's decoded rows at a time.
    """
    from kvik.cache.allocators import ALLOCATORS

    method, chosen = policy.scoring, dict(policy.options)
    options = {name: chosen[name] for name, _ in method.options if name in chosen}
    scores, held, protected, budget = [], [], [], 0
    for layer, seen in enumerate(seens):
        # A random method draws by lane and position: layers need seeds of their own.
        scores.append(method.scores(replace(seen, seed=(seen.seed << 20) + layer), **options))
        held.append(seen.held)
        edges = (seen.positions < policy.sinks) | (seen.positions >= seen.tokens - policy.recent)
        protected.append(seen.held & edges)
        budget = policy.budget_at(seen.tokens)
        del seen
    allocate = ALLOCATORS[policy.allocator]
    shares = {name: chosen[name] for name, _ in options_of(allocate) if name in chosen}
    return allocate(scores, held, protected, budget, **shares)


def _method(name: str) -> Method:
    from kvik.cache.scorers import METHODS  # torch: not until a policy is named

    return METHODS.find(name)


def _settings(method: str, allocator: str) -> Options:
    """Everything that may be set, and its default: the method's, then the allocator's."""
    from kvik.cache.allocators import ALLOCATORS

    mine, shares = _method(method).settings, options_of(ALLOCATORS[allocator])
    if both := sorted(dict(mine).keys() & dict(shares).keys()):
        raise SpecError(
            f"{method!r} and {allocator!r} both take {both[0]!r}, so that neither could be told; use one of them"
        )
    return (*mine, *shares)


def _parsed(part: str) -> Policy:
    if len(part) > 1000:
        raise SpecError(f"it has {len(part):,} characters; 1,000 are enough for any")
    head, _, tail = part.partition(":")
    head = "".join(head.split())
    allocator, name = _named(head)
    method, settings = _method(name), _settings(name, allocator)
    amount, *items = (item.strip() for item in tail.split(","))
    budget = _budget(amount, head, method)
    values = _items(items, settings)
    counts = {key: int(values.pop(key)) for key in COUNTS if key in values}
    every = counts.pop("every", None)
    if method.needs & (Needs.PASS | Needs.PAGES) and every is not None:
        raise SpecError(
            f"'every:{every}' says nothing of {name!r}, which has no later positions to act at; leave it out"
        )
    options = tuple((key, values[key]) for key, usual in settings if values.get(key, usual) != usual)
    policy = Policy(name, allocator, budget, _trigger(budget, every), options=options, **counts)
    fixed = policy.sinks + policy.recent
    if budget.unit == "rows" and budget.amount < fixed:
        raise SpecError(
            f"{budget} are fewer than the {fixed} that always stay; give at least {fixed}rows, or lower recent"
        )
    return policy


def _named(head: str) -> tuple[str, str]:
    """(allocator, method) of `ada(snapkv)`."""
    from kvik.cache.allocators import ALLOCATORS
    from kvik.cache.scorers import METHODS

    outer, parenthesis, rest = head.partition("(")
    if outer in ALLOCATORS:
        if not rest.endswith(")") or not rest[:-1]:
            raise SpecError(f"{head!r} shares out what a method scores; write '{outer}(snapkv):25%'")
        if METHODS.find(rest[:-1]).score is None:
            raise SpecError(
                f"{head!r}: {rest[:-1]} drops no rows, so that there is nothing to share out; write it alone"
            )
        return outer, rest[:-1]
    if parenthesis and outer not in METHODS.wrappers:
        around = one_of(outer, [*ALLOCATORS, *METHODS.wrappers])
        raise SpecError(f"{head!r}: nothing called {outer!r} goes around a method; use {around}")
    return "uniform", head


def _budget(text: str, head: str, method: Method) -> Budget:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,4})?)\s*(%|rows|pages)", text)
    unit = match[2] if match else ""
    reads = Needs.PAGES in method.needs
    fits = unit == "pages" if reads else unit == "%" or (unit == "rows" and Needs.PASS not in method.needs)
    if not text:
        raise SpecError(f"{head!r} says not how much stays; write '{_example(head, method)}'")
    if match is None or not fits:
        raise SpecError(f"{text!r} is no budget of {method.name!r}; write '{_example(head, method)}'")
    amount = Fraction(match[1])
    if amount == 0 or (unit == "%" and amount > 100) or (unit != "%" and "." in match[1]):
        right = "more than 0 and at most 100" if unit == "%" else "a whole number, at least 1"
        raise SpecError(f"{text!r} can't be kept; what stands before {unit!r} is {right}")
    kinds: dict[str, Literal["%", "rows", "pages"]] = {"%": "%", "rows": "rows", "pages": "pages"}
    return Budget(amount, kinds[unit])


def _example(head: str, method: Method) -> str:
    if Needs.PAGES in method.needs:
        return f"{head}:16pages"
    return f"{head}:25%" if Needs.PASS in method.needs else f"{head}:25%' or '{head}:1024rows"


def _trigger(budget: Budget, every: int | None) -> Trigger:
    if budget.unit == "pages":
        return Trigger(When.NEVER)
    return Trigger(When.PROMPT, every) if budget.unit == "%" else Trigger(When.FULL, every or EVERY)


def _items(items: list[str], settings: Options) -> dict[str, int | float]:
    """`name:number` items, checked: whole numbers where the default is one, else parts from 0 to 1."""
    known = {**dict.fromkeys(COUNTS, 0), **dict(settings)}
    values: dict[str, int | float] = {}
    for item in items:
        name, _, text = (piece.strip() for piece in item.partition(":"))
        if name not in known:
            raise SpecError(f"{item!r} is no setting; use {one_of(name, known)}, as in 'recent:64'")
        if name in values:
            raise SpecError(f"{name!r} is given twice; give it once")
        values[name] = _number(item, name, text, known[name])
    return values


def _number(item: str, name: str, text: str, usual: int | float) -> int | float:
    if isinstance(usual, int):
        least = 0 if name in FROM_ZERO else 1
        if re.fullmatch(r"[0-9]{1,9}", text) and int(text) >= least:
            return int(text)
        raise SpecError(f"{item!r} needs a whole number from {least}, as in '{name}:{usual or 64}'")
    if re.fullmatch(r"[01](\.[0-9]{1,6})?", text) and float(text) <= 1:
        return float(text)
    raise SpecError(f"{item!r} needs a part from 0 to 1, as in '{name}:{_digits(usual or 0.1)}'")


def _digits(value: int | float) -> str:
    """A number as `_number` reads it."""
    return f"{value:.6f}".rstrip("0").rstrip(".")
