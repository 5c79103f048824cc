"""Models with an encoder: rows of their own, and rows of a source, which are written once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache

from kvik.errors import KvikError
from kvik.hf.conformance.given import Given
from kvik.hf.conformance.models import SOURCE, text
from kvik.hf.conformance.subject import Subject, figure, off
from kvik.hf.conformance.verdicts import demand

STEPS = 6


def encoder_decoder_relative(given: Given) -> str:
    """An encoder and a bias by distance (T5): two sources, one padded; a prompt, then token by token."""
    return reads(given, "relative")


def encoder_decoder_learned(given: Given) -> str:
    """An encoder and learned positions (BART): two sources, one padded; a prompt, then token by token."""
    return reads(given, "translator")


def encoder_decoder_sound(given: Given) -> str:
    """An encoder of sound (Whisper): two sources; a prompt, then token by token."""
    return reads(given, "listener")


def encoder_decoder_beams(given: Given) -> str:
    """Beams over two sources (T5): each beam's score is what the model says of it about its own source."""
    subject = given.subject("relative")
    source = _source(subject)
    output = subject.model.generate(
        **source, past_key_values=given.pair(subject), num_beams=3, num_return_sequences=2, max_new_tokens=STEPS,
        do_sample=False, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    worst = 0.0
    for index, ids in enumerate(output.sequences.tolist()):
        logits = exact(subject, _one(source, index // 2), ids)[:-1]
        said = logits.log_softmax(dim=1).gather(1, torch.tensor(ids[1:])[:, None]).mean()
        worst = max(worst, abs(float(said) - float(output.sequences_scores[index])))
    return given.near(subject, worst, "scores")


def encoder_decoder_turns(given: Given) -> str:
    """generate again over the same cache, with what was said so far (T5): the source is not written twice."""
    subject = given.subject("relative")
    source, cache, ids, worst = _source(subject), given.pair(subject), torch.tensor([[0], [0]]), 0.0
    for _ in range(2):
        output = subject.model.generate(
            **source, decoder_input_ids=ids, decoder_attention_mask=torch.ones_like(ids), past_key_values=cache,
            max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        got, told = torch.stack(list(output.logits), dim=1), output.sequences.tolist()
        for index, row in enumerate(told):
            want = exact(subject, _one(source, index), row)[-got.shape[1] - 1 : -1]
            worst = max(worst, off(got[index], want))
        ids = torch.cat([output.sequences, torch.tensor([text(2, 3), text(2, 4)])], dim=1)
    return given.near(subject, worst)


def encoder_decoder_alone(given: Given) -> str:
    """A model with an encoder, and a cache that is not made of two: it works or refuses, never wrong in silence."""
    subject = given.subject("relative")
    cache = given.cache(subject)
    if isinstance(cache, EncoderDecoderCache):
        return "is made of two"
    source = _one(_source(subject), 0)
    try:
        output = subject.model.generate(
            **source, past_key_values=cache, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    except (ValueError, TypeError, NotImplementedError, KvikError) as refusal:
        return f"refused: {type(refusal).__name__}"
    got = torch.stack(list(output.logits), dim=1)[0]
    moved = off(got, exact(subject, source, output.sequences[0].tolist())[:-1])
    demand(moved <= given.slack(subject), f"no error, but logits are off by {figure(moved)}")
    return f"off by {figure(moved)}"


def reads(given: Given, name: str) -> str:
    """Logits of two texts about two sources, in one call and then token by token."""
    subject = given.subject(name)
    source, cache = _source(subject), given.pair(subject)
    rows = [text(3 + STEPS, 1), text(3 + STEPS, 2)]
    encoded = subject.model.get_encoder()(**source)
    mask = {"attention_mask": source["attention_mask"]} if "attention_mask" in source else {}
    got = []
    for start, stop in [(0, 3), *((at, at + 1) for at in range(3, 3 + STEPS))]:
        ids = torch.tensor([row[start:stop] for row in rows])
        output = subject.model(
            encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True, **mask
        )
        got.append(output.logits.float())
    want = torch.stack([exact(subject, _one(source, index), row) for index, row in enumerate(rows)])
    return given.near(subject, off(torch.cat(got, dim=1), want))


def exact(subject: Subject, source: dict[str, Tensor], ids: Sequence[int]) -> Tensor:
    """Logits [T, V] of one text about one source, without a cache."""
    output = subject.twin(**source, decoder_input_ids=torch.tensor([list(ids)]), use_cache=False)
    return torch.as_tensor(output.logits)[0].float()


def _source(subject: Subject) -> dict[str, Tensor]:
    """What two sources' encoder reads: sound of one length, or tokens, of which the second's last are pads."""
    if subject.name == "listener":
        drawn = torch.randn(2, 8, 2 * SOURCE, generator=torch.Generator().manual_seed(5))
        return {"input_features": drawn}
    mask = torch.ones(2, SOURCE, dtype=torch.long)
    mask[1, 7:] = 0
    return {"input_ids": torch.tensor([text(SOURCE, 7), text(SOURCE, 8)]) * mask, "attention_mask": mask}


def _one(source: dict[str, Tensor], index: int) -> dict[str, Any]:
    """One source alone."""
    return {key: value[index : index + 1] for key, value in source.items()}
