"""llama.cpp's logits after every token of some texts, for `precision.py`; run by the interpreter that has it.

    python benchmarks/llama_logits.py MODEL.gguf TYPE_K TYPE_V fused|apart TOKENS.npy FOLDER

Tokens are int32 [texts, tokens]; FOLDER gets a file `0.npy`, `1.npy` … of f32 [tokens, vocabulary] for each text.
`fused` is flash attention. Chunks are of 256 tokens, threads are as many as cores. Prints one line of JSON: the
version, and whether llama.cpp rotates keys and values before it rounds them (it does where they are quantised, unless
LLAMA_ATTN_ROT_DISABLE=1).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

import llama_cpp as c
import numpy as np

TYPES = {"f16": c.GGML_TYPE_F16, "q8_0": c.GGML_TYPE_Q8_0, "q4_0": c.GGML_TYPE_Q4_0}
CHUNK = 256


def main() -> None:
    """One setting, all texts."""
    path, type_k, type_v, attention, tokens, folder = sys.argv[1:]
    told: list[str] = []
    listen = c.llama_log_callback(lambda level, text, data: told.append(text.decode(errors="replace")))
    c.llama_log_set(listen, ctypes.c_void_p(0))
    c.llama_backend_init()
    texts = np.load(tokens)
    model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
    options = c.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = texts.shape[1], CHUNK, CHUNK
    options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
    options.flash_attn_type = {"apart": 0, "fused": 1}[attention]
    options.type_k, options.type_v = TYPES[type_k], TYPES[type_v]
    context = c.llama_init_from_model(model, options)
    if not context:
        raise SystemExit(f"llama.cpp takes no {type_k}/{type_v}: {''.join(told[-3:])}")
    vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
    batch = c.llama_batch_init(CHUNK, 0, 1)
    for number, text in enumerate(texts):
        c.llama_memory_clear(c.llama_get_memory(context), True)
        out = np.empty((len(text), vocabulary), np.float32)
        for start in range(0, len(text), CHUNK):
            chunk = text[start : start + CHUNK]
            batch.n_tokens = len(chunk)
            for i, token in enumerate(chunk.tolist()):
                batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if c.llama_decode(context, batch) != 0:
                raise SystemExit(f"llama_decode failed: {''.join(told[-3:])}")
            got = np.ctypeslib.as_array(c.llama_get_logits(context), (len(chunk), vocabulary))
            out[start : start + len(chunk)] = got
        np.save(Path(folder) / f"{number}.npy", out)
    rotated = {stream: any(f"attn_rot_{stream} = 1" in line for line in told) for stream in "kv"}
    print(json.dumps({"version": c.__version__, "rotated": rotated}))


if __name__ == "__main__":
    main()
