"""Does kvik write what transformers writes? Greedy text of SmolLM2 on 20 prompts x 64 tokens, weights and rows in f32,
and how many of the 20 texts stay the same under other specs.

    python benchmarks/agreement.py [--prompts 20] [--tokens 64]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import kvik
from kvik.models.files import prepare
from kvik.ops.grouped import dense

PROMPTS = [
    "What is the capital of France?", "Why is the sky blue?", "Write a haiku about rain.", "Name three colours.",
    "How do I boil an egg?", "What is 12 times 12?", "Tell me a joke about cats.", "Who wrote Hamlet?",
    "Explain gravity to a child.", "List the planets in order.", "What does a compiler do?", "Greet me in French.",
    "Give me a recipe for pancakes.", "What is photosynthesis?", "How far is the moon?", "Describe a forest.",
    "What is a prime number?", "Why do leaves fall?", "Write about trust.", "How does a bicycle stay up?",
]  # fmt: skip


def reference_model(model: kvik.Model) -> Any:
    """transformers' own Llama with the same dequantised weights, in f32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    loaded, config = prepare.load(prepare.resolve("smollm2")), model.config
    theirs = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden, intermediate_size=config.ffn,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_positions, rms_norm_eps=config.norm_eps, rope_theta=config.rope.theta,
        tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    tensors = {name: dense(tensor) for name, tensor in loaded.tensors.items()}
    reference = LlamaForCausalLM.from_pretrained(None, config=theirs, state_dict=tensors)
    reference.generation_config.eos_token_id = list(config.eos_ids)
    reference.generation_config.pad_token_id = config.eos_ids[0]
    return reference.eval()


def transformers_texts(model: kvik.Model, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy continuations by transformers' `generate`."""
    reference, out = reference_model(model), []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            whole = reference.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)[0]
            out.append(whole[len(prompt) :].tolist())
    return out


def kvik_texts(model: kvik.Model, prompts: list[list[int]], tokens: int, kv: str) -> list[list[int]]:
    """Greedy continuations of all prompts in one ragged batch."""
    cache = model.cache(kv, shares=False)
    sequences = [cache.open() for _ in prompts]
    out: list[list[int]] = [[] for _ in prompts]
    pending = dict(enumerate(prompts))
    for _ in range(tokens):
        logits = model.run([(sequences[i], new) for i, new in pending.items()])
        chosen = dict(zip(pending, logits.argmax(dim=-1).tolist(), strict=True))
        for i, token in chosen.items():
            out[i].append(token)
        pending = {i: [token] for i, token in chosen.items() if token not in model.config.eos_ids}
        if not pending:
            break
    return out


def main() -> None:
    """Prints one line a spec."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    model = kvik.load("smollm2", weights="f32")
    texts = [model.tokenizer.chat([{"role": "user", "content": text}]) for text in PROMPTS[: options.prompts]]
    prompts = [model.tokenizer.encode(text) for text in texts]
    want = transformers_texts(model, prompts, options.tokens)
    for kv in ("f32", "bf16", "f16", "int8", "int8-rot", "k8v4", "int4"):
        got = kvik_texts(model, prompts, options.tokens, kv)
        same = sum(a == b for a, b in zip(want, got, strict=True))
        print(f"{kv:9} {same} of {len(want)} texts equal transformers'", flush=True)


if __name__ == "__main__":
    main()
