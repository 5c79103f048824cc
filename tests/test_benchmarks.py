"""What `benchmarks/precision.py`, `resident.py` and `whisper.py` compute from what they measure."""

import json
import math
import mmap
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import precision
import resident
import whisper

from kvik.cache.arena import SLAB, Arena
from test_sound import wav


def test_a_divergence_is_from_the_full_rows_to_the_others():
    """KL(p, q) by hand, for p = (1/2, 1/2) and q = (1/4, 3/4); and in chunks, as for a text."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    want = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert precision.compare([p + 3], [q - 5], [[7]]) == pytest.approx((want, want, 0.0), abs=1e-7)
    rows = precision.CHUNK + 9
    mixed = torch.cat([q.expand(rows - 27, 2), p.expand(27, 2)])
    mean, p99, same = precision.compare([p.expand(rows, 2)], [mixed], [[0] * rows])
    assert mean == pytest.approx(want * (rows - 27) / rows, abs=1e-7) and p99 == pytest.approx(want, abs=1e-7)
    assert same == pytest.approx(27 / rows)
    assert precision.compare([q], [q], [[0]]) == (0.0, 0.0, 1.0)


@pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="counts pages of 4096 B")
def test_what_lies_in_memory_is_counted_by_the_page():
    arena = Arena(8 * SLAB, 64 << 20, 8192, torch.device("cpu"))
    assert resident.present(arena) == 0
    pages = arena.take(4096, 3 * SLAB // 4096 + 5)
    assert resident.present(arena) == len(pages) * 4096
    arena.release(4096, pages[: 2 * SLAB // 4096])
    assert resident.present(arena) == (len(pages) - 2 * SLAB // 4096) * 4096


def test_memory_is_told_above_a_ground():
    ground, now = resident.Memory(100, 80, 0), resident.Memory(130, 95, 16)
    assert now.above(ground) == {"resident": 30, "anonymous": 15, "arena": 16}


def test_a_line_before_stands_only_where_rows_left():
    found = {"account": 2 << 20, "slabs": 3 << 20, "resident": 5 << 19, "anonymous": 0, "arena": 0}
    full = {"spec": "int8", "formula": 2 << 20, "page_a_lane": 1 << 20, "moments": {"before": found, "settled": found}}
    less = full | {"spec": "int8+x", "moments": {"before": found | {"account": 4 << 20}, "settled": found}}
    lines = resident.table([full, less]).splitlines()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| int8", "settled"], ["| int8+x", "before"], ["| int8+x", "settled"],
    ]  # fmt: skip
    assert "+0.50 (+25.0%)" in lines[0]


def test_word_errors_are_counted_by_the_fewest_changes():
    said = whisper.words("He was not an ill-disposed young man, Mr. Dashwood!")
    assert said == ["he", "was", "not", "an", "ill", "disposed", "young", "man", "mister", "dashwood"]
    for heard, errors in (
        ("he was not an ill disposed young man mister dashwood", 0), ("", 10), ("he was an ill disposed young man", 3),
        ("he he was not an ill posed young man mister dashwood", 2), ("x y", 10),
    ):  # fmt: skip
        assert whisper.distance(said, heard.split()) == errors
    assert whisper.distance([], ["a", "b"]) == 2


def test_the_figures_of_real_speech_are_those_that_were_measured():
    docs = Path(__file__).parent.parent / "docs"
    facts = json.loads((docs / "whisper.json").read_text())
    outcomes = [whisper.Outcome(**each) for each in facts["outcomes"]]
    assert whisper.table(outcomes, facts["words"]) in (docs / "whisper.md").read_text()
    assert facts["same_as_transformers"] == facts["of"] == 5 and all(o.encoded == [5, 0] for o in outcomes)
    one, five = ([o.held_bytes for o in outcomes if o.beams == count] for count in (1, 5))
    assert one == five, "five beams hold one window"


def test_clips_are_those_that_a_transcription_names(tmp_path):
    wav(tmp_path / "one-0870.wav", [0.0] * 800)
    (tmp_path / "transcription").write_text("<s> good  morning </s> (one-0870)\n\nno clip\n")
    (clip,) = whisper.clips(tmp_path)
    assert (clip.name, clip.words, len(clip.sound)) == ("one-0870", ["good", "morning"], 800)
