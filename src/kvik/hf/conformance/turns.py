"""One text over one cache: in one call, in pieces, over many turns, taken back, copied, kept in a file, begun anew."""

from __future__ import annotations

import copy
import inspect
import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from kvik.hf.conformance.given import EXACT, Given
from kvik.hf.conformance.models import WINDOW, text
from kvik.hf.conformance.subject import Subject, figure, off
from kvik.hf.conformance.verdicts import UnfitError, demand

LENGTH = 53
LOST = 0.5  # of the largest logit; a cache that is off by more is no cache of this text
PIECES = (1, 6, 2, 1, 11, 32)


def alone(given: Given) -> str:
    """A text read in one call and then token by token has the logits of a model without a cache."""
    subject = given.subject("plain")
    texts = [text(length, seed=length) for length in (5, 14, 33)]
    found = max(given.alone(subject, ids) for ids in texts)
    if not given.contender.lossy:
        return given.near(subject, found)
    share = found / max(float(subject.exact(ids).abs().max()) for ids in texts)
    demand(share <= LOST, f"lossy: logits off by {figure(found)}, {share:.0%} of the largest")
    return f"lossy: off by {figure(found)}, {share:.0%} of the largest"


def chunked_prefill(given: Given) -> str:
    """A prompt in pieces gives the logits of a prompt in one, by hand and through prefill_chunk_size."""
    subject, ids = given.subject("plain"), text(LENGTH, 1)
    found = pieces(given, subject, ids)
    output = subject.generate(given.cache(subject), [ids], prefill_chunk_size=4)
    return given.near(subject, max(found, subject.strays(output, [ids])))


def chunked_prefill_padded(given: Given) -> str:
    """A left-padded batch in pieces, through prefill_chunk_size: each text has the logits that it has alone."""
    subject, rows = given.subject("plain"), [text(4, 2), text(LENGTH, 3)]
    output = subject.generate(given.cache(subject), rows, prefill_chunk_size=5)
    return given.near(subject, subject.strays(output, rows))


def pieces(given: Given, subject: Subject, ids: list[int], cuts: tuple[int, ...] = PIECES) -> float:
    """How far logits are off where a text is read in pieces."""
    cache, at, found = given.cache(subject), 0, []
    for cut in cuts:
        found.append(subject.feed(cache, [ids[at : at + cut]])[0])
        at += cut
    return off(torch.cat(found), subject.exact(ids[:at]))


def many_turns(given: Given) -> str:
    """Four calls of generate over one cache, each with the whole text so far, have the logits of that text."""
    subject = given.subject("plain")
    cache, ids, worst = given.cache(subject), text(5, 4), 0.0
    for turn in range(4):
        ids = [*ids, *text(4, 40 + turn)]
        output = subject.generate(cache, [ids], new=5)
        worst = max(worst, subject.strays(output, [ids]))
        ids = output.sequences[0].tolist()
        seen = int(cache.get_seq_length())
        demand(seen == len(ids) - 1, f"after turn {turn + 1} it counts {seen} tokens instead of {len(ids) - 1}")
    return given.near(subject, worst)


def many_turns_padded(given: Given) -> str:
    """Turns of a left-padded batch over one cache: the pads of the first turn stay unseen in the next."""
    subject, rows, shifts = given.subject("plain"), [text(3, 5), text(10, 6)], (0, 1)
    cache = given.cache(subject)
    first = subject.generate(cache, rows, new=4)
    ids = torch.cat([first.sequences, torch.tensor([text(4, 50 + row) for row in shifts])], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    second = subject.model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return given.near(subject, subject.strays(second, [ids[0, 7:].tolist(), ids[1].tolist()]))


def crop(given: Given) -> str:
    """crop(-n) takes the last n tokens back: the rest stays, another text goes on, again and again."""
    subject = given.subject("plain")
    return given.near(subject, cropped(given, subject, (3, 1, 30, 9)))


def cropped(given: Given, subject: Subject, takes: tuple[int, ...], *, records: bool = False) -> float:
    """How far logits are off behind several crops."""
    cache, ids, worst = croppable(given, subject), text(LENGTH, 7), 0.0
    if records:
        cache.activate_past_recording()
    subject.feed(cache, [ids])
    for turn, take in enumerate(takes):
        cache.crop(-take)
        seen, left = int(cache.get_seq_length()), len(ids) - take
        demand(seen == left, f"crop(-{take}) of {len(ids)} tokens leaves {seen} instead of {left}")
        ids = [*ids[:left], *text(4, 60 + turn)]
        got = torch.cat([subject.feed(cache, [ids[left : left + 3]])[0], subject.feed(cache, [ids[left + 3 :]])[0]])
        worst = max(worst, off(got, subject.exact(ids)[left:]))
    return worst


def crop_nothing(given: Given) -> str:
    """crop(0), which assisted decoding calls at every step, leaves all tokens where they are."""
    if "max_length" in inspect.signature(DynamicLayer.crop).parameters:
        raise UnfitError("in this version of transformers crop(0) means: keep 0 tokens")
    subject, ids = given.subject("plain"), text(LENGTH, 8)
    cache = croppable(given, subject)
    cache.crop(0)
    subject.feed(cache, [ids[:-2]])
    cache.crop(0)
    seen = int(cache.get_seq_length())
    demand(seen == len(ids) - 2, f"crop(0) of {len(ids) - 2} tokens leaves {seen}")
    return given.near(subject, off(subject.feed(cache, [ids[-2:]])[0], subject.exact(ids)[-2:]))


def crop_all(given: Given) -> str:
    """crop(-length) leaves an empty cache that another text can go through."""
    subject, first, second = given.subject("plain"), text(9, 9), text(12, 10)
    cache = croppable(given, subject)
    subject.feed(cache, [first])
    cache.crop(-len(first))
    seen = int(cache.get_seq_length())
    demand(seen == 0, f"crop(-{len(first)}) of {len(first)} tokens leaves {seen}")
    return given.near(subject, off(subject.feed(cache, [second])[0], subject.exact(second)))


def crop_batch(given: Given) -> str:
    """crop in a left-padded batch takes the newest tokens of every text, never the pads."""
    subject, rows = given.subject("plain"), [text(4, 11), text(10, 12)]
    cache = croppable(given, subject)
    first = subject.generate(cache, rows, new=5)
    cache.crop(-4)
    ids = torch.cat([first.sequences[:, :10], torch.tensor([text(3, 13), text(3, 14)])], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    second = subject.model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return given.near(subject, subject.strays(second, [ids[0, 6:].tolist(), ids[1].tolist()]))


def croppable(given: Given, subject: Subject) -> Any:
    """An empty cache, unless its class says that it can't be cropped."""
    cache = given.cache(subject)
    if not says_croppable(cache):
        raise UnfitError("says itself that it can't be cropped (is_croppable)")
    return cache


def says_croppable(cache: Any) -> bool:
    """What a cache says of itself; older transformers have no word for it."""
    return bool(cache.is_croppable) if "is_croppable" in dir(type(cache)) else True


def reset(given: Given) -> str:
    """A cache that was reset counts nothing and is as good as new."""
    subject, first, second = given.subject("mixed"), text(LENGTH, 15), text(LENGTH, 16)
    try:
        cache = given.cache(subject)
    except UnfitError:
        subject = given.subject("plain")
        cache = given.cache(subject)
    subject.feed(cache, [first])
    cache.reset()
    seen = int(cache.get_seq_length())
    demand(seen == 0, f"it counts {seen} tokens after reset")
    return given.near(subject, off(subject.feed(cache, [second])[0], subject.exact(second)))


def deep_copy(given: Given) -> str:
    """A deep copy goes its own way, and the original never learns of it."""
    subject, ids = given.subject("plain"), text(12, 17)
    cache = given.cache(subject)
    subject.feed(cache, [ids])
    twin = copy.deepcopy(cache)
    worst = 0.0
    for seed, each in ((18, twin), (19, cache), (20, copy.deepcopy(cache))):
        told = [*ids, *text(5, seed)]
        if each is not twin and each is not cache:
            told = [*ids, *text(5, 19), *text(5, seed)]
        start = int(each.get_seq_length())
        worst = max(worst, off(subject.feed(each, [told[start:]])[0], subject.exact(told)[start:]))
    return given.near(subject, worst)


def keep_in_a_file(given: Given) -> str:
    """What comes out of a file goes on as what went in: save and load, or torch.save where a class has neither."""
    subject, ids = given.subject("plain"), text(LENGTH, 22)
    cache = given.cache(subject)
    subject.feed(cache, [ids[:WINDOW]])
    kind = type(cache)
    if "save" in dir(kind) and "load" in dir(kind):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            cache.save(path)
            back = kind.load(subject.model, path)
        how = "save and load"
    else:
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        back = torch.load(file, weights_only=False)
        how = "torch.save (pickle), as the class has no save"
    want = subject.feed(cache, [ids[WINDOW:]])
    moved = off(subject.feed(back, [ids[WINDOW:]]), want)
    demand(moved <= EXACT, f"by {how}: logits off by {figure(moved)} from those of the cache that was saved")
    if not given.contender.lossy:
        given.near(subject, off(want[0], subject.exact(ids)[WINDOW:]))
    return f"off by {figure(moved)}; by {how}"
