"""Real speech through Whisper tiny.en: what smaller caches cost in words, and what beams and second passes share.

    python benchmarks/whisper.py [--clips FOLDER] [--rounds 3] [--write docs/whisper.json]

The clips are five sentences of a LibriVox reading with their texts, from Debian's package pocketsphinx-testdata, which
apt-get download fetches (1.8 MB; nothing is installed), or FOLDER, with WAV files and a file `transcription` of lines
"<s> words </s> (name)". Weights f32. Every spec and number of beams reads each clip twice in one cache: the second pass
finds the window's rows. Medians of the rounds' seconds; texts are the same in all rounds. Word error rate: substituted,
left out and added words by words said, both texts in lower case and without punctuation. The tokens of f32, greedy, are
compared with those of transformers' own `generate` over the same weights and features.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from torch import Tensor

import kvik
from kvik.cache.cache import Cache
from kvik.engine.transcription import Transcriber, source_bytes, text_bytes
from kvik.models import prepare
from kvik.models.mel import RATE, log_mel
from kvik.models.model import Model
from kvik.models.sound import read_wav

NAME = "whisper-tiny.en"
PACKAGE = "pocketsphinx-testdata"
SPECS = ("f32", "int8", "int8; cross: int4", "int4")
BEAMS = (1, 5)


@dataclass(frozen=True)
class Clip:
    """A sentence: its sound, and what is said."""

    name: str
    sound: Tensor
    words: list[str]


@dataclass(frozen=True)
class Outcome:
    """One spec and number of beams over all clips.

    Attributes:
        errors: words that were substituted, left out or added.
        same_texts: clips whose tokens are those of f32 with as many beams.
        score_change: mean absolute change of texts' scores from f32's.
        window_bytes: payload of one window's rows.
        held_bytes: bytes of pages with windows' rows that one text's search held at the most.
        text_bytes: payload of the longest text's own rows.
        first_s, second_s: seconds of a pass over all clips.
        encoded: encoder runs in each pass.
        real_time: first_s by seconds of sound.
    """

    spec: str
    beams: int
    errors: int
    error_rate: float
    same_texts: int
    score_change: float
    window_bytes: int
    held_bytes: int
    text_bytes: int
    first_s: float
    second_s: float
    encoded: tuple[int, int]
    real_time: float
    texts: list[str]


def clips(folder: Path) -> list[Clip]:
    """Those that a folder's `transcription` names."""
    lines = (folder / "transcription").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"<s>(.*)</s>\s*\((.*)\)\s*", line) for line in lines]
    return [Clip(m[2], read_wav(folder / f"{m[2]}.wav"), words(m[1])) for m in found if m]


def fetch(into: Path) -> tuple[Path, dict[str, str]]:
    """(the clips' folder, which package they are from), by apt-get download and dpkg."""
    subprocess.run(["apt-get", "download", "-q", PACKAGE], cwd=into, check=True, stdout=2)
    (package,) = into.glob("*.deb")
    subprocess.run(["dpkg", "-x", package.name, "files"], cwd=into, check=True)
    source = {"package": package.name, "sha256": hashlib.sha256(package.read_bytes()).hexdigest()}
    return into / "files/usr/share/pocketsphinx/test/data/librivox", source


def words(text: str) -> list[str]:
    """Lower case, without punctuation; a hyphen ends a word, and titles are written out."""
    plain = re.sub(r"[^\w\s]", "", text.lower().replace("-", " "))
    return re.sub(r"\bmr\b", "mister", plain).split()


def distance(said: list[str], heard: list[str]) -> int:
    """Words to substitute, leave out or add (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, a in enumerate(said, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(heard, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def held(cache: Cache) -> int:
    """Bytes of the pages with sources' rows that open sequences hold, each page once."""
    pages = {
        (table.group.page_bytes, int(page))
        for sequence in cache.sequences for table in sequence.tables if table.group.source
        for page in table.held(0)[0]
    }  # fmt: skip
    return sum(size for size, _ in pages)


def measure(model: Model, given: list[Clip], spec: str, count: int, rounds: int, reference: Outcome | None) -> Outcome:
    """See `Outcome`."""
    first, second, most, run = [], [], [0], model.run

    def watched(chunks, **options):
        logits = run(chunks, **options)
        most[0] = max(most[0], held(chunks[0][0].cache))
        return logits

    for number in range(rounds + 1):
        cache = model.cache(spec, memory=1 << 30)
        model.run = watched if number == 0 else run  # type: ignore[method-assign]
        passes = []
        for _ in range(2):
            transcriber, began = Transcriber(model, cache, count=count), time.perf_counter()
            windows = [window for clip in given for window in transcriber(clip.sound)]
            passes.append((time.perf_counter() - began, transcriber, windows))
        if number:  # the first is to be watched and warms up
            first.append(passes[0][0])
            second.append(passes[1][0])
        assert passes[0][2] == passes[1][2], "kept rows give the same text"
    transcribers = [each[1] for each in passes]
    texts, ids = [window.text for window in windows], [window.token_ids for window in windows]
    scores = [window.score for window in windows]
    errors = sum(distance(clip.words, words(text)) for clip, text in zip(given, texts, strict=True))
    known = (ids, scores) if reference is None else MEMORY[reference.beams]
    MEMORY.setdefault(count, (ids, scores))
    sound = sum(len(clip.sound) for clip in given) / RATE
    return Outcome(
        spec=spec,
        beams=count,
        errors=errors,
        error_rate=errors / sum(len(clip.words) for clip in given),
        same_texts=sum(a == b for a, b in zip(ids, known[0], strict=True)),
        score_change=statistics.mean(abs(a - b) for a, b in zip(scores, known[1], strict=True)),
        window_bytes=source_bytes(model, cache.spec).payload,
        held_bytes=most[0],
        text_bytes=text_bytes(cache.spec, transcribers[0].longest).payload,
        first_s=statistics.median(first),
        second_s=statistics.median(second),
        encoded=(transcribers[0].encoded, transcribers[1].encoded),
        real_time=statistics.median(first) / sound,
        texts=texts,
    )


MEMORY: dict[int, tuple[list[tuple[int, ...]], list[float]]] = {}  # tokens and scores of f32, by beams


@torch.no_grad()
def same_as_transformers(model: Model, given: list[Clip]) -> int:
    """Of how many clips transformers gives the same tokens, greedy, over the same weights."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = model.config
    theirs = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=config.vocab_size, d_model=config.hidden, encoder_layers=config.encoder_layers,
            decoder_layers=config.layers, encoder_ffn_dim=config.encoder_ffn, decoder_ffn_dim=config.ffn,
            encoder_attention_heads=config.encoder_heads, decoder_attention_heads=config.heads,
        )
    ).eval()  # fmt: skip
    loaded = prepare.load(prepare.resolve(NAME))
    tensors = {name: tensor.float() for name, tensor in loaded.tensors.items() if not name.endswith("k_proj.bias")}
    theirs.load_state_dict(tensors, strict=False)
    theirs.tie_weights()
    prompt, rules, same = config.begin(None, timed=False), config.constraints, 0
    for clip, ours in zip(given, MEMORY[1][0], strict=True):
        features = log_mel(clip.sound, config.mels, config.frames).t()[None]
        found = theirs.generate(
            features, decoder_input_ids=torch.tensor([prompt]), do_sample=False, eos_token_id=config.eos_ids[0],
            suppress_tokens=[each[0] for each in rules.never], begin_suppress_tokens=list(rules.never_begin),
            pad_token_id=config.eos_ids[0], max_new_tokens=200, return_timestamps=False,
        )[0].tolist()  # fmt: skip
        text = [token for token in found if token not in (*prompt, *config.eos_ids)]
        same += text == [token for token in ours if token not in config.eos_ids]
    return same


def table(outcomes: list[Outcome], said: int) -> str:
    """As Markdown."""
    lines = [
        f"| cache | beams | errors of {said} words | texts as f32's | score | a window | held by the search | a pass | "
        "× real time | second pass | encoder runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{o.spec}` | {o.beams} | {o.errors} ({100 * o.error_rate:.1f} %) | {o.same_texts} of {len(o.texts)} | "
        f"± {o.score_change:.4f} | {o.window_bytes:,} B | {o.held_bytes:,} B | {o.first_s:.2f} s | {o.real_time:.3f} | "
        f"{o.second_s:.2f} s | {o.encoded[0]} + {o.encoded[1]} |"
        for o in outcomes
    ]
    return "\n".join(lines)


def main() -> None:
    """Prints a table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder, source = fetch(Path(work)) if options.clips is None else (options.clips, {"folder": "of --clips"})
        given = clips(folder)
    model = kvik.load(NAME, weights="f32")
    outcomes: list[Outcome] = []
    for count in BEAMS:
        reference = None
        for spec in SPECS:
            outcomes.append(measure(model, given, spec, count, options.rounds, reference))
            reference = reference or outcomes[-1]
    same = same_as_transformers(model, given)
    said, seconds = sum(len(clip.words) for clip in given), sum(len(clip.sound) for clip in given) / RATE
    print(f"{len(given)} clips, {seconds:.1f} s, {said} words · weights f32 · medians of {options.rounds} rounds\n")
    print(table(outcomes, said))
    print(f"\ntokens of f32, greedy, equal transformers' in {same} of {len(given)} clips")
    if options.write is not None:
        facts = {
            "model": NAME, "clips": source, "seconds": seconds, "words": said, "threads": torch.get_num_threads(),
            "rounds": options.rounds, "same_as_transformers": same, "of": len(given),
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }  # fmt: skip
        options.write.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
