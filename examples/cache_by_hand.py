"""A cache without a model: open, append, attend, fork, trim, and what it holds at each point."""

import torch

from kvik import Cache, LayerShape, Spec

torch.manual_seed(0)
layers = [LayerShape(heads=2, streams=(("k", 64), ("v", 64)))]  # one layer, 2 KV heads of 64
cache = Cache(Spec.parse("int8", layers), memory=4 << 20)


def step(sequence, tokens):
    """Appends random rows for some tokens and attends with 4 query heads, two to each KV head."""
    count = len(tokens)
    with sequence.append(tokens) as step:
        step.append(0, k=torch.randn(count, 2, 64), v=torch.randn(count, 2, 64))
        out = step.attend(0, torch.randn(count, 4, 64), scale=64**-0.5).out
    sequence.settle()
    return out


story = cache.open()
print("prompt  ", tuple(step(story, range(100)).shape), story.nbytes)
twin = story.fork()  # shares all pages; a page is copied when one of them writes to it
print("forked  ", cache.books)
step(story, [1000])
step(twin, [2000, 2001])
print("diverged", cache.books, len(story), len(twin))
twin.trim(100)  # forget the two tokens again
assert torch.equal(twin.read(0)["k"], story.read(0)["k"][:, :100]), "both remember the same past"
story.close()
twin.close()
again = cache.open(list(range(100)))
print("reopened", again.cached, "of 100 tokens were still known")
cache.check()
