"""The comparison of servers: its page shows the figures that were measured, its players hear every token."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
pytest.importorskip("fastapi", reason="pip install 'kvik[serve]'")
import batches
import clients
import serve
import serve_report as report
from batches import Heard

from kvik.models.model import load
from served import save_tiny, serving

ROOT = Path(__file__).parent.parent
PAGE, FOUND = (ROOT / "docs/serving.md").read_text(), json.loads((ROOT / "docs/serve.json").read_text())
PROMPTS = [list(b"a shared beginning, then one"), list(b"a shared beginning, then two")]


def test_the_page_has_what_was_found():
    assert report.into(PAGE, report.page(FOUND)) == PAGE
    assert {"kvik", "kvik serve"} < {entry["key"] for entry in FOUND["contenders"]} <= set(report.KEYS)


def contender(key, **found):
    return {"key": key, "said": "x", "found": {name: list(values) for name, values in found.items()}}


def test_ratios_are_of_medians_of_like_with_like():
    times = dict.fromkeys(("new", "known", "alone", "beside", "beside_p99", "newcomer"), (0.1, 0.3, 0.2))
    mine = contender("kvik", first=(10.0,), later=(30.0, 90.0, 50.0), peak_bytes=(2e6, 3e6), **times)
    other = contender("openvino", first=(20.0,), later=(20.0, 10.0, 40.0), peak_bytes=(1e6,), **times)
    found = {"contenders": [mine, other]}
    assert "| kvik's engine | 10 | 50 | 200 | 200 | 200.0 | 200.0 | 200.0 | 0.2 | 3 |" in report.table(found)
    aims = report.aims(found)
    assert "| later rounds, engine / OpenVINO | ≥ 1.5, better 2 | 2.50 × |" in aims
    assert "| first round, engine / OpenVINO |  | 0.50 × |" in aims
    assert "| first token, known / new prefix, engine | ≤ 15 % | 100.0 % |" in aims
    assert "kvik serve" not in aims, "it was not measured"


def test_a_page_without_a_place_is_refused():
    with pytest.raises(SystemExit, match="no place"):
        report.into("words", "tables")


def test_what_is_between_tokens_before_and_beside_a_newcomer():
    """Two answers, a token every second and every two; the newcomer is asked at 20.5 and answered at 30.5; one answer
    stalls from 22 to 30."""
    first = Heard(0.0, [float(n) for n in range(40)])
    second = Heard(0.0, [*range(0, 23, 2), 30.0, 32.0])
    found = serve.mixed([first, second, Heard(20.5, [30.5])])
    assert found["alone"] == 1.0, "from 16 on, where both have 9 tokens: four of 1, two of 2"
    assert found["beside"] == 1.0 and found["beside_p99"] == 8.0 and found["newcomer"] == 10.0


def test_an_answer_that_ends_before_the_newcomers_begins_counts_for_nothing():
    with pytest.raises(SystemExit, match="ROOM"):
        serve.mixed([Heard(0.0, [float(n) for n in range(serve.ROOM)]), Heard(20.5, [5000.0])])


def test_figures_take_the_place_of_others_or_stand_beside_them():
    def made(key, value):
        return SimpleNamespace(key=key, said=key, found={"first": [value]})

    old = serve.joined({}, [made("openvino", 1.0), made("kvik", 2.0)], more=False)
    assert [entry["key"] for entry in old["contenders"]] == ["kvik", "openvino"], "in the page's order"
    new = serve.joined(old, [made("kvik", 3.0)], more=False)
    assert [entry["found"]["first"] for entry in new["contenders"]] == [[3.0], [1.0]]
    more = serve.joined(old, [made("kvik", 3.0)], more=True)
    assert [entry["found"]["first"] for entry in more["contenders"]] == [[2.0, 3.0], [1.0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_pieces_are_the_same_as_text_and_never_come_twice(folder):
    texts = serve.Texts(load(str(folder)).tokenizer)
    pieces = [texts.piece(50) for _ in range(20)]
    assert len({tuple(piece) for piece in pieces}) == 20
    behind = texts.piece(30, pieces[0])
    assert behind[:50] == pieces[0] and len(behind) == 80


def test_the_engine_plays(folder):
    play, said = batches.kvik(str(folder), "f32")
    heard = play(PROMPTS, 8, None, 0)
    assert [len(each.times) for each in heard] == [8, 8] and "weights" in said
    assert all(each.sent <= each.times[0] and each.ended == each.times[-1] for each in heard)
    *streams, newcomer = play(PROMPTS, 900, list(b"late"), 5)
    assert all(each.times[4] <= newcomer.sent < newcomer.times[0] for each in streams)
    assert all(len(each.times) < 900 for each in streams), "they end with its first token"


@pytest.fixture(scope="module")
def server(folder):
    with serving(load(str(folder), weights="f32")) as made:
        extra = {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
        yield SimpleNamespace(port=made.port, extra=extra, name="tiny", log="nowhere", engine=made.engine)


def test_clients_play(server, monkeypatch):
    monkeypatch.setattr(clients, "SETTLING", 0.0)
    texts = [bytes(prompt).decode() for prompt in PROMPTS]
    played = clients.play(server, texts, 8, None, 0)
    assert all(client.usage["completion_tokens"] == 8 for client in played)
    assert all(client.heard.sent < client.heard.times[0] <= client.heard.ended for client in played)
    *streams, newcomer = (client.heard for client in clients.play(server, texts, 900, "late", 5))
    assert all(each.times[4] <= newcomer.sent < newcomer.times[0] for each in streams)
    assert all(len(each.times) < 900 for each in streams), "they hang up at its first token"


def test_an_answer_that_fails_ends_the_play(server):
    with pytest.raises(SystemExit, match=r"tiny failed an answer .*400"):
        clients.play(server, ["x" * 5000], 8, None, 0)


def test_a_command_is_shown_without_folders_and_port():
    assert clients.shown(["/a/b/python", "-m", "x", "--port", "0", "/c/d.gguf"]) == "python -m x d.gguf"
