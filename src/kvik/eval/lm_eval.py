"""kvik as a model of lm-eval (EleutherAI's lm-evaluation-harness), and tasks for it that need no download.

    pip install "kvik[lm-eval]"
    python -m kvik.eval.lm_eval --model kvik --model_args model=smollm2,kv=int8+snapkv:25%,weights=f32 --tasks kvik

That is lm-eval's own command, which knows a model `kvik` and the tasks of `lm_eval_tasks/` besides its own. From
Python: `kvik.eval.lm_eval.register()`, then `lm_eval.simple_evaluate(model="kvik", model_args={…})`; importing this
file changes nothing, and needs no lm-eval. What is scored over which rows: `eval/scoring.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvik.errors import KvikError, UsageError

if TYPE_CHECKING:
    from kvik.engine.request import Request
    from kvik.eval.scoring import Scorer

TASKS = Path(__file__).parent / "lm_eval_tasks"
SUBCOMMANDS = ("run", "ls", "validate")
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names, by priority
NEW_TOKENS = 256  # where a task sets no limit, as with lm-eval's other models
Report = Callable[[str, Sequence[object], object], None]


class Asked(Protocol):
    """What lm-eval asks: one of its `Instance`s."""

    @property
    def args(self) -> tuple[Any, ...]:
        """(context, continuation), (text,) or (context, settings), by kind."""


class Harness:
    """lm-eval's interface, in terms of a `Scorer`. `adapter` makes a model of lm-eval of it."""

    def __init__(
        self,
        model: str = "smollm2",
        kv: str = "bf16",
        weights: str = "auto",
        device: str = "cpu",
        memory: str | int | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **others: object,
    ) -> None:
        """
        Args:
            model, weights, device: see `kvik.load`.
            kv: what the cache keeps, a spec string.
            memory: the cache's budget, such as 512MiB.
            max_length: tokens that are fed at most; by default all positions of the model.
            batch_size, max_batch_size: lm-eval hands them over; texts go in one by one, which changes no bit.
            others: refused.

        Raises:
            KvikError: something can't be had; see `kvik.load` and `Scorer`.
        """
        super().__init__()
        _check(others, batch_size, max_batch_size)
        from kvik.eval.scoring import Scorer
        from kvik.models.model import load
        from kvik.units import parse_bytes

        budget = parse_bytes(str(memory), "memory") if memory is not None else None
        loaded = load(model, weights=weights, device="cuda" if device == "cuda:0" else device)  # type: ignore[arg-type]
        self.scorer = Scorer(loaded, str(kv), memory=budget, longest=max_length)
        self._report: Report = lambda method, arguments, answer: None

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Harness:
        """lm-eval's way to make one: of its own settings, over which the model's arguments go."""
        settings = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**settings | dict(arg_dict))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> Harness:
        """The same, of `key=value,key=value`."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """lm-eval's: where answers go as soon as they are there."""
        self._report = cache_hook.add_partial

    def loglikelihood(self, requests: Sequence[Asked], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding would say it) of each (context, continuation)."""
        pairs = [self.scorer.pair(*request.args) for request in requests]
        answers = [(0.0, False)] * len(pairs)
        with _bar(len(pairs), disable_tqdm) as bar:
            for number, nats, greedy in self.scorer.score(pairs):
                answers[number] = nats, greedy
                self._report("loglikelihood", requests[number].args, answers[number])
                bar.update()
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Asked], disable_tqdm: bool = False) -> list[float]:
        """Nats of each whole text. Says so where the spec waits for a prompt, which such a text has not."""
        if self.scorer.waits_for_a_prompt:
            print(f"kvik: {self.scorer.kv} drops rows when a prompt ends; a rolling text has none", file=sys.stderr)
        answers = []
        with _bar(len(requests), disable_tqdm) as bar:
            for request in requests:
                answers.append(self.scorer.rolling(self.scorer.encode(request.args[0])))
                self._report("loglikelihood_rolling", request.args, answers[-1])
                bar.update()
        return answers

    def generate_until(self, requests: Sequence[Asked], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop text or a limit."""
        answers = []
        with _bar(len(requests), disable_tqdm) as bar:
            for request in requests:
                context, settings = request.args
                answers.append(self.scorer.go_on(request_of(self.scorer, context, settings)))
                self._report("generate_until", request.args, answers[-1])
                bar.update()
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model was trained on."""
        if not add_generation_prompt:
            raise UsageError("kvik can't begin the assistant's answer for it (gen_prefix); leave the chat template out")
        return self.scorer.tokenizer.chat(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What conversations go through, for lm-eval's records."""
        if isinstance(chat_template, str):
            raise UsageError(f"chat template {chat_template!r}: kvik takes the model's own; name none")
        return (self.scorer.tokenizer.chat_template or "") if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """For the keys of lm-eval's request cache."""
        return self.scorer.model.config.name.replace("/", "__")

    def get_model_info(self) -> dict[str, object]:
        """For lm-eval's records: what the weights and the rows were held as."""
        model, spec = self.scorer.model, self.scorer.cache.spec
        held = {"weights": model.weights, "arithmetic": model.arithmetic, "fingerprint": model.fingerprint}
        return {
            "kvik": held | {"spec": str(spec), "spec_fingerprint": spec.fingerprint, "longest": self.scorer.longest}
        }


def request_of(scorer: Scorer, context: str, settings: Mapping[str, Any]) -> Request:
    """What lm-eval wants to be generated. The context's beginning is left out where it would leave no room.

    Args:
        scorer: encodes it.
        context: text.
        settings: `until`, a limit of new tokens, `do_sample`, `temperature`, `top_p`, `top_k`. Noise is drawn from
            torch's generator, which lm-eval seeds.

    Raises:
        UsageError: a setting is unknown, or can't be.
    """
    import torch

    from kvik.engine.request import Request
    from kvik.engine.sampling import Sampling

    known = {"until", "do_sample", "temperature", "top_p", "top_k", *LIMITS}
    if unknown := sorted(set(settings) - known):
        raise UsageError(f"gen_kwargs {unknown[0]!r}: kvik takes {', '.join(sorted(known))}; leave it out")
    given = {name: value for name, value in settings.items() if value is not None}
    limit = int(next((given[name] for name in LIMITS if name in given), NEW_TOKENS))
    if not 1 <= limit < scorer.longest:
        raise UsageError(f"{limit:,} new tokens: texts may have {scorer.longest:,} in all; use a smaller max_gen_toks")
    until = given.get("until", [])
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    heat = float(given.get("temperature", 0)) if given.get("do_sample", True) else 0.0
    seed = int(torch.randint(2**32, (1,))) if heat else 0
    sampling = Sampling(heat, float(given.get("top_p", 1)), int(given.get("top_k", 0)), seed)
    ids = scorer.encode(context) or [scorer.prefix]
    return Request(ids[-(scorer.longest - limit) :], limit, stops, sampling)


def adapter() -> type[Harness]:
    """`Harness` as a subclass of lm-eval's `LM`.

    Raises:
        UsageError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UsageError(f"lm-eval can't be loaded ({error}); install it with pip install 'kvik[lm-eval]'") from None
    return type("Kvik", (Harness, LM), {})


def register() -> None:
    """Lets lm-eval find a model `kvik` in this process. Idempotent."""
    made = adapter()
    import lm_eval.models  # noqa: F401  # its own models: it looks for them only where no model is known at all
    from lm_eval.api.registry import model_registry

    if "kvik" not in model_registry:
        model_registry.register("kvik", target=made)


def completed(arguments: Sequence[str]) -> list[str]:
    """lm-eval's arguments, with our tasks where no other folder of tasks is named, and the CPU where no device is:
    lm-eval's own default is a GPU, whether there is one or not.

    >>> completed(["--tasks", "kvik", "--include_path=mine"])
    ['--tasks', 'kvik', '--include_path=mine', '--device', 'cpu']
    >>> completed(["--help"])
    ['--help']
    """
    named = {each.split("=")[0] for each in arguments}
    command = arguments[0] if arguments and arguments[0] in SUBCOMMANDS else "run" if len(arguments) > 1 else None
    tasks = ["--include_path", str(TASKS)] if command and "--include_path" not in named else []
    device = ["--device", "cpu"] if command == "run" and "--device" not in named else []
    return [*arguments, *tasks, *device]


def main() -> None:
    """lm-eval's command. Exit code 2 and one line where kvik refuses something."""
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch is loaded, as the `kvik` command does
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        sys.argv = [sys.argv[0], *completed(sys.argv[1:])]
        cli_evaluate()
    except KvikError as error:
        print(f"kvik: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _check(others: Mapping[str, object], batch_size: int | str, most: int | None) -> None:
    for name in others:
        way = 'a spec with commas goes in as JSON: --model_args \'{"kv": "int8+window:512,sinks:4"}\''
        raise UsageError(f"model_args {name!r}: kvik takes model, kv, weights, device, memory, max_length; {way}")
    if str(batch_size) != "1" or most not in (None, 1):
        raise UsageError(f"batch size {batch_size}: kvik's model takes texts one by one; leave --batch_size out")


def _bar(total: int, hidden: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=hidden, desc="kvik")


if __name__ == "__main__":
    main()
