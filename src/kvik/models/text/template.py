"""A model's chat template: a Jinja program from a stranger, rendered in a sandbox and within a budget.

The sandbox (jinja2's immutable one, as in transformers) keeps the program from Python's internals. The budget keeps it
from running or growing without end: every loop step, call and printed character is counted, and one operation may make
at most `MOST_MADE` characters or items. That is a bound on memory, and on time for all that a program loops over; it is
not a promise of milliseconds.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from types import GeneratorType
from typing import TYPE_CHECKING, Any, TypeVar

from kvik.errors import TokenizerError

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.environment import Template
    from jinja2.parser import Parser
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_SOURCE = 2**20  # characters of a template
MOST_WORK = 2**24  # loop steps, calls and printed characters of one rendering
MOST_MADE = 2**28  # characters or items that one operation could make at most
_WIDE = re.compile(r"\d{5,}")  # in a format text: a width of 10,000 characters or more


_T = TypeVar("_T")


class _RefusedError(Exception):
    """The template asked for more than its budget, or called raise_exception."""


class ChatTemplate:
    """A compiled chat template. Safe to render from several threads; each waits for the other.

    Raises:
        TokenizerError: the source is no Jinja template, or is longer than `MOST_SOURCE`.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MOST_SOURCE:
            raise TokenizerError(f"the chat template has {len(source)} characters, above {MOST_SOURCE}; use --raw")
        self._budget = _Budget()
        self._lock = threading.Lock()
        self._template: Template = _guarded(lambda: _compile(source, self._budget))

    def render(self, variables: Mapping[str, object]) -> str:
        """The text of a conversation. Raises TokenizerError where the template refuses, fails or exceeds its budget."""
        plain = _guarded(lambda: _plain(variables))
        with self._lock:
            self._budget.spent = 0
            return _guarded(lambda: self._template.render(plain))


class _Budget:
    """What one rendering has spent so far, in loop steps, calls and characters."""

    def __init__(self) -> None:
        self.spent = 0

    def spend(self, amount: int) -> None:
        self.spent += amount
        if self.spent > MOST_WORK:
            raise _RefusedError("it loops or prints without end")

    def steps(self, items: Iterable[Any], weight: int) -> Iterator[Any]:
        """The items, each paid for with the literal text that its step may print."""
        for item in items:
            self.spend(weight)
            yield item

    def printed(self, value: Any) -> Any:
        """The value, paid for; only what has a bounded text may be printed."""
        from jinja2 import Undefined

        if value is not None and not isinstance(value, str | int | float | list | tuple | dict | Undefined):
            raise _RefusedError(f"it prints a {type(value).__name__}")
        self.spend(1 + _size(value))
        return value

    def joined(self, values: list[Any]) -> str:
        """Jinja's `a ~ b`."""
        return "".join(str(self.printed(value)) for value in values)


def _guarded(action: Callable[[], _T]) -> _T:
    """What the action gives; every way in which a template can fail becomes one line."""
    try:
        return action()
    except TokenizerError:
        raise
    except (RecursionError, MemoryError):
        reason = "it nests or grows without end"
    except Exception as error:  # a template can raise any exception by what it computes
        reason = " ".join(f"{error}".split())[:200] or type(error).__name__
    raise TokenizerError(f"the model's chat template can't be used: {reason}; use --raw to send text without it")


def _plain(value: object) -> object:
    """JSON types rebuilt, so that the template meets no object with methods of its own."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TokenizerError(f"a message holds a {type(value).__name__}, but only JSON values have a text; pass a string")


def _size(value: Any) -> int:
    """Characters and items in a value, all the way down; refuses at `MOST_MADE`, so shared parts can't explode."""
    total, stack = 0, [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, dict):
            total += len(item)
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            total += len(item)
            stack += item
        if total > MOST_WORK:
            raise _RefusedError("it makes a value without end")
    return total


def _weigh(operands: Iterable[Any]) -> None:
    """Refuses an operation whose result could be larger than `MOST_MADE`: the product of all sizes and numbers."""
    made = 1.0
    for operand in operands:
        if isinstance(operand, int):
            made *= max(1, min(abs(operand), 2**64))
        else:
            made *= max(1, _size(operand))
    if made > MOST_MADE:
        raise _RefusedError("it makes a value without end")


def _binary(operator: str, left: Any, right: Any) -> None:
    """Refuses `left operator right` where the result would be out of all proportion."""
    if operator == "**":
        if isinstance(right, int | float) and abs(right) > 64:
            raise _RefusedError("it takes a power above 64")
        if isinstance(left, int) and left.bit_length() > 64:
            raise _RefusedError("it takes a power of a number above 2**64")
    elif isinstance(left, int | float) and isinstance(right, int | float):
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 4096:
            raise _RefusedError("it computes a number above 2**4096")
    elif operator == "+":
        _size((left, right))
    else:
        _narrow(left)
        _weigh((left, right))


def _narrow(text: object) -> None:
    """Refuses a format text that pads to 10,000 characters or more."""
    if isinstance(text, str) and _WIDE.search(text):
        raise _RefusedError("it pads a text without end")


def _compile(source: str, budget: _Budget) -> Template:
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Counted(NodeTransformer):
        """Loops and joins go through filters that count."""

        def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
            self.generic_visit(node)
            weight = nodes.Const(1 + sum(len(text.data) for text in node.find_all(nodes.TemplateData)))
            node.iter = nodes.Filter(node.iter, "kvik_steps", [weight], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
            self.generic_visit(node)
            parts = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(parts, "kvik_joined", [], [], None, None, lineno=node.lineno)

    environment = _environment(budget, literal=len(source))
    tree = Counted().visit(environment.parse(source))
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _environment(budget: _Budget, literal: int) -> ImmutableSandboxedEnvironment:
    """The sandbox with transformers' extras, counting into the budget; macros cost the template's length a call."""
    from jinja2 import pass_context
    from jinja2.runtime import Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "-", "*", "**", "%"))

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            budget.spend(1)
            _binary(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            budget.spend(1 + (literal if isinstance(obj, Macro) else 0))
            method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
            if not isinstance(obj, Macro):
                owner = getattr(method, "__self__", None)
                if getattr(method, "__name__", "") in ("format", "format_map"):
                    _narrow(owner)
                _weigh((owner, *args, *kwargs.values()))
            return super().call(context, obj, *args, **kwargs)

    @pass_context
    def printed(context: Context, value: Any) -> Any:
        return budget.printed(value)

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # nothing is computed at compile time, outside the budget
        finalize=printed,
        extensions=[_generation_tag(), "jinja2.ext.loopcontrols"],
    )
    filters: dict[str, Callable[..., Any]] = {**environment.filters, "tojson": _tojson}
    environment.filters = {name: _weighed(name, function) for name, function in filters.items()}
    environment.filters |= {"kvik_steps": budget.steps, "kvik_joined": budget.joined}
    del environment.globals["lipsum"]
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _namespace_class(),
    }
    return environment


def _weighed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, refusing what could make too much of its value and arguments."""
    from functools import wraps

    from jinja2.environment import Environment
    from jinja2.nodes import EvalContext
    from jinja2.runtime import Context

    @wraps(function)  # keeps the marks by which jinja passes its context first
    def weighed(*args: Any, **kwargs: Any) -> Any:
        given = [list(a) if isinstance(a, GeneratorType) else a for a in args]
        values = [a for a in (*given, *kwargs.values()) if not isinstance(a, Environment | EvalContext | Context)]
        if name == "format":
            _narrow(values[0])
        _weigh(values)
        return function(*given, **kwargs)

    return weighed


def _generation_tag() -> type[Any]:
    """`{% generation %}`: marks what the assistant says, for training; here its body is rendered and no more."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return Generation


def _namespace_class() -> type[Any]:
    """Jinja's namespace, without names that begin with an underscore."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class TemplateNamespace(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            for name in dict(*args[1:], **kwargs):
                _refuse_private(name)
            Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_private(name)
            super().__setitem__(name, value)

    def _refuse_private(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"it stores the name {name[:40]!r} in a namespace")

    return TemplateNamespace


def _raise_exception(message: object) -> None:
    raise _RefusedError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, as transformers has it."""
    if isinstance(indent, int) and indent > 64:
        raise _RefusedError("it indents JSON by more than 64")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    _narrow(format)
    return datetime.now().strftime(format)
