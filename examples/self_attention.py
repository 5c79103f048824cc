"""Multi-head causal self-attention in plain PyTorch, first without and then with a KV cache.

The lines that a cache changes are marked `# cache`. Shapes: n tokens so far, t new ones, H heads, D = d / H wide.
"""

import torch

torch.manual_seed(0)
N, H, D = 6, 2, 8  # tokens of the text, of which 3 are the prompt; heads; width of a head
PROMPT, d = 3, H * D
x = torch.randn(N, d, dtype=torch.float64)  # what the layer gets: one vector a token
W_q, W_k, W_v, W_o = torch.randn(4, d, d, dtype=torch.float64) / d**0.5


def heads(y):
    """[t, d] → [H, t, D]."""
    return y.view(len(y), H, D).transpose(0, 1)


def attend(q, k, v):
    """Queries [H, t, D] of the last t of n tokens over keys and values [H, n, D]: each sees itself and before."""
    t, n = q.shape[1], k.shape[1]
    scores = q @ k.transpose(1, 2) / D**0.5  # [H, t, n]
    visible = torch.arange(n) <= torch.arange(n - t, n)[:, None]
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(0, 1).reshape(t, d) @ W_o, int(visible.sum())


def without_cache(x):
    """The last token's output from all tokens of the text so far."""
    q, k, v = heads(x @ W_q), heads(x @ W_k), heads(x @ W_v)
    out, pairs = attend(q, k, v)
    return out[-1:], k.shape[1], pairs


class Cached:
    """The same layer, given the new tokens alone."""

    def __init__(self):
        self.k = self.v = torch.empty(H, 0, D, dtype=torch.float64)  # cache: what is kept, nothing yet

    def __call__(self, new):
        q, k, v = heads(new @ W_q), heads(new @ W_k), heads(new @ W_v)  # t rows each, not n
        self.k = torch.cat((self.k, k), dim=1)  # cache: new rows go behind the old
        self.v = torch.cat((self.v, v), dim=1)  # cache: no old row changes: it depends on no later token
        out, pairs = attend(q, self.k, self.v)  # cache: all rows are read
        return out[-1:], k.shape[1], pairs


layer, rows, pairs = Cached(), [0, 0], [0, 0]
for n in range(PROMPT, N + 1):
    new = x[:n] if n == PROMPT else x[n - 1 : n]  # prefill takes the prompt at once; then one token at a time
    with_cache, without = layer(new), without_cache(x[:n])
    assert (with_cache[0] - without[0]).abs().max() <= 1e-10, "a cache changes no result"
    rows = [rows[0] + with_cache[1], rows[1] + without[1]]
    pairs = [pairs[0] + with_cache[2], pairs[1] + without[2]]
    phase = f"prefill, {n} tokens" if n == PROMPT else f"decode, token {n}"
    print(f"{phase:18} q of a head {[len(new), D]}, k {list(layer.k.shape[1:])}, v {list(layer.v.shape[1:])};", end=" ")
    print(f"rows of k so far {rows[0]} (no cache: {rows[1]}), query-key pairs {pairs[0]} ({pairs[1]})")

held = layer.k.nbytes + layer.v.nbytes
print(f"\nkept: 2 (k, v) · 8 B (float64) · 1 layer · {H} heads · {D} wide · {N} tokens = {held} B")
assert held == 2 * 8 * H * D * N
print("one token at a time from the first: n rows with a cache, n(n+1)/2 without;")
print("n(n+1)/2 pairs with, n(n+1)(n+2)/6 without. Every step still reads all n rows: they are kept, not avoided.")
