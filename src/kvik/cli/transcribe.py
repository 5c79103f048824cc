"""`kvik transcribe`: sound to text, each window's rows in the cache once for all that read them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvik.cli.common import (
    DeviceOption,
    JsonOption,
    KvOption,
    MemoryOption,
    WeightsOption,
    app,
    budget,
    check_spec,
    load_model,
    progress,
    stderr,
)  # fmt: skip
from kvik.cli.files import check_target
from kvik.errors import StorageError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from kvik.cache.cache import Cache
    from kvik.engine.transcription import Segment, Transcriber, Window

MOST_BEAMS = 16


@app.command()
def transcribe(
    files: Annotated[list[Path], typer.Argument(help="WAV files of PCM samples, of any rate.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="whisper-tiny.en (built in), a safetensors folder, or a hub id.")
    ] = "whisper-tiny.en",
    kv: KvOption = "bf16",
    beams: Annotated[int, typer.Option(help="Texts that are searched side by side; 1 = greedy.")] = 1,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Print each part's times.")] = False,
    language: Annotated[str | None, typer.Option(help="What is spoken, such as de, of a model with several.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write the text to this file: .txt, .srt or .vtt by its ending.")
    ] = None,
    weights: WeightsOption = "auto",
    device: DeviceOption = "cpu",
    memory: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn speech into text, and say what it cost."""
    room = budget(memory)
    check_spec(kv, allow_none=False)
    form = _check(files, beams, output)
    from kvik.models.sound import read_wav

    sounds = [read_wav(path) for path in files]
    loaded = load_model(model, weights, device, reads=True)
    from kvik.engine.transcription import Transcriber, hears, memory_for

    hears(loaded)
    spec = loaded.spec(kv)
    cache = loaded.cache(kv, memory=memory_for(loaded, spec, beams) if room is None else room)
    timed = timestamps or form in (".srt", ".vtt")
    transcriber = Transcriber(loaded, cache, language=language, timed=timed, count=beams)
    started = time.perf_counter()
    heard = [
        _listen(transcriber, path, sound, shown=not as_json, titled=len(files) > 1, timed=timestamps)
        for path, sound in zip(files, sounds, strict=True)
    ]
    facts = _facts(transcriber, cache, sounds, heard, time.perf_counter() - started)
    if as_json:
        each = [_described(path, windows) for path, windows in zip(files, heard, strict=True)]
        print(json.dumps({"files": each, **facts}, ensure_ascii=False, indent=2))
    else:
        _show(facts)
    if output is not None and form is not None:
        _write(output, form, _segments(heard[0]))


def _check(files: list[Path], beams: int, output: Path | None) -> str | None:
    """Complains before anything is read. Returns the output's form."""
    from kvik.engine.subtitles import FORMATS

    if not 1 <= beams <= MOST_BEAMS:
        raise UsageError(f"--beams {beams}: use 1 to {MOST_BEAMS}")
    if output is None:
        return None
    form = output.suffix.lower()
    if form not in FORMATS:
        raise UsageError(f"--output {output}: its ending must be one of {', '.join(FORMATS)}")
    if len(files) > 1:
        raise UsageError(f"--output {output} takes one file's text, but {len(files)} are given; run them one by one")
    check_target("--output", output)
    return form


def _listen(
    transcriber: Transcriber, path: Path, sound: Tensor, *, shown: bool, titled: bool, timed: bool
) -> list[Window]:
    """One file; its text is printed as it comes."""
    from kvik.engine.subtitles import clock
    from kvik.models.mel import RATE

    found: list[Window] = []
    total, done = len(sound) / RATE, 0.0
    if shown and titled:
        print(f"{path}:", flush=True)
    windows = transcriber(sound)
    while True:
        with progress() as show:  # gone before anything is printed
            show(f"{path.name} {clock(done, hours=False)} of {clock(total, hours=False)}", int(done), int(total) or 1)
            window = next(windows, None)
        if window is None:
            return found
        found.append(window)
        done = window.start + window.seconds
        for each in window.segments if shown else ():
            times = f"[{clock(each.start, hours=False)} → {clock(each.end, hours=False)}] " if timed else ""
            print(f"{times}{each.text}", flush=True)


def _segments(windows: list[Window]) -> list[Segment]:
    return [segment for window in windows for segment in window.segments]


def _described(path: Path, windows: list[Window]) -> dict[str, object]:
    return {
        "file": str(path),
        "text": " ".join(window.text for window in windows if window.segments),
        "segments": [
            {"start": round(each.start, 3), "end": round(each.end, 3), "text": each.text} for each in _segments(windows)
        ],
        "windows": [
            {
                "start": round(each.start, 3), "seconds": round(each.seconds, 3), "score": round(each.score, 4),
                "temperature": each.temperature, "speech": each.speech, "token_ids": list(each.token_ids),
            }
            for each in windows
        ],
    }  # fmt: skip


def _facts(
    transcriber: Transcriber, cache: Cache, sounds: list[Tensor], heard: list[list[Window]], seconds: float
) -> dict[str, Any]:
    from kvik.engine.transcription import source_bytes, text_bytes
    from kvik.models.mel import RATE

    sound_s, model = sum(map(len, sounds)) / RATE, transcriber.model
    windows = [window for each in heard for window in each]
    return {
        "sound_s": round(sound_s, 3),
        "seconds": round(seconds, 3),
        "real_time_factor": round(seconds / sound_s, 4),
        "windows": len(windows),
        "drawn_again": sum(window.temperature > 0 for window in windows),
        "encoder_runs": transcriber.encoded,
        "beams": transcriber.count,
        "source_bytes": source_bytes(model, cache.spec).payload,
        "text_bytes": text_bytes(cache.spec, transcriber.longest).payload,
        "longest_text": transcriber.longest,
        "spec": str(cache.spec),
        "model": model.config.name,
        "weights": model.weights,
        "weights_bytes": model.nbytes,
    }


def _show(facts: dict[str, Any]) -> None:
    from kvik.units import format_bytes

    again = f", {facts['drawn_again']} drawn again at a higher temperature" if facts["drawn_again"] else ""
    spent = f"{facts['seconds']:.1f} s: {facts['real_time_factor']:.3f} of real time"
    lines = [
        f"{facts['sound_s']:.1f} s of sound in {spent} · "
        f"{_many(facts['windows'], 'window')}{again} · {_many(facts['encoder_runs'], 'encoder run')}",
        f"cache {facts['spec']}: {facts['source_bytes']:,} B of a window, once for {_many(facts['beams'], 'beam')} "
        f"+ {facts['text_bytes']:,} B of the longest text, {_many(facts['longest_text'], 'token')}",
        f"weights {facts['weights']}: {format_bytes(facts['weights_bytes'])}",
    ]
    stderr().print("\n" + "\n".join(lines), style="dim", highlight=False, markup=False)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _write(path: Path, form: str, segments: list[Segment]) -> None:
    from kvik.engine.subtitles import FORMATS

    try:
        path.write_text(FORMATS[form](segments), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: can't be written ({error.strerror}); name another file") from None
