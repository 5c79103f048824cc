"""The attention of `self_attention.py` through kvik: `append` writes the rows into pages, `attend` reads them there.

What a list of tensors does not do: rows in any precision, pages that others share, a byte budget, and exact books.
"""

import torch

from kvik import Cache, LayerShape, Spec

torch.manual_seed(0)
N, H, D = 6, 2, 8
PROMPT, d = 3, H * D
x = torch.randn(N, d, dtype=torch.float64)
W_q, W_k, W_v, W_o = torch.randn(4, d, d, dtype=torch.float64) / d**0.5


def heads(y):
    """[t, d] → [t, H, D], as kvik takes them."""
    return y.view(len(y), H, D)


def from_scratch(x):
    """Every token's output, everything computed at once: [n, d]."""
    q, k, v = (heads(x @ W).transpose(0, 1) for W in (W_q, W_k, W_v))
    scores = (q @ k.transpose(1, 2) / D**0.5).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    return (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(len(x), d) @ W_o


for kv in ("f32", "int8", "int4"):
    cache = Cache(Spec.parse(kv, [LayerShape(heads=H, streams=(("k", D), ("v", D)))]), memory=1 << 20)
    worst = 0.0
    with cache.open() as sequence:
        for n in range(PROMPT, N + 1):
            new = x[:n] if n == PROMPT else x[n - 1 : n]
            with sequence.append(range(n - len(new), n)) as step:  # token ids: any numbers, here 0, 1, 2 …
                step.append(0, k=heads(new @ W_k).float(), v=heads(new @ W_v).float())
                mixed = step.attend(0, heads(new @ W_q).float(), scale=D**-0.5).out  # [t, H, D]
            sequence.settle()
            out = mixed.double().flatten(1) @ W_o
            worst = max(worst, float((out - from_scratch(x[:n])[-len(new) :]).abs().max()))
        kept = sequence.read(0)
        assert kept["k"].shape == (H, N, D), "one row a token and head, none computed twice"
        assert kv != "f32" or worst < 1e-5, "f32 rows: equal to float64 within f32's rounding"
        print(f"{kv:5} k per head {list(kept['k'].shape[1:])}, largest difference {worst:.0e},", end=" ")
        print(f"{sequence.nbytes.payload} B of codes in {cache.books.in_use} pages")
