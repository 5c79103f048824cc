"""Real speech through Whisper tiny.en: what smaller caches cost in words, and what beams and second passes share.

    python benchmarks/whisper.py [--clips FOLDER] [--rounds 3] [--write docs/whisper.json]

The clips are five sentences of a LibriVox reading with their texts, from Debian's package pocketsphinx-testdata, which
apt-get download fetches (1.8 MB; nothing is installed), or FOLDER, with WAV files and a file `transcription` of lines
"<s> words </s> (name)". Weights f32. Every spec and number of beams reads each clip twice in one cache: the second pass
finds the window's rows. Rounds take turns; medians of seconds, and of processor seconds, which other programs move
less. Word error rate: substituted, left out and added words by words said, both texts in lower case and without
punctuation. The tokens of f32, greedy, are compared with those of transformers' own `generate` over the same weights
and features.
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
from kvik.engine.transcription import Transcriber, Window, source_bytes, text_bytes
from kvik.models.files import prepare
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
        first_s, second_s: seconds of a pass over all clips; median of the rounds.
        first_processor_s, second_processor_s: processor seconds of the same, of all threads.
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
    first_processor_s: float
    second_processor_s: float
    encoded: tuple[int, ...]
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


@dataclass(frozen=True)
class Round:
    """All clips twice in one cache: seconds and processor seconds of each pass, its encoder runs, and its texts."""

    seconds: tuple[float, ...]
    processor: tuple[float, ...]
    encoded: tuple[int, ...]
    windows: list[Window]
    longest: int


def once(model: Model, given: list[Clip], spec: str, count: int) -> Round:
    """See `Round`."""
    cache = model.cache(spec, memory=1 << 30)
    passes = []
    for _ in range(2):
        transcriber, wall, processor = Transcriber(model, cache, count=count), time.perf_counter(), time.process_time()
        windows = [window for clip in given for window in transcriber(clip.sound)]
        passes.append((time.perf_counter() - wall, time.process_time() - processor, transcriber.encoded, windows))
    assert passes[0][3] == passes[1][3], "kept rows give the same text"
    seconds, processors, encoded, _ = zip(*passes, strict=True)
    return Round(seconds, processors, encoded, windows, transcriber.longest)


def most_held(model: Model, clip: Clip, spec: str, count: int) -> int:
    """Bytes of pages with the window's rows that the search for one clip's text holds at the most."""
    cache, run, found = model.cache(spec, memory=1 << 30), model.run, [0]

    def watched(chunks, **options):
        logits = run(chunks, **options)
        found[0] = max(found[0], held(cache))
        return logits

    model.run = watched  # type: ignore[method-assign]
    try:
        list(Transcriber(model, cache, count=count)(clip.sound))
    finally:
        model.run = run  # type: ignore[method-assign]
    return found[0]


def outcome(model: Model, given: list[Clip], spec: str, count: int, rounds: list[Round], full: list[Window]) -> Outcome:
    """See `Outcome`; `full` is what f32 gives with as many beams."""
    windows, kept = rounds[0].windows, model.spec(spec)
    errors = sum(distance(clip.words, words(each.text)) for clip, each in zip(given, windows, strict=True))
    first, second = (statistics.median(each.seconds[i] for each in rounds) for i in (0, 1))
    first_cpu, second_cpu = (statistics.median(each.processor[i] for each in rounds) for i in (0, 1))
    return Outcome(
        spec=spec,
        beams=count,
        errors=errors,
        error_rate=errors / sum(len(clip.words) for clip in given),
        same_texts=sum(a.token_ids == b.token_ids for a, b in zip(windows, full, strict=True)),
        score_change=statistics.mean(abs(a.score - b.score) for a, b in zip(windows, full, strict=True)),
        window_bytes=source_bytes(model, kept).payload,
        held_bytes=most_held(model, given[0], spec, count),
        text_bytes=text_bytes(kept, rounds[0].longest).payload,
        first_s=first,
        second_s=second,
        first_processor_s=first_cpu,
        second_processor_s=second_cpu,
        encoded=rounds[0].encoded,
        real_time=first / sum(len(clip.sound) for clip in given) * RATE,
        texts=[each.text for each in windows],
    )


@torch.no_grad()
def same_as_transformers(model: Model, given: list[Clip], greedy: list[Window]) -> int:
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
    for clip, ours in zip(given, greedy, strict=True):
        features = log_mel(clip.sound, config.mels, config.frames).t()[None]
        found = theirs.generate(
            features, decoder_input_ids=torch.tensor([prompt]), do_sample=False, eos_token_id=config.eos_ids[0],
            suppress_tokens=[each[0] for each in rules.never], begin_suppress_tokens=list(rules.never_begin),
            pad_token_id=config.eos_ids[0], max_new_tokens=200, return_timestamps=False,
        )[0].tolist()  # fmt: skip
        text = [token for token in found if token not in (*prompt, *config.eos_ids)]
        same += text == [token for token in ours.token_ids if token not in config.eos_ids]
    return same


def table(outcomes: list[Outcome], said: int) -> str:
    """As Markdown."""
    lines = [
        f"| cache | beams | errors of {said} words | texts as f32's | score | a window | held by a search | a pass | "
        "the second | processor | the second | encoder runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{o.spec}` | {o.beams} | {o.errors} ({100 * o.error_rate:.1f} %) | {o.same_texts} of {len(o.texts)} | "
        f"± {o.score_change:.4f} | {o.window_bytes:,} B | {o.held_bytes:,} B | "
        f"{o.first_s:.2f} s | {o.second_s:.2f} s | "
        f"{o.first_processor_s:.2f} s | {o.second_processor_s:.2f} s | {o.encoded[0]} + {o.encoded[1]} |"
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
    settings = [(spec, count) for count in BEAMS for spec in SPECS]
    rounds: dict[tuple[str, int], list[Round]] = {each: [] for each in settings}
    for _ in range(options.rounds):  # in turn, so that a busy minute falls on all alike
        for spec, count in settings:
            rounds[spec, count].append(once(model, given, spec, count))
    full = {count: rounds[SPECS[0], count][0].windows for count in BEAMS}
    outcomes = [outcome(model, given, *each, rounds[each], full[each[1]]) for each in settings]
    same = same_as_transformers(model, given, full[1])
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
