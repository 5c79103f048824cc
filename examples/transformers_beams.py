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
GUIDE = """A guide to Vienna.

Begin at Saint Stephen's Cathedral, in the middle of the old town; its south tower has 343 steps. From there
the Graben, a wide street of shops, leads to the Hofburg, the palace of the emperors, which is a museum today.
Trams run around the old town on the Ring: the opera, the parliament and the city hall all stand along it.
Schönbrunn, the summer palace, has a park that costs nothing, and the oldest zoo of the world.

People sit in coffee houses for hours, with a newspaper and a glass of water. They eat Wiener schnitzel with
potato salad, boiled beef with apple and horseradish, and afterwards Sachertorte, a dark cake of chocolate and
apricot jam. In summer they drink young wine in the gardens of Grinzing and Nussdorf, and swim in the Old
Danube, which the underground reaches in ten minutes. On New Year's morning the philharmonic orchestra plays
waltzes for the whole world.

Questions and answers about Vienna:
"""
prefix = tokenizer.encode(GUIDE)

with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
    path = Path(folder) / "guide.kv"
    with kvik.hf.Cache(model, "int8") as cache:
        start = time.perf_counter()
        model(torch.tensor([prefix]), past_key_values=cache, logits_to_keep=1)
        computed = time.perf_counter() - start
        cache.save(path)
    print(f"{len(prefix)} tokens computed in {computed:.2f} s, saved in {path.stat().st_size / 2**20:.1f} MiB")

    for question in ("Where does a visitor begin?", "Which cake do people eat?"):
        start = time.perf_counter()
        with kvik.hf.Cache.load(model, path) as cache:
            loaded = time.perf_counter() - start
            ids = torch.tensor([prefix + tokenizer.encode(f"\nQuestion: {question}\nAnswer:")])
            options = dict(num_beams=BEAMS, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))
            answer = model.generate(ids, past_key_values=cache, **options)[0, ids.shape[1] :]
            held, alone = cache.nbytes.payload, cache.spec.nbytes(ids.shape[1] + len(answer)).payload
            print(f"\n{question}\n{tokenizer.decode(answer.tolist()).strip()}")
            print(
                f"[loaded in {loaded:.2f} s instead of computed in {computed:.2f} s; {BEAMS} beams hold "
                f"{held / 2**20:.1f} MiB, {BEAMS} copies would hold {BEAMS * alone / 2**20:.1f} MiB]"
            )
