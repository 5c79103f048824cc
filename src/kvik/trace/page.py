"""A trace as one HTML file that needs nothing else: no network, no library, works from file://.

What the page holds beside the text is arrays: f16 numbers as fractions of their largest, in base64. A text can hold
anything; it is JSON inside a script element that is never run, and reaches the page as text only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Hashable, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvik.errors import StorageError, UsageError
from kvik.models.config import Config
from kvik.trace.recording import Look, Trace
from kvik.trace.summary import Facts
from kvik.trace.tokens import visible

ARRAYS = 3_200_000  # bytes of base64 at the most, so that a page stays below 4 MB


def layers_that_fit(config: Config, tokens: int, layer: int) -> list[int]:
    """The layers that a page of a text of so many tokens can hold: all, or the chosen one."""
    each = _size(tokens, config.heads, config.kv_heads, config.head_dim)
    return list(range(config.layers)) if config.layers * each <= ARRAYS else [layer]


def make_page(trace: Trace, *, layer: int, head: int) -> str:
    """The page, which opens at a recorded layer and one of its heads. It holds all recorded layers and all their heads,
    or that head alone where the whole would be too large."""
    style = _asset("page.css")
    code = "\n".join(map(_asset, ("draw.js", "curves.js", "data.js", "panels.js", "page.js")))
    script = f'(() => {{\n"use strict";\n{code}}})();'
    fill = {
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "data": _embedded(_data(trace, layer, head)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fill[match[1]], _asset("page.html"))


def check_target(path: Path) -> None:
    """Raises UsageError where a page can't be written to: a folder, no ordinary file, or no folder around it."""
    if path.is_dir():
        raise UsageError(f"html {str(path)!r} is a folder; name a file in it, such as {str(path / 'trace.html')!r}")
    if not path.parent.is_dir():
        raise UsageError(f"html {str(path)!r}: there is no folder {str(path.parent)!r}; make it, or name another file")
    if path.exists() and not path.is_file():
        raise UsageError(f"html {str(path)!r} is no ordinary file, and a page would replace it; name another")


def write_page(path: Path, text: str) -> int:
    """Writes a page whole or not at all, over an older one if there is one. Returns its bytes.

    Raises:
        UsageError: as `check_target`.
        StorageError: it can't be written there; nothing changed.
    """
    check_target(path)
    data = text.encode()
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "wb") as file:
                file.write(data)
            os.chmod(name, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise StorageError(f"{path}: can't be written ({error.strerror}); name another place with --html") from None
    return len(data)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _asset(name: str) -> str:
    return files("kvik.trace").joinpath(name).read_text(encoding="utf-8")


def _hash(code: str) -> str:
    """For the page's own policy: nothing but these lines may run."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() + "'"


def _embedded(data: Facts) -> str:
    """JSON that can stand inside a script element: no `<` can end it, no `&` or line separator is left."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII only
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _size(tokens: int, heads: int, lanes: int, width: int) -> int:
    """Bytes of one layer's arrays."""
    numbers = tokens * (2 * heads + 2 * lanes) * width + heads * tokens * (tokens + 1) // 2
    return numbers * 2 * 4 // 3


class _Shared:
    """Values that many lanes or heads have in common, each kept once."""

    def __init__(self) -> None:
        self.values: list[Hashable] = []
        self._places: dict[Hashable, int] = {}

    def place(self, value: Hashable) -> int:
        """The index of a value."""
        if value not in self._places:
            self._places[value] = len(self.values)
            self.values.append(value)
        return self._places[value]


def _data(trace: Trace, layer: int, head: int) -> Facts:
    looks = {number: [frame.looks[number] for frame in trace.frames] for number in trace.frames[0].looks}
    width = looks[layer][0].k.shape[2]
    whole = len(looks) * _size(len(trace.tokens), trace.heads, trace.lanes, width) <= ARRAYS
    heads = range(trace.heads) if whole else range(head, head + 1)
    lanes = sorted({trace.lane(each) for each in heads})
    shared = _Shared()
    layers = [_layer(trace, number, looks[number], heads, lanes, shared) for number in looks]
    text = visible("".join(trace.texts[token] for token in trace.tokens))
    return {
        "model": trace.model,
        "weights": trace.weights,
        "spec": trace.spec,
        "title": text[:80] + "…" * (len(text) > 80),
        "tokens": [visible(trace.texts[token]) for token in trace.tokens],
        "layers": trace.layers,
        "heads": trace.heads,
        "lanes": trace.lanes,
        "rotated": trace.rotated,
        "hides": trace.hides,
        "prompt": trace.prompt,
        "page_rows": trace.page_size,
        "layer": layer,
        "head": head,
        "kept_heads": list(heads),
        "kept_lanes": lanes,
        "kept_layers": layers,
        "shared": shared.values,
        "steps": [
            {
                "start": frame.start,
                "end": frame.length,
                "guesses": [
                    [visible(trace.texts[guess.token]), round(guess.probability, 5), guess.token]
                    for guess in frame.guesses
                ],
                "next": trace.tokens[frame.length] if frame.length < len(trace.tokens) else None,
                "bytes": [frame.nbytes.payload, frame.nbytes.overhead],
                "same": [frame.same.logits, frame.same.attention],
                "plain": [frame.plain.logits, frame.plain.attention],
            }
            for frame in trace.frames
        ],
    }


def _layer(
    trace: Trace, number: int, looks: list[Look], heads: Sequence[int], lanes: Sequence[int], shared: _Shared
) -> Facts:
    """One layer's arrays: q, out [head][token][width], k, v [lane][token][width], weights [head] as a triangle; and
    places in `shared`."""
    query, lane = torch.tensor(list(heads)), torch.tensor(list(lanes))
    rows = [(look, index) for look in looks for index in range(look.q.shape[0])]
    triangle = [look.weights[index, query, : at + 1].T for at, (look, index) in enumerate(rows)]
    return {
        "layer": number,
        "q": _array(torch.cat([look.q for look in looks])[:, query].transpose(0, 1)),
        "out": _array(torch.cat([look.out for look in looks])[:, query].transpose(0, 1)),
        "k": _array(torch.cat([look.k for look in looks], dim=1)[lane]),
        "v": _array(torch.cat([look.v for look in looks], dim=1)[lane]),
        "weights": _array(torch.cat(triangle).T),
        "seen": [shared.place(tuple(_runs(look.seen[i, index]) for look, index in rows)) for i in lanes],
        "held": [shared.place(tuple(_runs(look.held[i]) for look in looks)) for i in lanes],
        "rows": [
            [
                shared.place(tuple(int(frame.cached.rows[number, i]) for frame in trace.frames)),
                shared.place(tuple(int(frame.recomputed.rows[number, i]) for frame in trace.frames)),
            ]
            for i in lanes
        ],
        "pairs": [
            [
                shared.place(tuple(int(frame.cached.pairs[number, i]) for frame in trace.frames)),
                shared.place(tuple(int(frame.recomputed.pairs[number, i]) for frame in trace.frames)),
            ]
            for i in heads
        ],
    }


def _array(x: Tensor) -> Facts:
    """f16 as fractions of the largest number."""
    numbers: NDArray[np.float32] = x.contiguous().numpy()
    scale = float(np.abs(numbers).max(initial=0.0)) or 1.0
    data = (numbers / scale).astype("<f2").tobytes()
    return {"scale": scale, "data": base64.b64encode(data).decode()}


def _runs(mask: Tensor) -> tuple[int, ...]:
    """Where True begins and ends, in turn.

    >>> _runs(torch.tensor([True, True, False, True]))
    (0, 2, 3, 4)
    """
    edges = torch.diff(mask.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    return tuple(edges.nonzero().flatten().tolist())
