"""Other ways to call a model: with embeddings, with a mask of one's own, with two caches in turns, stopped midway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvik.errors import KvikError
from kvik.hf.conformance.given import Given
from kvik.hf.conformance.models import text
from kvik.hf.conformance.subject import Subject, figure, off
from kvik.hf.conformance.verdicts import UnfitError, demand, first_line

LENGTH, FIRST = 16, 9


def embeddings(given: Given) -> str:
    """A model that is given embeddings instead of tokens has the logits of those tokens."""
    subject, ids = given.subject("plain"), text(LENGTH, 1)
    cache, got = given.cache(subject), []
    table = subject.model.get_input_embeddings()
    for start, stop in ((0, FIRST), (FIRST, FIRST + 1), (FIRST + 1, LENGTH)):
        rows = table(torch.tensor([ids[start:stop]]))
        got.append(subject.model(inputs_embeds=rows, past_key_values=cache, use_cache=True).logits[0].float())
    return given.near(subject, off(torch.cat(got), subject.exact(ids)))


def new_ids_only(given: Given) -> str:
    """A turn may name the new tokens alone, with a mask for all of them."""
    subject, ids = given.subject("plain"), text(LENGTH, 2)
    cache = given.cache(subject)
    subject.feed(cache, [ids[:FIRST]])
    output = subject.model.generate(
        input_ids=torch.tensor([ids[FIRST:]]), attention_mask=torch.ones(1, LENGTH, dtype=torch.long),
        past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    return given.near(subject, subject.strays(output, [ids]))


def own_mask(given: Given) -> str:
    """A mask of the user's own, [batch, 1, queries, columns], is obeyed or refused, never ignored."""
    subject, ids = given.subject("plain"), torch.tensor([text(LENGTH, 3)])
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    hidden[FIRST:, 2:6] = False
    mask = hidden[None, None]
    want = subject.twin(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    plain = subject.exact(ids[0].tolist())
    cache, got = given.cache(subject), []
    try:
        for start, stop in ((0, FIRST), (FIRST, FIRST + 1), (FIRST + 1, LENGTH)):
            got.append(_masked(subject, cache, ids[:, start:stop], mask[:, :, start:stop, :stop], start))
    except (ValueError, TypeError, NotImplementedError, KvikError) as refusal:
        raise UnfitError(f"refuses: {first_line(refusal)}") from refusal
    moved = off(torch.cat(got), want)
    demand(off(plain, want) > 1e-2, "the case itself is wrong: the mask changes nothing")
    return given.near(subject, moved)


def _masked(subject: Subject, cache: Any, ids: Tensor, mask: Tensor, start: int) -> Tensor:
    columns, _ = cache.get_mask_sizes(ids.shape[1], 0)
    mask = torch.nn.functional.pad(mask, (0, int(columns) - mask.shape[-1]))
    positions = torch.arange(start, start + ids.shape[1])[None]
    output = subject.model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return torch.as_tensor(output.logits)[0].float()


def two_at_once(given: Given) -> str:
    """Two caches of one model in turns, calls without a cache in between, and one that ends before the other."""
    subject, texts = given.subject("plain"), [text(LENGTH, 4), text(LENGTH, 5)]
    caches, worst = [given.cache(subject), given.cache(subject)], 0.0
    for at in range(0, LENGTH, 4):
        for cache, ids in zip(caches, texts, strict=True):
            if at == LENGTH - 4 and cache is caches[0]:
                given.end(cache)
                continue
            worst = max(worst, off(subject.feed(cache, [ids[at : at + 4]])[0], subject.exact(ids)[at : at + 4]))
        alone = subject.model(input_ids=torch.tensor([texts[0]]), use_cache=False).logits[0].float()
        worst = max(worst, off(alone, subject.exact(texts[0])))
    return given.near(subject, worst)


class Stopped(Exception):  # noqa: N818  # as KeyboardInterrupt is none
    """What stands for Ctrl-C in the middle of a step."""


def interrupted(given: Given) -> str:
    """A step that is stopped between two layers leaves no trace, or the cache says that it can't go on."""
    subject, ids = Subject("plain"), text(LENGTH, 6)
    cache = given.cache(subject)
    subject.feed(cache, [ids[:FIRST]])

    def stop(*_: Any) -> None:
        raise Stopped

    hook = subject.model.model.layers[1].register_forward_pre_hook(stop)
    try:
        subject.feed(cache, [ids[FIRST:]])
    except Stopped:
        pass
    finally:
        hook.remove()
    try:
        seen = [int(cache.get_seq_length(layer)) for layer in range(2)]
        demand(seen == [FIRST] * 2, f"its layers count {seen} tokens; {FIRST} were read before")
        got = subject.feed(cache, [ids[FIRST:]])[0]
    except KvikError as refusal:
        return f"refuses to go on: {first_line(refusal)}"
    moved = off(got, subject.exact(ids)[FIRST:])
    demand(moved <= given.slack(subject), f"logits off by {figure(moved)} after it")
    return f"off by {figure(moved)} after it"
