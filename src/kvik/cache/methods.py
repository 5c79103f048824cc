"""Retention methods by name: what each must be shown, its options, and the function that scores.

A new method is one short function in a file of your own:

    from kvik.cache.scorers import scorer

    @scorer("loud")
    def loud(seen):
        \"\"\"Rows whose values are long stay.\"\"\"
        return seen.values.norm(dim=-1)

and `int8+loud:25%` finds it. Keyword-only parameters with a default are its options: with `*, power: float = 0.5` in
the signature, `loud:25%,power:0.3` works too. Whole numbers are at least 1, others are parts from 0 to 1.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import TYPE_CHECKING, Any

from kvik.errors import SpecError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from kvik.cache.seen import Seen

Scorer = Callable[..., "Tensor"]  # (Seen, **options) -> f32 [L, n]; higher stays
Wrapper = Callable[..., "Tensor"]  # (scores f32 [L, n], Seen, **options) -> f32 [L, n]
Options = tuple[tuple[str, "int | float"], ...]

COUNTS = ("sinks", "recent", "every", "seed")  # what every policy takes, whatever its method
FROM_ZERO = ("sinks", "recent", "seed", "skip", "dense")  # whole numbers that may be 0; others are at least 1


class Needs(Flag):
    """What a method must be shown beside keys, values and positions."""

    NOTHING = 0
    QUERIES = auto()  # queries of the last tokens: Seen.queries, Seen.asking
    MASS = auto()  # attention that each row received from every query so far: Seen.mass
    PASS = auto()  # a pass of the model over the text, such as one that repeats it: Seen.repeated
    PAGES = auto()  # bounds of each page's keys, at every query: a way to read, which drops nothing (`cache/quest.py`)
    FUTURE = auto()  # with PASS: of what comes after the prompt, which only an evaluation knows: no method for use


@dataclass(frozen=True)
class Method:
    """One way of telling which rows matter.

    Attributes:
        name: as it stands in a spec string; `chunk(snapkv)` where a wrapper stands around it.
        score: the function; None where rows are chosen for each query and none are dropped.
        needs: what it must be shown.
        last: how many of the last queries it looks at, unless the spec says otherwise; 0 = none.
        options: names and defaults that `score` takes.
        paper: arXiv ids of its docstring; empty where there is none.
    """

    name: str
    score: Scorer | None
    needs: Needs = Needs.NOTHING
    last: int = 0
    options: Options = ()
    paper: str = ""

    @property
    def settings(self) -> Options:
        """Everything that a spec may set: the options, and how many queries are kept."""
        return (("last", self.last), *self.options) if Needs.QUERIES in self.needs else self.options

    def scores(self, seen: Seen, **options: int | float) -> Tensor:
        """f32 [L, n], higher stays; -inf where a lane holds no row, whatever stands there.

        Raises:
            SpecError: the function returned something of another shape.
        """
        assert self.score is not None, f"{self.name} chooses rows for each query; it scores none"
        shown = {Needs.QUERIES: seen.queries, Needs.MASS: seen.mass, Needs.PASS: seen.repeated}
        missing = [need.name for need in shown if need in self.needs and shown[need] is None]
        assert not missing, f"{self.name} was not shown {missing}"
        packed, order = seen.packed()
        scores = self.score(packed, **options)
        if scores.shape != order.shape:
            raise SpecError(
                f"method {self.name!r} returned scores {list(scores.shape)}; it must return one for each row of each "
                f"lane, {list(order.shape)}"
            )
        scores = scores.float().masked_fill(~packed.held, -float("inf"))
        return scores.new_empty(scores.shape).scatter_(1, order, scores)


@dataclass(frozen=True)
class Registry:
    """Methods, and wrappers that change another method's scores, by name."""

    methods: dict[str, Method] = field(default_factory=dict)
    wrappers: dict[str, Wrapper] = field(default_factory=dict)

    def register(self, method: Method) -> None:
        """Adds a method.

        Raises:
            UsageError: its name is taken or can't stand in a spec, an option is no number, or it looks at queries but
                says not how many.
        """
        self._check(method.name, method.options)
        if (Needs.QUERIES in method.needs) != (method.last > 0):
            raise UsageError(f"method {method.name!r}: Needs.QUERIES and last=… go together; give both or neither")
        self.methods[method.name] = method

    def scorer(self, name: str, *, needs: Needs = Needs.NOTHING, last: int = 0) -> Callable[[Scorer], Scorer]:
        """A decorator that adds a scorer: (Seen, *, options) -> f32 [L, n]; higher stays. Raises as `register`.

        Args:
            name: as it shall stand in a spec string.
            needs: what it must be shown beside keys, values and positions.
            last: how many of the last queries it looks at, if any.
        """

        def add(score: Scorer) -> Scorer:
            self.register(Method(name, score, needs, last, options_of(score), papers_of(score)))
            return score

        return add

    def wrapper(self, name: str) -> Callable[[Wrapper], Wrapper]:
        """A decorator that adds a wrapper: (scores, Seen, *, options) -> scores. Raises UsageError as `register`."""

        def add(wrap: Wrapper) -> Wrapper:
            self._check(name, options_of(wrap))
            self.wrappers[name] = wrap
            return wrap

        return add

    def find(self, name: str) -> Method:
        """The method of this name: `snapkv`, or `chunk(snapkv)`.

        Raises:
            SpecError: there is none; says which name looks most like it.
        """
        outer, parenthesis, rest = name.partition("(")
        if not parenthesis:
            if name in self.wrappers:
                raise SpecError(f"{name!r} changes what a method scores; write '{name}(snapkv)'")
            if name not in self.methods:
                offered = [each.name for each in self.methods.values() if Needs.FUTURE not in each.needs]
                raise SpecError(f"{name!r} is no method; use {one_of(name, offered)}")
            return self.methods[name]
        if outer not in self.wrappers:
            raise SpecError(
                f"{name!r}: nothing called {outer!r} goes around a method; use {one_of(outer, self.wrappers)}"
            )
        if not rest.endswith(")"):
            raise SpecError(f"{name!r} doesn't end with the ')' that belongs to {outer!r}")
        return self._wrapped(name, self.wrappers[outer], self.find(rest[:-1]))

    def _wrapped(self, name: str, wrap: Wrapper, base: Method) -> Method:
        own, score = options_of(wrap), base.score
        if score is None:
            raise SpecError(f"{name!r}: {base.name} scores no rows, so that nothing can go around it")
        if shared := sorted(dict(own).keys() & dict(base.options).keys()):
            raise SpecError(f"{name!r}: both take {shared[0]!r}, so that neither could be told; use one of them")

        def both(seen: Seen, **options: int | float) -> Tensor:
            mine = {key: options.pop(key) for key in dict(own) if key in options}
            return wrap(score(seen, **options), seen, **mine)

        papers = ", ".join(filter(None, (papers_of(wrap), base.paper)))
        return Method(name, both, base.needs, base.last, base.options + own, papers)

    def _check(self, name: str, options: Options) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
            raise UsageError(f"{name!r} can't name a method: small letters, then small letters, digits, '-' and '_'")
        if name in self.methods or name in self.wrappers:
            raise UsageError(f"there is a method named {name!r} already; give yours another name")
        for option, usual in options:
            if option in (*COUNTS, "last"):
                raise UsageError(f"method {name!r}: {option!r} is a setting of every policy; rename the option")
            whole = type(usual) is int and usual >= (option not in FROM_ZERO)
            if not whole and not (type(usual) is float and 0 <= usual <= 1):
                raise UsageError(
                    f"method {name!r}: option {option!r} needs a default, a whole number from 1 or a float from 0 to 1"
                )


def options_of(function: Callable[..., Any]) -> Options:
    """Names and defaults of a function's keyword-only parameters."""
    parameters = inspect.signature(function).parameters.values()
    return tuple((p.name, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY)


def papers_of(function: Callable[..., Any]) -> str:
    """The arXiv ids of a function's docstring."""
    return ", ".join(re.findall(r"arXiv:\d{4}\.\d{5}", function.__doc__ or ""))


def one_of(name: str, known: Iterable[str]) -> str:
    """'a, b or c (did you mean 'b'?)', for error messages."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    listed = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)
    return listed + (f" (did you mean {close[0]!r}?)" if close else "")
