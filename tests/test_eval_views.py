"""`kvik eval`: what is printed and drawn, and the command."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from bench_models import check_refused, told
from eval_models import SETUP, bits, command, evaluation, made, reader
from kvik.bench.drawing import STYLE
from kvik.eval import draw_frontier, draw_map, draw_needles, mapped, render_evaluation
from kvik.eval.needles import DEPTHS, KINDS, Answer, Needles

ROWS = np.arange(100) % np.arange(2, 10)[:, None] == 0
LONG = "int4+window:512,sinks:4; layers 0-1: int8; page 64"


def needles(*specs):
    """Made-up answers: each spec finds less than the one before."""
    answers = [
        tuple(
            Answer(kind, length, depth, place * length < 3000, -0.1 - place * length / 4000)
            for kind in KINDS for length in (512, 1024, 2048, 4096) for depth in DEPTHS
        )
        for place, _ in enumerate(specs)
    ]  # fmt: skip
    return Needles(specs, tuple(answers))


@pytest.fixture(scope="module")
def found():
    specs = [made("bf16", 5.6e-5, 256.5), made("int8", 8.3e-4, 133.0), made("k8v4", 5.1e-3, 102.0)]
    specs += [made("int4", 5.5e-2, 72.0), made(LONG, 0.31, 40.0, kept=0.34, rows=bits(ROWS, 2), recall=0.625)]
    asked = needles("f32", *(each.spec for each in specs))
    return evaluation(*specs, needles=asked, setup=replace(SETUP, model="smollm2", prefix=1536, documents=2))


def printed(found, width=80, **options):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        render_evaluation(found, console, **options)
    return capture.get()


def test_the_tables_have_the_figures_in_80_columns(found):
    text = printed(found)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "f32 0 0 0 0 100 % 100 %" in lines
    assert "int8 8.3e-4 6.2e-4 1.8e-3 1.9e-3 75.0 % 100 %" in lines
    assert "int8 3.0004 +0.0004 +0.0004 to +0.0004 1.0004" in lines
    assert "int8 133 26 % 16.9 KiB 100 % 750 ms 10.0 ms" in lines
    assert any(line.endswith("34 % 750 ms 10.0 ms") for line in lines)
    assert any(line.endswith("75.0 % 62 %") for line in lines)
    assert "int8 10 of 20 10 of 20 50 % 35 %" in lines
    words = " ".join(lines)
    for said in (
        "smollm2 weights f32 · 2 documents of 1,536 + 4 tokens",
        "taken in as a prompt",
        "--plot frontier.png",
    ):
        assert said in words, said
    assert "--plot" not in printed(found, pictures=True)


def test_what_a_measurement_can_not_say_is_said(found):
    short = replace(found.measured[2], spec="int8+window:9000")
    it = replace(found, measured=(*found.measured, short), setup=replace(found.setup, documents=1))
    words = " ".join(printed(it).split())
    assert "none was dropped of this text by int8+window:9000; use a longer --prefix" in words
    assert "one document says nothing about others" in words
    nothing = tuple(replace(each, right=False) for each in found.needles.answers[0])
    blind = replace(found.needles, answers=(nothing, *found.needles.answers[1:]))
    assert "the full cache finds none" in " ".join(printed(replace(found, needles=blind)).split())


def test_json_has_every_figure(found):
    facts = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [each["spec"] for each in facts["specs"]] == ["f32", "bf16", "int8", "k8v4", "int4", LONG]
    for each in facts["specs"]:
        held = each["bytes"]
        assert held["payload"] + held["overhead"] == held["allocated"] <= each["peak_bytes"]
        assert each["kl"]["median"] <= each["kl"]["p99"] <= each["kl"]["max"]
        assert len(each["documents"]) == 2
    assert facts["frontier"] == [LONG, "int4", "k8v4", "int8", "bf16", "f32"]
    assert facts["needles"]["f32"]["retained"] == 1.0 and len(facts["needles"]["int4"]["answers"]) == 40
    assert facts["setup"]["protocol"] == "prompt"


def size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_the_pictures_are_pictures_and_leave_settings_alone(found, tmp_path):
    before = {key: matplotlib.rcParams[key] for key in STYLE}
    for picture in (draw_frontier, draw_map, draw_needles):
        picture(found, tmp_path / "a.png")
        assert size(tmp_path / "a.png")[0] == 1600
    for name in ("a.svg", "b.svg"):
        draw_frontier(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert before == {key: matplotlib.rcParams[key] for key in STYLE}


def words_of(monkeypatch, picture, found, tmp_path):
    """(all texts of a picture, the figure)."""
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: seen.append(self))
    picture(found, tmp_path / "a.png")
    return [each.get_text() for each in seen[0].findobj(Text)], seen[0]


def test_the_frontier_names_every_spec_and_no_label_covers_another(found, monkeypatch, tmp_path):
    words, figure = words_of(monkeypatch, draw_frontier, found, tmp_path)
    for each in found.measured[1:]:
        assert each.spec in words
    assert "f32: 0" in words and "rows are dropped" in words
    axes, renderer = figure.axes[0], FigureCanvasAgg(figure).get_renderer()
    names = {each.spec for each in found.measured} | {"f32: 0"}
    boxes = [each.get_window_extent(renderer) for each in axes.texts if each.get_text() in names]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    only = evaluation(made("bf16", 1e-4, 256.0))
    assert "rows are dropped" not in words_of(monkeypatch, draw_frontier, only, tmp_path)[0]


def test_many_specs_close_together_are_still_told_apart(monkeypatch, tmp_path):
    specs = [made(f"int4; layers 0-{number}: int8", 0.01 + 0.0004 * number, 80.0 + number) for number in range(10)]
    _, figure = words_of(monkeypatch, draw_frontier, evaluation(*specs), tmp_path)
    axes, renderer = figure.axes[0], FigureCanvasAgg(figure).get_renderer()
    boxes = [each.get_window_extent(renderer) for each in axes.texts if each.get_text().startswith("int4;")]
    assert sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]) <= 2


def test_the_map_draws_what_was_held_of_specs_that_drop(found, monkeypatch, tmp_path):
    assert [each.spec for each in mapped(found)] == [LONG]
    words, figure = words_of(monkeypatch, draw_map, found, tmp_path)
    assert LONG in words and "position" in words
    drawn = figure.axes[0].images[0].get_array()
    assert np.array_equal(np.asarray(drawn).astype(bool), ROWS)
    shares = [bar.get_width() for bar in figure.axes[1].patches]
    assert shares == pytest.approx([ROWS[i : i + 2].mean() for i in range(0, 8, 2)])


def test_the_grid_has_a_panel_for_each_spec_and_kind(found, monkeypatch, tmp_path):
    words, figure = words_of(monkeypatch, draw_needles, found, tmp_path)
    assert len(figure.axes) == 12 and words.count(LONG) == 1
    assert "✓ 90 %" in words
    assert sum(word.startswith("✓ ") for word in words) == sum(
        found.needles.right(spec) for spec in found.needles.specs
    )
    chances = np.asarray(figure.axes[0].images[0].get_array())
    assert chances.shape == (5, 4) and chances[0, 0] == pytest.approx(np.exp(-0.1))


# The command.

REFUSED = {
    "spec": (["int5"], ["int5", "int8"]),
    "no cache": (["none"], ["none"]),
    "prefix": (["--prefix", 0], ["--prefix 0", "at least 1"]),
    "scored": (["--scored", 0], ["--scored 0", "at least 1"]),
    "documents": (["--documents", -1], ["--documents -1", "at least 1"]),
    "protocol": (["--protocol", "flood"], ["flood", "prompt or stream"]),
    "grid of nothing": (["--needle-plot", "{}/a.png"], ["--needle-plot", "add --needles"]),
    "picture of another kind": (["--map", "{}/a.jpg"], ["--map", "PNG or SVG"]),
    "two pictures in one": (["--map", "{}/a.png", "--plot", "{}/a.png"], ["--plot and --map", "name two files"]),
    "text that is not there": (["--text", "{}/none.txt"], ["none.txt", "can't be read"]),
    "nowhere to resume from": (["--resume", "{}/none/a.jsonl"], ["--resume", "no folder"]),
    "damaged file": (["--resume", "{}/damaged.jsonl"], ["damaged.jsonl, line 1", "delete that line"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_measured_is_refused_before_a_model_is_loaded(case, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("kvik.cli.eval.load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "damaged.jsonl").write_text("hello\n")
    options, wanted = REFUSED[case]
    check_refused(capsys, command(monkeypatch, "eval", *(str(e).format(tmp_path) for e in options)), *wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reader(tmp_path_factory)[0]


def test_documents_beyond_the_model_or_the_text_are_refused(monkeypatch, capsys, tmp_path, folder):
    code = command(monkeypatch, "eval", "--model", folder, "--prefix", 690, "--scored", 11)
    check_refused(capsys, code, "--prefix 690 and --scored 11", "700 positions", "smaller --prefix")
    code = command(monkeypatch, "eval", "--model", folder, "--prefix", 10, "--scored", 700)
    check_refused(capsys, code, "--prefix and --scored of 350 at the most")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\0" * 2000)
    code = command(monkeypatch, "eval", "--model", folder, "--text", tmp_path / "picture.txt")
    check_refused(capsys, code, "picture.txt: is no text in UTF-8", "name a text file")
    (tmp_path / "short.txt").write_text("twenty-two characters!")
    sizes = ["--prefix", 20, "--scored", 4, "--documents", 2]
    code = command(monkeypatch, "eval", "--model", folder, *sizes, "--text", tmp_path / "short.txt")
    check_refused(capsys, code, "short.txt: 22 tokens are fewer than the 50", "longer --text")


def test_the_command_measures_prints_draws_and_resumes(monkeypatch, capsys, tmp_path, folder):
    options = ["eval", "int8", "f32+window:20; page 16", "--model", folder, "--prefix", 64, "--scored", 10]
    options += ["--documents", 2, "--resume", tmp_path / "done.jsonl"]
    pictures = ["--plot", tmp_path / "f.svg", "--map", tmp_path / "m.svg"]
    assert command(monkeypatch, *options, "--json", *pictures) == 0
    out, errors = capsys.readouterr()
    facts = json.loads(out)
    assert [each["spec"] for each in facts["specs"]] == ["f32", "int8", "f32+window:20; page 16"]
    assert facts["setup"]["model"] == "tiny-llama" and facts["needles"] is None
    assert told(errors) == [f"drawn: {tmp_path / name}" for name in ("f.svg", "m.svg")]
    assert command(monkeypatch, *options, "--map", tmp_path / "n.svg") == 0
    out, _ = capsys.readouterr()
    assert out.startswith("tiny-llama") and "int8" in out
    assert len((tmp_path / "done.jsonl").read_text().splitlines()) == 6
    code = command(monkeypatch, "eval", "int8", *options[3:], "--protocol", "stream", "--map", tmp_path / "o.svg")
    _, errors = capsys.readouterr()
    assert code == 0 and told(errors) == [f"not drawn: {tmp_path / 'o.svg'}, no spec dropped a row"]


def test_needles_are_asked_drawn_and_need_positions(monkeypatch, capsys, tmp_path, folder):
    options = ["eval", "int8", "--model", folder, "--prefix", 64, "--scored", 4, "--documents", 1, "--needles"]
    assert command(monkeypatch, *options, "--json", "--needle-plot", tmp_path / "n.svg") == 0
    out, errors = capsys.readouterr()
    assert set(json.loads(out)["needles"]) == {"f32", "int8"} and told(errors) == [f"drawn: {tmp_path / 'n.svg'}"]


def test_the_default_is_a_list_that_a_model_takes(folder, monkeypatch):
    asked = {}

    def measure(model, ids, specs, **options):
        asked.update(options, specs=[str(model.spec(kv)) for kv in specs])
        return evaluation(made("bf16", 1e-4, 256.0))

    monkeypatch.setattr("kvik.eval.runs.evaluate", measure)
    assert command(monkeypatch, "eval", "--model", folder, "--prefix", 600, "--scored", 50) == 0
    assert asked["specs"] == ["bf16", "int8", "int8-rot", "k8v4", "int4", "int8+window:200,sinks:4"]
    assert (asked["documents"], asked["protocol"], asked["text"]) == (8, "prompt", "Python's topics")


@pytest.mark.weights
def test_on_a_real_model_fewer_bits_and_fewer_rows_cost_more():
    from pydoc_data.topics import topics

    import kvik
    from kvik.eval import evaluate

    model = kvik.load("smollm2")
    ids = model.tokenizer.encode(topics["lambda"] + topics["class"] + topics["while"])
    specs = ["bf16", "int8", "int4", "bf16+window:32,sinks:4"]
    found = {each.spec: each for each in evaluate(model, ids, specs, prefix=200, scored=32, documents=1).measured}
    assert 0 == found["f32"].kl < found["bf16"].kl < found["int8"].kl < found["int4"].kl
    assert found["int8"].kl < 0.02 < found["bf16+window:32,sinks:4"].kl
    assert found["int4"].bytes_a_token < found["int8"].bytes_a_token < found["f32"].bytes_a_token
