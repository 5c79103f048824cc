"""`kvik.hf.Cache` beside transformers' own caches, in one process and the same model code around both.

    python benchmarks/hf.py [--rounds 5] [--quanto FOLDER] [--parts decode,quantized,batch] [--write docs/hf.json]

SmolLM2-135M-Instruct. Three parts:

decode     ms a token with DynamicCache and with kvik, in turns, at 16, 4,096 and 8,000 tokens, f32 and bf16; both were
           filled with the same random rows, so that nobody waits for a prompt
quantized  a text of 2,048 tokens in the shipped QuantizedCache (fp8; and 4 bits by optimum-quanto, if a folder has it)
           and in kvik: ms a token, and the mean KL of 32 following predictions against DynamicCache, in f64
batch      16 left-padded prompts of 50 to 1,500 tokens: bytes, and whether what stands in the padding moves a bit

Nothing else should run meanwhile. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

import kvik.hf
from kvik.models.in_transformers import in_transformers

DOCS = Path(__file__).parent.parent / "docs"
STEPS, FOLLOWING = 6, 32


def fill(cache, model, tokens: int) -> None:
    """Puts the same random rows into either kind of cache."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    chunk = None
    if isinstance(cache, kvik.hf.Cache):
        chunk = cache.batch.begin(1, tokens, torch.zeros((1, tokens), dtype=torch.long), None, [0])
    for layer in range(config.num_hidden_layers):
        k, v = (torch.randn(shape, generator=generator).to(model.dtype) for _ in range(2))
        cache.update(k, v, layer)
    if chunk is not None:
        cache.batch.end()


@torch.inference_mode()
def step(model, cache, token: Tensor) -> tuple[float, Tensor]:
    """Seconds of one token, and its logits."""
    start = time.perf_counter()
    logits = model(token, past_key_values=cache, logits_to_keep=1).logits[0, -1]
    return time.perf_counter() - start, logits


def in_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """For each name, the median seconds of each round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()  # after the other one, caches of the processor are cold
            found[name].append(statistics.median(run() for _ in range(STEPS)))
    return found


def ratio(found: dict[str, list[float]], other: str, ours: str) -> float:
    """How many times as fast ours is: the median of the rounds' ratios."""
    return statistics.median(b / a for a, b in zip(found[ours], found[other], strict=True))


def decode(dtype: torch.dtype, rounds: int) -> list[dict[str, object]]:
    """One token after 4,096 and after 8,192 others."""
    model, _ = in_transformers("smollm2", dtype)
    token, out = torch.tensor([[17]]), []
    for tokens in (16, 4096, 8000):  # next to none: the model by itself; it has 8,192 positions
        own, ours = DynamicCache(config=model.config), kvik.hf.Cache(model)
        fill(own, model, tokens), fill(ours, model, tokens)
        caches = {"DynamicCache": own, "kvik": ours}
        found = in_turns(
            {name: (lambda cache=cache: step(model, cache, token)[0]) for name, cache in caches.items()}, rounds
        )
        best = {name: 1e3 * min(seconds) for name, seconds in found.items()}
        held = ours.nbytes
        out.append(
            dict(
                dtype=str(dtype).removeprefix("torch."), tokens=tokens, dynamic_ms=best["DynamicCache"],
                kvik_ms=best["kvik"], times=ratio(found, "DynamicCache", "kvik"), rows=held.payload,
                around=held.overhead,
            )
        )  # fmt: skip
        ours.close()
        print(out[-1], flush=True)
    return out


@torch.inference_mode()
def prefilled(model, cache, ids: Tensor):
    """The cache, once it has read the text."""
    for piece in ids.split(512, dim=1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    return cache


def kl(reference: list[Tensor], found: list[Tensor]) -> float:
    """Mean KL in nats, f64."""
    p, q = (torch.stack(each).double().log_softmax(-1) for each in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def quantized(rounds: int, quanto: Path | None) -> list[dict[str, object]]:
    """Caches of few bits after 2,048 tokens of text."""
    model, tokenizer = in_transformers("smollm2")
    text = (DOCS / "performance.md").read_text() + (DOCS / "retention.md").read_text()
    ids = torch.tensor([tokenizer.encode(text)[: 2048 + FOLLOWING]])
    prompt, following = ids[:, :2048], ids[:, 2048:].split(1, dim=1)
    makers: dict[str, Callable[[], object]] = {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "QuantizedCache fp8": lambda: QuantizedCache("fp8", model.config),
        **{f"kvik {spec}": (lambda spec=spec: kvik.hf.Cache(model, spec)) for spec in ("f32", "int8", "k8v4", "int4")},
    }
    if quanto is not None:
        sys.path.insert(0, str(quanto))
        makers["QuantizedCache quanto, 4 bits"] = lambda: QuantizedCache("quanto", model.config, nbits=4)
    caches = {name: prefilled(model, make(), prompt) for name, make in makers.items()}
    logits = {name: [step(model, cache, token)[1] for token in following] for name, cache in caches.items()}
    runs = {name: (lambda cache=cache: step(model, cache, following[0])[0]) for name, cache in caches.items()}
    found = in_turns(runs, rounds)
    out = []
    for name in makers:
        out.append(
            dict(
                cache=name, ms=1e3 * min(found[name]), kl=kl(logits["DynamicCache"], logits[name]),
                tokens_per_second=1 / min(found[name]),
            )
        )  # fmt: skip
        print(out[-1], flush=True)
    return out


@torch.inference_mode()
def batch() -> dict[str, object]:
    """Prompts of very different lengths, padded on the left."""
    model, _ = in_transformers("smollm2", torch.bfloat16)
    lengths = [50 + 1450 * i // 15 for i in range(16)]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 49000, (16, 1500), generator=generator)
    mask = (torch.arange(1500) >= 1500 - torch.tensor(lengths)[:, None]).long()
    with kvik.hf.Cache(model) as cache:
        start = time.perf_counter()
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
        seconds, held = time.perf_counter() - start, cache.nbytes
        tokens = int(cache.batch.real.sum())
        each = held.payload // tokens
        dense = each * cache.batch.real.size
    same, found = True, []
    for pad in (0, 9999):
        few = ids[:4, -600:].masked_fill(mask[:4, -600:] == 0, pad)
        with kvik.hf.Cache(model) as cache:
            found.append(model(few, attention_mask=mask[:4, -600:], past_key_values=cache, logits_to_keep=1).logits)
    same = bool(torch.equal(*found))
    out = dict(
        prompts=16, tokens=tokens, seconds=seconds, rows=held.payload, around=held.overhead, dense=dense,
        pads_move_a_bit=not same,
    )  # fmt: skip
    print(out, flush=True)
    return out


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quanto", type=Path, help="a folder in which optimum-quanto was unpacked")
    parser.add_argument("--parts", default="decode,quantized,batch")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    found: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    parts = options.parts.split(",")
    if "decode" in parts:
        found["decode"] = [*decode(torch.float32, options.rounds), *decode(torch.bfloat16, options.rounds)]
    if "quantized" in parts:
        found["quantized"] = quantized(options.rounds, options.quanto)
    if "batch" in parts:
        found["batch"] = batch()
    if options.write is not None:
        options.write.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
