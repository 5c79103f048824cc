"""Questions about a long document, in transformers, with less than 64 MiB of cache: the document is read once.

Every question starts from the document's pages; none is copied, and what a question adds leaves with it.

    python examples/transformers_document.py [tokens of the document, 5000 by default]
"""

import copy
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

import kvik.hf
from kvik.models.in_transformers import in_transformers

logging.disable_progress_bar()
TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1].isdigit() else 5000
QUESTIONS = ("What is kvik?", "What is the code of the vault?", "What does a Sequence hold?")

model, tokenizer = in_transformers("smollm2")  # yours: AutoModelForCausalLM.from_pretrained(…)
text = (Path(__file__).parent.parent / "DESIGN.md").read_text() * 3
document = tokenizer.encode("The code of the vault is 4711.\n\n" + text)[:TOKENS]
ids = torch.tensor([document])

with kvik.hf.Cache(model, budget="64MiB", tokens=TOKENS + 100) as cache, torch.inference_mode():
    start = time.perf_counter()
    for piece in ids.split(512, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    read, held = time.perf_counter() - start, cache.nbytes
    dense = 2 * 4 * model.config.num_key_value_heads * model.config.head_dim * model.config.num_hidden_layers * TOKENS
    print(f"{TOKENS} tokens read in {read:.1f} s; {cache.spec}: {(held.payload + held.overhead) / 2**20:.1f} MiB")
    print(f"saved: {(dense - held.payload - held.overhead) / 2**20:.0f} MiB of {dense / 2**20:.0f} MiB in f32")
    for question in QUESTIONS:
        asked = torch.tensor([document + tokenizer.encode(f"\n\nQuestion: {question}\nAnswer:")])
        start, about = time.perf_counter(), copy.deepcopy(cache)  # its tables: the rows are shared
        options = dict(max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(asked))
        answer = model.generate(asked, past_key_values=about, **options)[0, asked.shape[1] :]
        seconds, most = time.perf_counter() - start, cache.nbytes
        about.close()
        print(f"\n{question}\n{tokenizer.decode(answer.tolist()).strip()}")
        print(f"[{seconds:.1f} s instead of {read:.1f} s and more; {(most.payload + most.overhead) / 2**20:.1f} MiB]")
    assert most.payload + most.overhead < 64 << 20
