"""One training of a comparison: what it is, and what came out of it."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from kvik.models.families.gpt import GPTConfig
from kvik.models.families.masked import MaskedConfig
from kvik.models.families.vit import ViTConfig
from kvik.models.files.weights import check
from kvik.models.model import Model
from kvik.models.operators import Cost, Form
from kvik.train import tasks
from kvik.train.loop import Batch, Loop, Schedule, named
from kvik.train.network import GPT, ViT, parameters
from kvik.train.pictures import CLASSES, Pictures, digits, moving
from kvik.train.text import Corpus

VERSION = 1  # of what a trial does: another one's results are others
PATCH = 4
_BYTES = 256  # tokens of a text
_HELD = 16_384  # tokens of the held-out text that a trial is examined by
_LONG = 4096  # tokens over which cache bytes a token are an average


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        task: `text` (the next byte), `masked` (hidden bytes), `digits` or `moving`.
        operator: `Form`'s word.
        share: which layers read others' rows; "" = none.
        layers, width, heads: of the network.
        length: tokens of a text.
        schedule: how long and how fast.
    """

    task: str
    operator: str
    layers: int
    width: int
    heads: int
    length: int
    schedule: Schedule
    share: str = ""

    @property
    def config(self) -> GPTConfig | MaskedConfig | ViTConfig:
        """Its network's sizes."""
        common: dict[str, Any] = dict(
            name=self.operator, layers=self.layers, hidden=self.width, heads=self.heads, kv_heads=self.heads,
            head_dim=self.width // self.heads, ffn=4 * self.width, tied_embeddings=False, eos_ids=(), bos_id=None,
            operator=self.operator, norm_eps=1e-5,
        )  # fmt: skip
        if self.task in ("digits", "moving"):
            side, patch = (8, 2) if self.task == "digits" else (16, PATCH)
            return ViTConfig(
                **common, vocab_size=0, max_positions=(side // patch) ** 2 + 1, activation="gelu_new", channels=1,
                size=side, patch=patch, qkv_bias=False,
            )  # fmt: skip
        if self.task == "masked":
            return MaskedConfig(**common, vocab_size=_BYTES + 1, max_positions=self.length, mask_id=_BYTES)
        config = GPTConfig(**common, vocab_size=_BYTES, max_positions=self.length)
        return config.sharing(self.share) if self.share else config

    @property
    def operations(self) -> int:
        """Of a training step, by formula: three times a forward pass, multiplications and additions."""
        config, d = self.config, self.width
        if isinstance(config, ViTConfig):
            side = config.size // config.patch
            rows, sets, ends = config.max_positions, Form.parse(self.operator).sets_around(side, side), d * CLASSES
        else:
            rows, sets, ends = self.length, config.cost.sets, self.length * d * config.vocab_size
        cost = Cost(d, d, self.heads, sets, Form.parse(self.operator))
        pairs = cost.whole(rows)
        if isinstance(config, GPTConfig):
            reading = sum(not config.keeps(layer) for layer in range(self.layers))
            pairs -= reading * rows * 4 * d * d // self.layers
        else:  # both sides are seen
            pairs += cost.whole(rows) - rows * cost.whole(1)
        each = self.layers * (pairs + rows * (2 * d * d + 4 * d * config.ffn)) + 2 * ends
        return 3 * self.schedule.batch * each

    @property
    def parameters(self) -> int:
        """Of its network."""
        config = self.config
        with torch.device("meta"):
            return parameters(_network(config))

    def network(self) -> GPT | ViT:
        """With newly drawn weights."""
        return _network(self.config)

    def key(self, data: str) -> str:
        """Names all that its result depends on."""
        return named(version=VERSION, data=data, **asdict(self))[:16]


def run(trial: Trial, corpus: Corpus | None, device: str = "cpu") -> dict[str, Any]:
    """Trains and examines. `corpus`: of a text."""
    torch.manual_seed(trial.schedule.seed)
    network, given = trial.network().to(device), _pictures(trial.task)
    draw, length = _drawing(trial, corpus, given)
    loop = Loop(network, trial.schedule, draw, tasks.cross_entropy, trial.schedule.batch * length)
    held = saved_bytes(network, draw(torch.Generator().manual_seed(0), trial.schedule.batch))
    loop.run()
    found: dict[str, Any] = {
        "parameters": parameters(network), "operations": trial.operations, "seconds": round(loop.seconds, 2),
        "held_mb": round((held + 16 * parameters(network)) / 1e6, 2), "loss": round(loop.losses[-1], 4),
    }  # fmt: skip
    if given is not None:
        assert isinstance(network, ViT), "pictures are for a ViT"
        found["accuracy"] = tasks.accuracy(network, given.held)
        if given.shifted is not None:
            found["shifted"] = tasks.accuracy(network, given.shifted)
        return found
    assert corpus is not None and isinstance(network, GPT), "a text is for a decoder"
    if trial.task == "masked":
        nats = tasks.hidden_nats(network, corpus.held, trial.length, corpus.vocabulary, _HELD)
        return {**found, "nats": nats, "perplexity": math.exp(nats)}
    nats = tasks.nats(network, corpus.held, trial.length, _HELD)
    return {**found, "nats": nats, "perplexity": math.exp(nats), **served(network, corpus.held[: trial.length])}


def served(network: GPT, tokens: Tensor) -> dict[str, float]:
    """What a trained decoder costs in kvik: bytes a token, and processor time, of rows in bf16."""
    config = network.config
    weights = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    model = Model(config, dict(check(weights, config)), weights="f32")
    cache, ids, prefills, steps = model.cache("bf16", memory="64MiB", shares=False), tokens.tolist(), [], []
    for _ in range(4):
        with cache.open() as sequence:
            prefills.append(_timed(lambda sequence=sequence: model.run([(sequence, ids[:-8])])))
            steps += [_timed(lambda sequence=sequence, i=i: model.run([(sequence, [ids[i]])])) for i in range(-8, 0)]
    payload = model.spec("bf16").nbytes(_LONG).payload / _LONG
    return {"cache_bytes": payload, "prefill_ms": 1e3 * median(prefills), "decode_ms": 1e3 * median(steps)}


def saved_bytes(network: nn.Module, batch: Batch) -> int:
    """Bytes that a training step keeps for its way back, weights aside: as autograd asks for them."""
    own = {each.untyped_storage().data_ptr() for each in network.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(tensor)  # so that no address is used twice
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tasks.cross_entropy(network, batch)
    return sum(seen.values())


def _network(config: GPTConfig | MaskedConfig | ViTConfig) -> GPT | ViT:
    return ViT(config, CLASSES) if isinstance(config, ViTConfig) else GPT(config)


def _pictures(task: str) -> Pictures | None:
    return {"digits": digits, "moving": moving}[task]() if task in ("digits", "moving") else None


def _drawing(trial: Trial, corpus: Corpus | None, given: Pictures | None) -> tuple[Any, int]:
    """How batches are drawn, and how many items each of its texts or pictures is."""
    if given is not None:
        return tasks.pictures(given.learnt), 1
    assert corpus is not None, "a text is learnt from"
    if trial.task == "masked":
        return tasks.hidden(corpus.learnt, trial.length, corpus.vocabulary), trial.length
    return tasks.windows(corpus.learnt, trial.length), trial.length


def _timed(what: Any) -> float:
    began = time.process_time()
    what()
    return time.process_time() - began
