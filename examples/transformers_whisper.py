"""Whisper tiny.en in transformers, five beams over one sound: the encoder's rows are stored once, for all of them.

    python examples/transformers_whisper.py CLIP.wav      (16 kHz; Debian's pocketsphinx-testdata has five)

Without a clip it looks for those of that package, and else hears a chord that it makes itself.
"""

import sys
from pathlib import Path

import torch
from transformers import GenerationMixin
from transformers.utils import logging

import kvik
import kvik.hf
from kvik.models.in_transformers import in_transformers
from kvik.models.mel import log_mel
from kvik.models.sound import RATE, read_wav

logging.disable_progress_bar()
BEAMS = 5


def sound() -> tuple[str, torch.Tensor]:
    """What to listen to, and its samples."""
    named = [Path(word) for word in sys.argv[1:] if word.endswith(".wav")]
    found = named + sorted(Path("/usr/share/pocketsphinx/test/data/librivox").glob("*.wav"))
    if found:
        return found[0].name, read_wav(found[0])
    times = torch.arange(4 * RATE) / RATE
    return "a chord", sum(torch.sin(2 * torch.pi * hertz * times) for hertz in (262, 330, 392)) * 0.1


own = kvik.load("whisper-tiny.en").config
model, tokenizer = in_transformers("whisper-tiny.en")  # yours: AutoModelForSpeechSeq2Seq.from_pretrained(…)
name, samples = sound()
features = log_mel(samples, own.mels, own.frames).t()[None]
options = dict(
    decoder_input_ids=torch.tensor([own.begin(None, timed=False)]), num_beams=BEAMS, max_new_tokens=50,
    do_sample=False, eos_token_id=own.eos_ids[0], pad_token_id=own.eos_ids[0],
    suppress_tokens=[each[0] for each in own.constraints.never],
    begin_suppress_tokens=list(own.constraints.never_begin),
)  # fmt: skip
with kvik.hf.Cache(model, "f32; cross: int8") as cache, torch.inference_mode():
    tokens = GenerationMixin.generate(model, features, past_key_values=cache, **options)[0].tolist()
    rows = [block.rows for block in cache.pages.index]
    each = sum(shape.heads * sum(width for _, width in shape.streams) * 4 * rows[0] for shape in cache.found.sources)
    held = cache.nbytes
    print(f"{name}, {len(samples) / RATE:.1f} s:{tokenizer.decode([t for t in tokens if t < own.eos_ids[0]])}")
    print(f"{rows[0]} rows of the sound are stored once for {BEAMS} beams: {held.payload / 2**20:.1f} MiB in all")
    saved = BEAMS * each - held.payload - held.overhead
    print(f"saved: {saved / 2**20:.1f} MiB of {BEAMS * each / 2**20:.1f} MiB in f32")
