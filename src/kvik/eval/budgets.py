"""Specs that differ only in how much stays, and the two that any of them is held against: chance, and foresight.

int8+snapkv:25%,recent:64    family 'int8+snapkv,recent:64', budget 25 %
                             chance: int8+random:25%,recent:64 and the same with seed:1 and seed:2
                             foresight: int8+oracle:25%,recent:64
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from kvik.cache.policy import Budget, Policy, Trigger, When
from kvik.cache.spec import PAGE_SIZE, Rule, parse_rules
from kvik.eval.results import Costs, Document, Measured, Protocol

SEEDS = 3
CHANCE, FORESIGHT = "random", "oracle"


@dataclass(frozen=True)
class Family:
    """What specs have in common that differ only in their budget.

    Attributes:
        name: the spec without budgets.
        units: of the budgets; a part of the prompt and a bound on rows are different things.
    """

    name: str
    units: tuple[str, ...]


def family(kv: str) -> tuple[Family, tuple[float, ...]] | None:
    """A spec's family and its budgets, one for each rule that has one; None where everything stays.

    >>> family("int8+snapkv:25%,recent:64")
    (Family(name='int8+snapkv,recent:64', units=('%',)), (25.0,))
    >>> family("int8+window:512,sinks:4")
    (Family(name='int8+window,sinks:4', units=('window',)), (512.0,))
    """
    rules, size = parse_rules(kv)
    names, units, amounts = list[str](), list[str](), list[float]()
    for rule in rules:
        name, policy, window = str(rule), rule.retention.policy, rule.retention.window
        if policy is not None:
            name = name.replace(f":{policy.budget}", "", 1)
            units.append(policy.budget.unit)
            amounts.append(float(policy.budget.amount))
        elif window is not None:
            name = name.replace(f"window:{window}", "window", 1)
            units.append("window")
            amounts.append(float(window))
        names.append(name)
    return (Family(_printed(names, size), tuple(units)), tuple(amounts)) if amounts else None


def families(found: Iterable[Measured]) -> dict[Family, list[Measured]]:
    """Specs by family, in the order in which these first come; of a family, the smallest budget first."""
    out: dict[Family, list[tuple[tuple[float, ...], Measured]]] = {}
    for each in found:
        if (known := family(each.spec)) is not None:
            out.setdefault(known[0], []).append((known[1], each))
    return {name: [it for _, it in sorted(members, key=lambda pair: pair[0])] for name, members in out.items()}


def budget_text(kv: str) -> str:
    """A spec's budgets, for the label of a point of its family.

    >>> budget_text("int8+snapkv:12.5%; layers 0: int8+window:64"), budget_text("int8+keydiff:512rows")
    ('12.5 %, 64', '512')
    """
    found = family(kv)
    assert found is not None, "something is dropped"
    pairs = zip(found[0].units, found[1], strict=True)
    return ", ".join(f"{amount:g} %" if unit == "%" else f"{amount:g}" for unit, amount in pairs)


def baselines(kv: str, prefix: int, protocol: Protocol) -> list[list[str]]:
    """What a spec's policies are held against, at the same budgets and codecs: chance, several seeds of it, and
    foresight. Empty where no policy drops rows, and where it is chance or foresight itself.

    Args:
        kv: the spec.
        prefix: tokens, of which a bound on rows is a part: foresight chooses once, when they are in.
        protocol: where nothing says that a prompt ends, no policy chooses there.
    """
    rules, size = parse_rules(kv)
    policies = [rule.retention.policy for rule in rules if rule.retention.policy is not None]
    policies = [each for each in policies if each.budget.unit != "pages"]
    if protocol == "stream":
        policies = [each for each in policies if each.trigger.when is When.FULL]
    if all(each.method in (CHANCE, FORESIGHT) for each in policies):
        return []
    found = [[_with(rules, size, _random(seed)) for seed in range(SEEDS)]]
    if protocol == "prompt" and all(_percent(each, prefix) < 100 for each in policies):
        found.append([_with(rules, size, lambda policy: _oracle(policy, prefix))])
    return found


def pooled(seeds: Sequence[Measured]) -> Measured:
    """Several seeds as one: their predictions side by side, document by document, and how far their mean KLs lie apart.
    Sizes and times are means."""
    if len(seeds) == 1:
        return seeds[0]
    documents = tuple(map(_together, zip(*(each.documents for each in seeds), strict=True)))
    apart = [each.kl for each in seeds]
    return Measured(seeds[0].spec, documents, (min(apart), max(apart)))


def _together(found: Sequence[Document]) -> Document:
    costs = [each.costs for each in found]

    def mean(name: str, of: Sequence[object]) -> float:
        return statistics.fmean(getattr(each, name) for each in of)

    return Document(
        mean("nll", found), mean("delta", found), tuple(kl for each in found for kl in each.kl),
        sum(each.same for each in found), mean("recall", found),
        Costs(
            costs[0].tokens, round(mean("payload", costs)), round(mean("overhead", costs)),
            max(each.peak for each in costs), mean("kept", costs), mean("first", costs), mean("step", costs),
        ),
        found[0].kept,
    )  # fmt: skip


def _random(seed: int) -> Callable[[Policy], Policy]:
    return lambda policy: replace(policy, method=CHANCE, allocator="uniform", options=(), seed=seed)


def _oracle(policy: Policy, prefix: int) -> Policy:
    budget = Budget(_percent(policy, prefix), "%")
    return Policy(FORESIGHT, "uniform", budget, Trigger(When.PROMPT), policy.sinks, policy.recent)


def _percent(policy: Policy, prefix: int) -> Fraction:
    """A budget as a part of the prefix, in steps that a spec can say, so that it is never fewer rows."""
    if policy.budget.unit == "%":
        return policy.budget.amount
    return Fraction(math.ceil(policy.budget.amount * 100 / prefix * 10_000), 10_000)


def _with(rules: Sequence[Rule], size: int, change: Callable[[Policy], Policy]) -> str:
    """The rules with every policy that drops rows changed, as text."""

    def changed() -> Iterator[str]:
        for rule in rules:
            policy = rule.retention.policy
            if policy is not None and policy.budget.unit != "pages":
                rule = replace(rule, retention=replace(rule.retention, policy=change(policy)))
            yield str(rule)

    return _printed(list(changed()), size)


def _printed(rules: Sequence[str], size: int) -> str:
    return "; ".join([*rules, *([f"page {size}"] if size != PAGE_SIZE else [])])
