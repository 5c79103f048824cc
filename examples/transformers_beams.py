"""Beams over a prefix from a file: a prompt is computed once, saved, loaded by another cache, and shared by its beams.

python examples/transformers_beams.py
"""

import tempfile
import time
from pathlib import Path

import torch
from transformers.utils import logging

import kvik.hf
from kvik.models.in_transformers import in_transformers

logging.disable_progress_bar()
BEAMS = 4

model, tokenizer = in_transformers("smollm2")  # yours: AutoModelForCausalLM.from_pretrained(…)
rules = "You are a helpful guide to the city of Vienna. " * 24
prefix = tokenizer.encode(rules)

with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
    path = Path(folder) / "guide.kv"
    with kvik.hf.Cache(model, "int8") as cache:
        start = time.perf_counter()
        model(torch.tensor([prefix]), past_key_values=cache, logits_to_keep=1)
        computed = time.perf_counter() - start
        cache.save(path)
    print(f"{len(prefix)} tokens computed in {computed:.2f} s, saved in {path.stat().st_size / 2**20:.1f} MiB")

    for question in ("Where do I begin?", "What do people eat here?"):
        start = time.perf_counter()
        with kvik.hf.Cache.load(model, path) as cache:
            loaded = time.perf_counter() - start
            ids = torch.tensor([prefix + tokenizer.encode(f"\n{question}\n")])
            options = dict(num_beams=BEAMS, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))
            answer = model.generate(ids, past_key_values=cache, **options)[0, ids.shape[1] :]
            held, alone = cache.nbytes.payload, cache.spec.nbytes(ids.shape[1] + len(answer)).payload
            print(f"\n{question}\n{tokenizer.decode(answer.tolist()).strip()}")
            print(
                f"[loaded in {loaded:.2f} s instead of computed in {computed:.2f} s; {BEAMS} beams hold "
                f"{held / 2**20:.1f} MiB, {BEAMS} copies would hold {BEAMS * alone / 2**20:.1f} MiB]"
            )
