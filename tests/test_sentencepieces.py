"""Marian's tokenizer from source.spm and vocab.json, over a model that is written here by hand."""

import json
import struct

import pytest

from kvik.errors import TokenizerError
from kvik.models.text import sentencepieces
from kvik.models.text.tokenizer import Tokenizer

# (piece, score, kind); "xy" is likelier than "x" and "y" apart, "<s>" is no text
PIECES = [
    ("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("▁", -3.0, 1), ("▁xy", -4.0, 1), ("x", -3.0, 1),
    ("y", -3.0, 1), ("xy", -5.0, 1), ("z", -6.0, 1), ("s", -6.0, 1), ("<", -6.0, 1), (">", -6.0, 1), (",", -2.0, 1),
]  # fmt: skip
IDS = {"</s>": 0, "<unk>": 1, "▁xy": 2, "x": 3, "y": 4, "xy": 5, "▁": 6, "ß": 7, "s": 8, "<": 9, ">": 10, ">>deu<<": 11,
       "▁Wort": 12, "e": 13, "<pad>": 14, ",": 15}  # fmt: skip


def number(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def field(at, value):
    """One field of a protobuf message: a number, a float, or bytes."""
    if isinstance(value, float):
        return number(at << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return number(at << 3) + number(value)
    return number(at << 3 | 2) + number(len(value)) + value


def spm(pieces=tuple(PIECES), trainer=(), normaliser=()):
    """A SentencePiece model's bytes."""
    rows = (field(1, text.encode()) + field(2, score) + field(3, kind) for text, score, kind in pieces)
    out = b"".join(field(1, row) for row in rows)
    return out + field(2, b"".join(trainer)) + field(3, b"".join(normaliser))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "source.spm").write_bytes(spm())
    (tmp_path / "vocab.json").write_text(json.dumps(IDS))
    return tmp_path


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("xy", [2]),
        ("xyxy", [2, 5]),
        ("  xy   xy ", [2, 2]),
        ("z", [6, 1]),  # a piece of the source that the table has no id for
        ("ß", [6, 7]),  # no piece, but the table knows it
        ("q", [6, 1]),
        (">>deu<<xy", [11, 2]),
        (">>fra<< xy", [1, 2]),
        (">> xy", [6, 10, 10, 2]),
        ("xy</s>", [2, 0]),
        ("<s>", [6, 9, 8, 10]),  # what controls a model is no text
    ],
)
def test_a_source_is_cut_by_its_model_and_numbered_by_the_table(folder, text, ids):
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode(text, add_special_tokens=True) == [*ids, 0]


def test_ids_become_text_of_the_other_language(folder):
    tokenizer = Tokenizer(folder)
    ids = [12, 13, 2, 15, 14, 0]
    assert tokenizer.decode(ids) == "Worte xy,"
    assert tokenizer.decode(ids, skip_special=False).endswith("</s>")
    stream = tokenizer.stream()
    assert "".join(stream.step(i) for i in ids) + stream.finish() == "Worte xy,"
    assert (tokenizer.vocab_size, tokenizer.token_id("▁Wort")) == (16, 12)


def test_spaces_are_as_the_file_says(folder):
    (folder / "source.spm").write_bytes(spm(normaliser=[field(3, 0), field(4, 0)]))
    assert Tokenizer(folder).encode("xy  xy") == [5, 6, 2]


def test_a_tokenizer_json_beside_them_comes_first(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer(folder)


BPE, OF_USERS = spm(trainer=[field(3, 2)]), spm((*PIECES, ("@", 0.0, 4)))


@pytest.mark.parametrize(
    ("file", "data", "named"),
    [
        ("source.spm", b"", "no unigram model"), ("source.spm", BPE, "no unigram model"),
        ("source.spm", OF_USERS, "doesn't know"), ("source.spm", spm()[:-8], "breaks off"),
        ("source.spm", b"\xff" * 40, "damaged"), ("source.spm", b"\x08", "damaged"),
        ("source.spm", field(1, 5), "where bytes should"), ("source.spm", field(1, field(2, 1.0)), "damaged"),
        ("source.spm", field(1, field(1, b"\xff")), "damaged"), ("vocab.json", b"[1]", "no table of ids"),
        ("vocab.json", b'{"</s>": -1}', "no table of ids"), ("vocab.json", b'{"</s>": 0}', "no <unk>"),
        ("vocab.json", b"{", "no table of ids"),
        ("source.spm", spm(normaliser=[field(2, b"\xff" * 9)]), "damaged"),
        ("source.spm", spm(((p, s, 1) for p, s, _ in PIECES)), "no piece for what"),
    ],
    ids=range(15),
)  # fmt: skip
def test_damaged_files_are_refused_in_one_line(folder, file, data, named):
    (folder / file).write_bytes(data)
    with pytest.raises(TokenizerError, match=named) as caught:
        Tokenizer(folder)
    assert "\n" not in str(caught.value) and file in str(caught.value)


def test_any_cut_off_file_is_refused_or_whole(folder):
    data = spm()
    for end in range(len(data)):
        (folder / "source.spm").write_bytes(data[:end])
        try:
            pieces = sentencepieces.Pieces.read(folder / "source.spm")
        except TokenizerError:
            continue
        assert 0 < len(pieces.pieces) <= len(PIECES)
