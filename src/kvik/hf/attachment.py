"""What kvik puts on a model, and takes away again: two hooks around its forward.

The first opens a step of the cache that the forward was given and, where attention reads pages, sets the attention of
the model's configuration; the second ends the step and sets it back. A forward with another cache, or none, is left as
it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kvik.hf.asking import name_for
from kvik.hf.finding import Found
from kvik.hf.pieces import Pieces
from kvik.ops.loader import spinning

_PATIENCE = 20  # microseconds: torch's threads take the cores between two layers' attention


class Stepping(Protocol):
    """A cache that takes steps."""

    @property
    def attachment(self) -> Attachment:
        """The model that it was made for."""

    def cut(self, forward: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], Pieces | None]:
        """A forward is about to begin, and may go through the model in pieces."""

    def enter(self, inputs: dict[str, Any]) -> None:
        """A forward begins."""

    def leave(self, done: bool) -> None:
        """It is over; not done: it failed."""


class Attachment:
    """One model's hooks, shared by its caches.

    Attributes:
        model: it.
        decoder: the part of it whose layers keep rows.
        found: how it asks.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.decoder = model, model.get_decoder()
        self._users = 0
        self._hooks: list[Any] = []
        self._stack: list[tuple[nn.Module, Stepping, Pieces | None]] = []
        self._own: list[tuple[PretrainedConfig, str]] = []
        self._configs = configs_of(self.decoder)
        self._signatures: dict[nn.Module, inspect.Signature] = {}
        self.found: Found | None = None

    def hold(self) -> Attachment:
        """One more cache uses it: the first puts the hooks on."""
        if self._users == 0:
            whole = [] if self.model.config.is_encoder_decoder else [self.model, self.model.base_model]
            for module in dict.fromkeys([*whole, self.decoder]):
                before = module.register_forward_pre_hook(_Before(self), with_kwargs=True)
                after = module.register_forward_hook(self._after, always_call=True)
                self._hooks += [before, after]
        self._users += 1
        return self

    def release(self) -> None:
        """One cache fewer uses it: the last takes the hooks away."""
        self._users -= 1
        if self._users == 0:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self._restore()

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A forward begins, perhaps inside another's. Returns other inputs for it, if it gets others."""
        inputs = kwargs
        if args:
            if module not in self._signatures:
                self._signatures[module] = inspect.signature(module.forward)
            inputs = named(self._signatures[module], args, kwargs)
        cache: Stepping | None = inputs.get("past_key_values")
        if getattr(cache, "attachment", None) is not self or cache is None:
            return None
        if self._stack and self._stack[-1][1] is cache and self._stack[-1][0] is not module:
            return None  # the outer one has opened the step
        self._stack = [each for each in self._stack if each[1] is not cache]  # left over from one that was interrupted
        inputs, pieces = cache.cut(module, inputs)
        cache.enter(inputs)
        if not self._stack:
            before = spinning(_PATIENCE)
            self._patience = self._patience if before == _PATIENCE else before  # a forward was interrupted
        self._stack.append((module, cache, pieces))
        if self.found is not None and self.found.direct and not self._own:
            self._own = [(config, config._attn_implementation) for config in self._configs]
            for config, original in self._own:
                config._attn_implementation_internal = name_for(original or "eager")
        return None if pieces is None else ((), inputs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> object:
        if not self._stack or self._stack[-1][0] is not module:
            return None
        _, cache, pieces = self._stack.pop()
        if not self._stack:
            self._restore()
            spinning(self._patience)
        cache.leave(output is not None)
        return None if pieces is None or output is None else pieces.joined(output)

    def _restore(self) -> None:
        for config, original in self._own:
            config._attn_implementation_internal = original
        self._own = []


class _Before:
    """The first hook. Whoever looks for a model's attachment finds it here."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        return self.attachment.before(module, args, kwargs)


def attachment_of(model: PreTrainedModel, find: Callable[[Attachment], Found]) -> Attachment:
    """A model's, held; the one that is there, if caches of it are open.

    Args:
        find: finds out how the model asks; what it found stays with the model.
    """
    hooks = model.get_decoder()._forward_pre_hooks.values()
    attachment = next((hook.attachment for hook in hooks if isinstance(hook, _Before)), None) or Attachment(model)
    attachment.hold()
    try:
        known = vars(model).get("_kvik_found")
        attachment.found = known if isinstance(known, Found) and known.fits(model) else find(attachment)
    except BaseException:
        attachment.release()
        raise
    model._kvik_found = attachment.found
    return attachment


def named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's inputs by name."""
    bound = signature.bind_partial(*args, **kwargs)
    rest = [p.name for p in bound.signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    more = {name: x for part in rest for name, x in bound.arguments.get(part, {}).items()}
    return {**{name: x for name, x in bound.arguments.items() if name not in rest}, **more}


def configs_of(decoder: nn.Module) -> list[PretrainedConfig]:
    """The configurations that a decoder's modules read."""
    found = {id(module.config): module.config for module in decoder.modules() if isinstance(module, PreTrainedModel)}
    for module in decoder.modules():
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig):
            found.setdefault(id(config), config)
    return list(found.values())
