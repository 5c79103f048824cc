"""How a cache behaves beside computing: what it says of itself, what a token costs, what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache

from kvik.hf.conformance.given import Given
from kvik.hf.conformance.models import WINDOW, text
from kvik.hf.conformance.subject import Subject, figure, off
from kvik.hf.conformance.verdicts import UnfitError, demand

SHORT, LONG = 64, 512  # tokens at which a step's new bytes are counted
COPIED = 0.25  # of all rows may be copied for each new token; appending in place copies none


def empty(given: Given) -> str:
    """An empty cache counts 0 tokens and is true: code that asks `if past_key_values` must not drop it."""
    subject = given.subject("plain")
    cache = given.cache(subject)
    seen = int(cache.get_seq_length())
    demand(seen == 0, f"an empty cache counts {seen} tokens")
    demand(bool(cache), f"an empty cache is false (len: {len(cache)}), so `if past_key_values:` drops it")
    return f"true, len {len(cache)}"


def lengths(given: Given) -> str:
    """Before every step a cache says how many tokens it has seen and which rows it will show; both come true."""
    subjects = [given.subject(name) for name in ("plain", "mixed")]
    for subject in subjects:
        try:
            _lengths(given, subject)
        except UnfitError:
            demand(subject.name != "plain", "refuses a plain model")
    return "get_seq_length, get_mask_sizes and rows agree"


def _lengths(given: Given, subject: Subject) -> None:
    cache, ids, seen = given.cache(subject), text(3 * WINDOW, 1), 0
    honest, wrong = cache.update, []

    def update(keys: Any, values: Any, layer: int, *rest: Any, **named: Any) -> Any:
        length, start = (int(size) for size in cache.get_mask_sizes(keys.shape[-2], layer))
        shown = honest(keys, values, layer, *rest, **named)
        if start + length < seen + keys.shape[-2]:
            wrong.append(f"its mask ends at {start + length}, before token {seen + keys.shape[-2]}")
        if isinstance(shown[0], Tensor) and shown[0].shape[-2] != length:
            wrong.append(f"get_mask_sizes says {length} rows, update gives {shown[0].shape[-2]}")
        return shown

    cache.update = update
    for piece in (5, 1, 1, WINDOW, 1, 2):
        before = cache.get_seq_length()
        counted = int(before)
        subject.feed(cache, [ids[seen : seen + piece]])
        demand(int(before) == counted, f"a length that was read as {counted} turned into {int(before)} by itself")
        seen += piece
        demand(int(cache.get_seq_length()) == seen, f"it counts {int(cache.get_seq_length())} of {seen} tokens")
        demand(not wrong, "; ".join(wrong[:1]))


class NewBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all tensors that torch's operations make, views and work in place aside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        result = function(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in _tensors([args, kwargs or {}])}
        for made in _tensors([result]):
            if made.untyped_storage().data_ptr() not in known:
                self.count += made.untyped_storage().nbytes()
        return result


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [each for value in values for each in _tensors(value)] if isinstance(values, list | tuple) else []


def growth(given: Given) -> str:
    """A token's cost in new memory does not grow with the text: no row is copied again for every token."""
    subject = given.subject("equal-heads")
    made = []
    for length in (SHORT, LONG):
        cache = given.cache(subject, LONG + 8)
        subject.feed(cache, [text(length, 2)])
        costs = []
        for step in range(5):
            with NewBytes() as counted:
                subject.feed(cache, [text(1, step)])
            costs.append(counted.count)
        made.append(sorted(costs)[2])
    config = subject.model.config
    row = 2 * 4 * config.num_hidden_layers * config.hidden_size
    copied = max(0.0, (made[1] - made[0]) / (LONG - SHORT) / row)
    demand(copied <= COPIED, f"each new token copies {copied:.2g} × all rows before it, counted as f32")
    return f"each new token copies {copied:.2g} × all rows before it"


def no_patch_at_import(given: Given) -> str:
    """Its import changes nothing in transformers: no attention function, no mask, no layer type, no class."""
    module = given.contender.module
    if module.split(".")[0] == "transformers":
        raise UnfitError("is part of transformers")
    script = Path(__file__).with_name("registries.py")
    done = subprocess.run(
        [sys.executable, str(script), module], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )  # fmt: skip
    demand(done.returncode == 0, f"import {module} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    changed = done.stdout.strip()
    demand(not changed, f"import {module} changed {changed}")
    return "nothing changed"


def nothing_left_behind(given: Given) -> str:
    """After use, and close() where there is one, the model is as before: no hook, override, setting or row stays."""
    subject = Subject("plain")
    model, ids = subject.model, text(12, 3)
    before, want = portrait(model), model(input_ids=torch.tensor([ids]), use_cache=False).logits
    cache = given.cache(subject)
    subject.generate(cache, [ids, ids[:5]])
    closes = "close" in dir(cache)
    given.close()
    after = portrait(model)
    notes = [key for key in after.keys() - before.keys() if is_note(after[key])]
    changed = [key for key, value in after.items() if key not in notes and _differs(before.get(key), value)]
    changed += [key for key in before if key not in after]
    demand(not changed, f"changed: {', '.join(changed[:3])}")
    moved = off(model(input_ids=torch.tensor([ids]), use_cache=False).logits, want)
    demand(moved == 0, f"logits without a cache moved by {figure(moved)}")
    left = f", but for a note: {', '.join(notes)}" if notes else ""
    return "as before" + (", after close()" if closes else "") + left


def _differs(before: object, after: object) -> bool:
    return before is not after and (type(before) is not type(after) or before != after)


def is_note(value: Any, depth: int = 8) -> bool:
    """Whether a value is nothing but data: no tensor, module, cache or function is in it or below.

    >>> is_note({"heads": (2, 16)}), is_note([torch.ones(1)]), is_note(print)
    (True, False, False)
    """
    if isinstance(value, int | float | str | bytes | torch.dtype | torch.device | None):
        return True
    if isinstance(value, Tensor | torch.nn.Module | Cache) or callable(value) or depth == 0:
        return False
    if isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    elif "__dict__" in dir(value):
        parts = list(vars(value).values())
    else:
        return False
    return all(is_note(part, depth - 1) for part in parts)


def portrait(model: Any) -> dict[str, object]:
    """All of a model that a cache might change, by name: configurations, hooks, methods and other attributes."""
    found: dict[str, object] = {
        "config": str(model.config.to_dict()),
        "attention": str(model.config._attn_implementation),
        "generation_config": str(model.generation_config.to_dict()),
    }
    for name, module in model.named_modules():
        found[f"{name}: class"] = str(type(module))
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            hooks = key.startswith(("_forward", "_backward", "_state_dict", "_load"))
            found[f"{name}.{key}"] = len(value) if hooks and isinstance(value, dict) else value
    return found
