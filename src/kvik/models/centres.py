"""Finds what a model's keys have in common, once, so that quantised keys need not store it; see `cache/centres.py`.

A short text that comes with kvik goes through the model, over rows in f32, and every lane's keys are looked at. As keys
are turned by position, and this text has few positions, each is turned to others, all over those that the model knows:

    key of position 7  ──turned back──  its content  ──turned to 3,101, 611, …──  keys as a long text would have them

Of each channel the centre is the middle between its 2 % and its 98 % quantile. Without the turning, slow pairs of
channels would be centred for short texts, and stand on the other side of their circle in long ones: twice the error of
no centre at all (`docs/log.md`).

Centres lie in kvik's home folder, centres/<fingerprint of the weights as held>-<version>.safetensors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from kvik.cache.centres import Centres
from kvik.cache.weigh import turned, turns
from kvik.errors import StorageError, UsageError, WeightsError
from kvik.models.files.prepare import Progress, home, home_path, quiet
from kvik.models.files.weights import read_file
from kvik.models.watch import Chunk, Watch
from kvik.ops.reads import Partial

if TYPE_CHECKING:
    from kvik.models.model import Model

VERSION = 2  # of the text and of the way centres are found: another one finds others
TOKENS = 512  # of the text, at most: 256 to 2,048 gave the same
FEWEST = 64  # of fewer tokens nothing is known
_PLACES = 4  # positions that each key is turned to
_EDGE = 0.02  # of a channel's values lie beyond either end
_GOLDEN = 0.6180339887498949  # multiples of it, less their whole parts, lie evenly over 0 to 1, however many there are
_SMALL = 10_000_000  # weights: centres of smaller models are found faster than a file is worth
_WHAT = "find the keys' centres"


def obtain(model: Model, progress: Progress = quiet) -> Centres | None:
    """A model's centres: those that were kept, else found now and kept.

    Raises:
        StorageError: what was kept is damaged, or another model's.
    """
    if model.row_weights < _SMALL:
        return find(model)
    path = path_of(model.held)
    if path.exists():
        return recall(path, model)
    found = find(model, progress)
    if found is not None:
        keep(path, found, model.held, progress)
    return found


def find(model: Model, progress: Progress = quiet) -> Centres | None:
    """Runs the model over the text. None where it has no tokenizer or reads a source, where an operator reads rows back
    or has them stand for other tokens, where the text has too few tokens or the keys are no numbers, or where a softcap
    bends its scores, so that softmax would not ignore a centre.

    Args:
        progress: is told of each layer.
    """
    ids = [] if model.tokenizer is None else model.tokenizer.encode(text())[:TOKENS]
    if len(ids) < FEWEST or max(ids) >= model.config.vocab_size or model.reader is not None:
        return None
    if any(layer.use != "attend" for layer in model.decoder.layers):
        return None
    most = model.config.max_positions
    pieces = [ids[start : start + most] for start in range(0, len(ids), most)]
    seen: list[_Keys] = []

    def watch(step: Chunk) -> _Keys:
        seen.append(_Keys(step, model, progress))
        return seen[-1]

    memory = 2 * model.spec("f32").nbytes(len(ids), len(pieces)).allocated + (64 << 20)
    cache = model.cache("f32", shares=False, memory=memory)
    sequences = [cache.open() for _ in pieces]
    model.run(list(zip(sequences, pieces, strict=True)), watch=watch)  # in one step: each layer's keys come all at once
    for sequence in sequences:
        sequence.close()
    found = seen[0].found
    if seen[0].bent or not found or not all(layer.isfinite().all() for layer in found.values()):
        return None
    return Centres([found.get(layer, torch.zeros(0, 0)) for layer in range(len(model.decoder.layers))])


class _Keys(Watch):
    """Takes each layer's centre from the keys that pass.

    Attributes:
        found: by layer, f32 [heads, width].
        bent: scores were asked for with a softcap.
    """

    def __init__(self, step: Chunk, model: Model, progress: Progress) -> None:
        super().__init__(step)
        self.found: dict[int, Tensor] = {}
        self.bent = False
        self._layers, self._reach, self._progress = model.decoder.layers, model.config.max_positions, progress

    def append(self, layer: int, **streams: Tensor) -> None:
        """Looks at one layer's keys and passes them on."""
        super().append(layer, **streams)
        if "k" in streams:
            frequencies = self._layers[layer].frequencies
            self.found[layer] = middle(streams["k"].cpu(), self.positions, frequencies, self._reach)
        self._progress(_WHAT, layer + 1, len(self._layers))

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
        """Passes the queries on, and notes a softcap."""
        self.bent = self.bent or softcap is not None
        return super().attend(layer, q, scale=scale, softcap=softcap, bias=bias, want_lse=want_lse, want_mass=want_mass)


def middle(keys: Tensor, positions: list[int], frequencies: tuple[float, ...] | None, reach: int) -> Tensor:
    """The middle of each channel's values, [heads, width].

    Args:
        keys: f32 [T, heads, width], turned by position.
        positions: theirs.
        frequencies: see `LayerShape`.
        reach: positions that the model knows; keys are turned to some all over them.
    """
    if frequencies is not None:
        keys = keys.repeat(_PLACES, 1, 1)
        places = (torch.arange(len(keys), dtype=torch.float64) * _GOLDEN % 1 * reach).floor()
        by = places - torch.tensor(positions, dtype=torch.float64).repeat(_PLACES)
        keys = turned(keys, turns(torch.tensor(frequencies, dtype=torch.float64), by).unsqueeze(1))
    columns = keys.permute(1, 2, 0).contiguous()
    beyond = int(_EDGE * columns.shape[-1])
    low = columns.kthvalue(beyond + 1, dim=-1).values
    high = columns.kthvalue(columns.shape[-1] - beyond, dim=-1).values
    return (low + high) / 2


def text() -> str:
    """What is run."""
    return Path(__file__).with_name("centres.txt").read_text(encoding="utf-8")


def path_of(held: str) -> Path:
    """Where the centres of weights as held are kept, or would be."""
    return home_path() / "centres" / f"{held}-{VERSION}.safetensors"


def recall(path: Path, model: Model) -> Centres:
    """What was kept.

    Raises:
        StorageError: it is damaged, or another model's.
    """
    try:
        tensors, about = read_file(path)
        centres = Centres([tensors[str(layer)].clone() for layer in range(len(tensors))])
    except (WeightsError, UsageError, KeyError, AttributeError):
        _refuse(path, "is damaged")
    if about.get("model") != model.held:
        _refuse(path, "belongs to another model")
    if about.get("centres") != centres.fingerprint or len(centres.layers) != len(model.decoder.layers):
        _refuse(path, "is damaged")
    return centres


def _refuse(path: Path, what: str) -> NoReturn:
    raise StorageError(f"{path}: {what}, so the model's keys have no centres; delete it and they will be found again")


def keep(path: Path, centres: Centres, held: str, progress: Progress = quiet) -> None:
    """Keeps what was found. Where kvik's home can't be written nothing is lost but the time to find it again."""
    from safetensors.torch import save

    data = save(
        {str(number): layer for number, layer in enumerate(centres.layers)},
        metadata={"model": held, "centres": centres.fingerprint},
    )
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        home()
        path.parent.mkdir(exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except (OSError, StorageError):
        progress(f"{path.parent}: can't be written, so this is done at each start; set KVIK_HOME", 1, 1)
