"""What `kvik train lm` and `kvik train images` do: learn, examine, and leave a folder that `kvik.load` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvik.cache.limits import memory_available
from kvik.errors import StorageError, UsageError
from kvik.models.families.gpt import GPTConfig
from kvik.models.families.masked import MASK, MaskedConfig
from kvik.models.families.vit import ViTConfig
from kvik.models.model import check_device
from kvik.train import pictures, tasks, text
from kvik.train.checkpoint import NOTE, check_folder, replace_folder
from kvik.train.loop import Loop, Now, Schedule, settings
from kvik.train.network import GPT, ViT, parameters
from kvik.units import format_bytes

PATCHES = {"digits": 2, "moving": 4}
_MOST_WIDTH, _MOST_LAYERS = 4096, 96


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A network and how it learns.

    Attributes:
        operator: `Form`'s word.
        source: what is learnt from.
        device: cpu or cuda; it decides the last bits.
    """

    schedule: Schedule
    operator: str
    width: int
    layers: int
    heads: int
    source: str
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_device(self.device)
        if not 1 <= self.layers <= _MOST_LAYERS or not 1 <= self.width <= _MOST_WIDTH:
            raise UsageError(
                f"--layers {self.layers} --width {self.width}: use 1 to {_MOST_LAYERS} and 1 to {_MOST_WIDTH:,}"
            )
        if self.heads < 1 or self.width % (2 * self.heads):
            raise UsageError(f"--heads {self.heads}: the width {self.width} must be a multiple of twice as many")

    def sizes(self) -> dict[str, Any]:
        """What both families' configurations ask for."""
        return dict(
            name=Path(self.source).stem, layers=self.layers, hidden=self.width, heads=self.heads, kv_heads=self.heads,
            head_dim=self.width // self.heads, ffn=4 * self.width, tied_embeddings=False, eos_ids=(), bos_id=None,
            operator=self.operator, norm_eps=1e-5,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Text(Lesson):
    """Language modelling: the next token, or hidden ones.

    Attributes:
        length, pieces: see `text.read`.
        share: which layers read others' rows; "" = none.
        masked: it learns hidden tokens, from both sides.
    """

    length: int
    pieces: str = text.BYTES
    share: str = ""
    masked: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.length <= 8192:
            raise UsageError(f"--length {self.length}: use 2 to 8,192 tokens")
        if self.masked and self.share:
            raise UsageError(f"--share {self.share!r}: an encoder keeps no rows to share; leave it or --masked out")


@dataclass(frozen=True, kw_only=True)
class Images(Lesson):
    """Digits, still or moving."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source not in PATCHES:
            raise UsageError(f"{self.source!r}: there are {' and '.join(PATCHES)} to learn from")


@dataclass(frozen=True)
class Done:
    """What came of it.

    Attributes:
        figures: of what was held out.
        report: all of it, as it stands in the folder.
    """

    folder: Path
    steps: int
    seconds: float
    stopped: bool
    figures: dict[str, float]
    report: dict[str, Any]


@dataclass(frozen=True)
class _Course:
    """A lesson, ready to begin: its loop, its examination, and what is written down of it."""

    loop: Loop
    what: str
    examine: Callable[[], dict[str, float]]
    fill: Callable[[Path], None]


def learn(
    lesson: Text | Images, folder: Path, resume: bool, show: Callable[[Now], None], stopping: Callable[[], bool]
) -> Done:
    """Trains to the end, or until told to stop, and writes the folder; beside it is kept what a stopped training needs
    to go on.

    Raises:
        StorageError: the folder is no training's, or can't be written; or it holds one, and no `resume` was asked for.
        UsageError: the machine has too little memory for it.
    """
    check_folder(folder)
    state = folder.with_name(f"{folder.name}.unfinished.safetensors")
    _check_state(folder, state, resume)
    state.absolute().parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(lesson.schedule.seed)
    course = _text(lesson) if isinstance(lesson, Text) else _images(lesson)
    loop = course.loop
    if resume:
        loop.resume(state, course.what)
    loop.run(show, stopping, lambda: loop.save(state, course.what))
    figures = course.examine()
    stopped = loop.steps < lesson.schedule.steps
    report = {
        "lesson": asdict(lesson), "parameters": parameters(loop.network), "steps": loop.steps, "stopped": stopped,
        "processor_seconds": round(loop.seconds, 1), "loss": loop.losses[-1] if loop.losses else None, **figures,
    }  # fmt: skip

    def fill(work: Path) -> None:
        course.fill(work)
        curve(loop.losses, work / "loss.png", f"{lesson.operator} · {lesson.source}")
        note = {**report, "losses": [round(loss, 4) for loss in loop.losses]}
        (work / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")

    replace_folder(folder, fill)
    if not stopped:
        state.unlink(missing_ok=True)
    return Done(folder, loop.steps, loop.seconds, stopped, figures, report)


def _check_state(folder: Path, state: Path, resume: bool) -> None:
    """Raises StorageError where a training would be lost, or where there is none to go on with."""
    done, begun = (folder / NOTE).is_file(), state.exists()
    if begun and not resume:
        raise StorageError(
            f"{state}: an unfinished training is there; add --resume to go on with it, or name another with --out"
        )
    if done and not resume:
        raise StorageError(
            f"{folder}: holds what was trained before, which would be lost; name another with --out, or delete it"
        )
    if resume and not begun:
        way = "it was finished; name another folder with --out" if done else "leave --resume out"
        raise StorageError(f"{state}: is not there, so there is nothing to go on with; {way}")


def _check_memory(lesson: Lesson, drawn: Callable[[], nn.Module], tokens: int, vocabulary: int) -> None:
    """Raises UsageError where weights, gradients and AdamW's moments, and what a step keeps for its way back at the
    least (logits, and twelve rows of the width a layer), are more than this machine has left.

    Args:
        drawn: makes the network; it is counted on torch's device without numbers.
        tokens: of a batch, with as many logits each as `vocabulary`.
    """
    with torch.device("meta"):
        count = parameters(drawn())
    step = 4 * tokens * (2 * vocabulary + 12 * lesson.layers * lesson.width)
    needed, left = 16 * count + step if lesson.device == "cpu" else 4 * count, memory_available()
    if needed > left:
        raise UsageError(
            f"{lesson.operator}: {count:,} parameters and {tokens:,} tokens a step take {format_bytes(needed)} or "
            f"more, and this machine has {format_bytes(left)} left; use smaller --width, --layers, --length or --batch"
        )


def _text(lesson: Text) -> _Course:
    corpus = text.read(lesson.source, lesson.pieces)
    if min(len(corpus.learnt), len(corpus.held)) <= lesson.length:
        raise UsageError(
            f"--length {lesson.length}: the text's held-out tenth has {len(corpus.held):,} tokens; use a smaller length"
        )
    config = _text_config(lesson, corpus.vocabulary)
    batch = lesson.schedule.batch * lesson.length
    _check_memory(lesson, lambda: GPT(config), batch, corpus.vocabulary)
    network = GPT(config).to(lesson.device)
    draw = tasks.windows(corpus.learnt, lesson.length)
    if isinstance(config, MaskedConfig):
        draw = tasks.hidden(corpus.learnt, lesson.length, config.mask_id)
    loop = Loop(network, lesson.schedule, draw, tasks.cross_entropy, batch)

    def examine() -> dict[str, float]:
        if isinstance(config, MaskedConfig):
            return {"perplexity": math.exp(tasks.hidden_nats(network, corpus.held, lesson.length, config.mask_id))}
        nats = tasks.nats(network, corpus.held, lesson.length)
        bits = tasks.bits_a_byte(nats, len(corpus.held), corpus.held_bytes)
        return {"perplexity": math.exp(nats), "bits_a_byte": bits}

    def fill(folder: Path) -> None:
        write(folder, config.to_hf(), dict(network.state_dict()))
        text.save(corpus.tokenizer, folder, MASK if lesson.masked else None)

    return _Course(loop, settings(text=corpus.digest, **asdict(lesson)), examine, fill)


def _text_config(lesson: Text, vocabulary: int) -> GPTConfig | MaskedConfig:
    common = {**lesson.sizes(), "max_positions": lesson.length}
    if lesson.masked:
        return MaskedConfig(**common, vocab_size=vocabulary + 1, mask_id=vocabulary)
    config = GPTConfig(**common, vocab_size=vocabulary)
    return config.sharing(lesson.share) if lesson.share else config


def _images(lesson: Images) -> _Course:
    given = pictures.digits() if lesson.source == "digits" else pictures.moving()
    patch = PATCHES[lesson.source]
    config = ViTConfig(
        **lesson.sizes(), vocab_size=0, max_positions=(given.side // patch) ** 2 + 1, activation="gelu_new", channels=1,
        size=given.side, patch=patch, qkv_bias=False,
    )  # fmt: skip
    _check_memory(
        lesson, lambda: ViT(config, pictures.CLASSES), lesson.schedule.batch * config.max_positions, pictures.CLASSES
    )
    network = ViT(config, pictures.CLASSES).to(lesson.device)
    draw = tasks.pictures(given.learnt)
    loop = Loop(network, lesson.schedule, draw, tasks.cross_entropy, lesson.schedule.batch)

    def examine() -> dict[str, float]:
        found = {"accuracy": tasks.accuracy(network, given.held)}
        return found if given.shifted is None else {**found, "accuracy_shifted": tasks.accuracy(network, given.shifted)}

    return _Course(
        loop, settings(**asdict(lesson)), examine, lambda folder: write(folder, config.to_hf(), network.named())
    )


def write(folder: Path, config: dict[str, object], tensors: dict[str, Tensor]) -> None:
    """config.json and model.safetensors. Raises OSError."""
    from safetensors.torch import save_file

    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def curve(losses: list[float], path: Path, title: str) -> None:
    """Draws how the loss fell: each step's, and a mean over the last ones."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), dpi=150, facecolor="white", layout="tight")
    axes = figure.subplots()
    steps, smooth, mean = range(1, len(losses) + 1), list[float](), 0.0
    for number, loss in enumerate(losses):
        share = max(0.05, 1 / (number + 1))
        mean += share * (loss - mean)
        smooth.append(mean)
    axes.plot(steps, losses, color="#c9d6e2", linewidth=0.8)
    axes.plot(steps, smooth, color="#0b6fb8", linewidth=1.6)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats")
    axes.set_title(title, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
