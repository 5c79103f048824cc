"""The classes under test, and how each is made: `Contender.how` says it, and is shown with what was found."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.cache_utils import QuantizedCache

from kvik.errors import UsageError

BACKENDS = ("fp8", "quanto", "hqq")
GROUP = 16  # values with one scale, and tokens that stay as they are: what the tiny models' sizes allow
Make = Callable[[Any, int], Any]  # (model, tokens that must fit) -> an empty cache
KNOWN = (
    "dynamic, dynamic:bare, static, quantized (fp8), quantized:quanto, quantized:hqq, kvik, kvik:SPEC, or module:Class"
)


@dataclass(frozen=True)
class Contender:
    """A cache class under test.

    Attributes:
        name: as it was asked for.
        how: the call that makes one.
        make: makes an empty one for a model and a number of tokens.
        module: what is imported for it.
        lossy: whether it stores less than it is given, so that logits may differ a little.
    """

    name: str
    how: str
    make: Make
    module: str
    lossy: bool = False


def contender(name: str, *, lossy: bool = False) -> Contender:
    """The class that a name stands for.

    Args:
        name: one of KNOWN.
        lossy: said of a `module:Class` whose logits may differ a little.

    Raises:
        UsageError: for an unknown name, or one that can't be imported or called.
    """
    kind, _, rest = name.partition(":")
    if name in ("dynamic", "dynamic:bare", "static"):
        return _shipped(name)
    if kind == "quantized" and (not rest or rest in BACKENDS):
        return _quantized(name, rest or "fp8")
    if kind == "kvik":
        return _kvik(name, rest)
    if rest and kind.replace(".", "").isidentifier():
        return _foreign(name, kind, rest, lossy)
    raise UsageError(f"--cache {name} is unknown: give {KNOWN}")


def _shipped(name: str) -> Contender:
    if name == "static":

        def static(model: Any, room: int) -> Any:
            return transformers.StaticCache(config=model.config, max_cache_len=room)

        return Contender(name, "StaticCache(config=model.config, max_cache_len=…)", static, "transformers")
    if name == "dynamic":

        def dynamic(model: Any, room: int) -> Any:
            return transformers.DynamicCache(config=model.config)

        return Contender(name, "DynamicCache(config=model.config)", dynamic, "transformers")
    return Contender(name, "DynamicCache()", lambda model, room: transformers.DynamicCache(), "transformers")


def _quantized(name: str, backend: str) -> Contender:
    settings: dict[str, Any] = {}
    if backend != "fp8":
        axis = 0 if backend == "quanto" else 1
        settings = dict(nbits=4, q_group_size=GROUP, residual_length=GROUP, axis_key=axis, axis_value=axis)

    def make(model: Any, room: int) -> Any:
        return QuantizedCache(backend=backend, config=model.config, **settings)

    said = "".join(f", {key}={value}" for key, value in settings.items())
    how = f'QuantizedCache("{backend}", config=model.config{said})'
    return Contender(name, how, make, "transformers", lossy=True)


def _kvik(name: str, spec: str) -> Contender:
    hf = importlib.import_module("kvik.hf")
    if "Cache" not in dir(hf):
        raise UsageError("--cache kvik: this build has no kvik.hf.Cache; name another class")
    arguments = [spec] if spec else []
    how = f"kvik.hf.Cache(model{''.join(f', {spec!r}' for spec in arguments)})"
    return Contender(
        name, how, lambda model, room: hf.Cache(model, *arguments), "kvik.hf", lossy=spec not in ("", "f32")
    )


def _foreign(name: str, module: str, attribute: str, lossy: bool) -> Contender:
    """`module:Class`: called with config=model.config where it has a parameter `config`, else with the model."""
    try:
        called = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--cache {name} can't be imported: {error}") from error
    if not callable(called):
        raise UsageError(f"--cache {name} is no class or function; name one that makes a cache of a model")
    takes = inspect.signature(called).parameters
    known = {"config", "max_cache_len"} if "config" in takes else set(list(takes)[:1])
    needed = [
        key
        for key, parameter in takes.items()
        if parameter.default is parameter.empty and parameter.kind.name[:3] not in ("VAR",) and key not in known
    ]
    if needed or not takes:
        why = f"needs {', '.join(needed)}" if needed else "takes no model and no config"
        raise UsageError(f"--cache {name} {why}; write a function of a model alone, and name that: module:function")
    if "config" not in takes:
        return Contender(name, f"{attribute}(model)", lambda model, room: called(model), module, lossy)
    sized = "max_cache_len" in takes

    def make(model: Any, room: int) -> Any:
        return called(config=model.config, **({"max_cache_len": room} if sized else {}))

    how = f"{attribute}(config=model.config{', max_cache_len=…' if sized else ''})"
    return Contender(name, how, make, module, lossy)
