"""How a text's embedding is made of an encoder's states, as sentence-transformers' files beside a model say it.

modules.json lists the steps; the pooling's own folder says what it takes: the mean of all states, or the first one's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvik.errors import ConfigError, ContextError
from kvik.models.fields import Fields

KEPT = "embedding.json"  # in a prepared folder
_KINDS = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class Pooling:
    """f32 [tokens, width] → f32 [width].

    Attributes:
        mean: the mean of all states; else the first one's.
        unit: scaled to length 1.
        longest: tokens of a text at the most; None = as many as the model has positions.
    """

    mean: bool
    unit: bool
    longest: int | None

    def __call__(self, states: Tensor) -> Tensor:
        """One text's, special tokens included."""
        pooled = states.mean(0) if self.mean else states[0]
        return torch.nn.functional.normalize(pooled, dim=0) if self.unit else pooled

    def check_length(self, tokens: int, name: str) -> None:
        """Raises ContextError for a text of which sentence-transformers would leave out the end."""
        if self.longest is not None and tokens > self.longest:
            raise ContextError(
                f"{tokens:,} tokens are more than the {self.longest:,} that {name} embeds; embed the text in parts"
            )


def read(folder: Path) -> Pooling | None:
    """What a model's folder says; None where it has neither modules.json nor what `keep` wrote.

    Raises:
        ConfigError: it names steps that kvik does not know.
    """
    if (folder / KEPT).is_file():
        kept = Fields(_object(folder / KEPT), str(folder / KEPT))
        return Pooling(kept.flag("mean"), kept.flag("unit"), kept.integer("longest") if kept.has("longest") else None)
    path = folder / "modules.json"
    if not path.is_file():
        return None
    listed = _json(path)
    modules = [step for step in listed if isinstance(step, dict)] if isinstance(listed, list) else []
    steps = [str(step.get("type")).rpartition(".")[2] for step in modules]
    if tuple(steps) not in (_KINDS, _KINDS[:2]):
        raise ConfigError(f"{path}: its steps are not {', '.join(_KINDS)}; kvik does not know embeddings of that kind")
    config = folder / str(modules[1].get("path")) / "config.json"
    if not config.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{path}: names {config}, outside the model's folder; don't use it")
    pooling = Fields(_object(config), str(config))
    modes = {key for key in pooling.values if key.startswith("pooling_mode_") and pooling.flag(key)}
    if modes not in ({"pooling_mode_mean_tokens"}, {"pooling_mode_cls_token"}):
        raise ConfigError(
            f"{config}: pools by {', '.join(sorted(modes)) or 'nothing'}; kvik knows mean and first token"
        )
    pooling.refuse_unless("include_prompt", (True,))
    limits = folder / "sentence_bert_config.json"
    limit = Fields(_object(limits) if limits.is_file() else {}, str(limits))
    longest = limit.integer("max_seq_length") if limit.has("max_seq_length") else None
    return Pooling("pooling_mode_mean_tokens" in modes, len(steps) == len(_KINDS), longest)


def keep(folder: Path, pooling: Pooling | None) -> None:
    """Writes it into a prepared folder, for `read`. Raises OSError."""
    if pooling is not None:
        (folder / KEPT).write_text(json.dumps(asdict(pooling)), encoding="utf-8")


def _object(path: Path) -> dict[str, object]:
    values = _json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is no JSON object; get the model again from its source")
    return values


def _json(path: Path) -> object:
    try:
        values: object = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise ConfigError(f"{path}: is missing or no JSON; get the model again from its source") from None
    return values
