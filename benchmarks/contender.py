"""One engine in a process of its own, for `peers.py`: reads a task a line, answers a line, in JSON.

    {"prompt": [ids], "tokens": 32}  →  {"prefill_s": …, "decode_s": …}

The prompt goes through in one go (prefill, up to the first new token), then `tokens` more follow one by one, always the
likeliest. Nothing is kept from one task to the next. The first line says that it is ready and with which settings.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

Times = tuple[float, float]
Run = Callable[[list[int], int], Times]


def kvik(path: str, setting: str, room: int) -> tuple[Run, str]:
    """kvik with a KV spec, and as the weights' format what the file holds."""
    import kvik as library
    from kvik.engine.generation import prefill

    model = library.load(path)
    cache = model.cache(setting, shares=False)

    def run(prompt: list[int], tokens: int) -> Times:
        with cache.open() as sequence:
            start = time.perf_counter()
            token = int(prefill(model, [sequence], prompt).argmax())
            middle = time.perf_counter()
            for _ in range(tokens):
                token = int(model.run([(sequence, [token])])[0].argmax())
                sequence.settle()
            return middle - start, time.perf_counter() - middle

    return run, f"weights {model.weights}, {model.arithmetic}"


def llama(path: str, setting: str, room: int) -> tuple[Run, str]:
    """llama.cpp through its C interface, flash attention on, two threads for two cores."""
    import ctypes

    import llama_cpp as c
    import numpy as np

    quiet = c.llama_log_callback(lambda *_: None)
    c.llama_log_set(quiet, ctypes.c_void_p(0))
    c.llama_backend_init()
    model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
    options = c.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = room, 2048, 512
    options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
    options.flash_attn_type = 1
    options.type_k = options.type_v = {"f16": c.GGML_TYPE_F16, "q8_0": c.GGML_TYPE_Q8_0}[setting]
    context = c.llama_init_from_model(model, options)
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))

    def feed(ids: list[int]) -> int:
        for start in range(0, len(ids), options.n_batch):
            some = ids[start : start + options.n_batch]
            array = (c.llama_token * len(some))(*some)
            if c.llama_decode(context, c.llama_batch_get_one(array, len(some))) != 0:
                raise RuntimeError("llama_decode failed")
        return int(np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), (vocabulary,)).argmax())

    def run(prompt: list[int], tokens: int) -> Times:
        c.llama_memory_clear(c.llama_get_memory(context), True)
        start = time.perf_counter()
        token = feed(prompt)
        middle = time.perf_counter()
        for _ in range(tokens):
            token = feed([token])
        return middle - start, time.perf_counter() - middle

    held = quiet, model  # as long as `run` lives
    return lambda prompt, tokens: run(prompt, tokens) if held else (0.0, 0.0), f"llama-cpp-python {c.__version__}"


def openvino(path: str, setting: str, room: int) -> tuple[Run, str]:
    """OpenVINO GenAI, which reads the GGUF itself; its own figures for the first token and the others."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(path, "CPU")

    def run(prompt: list[int], tokens: int) -> Times:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens + 1, True, False
        ids = np.array([prompt], np.int64)
        metrics = pipeline.generate(
            genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids))), config
        ).perf_metrics
        return metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3 * tokens

    return run, f"openvino-genai {genai.__version__}, KV {setting}"


def transformers(path: str, setting: str, room: int) -> tuple[Run, str]:
    """transformers with the faster of f32 and bf16 for one token, as tried here."""
    import torch
    import transformers as library

    def make(dtype: torch.dtype) -> Run:
        folder, name = os.path.split(path)
        model = library.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype).eval()

        @torch.inference_mode()
        def run(prompt: list[int], tokens: int) -> Times:
            cache = library.DynamicCache(config=model.config)

            def feed(ids: list[int]) -> int:
                out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
                return int(out.logits[0, -1].argmax())

            start = time.perf_counter()
            token = feed(prompt)
            middle = time.perf_counter()
            for _ in range(tokens):
                token = feed([token])
            return middle - start, time.perf_counter() - middle

        return run

    runs = {name: make(getattr(torch, name)) for name in ("float32", "bfloat16")}
    for run in runs.values():
        run([1, 2, 3], 2)
    fastest = min(runs, key=lambda name: runs[name](list(range(100, 132)), 8)[1])
    chosen = runs[fastest]
    runs.clear()
    return chosen, f"transformers {library.__version__}, {fastest}"


def answering(handle: Callable[[dict[str, Any]], dict[str, Any]], said: str, answers: TextIO) -> None:
    """Says that it is ready, then an answer a line, until stdin ends."""
    print(json.dumps({"ready": said}), file=answers)
    for line in sys.stdin:
        print(json.dumps(handle(json.loads(line))), file=answers)


def own_stdout() -> TextIO:
    """Where answers go; whatever a library prints goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def main() -> None:
    """Until stdin ends."""
    engine, setting, path, room = sys.argv[1:]
    answers = own_stdout()
    engines = {"kvik": kvik, "llama.cpp": llama, "openvino": openvino, "transformers": transformers}
    run, said = engines[engine](path, setting, int(room))

    def handle(task: dict[str, Any]) -> dict[str, Any]:
        prefilled, decoded = run(task["prompt"], task["tokens"])
        return {"prefill_s": prefilled, "decode_s": decoded}

    answering(handle, said, answers)


if __name__ == "__main__":
    main()
