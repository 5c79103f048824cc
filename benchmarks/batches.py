"""An engine that takes many requests at once, in a process of its own, for `serve.py`: a play a line, in JSON.

    {"prompts": [[ids] …], "tokens": 64, "newcomer": null, "after": 0}
    →  {"heard": [{"sent": s, "times": [s …], "ended": s} …]}

All prompts are asked at once, each for exactly so many tokens, always the likeliest. A newcomer is a prompt that is
asked once each of the others has `after` tokens; with its first token everything ends. Heard is, for each prompt, when
it was asked, when each of its tokens came, and when the last word did, in seconds on one clock. What was known of a
prompt stays known.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from contender import answering, own_stdout

GIB = 1  # of memory for rows, in every engine that can be told
AT_ONCE, STEP = 16, 512  # answers, and tokens of a step


@dataclass
class Heard:
    """Of one prompt's answer: when it was asked, when each token came, and when the last word did."""

    sent: float = 0.0
    times: list[float] = field(default_factory=list)
    ended: float = 0.0

    def take(self, tokens: int) -> None:
        """So many more came, just now."""
        self.ended = time.perf_counter()
        self.times += [self.ended] * tokens


Play = Callable[[list[list[int]], int, list[int] | None, int], list[Heard]]


def kvik(path: str, setting: str) -> tuple[Play, str]:
    """kvik's engine, called as a library."""
    import kvik as library
    from kvik.engine.engine import Engine
    from kvik.engine.job import Update
    from kvik.engine.request import Request

    model = library.load(path)
    engine = Engine(model, setting, memory=f"{GIB}GiB", running=AT_ONCE, step_tokens=STEP)

    def play(prompts: list[list[int]], tokens: int, newcomer: list[int] | None, after: int) -> list[Heard]:
        all_ended, all_begun = threading.Event(), threading.Event()
        ended, begun = [0], [0]
        jobs: list[int] = []

        def ask(prompt: list[int], last: bool) -> Heard:
            heard = Heard(time.perf_counter())

            def tell(update: Update) -> None:  # in the engine's thread
                heard.take(len(update.token_ids))
                if len(heard.times) == after:
                    begun[0] += 1
                    if begun[0] == len(prompts):
                        all_begun.set()
                ended[0] += update.last
                if ended[0] == len(prompts) or last:
                    all_ended.set()

            jobs.append(engine.submit(Request(prompt, max_tokens=tokens, ignore_end=True), tell).job)
            return heard

        heard = [ask(prompt, False) for prompt in prompts]
        if newcomer is not None:
            all_begun.wait()
            heard.append(ask(newcomer, True))
        all_ended.wait()
        for job in jobs:
            engine.abort(job)
        engine.asked(lambda: None)
        return heard

    return play, f"weights {model.weights}, {model.arithmetic}"


def openvino(path: str, setting: str) -> tuple[Play, str]:
    """OpenVINO GenAI's continuous batching with prefix caching; it reads the GGUF itself."""
    import itertools

    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduling = genai.SchedulerConfig()
    scheduling.cache_size, scheduling.enable_prefix_caching = GIB, True
    scheduling.max_num_seqs, scheduling.max_num_batched_tokens = AT_ONCE, STEP
    pipeline = genai.ContinuousBatchingPipeline(path, scheduling, "CPU")
    numbers = itertools.count()

    def play(prompts: list[list[int]], tokens: int, newcomer: list[int] | None, after: int) -> list[Heard]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False

        def ask(prompt: list[int]) -> tuple[Heard, Any]:
            heard = Heard(time.perf_counter())
            return heard, pipeline.add_request(next(numbers), ov.Tensor(np.array([prompt], np.int64)), config)

        asked = [ask(prompt) for prompt in prompts]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for heard, handle in asked:
                if handle.can_read():
                    heard.take(sum(len(each.generated_ids) for each in handle.read().values()))
            if newcomer is None:
                continue
            if len(asked) == len(prompts) and all(len(heard.times) >= after for heard, _ in asked):
                asked.append(ask(newcomer))
            elif len(asked) > len(prompts) and asked[-1][0].times:
                for _, handle in asked:
                    handle.stop()
        return [heard for heard, _ in asked]

    return play, f"openvino-genai {genai.__version__}, KV {setting}"


def main() -> None:
    """Until stdin ends."""
    engine, setting, path = sys.argv[1:]
    answers = own_stdout()
    play, said = {"kvik": kvik, "openvino": openvino}[engine](path, setting)

    def handle(task: dict[str, Any]) -> dict[str, Any]:
        heard = play(task["prompts"], task["tokens"], task["newcomer"], task["after"])
        return {"heard": [asdict(each) for each in heard]}

    answering(handle, said, answers)


if __name__ == "__main__":
    main()
