"""Parts of a text with their times, as the files that players read: SubRip (.srt) and WebVTT (.vtt)."""

from __future__ import annotations

from collections.abc import Sequence

from kvik.engine.transcription import Segment


def clock(seconds: float, point: str = ".", *, hours: bool = True) -> str:
    """HH:MM:SS.mmm; without hours that are none where those are not asked for.

    >>> clock(3725.5), clock(65.04, hours=False)
    ('01:02:05.500', '01:05.040')
    """
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    minutes, second = divmod(whole, 60)
    hour, minute = divmod(minutes, 60)
    front = f"{hour:02d}:" if hours or hour else ""
    return f"{front}{minute:02d}:{second:02d}{point}{milliseconds:03d}"


def srt(segments: Sequence[Segment]) -> str:
    """SubRip: numbered from 1, commas in times."""
    parts = (
        f"{number}\n{clock(each.start, ',')} --> {clock(each.end, ',')}\n{_one_line(each.text)}\n"
        for number, each in enumerate(segments, start=1)
    )
    return "\n".join(parts)


def vtt(segments: Sequence[Segment]) -> str:
    """WebVTT; & and < are written out, as it asks."""
    escaped = (each.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for each in segments)
    parts = (
        f"{clock(each.start)} --> {clock(each.end)}\n{_one_line(text)}\n"
        for each, text in zip(segments, escaped, strict=True)
    )
    return "\n".join(["WEBVTT\n", *parts])


def plain(segments: Sequence[Segment]) -> str:
    """A line a part, without times."""
    return "".join(f"{_one_line(each.text)}\n" for each in segments)


def _one_line(text: str) -> str:
    return " ".join(text.split())


FORMATS = {".txt": plain, ".srt": srt, ".vtt": vtt}
