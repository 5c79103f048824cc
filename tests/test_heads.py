"""`kvik heads`: the scores are those of a whole text, the spec says what was chosen, and the command prints it."""

import json
from fractions import Fraction
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

import kvik
from bench_models import check_refused, ids, state, tiny, told
from eval_models import WHERE, command, reader
from kvik.cache.retention import Retention
from kvik.cache.rules import MOST_CHARACTERS
from kvik.cache.seen import Seen
from kvik.cache.spec import Bytes, LayerShape, Spec
from kvik.cache.streaming import far_sight
from kvik.errors import SpecError, UsageError
from kvik.eval import Heads, draw_heads, measure_heads, render_heads
from kvik.eval.heads import farthest, spec_text, stored
from kvik.eval.heads_view import FAR, NEAR
from kvik.models.model import Model
from kvik.models.watch import Watch

WINDOW = Retention(256, 4)
INT8 = stored("int8")[0]


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reader(tmp_path_factory)[0]


# Scores.


class Everything(Watch):
    """Keeps all keys and queries of a text that goes in at once."""

    found: dict

    def append(self, layer, **streams):
        self.found[layer] = [streams["k"].clone()]
        super().append(layer, **streams)

    def attend(self, layer, q, **options):
        self.found[layer] += [q.clone(), options["scale"]]
        return super().attend(layer, q, **options)


def test_scores_are_those_of_all_keys_and_queries_at_once(model):
    """Sums over chunks, held in place of the text, give what `far_sight` makes of the text itself."""
    tokens, watch = ids(650), type("Here", (Everything,), {"found": {}})
    with model.cache("f32").open() as sequence:
        model.run([(sequence, tokens)], watch=watch)
    got = measure_heads(model, tokens).scores
    assert len(got) == 2 and got[0] != got[1]
    places = torch.arange(len(tokens))
    for layer, (k, q, scale) in watch.found.items():
        seen = Seen(
            keys=k.transpose(0, 1), values=k.transpose(0, 1), positions=places.expand(2, -1), tokens=len(tokens),
            scale=scale, queries=torch.unflatten(q, 1, (2, 2)), asking=places, mass=None,
            frequencies=torch.tensor(model.decoder.layers[layer].frequencies, dtype=torch.float64), seed=0,
        )  # fmt: skip
        assert got[layer] == pytest.approx(far_sight(seen).tolist(), abs=1e-5)


def test_what_is_read_changes_the_scores_and_how_it_is_stored_does_not(model):
    one = measure_heads(model, ids(200))
    assert measure_heads(model, ids(200), kv="int4", window=20).scores == one.scores
    assert measure_heads(model, ids(200)[::-1]).scores != one.scores


def test_progress_goes_up_to_the_end(model):
    told = []
    measure_heads(model, ids(600), show=lambda *each: told.append(each))
    assert told == [("token 0 of 600", 0, 600), ("token 512 of 600", 512, 600)]


def test_a_model_whose_positions_turn_no_keys_is_refused_before_it_runs(monkeypatch, capsys, folder, tmp_path):
    sizes = {"vocab_size": 258, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    sizes |= {"bos_token_id": None, "eos_token_id": None}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "gpt2" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    capsys.readouterr()
    monkeypatch.setattr("kvik.models.centres.obtain", lambda model, show: None)  # that would be at work as well
    monkeypatch.setattr(Model, "run", lambda *_, **__: pytest.fail("the model ran"))
    check_refused(capsys, command(monkeypatch, "heads", "--model", tmp_path / "gpt2"), "no rotary")


# What is chosen, and how it is written.


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (Fraction(0), []),
        (Fraction(1, 10), []),
        (Fraction(1, 4), [(1, 1)]),
        (Fraction(1, 2), [(0, 1), (1, 1)]),
        (Fraction(3, 4), [(0, 0), (0, 1), (1, 1)]),  # of equal ones the earlier
        (Fraction(1), [(0, 0), (0, 1), (1, 0), (1, 1)]),
    ],
)
def test_the_highest_scores_are_far(share, wanted):
    assert sorted(farthest([[0.2, 0.5], [0.2, 0.9]], share)) == wanted


def test_layers_with_the_same_heads_share_a_rule():
    far = frozenset({(0, 1), (0, 4), (0, 6), (2, 1), (2, 4), (2, 6), *((3, head) for head in range(8))})
    assert spec_text(INT8, far, [8] * 6, WINDOW) == (
        "int8+window:256,sinks:4; layers 0,2 heads 1,4,6: int8; layers 3: int8"
    )
    by_head = frozenset((layer, head) for layer in range(20) for head in range(8) if layer % (head + 2))
    written = spec_text(INT8, by_head, [8] * 20, WINDOW)
    assert written.count(";") == 8 and "; layers 1,3,5,7,9,11,13,15,17,19 heads 0: int8; " in written, "shorter by head"
    assert spec_text(INT8, frozenset(), [2, 2], WINDOW) == "int8+window:256,sinks:4"
    assert spec_text(INT8, frozenset({(0, 0), (0, 1)}), [2], WINDOW) == "int8"
    k8v4, size = stored("k8v4; page 64")
    assert spec_text(k8v4, frozenset({(0, 0)}), [1, 1], Retention(9), size) == "k8v4+window:9; layers 0: k8v4; page 64"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 1 << 30))
def test_the_spec_gives_every_lane_what_was_chosen_for_it(heads, seed):
    lanes = [(layer, head) for layer, count in enumerate(heads) for head in range(count)]
    far = frozenset(Random(seed).sample(lanes, Random(seed + 1).randint(0, len(lanes))))
    written = spec_text(INT8, far, heads, WINDOW)
    spec = Spec.parse(written, [LayerShape(count, (("k", 8), ("v", 8))) for count in heads])
    assert str(spec) == written
    kept = {lane: group.retention for group in spec.groups for lane in group.lanes}
    assert kept == {lane: Retention() if lane in far else WINDOW for lane in lanes}


def test_the_largest_models_fit_into_a_spec():
    """A draw has no runs to merge: nothing that is measured is longer."""
    lanes = [(layer, head) for layer in range(80) for head in range(64)]
    written = spec_text(INT8, frozenset(Random(0).sample(lanes, len(lanes) // 2)), [64] * 80, WINDOW)
    assert 6000 < len(written) < MOST_CHARACTERS
    Spec.parse(written, [LayerShape(64, (("k", 128), ("v", 128)))] * 80)
    small = [(layer, head) for layer in range(30) for head in range(3)]
    assert len(spec_text(INT8, frozenset(Random(0).sample(small, 45)), [3] * 30, WINDOW)) < 250


@pytest.mark.parametrize("kv", ["int8+window:20", "int8+snapkv:25%", "int8; layers 0: bf16"])
def test_a_spec_that_says_which_rows_stay_is_refused(kv):
    with pytest.raises(UsageError, match="give a codec alone"):
        stored(kv)


def test_the_bytes_are_the_specs_own(model):
    found = measure_heads(model, ids(400), kv="k8v4", window=40, sinks=2, far=0.25)
    assert found.every == model.spec("k8v4").nbytes(400) and found.held == model.spec(found.spec).nbytes(400)
    assert len(found.far) == 1 and found.least_far == max(max(each) for each in found.scores)
    facts = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert facts["far"] == [list(next(iter(found.far)))] and facts["scores"] == [list(each) for each in found.scores]


# What is shown.


def made(layers, heads, share=0.5):
    random = Random(layers)
    scores = tuple(tuple(random.random() for _ in range(heads)) for _ in range(layers))
    far = farthest(scores, share)
    spec = spec_text(INT8, far, [heads] * layers, WINDOW)
    return Heads("smollm2", "int4", "a text", 4096, WHERE, scores, far, spec, Bytes(1000, 24), Bytes(500, 12))


def printed(found):
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        render_heads(found, console)
    return capture.get()


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 2), (30, 3), (31, 3), (32, 8), (32, 18), (32, 32), (80, 64)])
def test_every_head_has_its_cell_and_the_last_line_is_the_spec(layers, heads):
    found = made(layers, heads)
    *table, spec = printed(found).splitlines()
    assert spec == found.spec and max(map(len, table)) <= 80
    grid, _, rest = "\n".join(table).partition("\nscore")
    assert (grid.count(FAR), grid.count(NEAR)) == (len(found.far), layers * heads - len(found.far))
    cells = dict(found_cells(grid.split("\n\n")[1].splitlines()[1:]))
    assert sorted(cells) == list(range(layers))
    for layer, marks in cells.items():
        assert [mark == FAR for mark in marks if mark in FAR + NEAR] == [(layer, i) in found.far for i in range(heads)]
    if heads <= 18:
        assert f"{100 * found.scores[layers - 1][0]:.0f}{FAR if (layers - 1, 0) in found.far else NEAR}" in grid
    assert "512 B instead of 1.0 KiB for 4,096 tokens, 50 %" in " ".join(rest.split())


def found_cells(lines):
    """(layer, its marks) of a grid's lines: a block begins where a number stands alone."""
    for line in lines:
        layer, marks = None, ""
        for word in line.replace(FAR, FAR + " ").replace(NEAR, NEAR + " ").split():
            if word.isdecimal():
                if layer is not None:
                    yield layer, marks
                layer, marks = int(word), ""
            else:
                marks += word[-1]
        yield layer, marks


def test_all_and_none_are_told_apart():
    assert NEAR not in printed(made(3, 2, 1)) and FAR not in printed(made(3, 2, 0))


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (30, 3), (32, 32)])
def test_the_picture_has_a_cell_and_a_dot_for_each(layers, heads, tmp_path, monkeypatch):
    found, figures = made(layers, heads), []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    draw_heads(found, tmp_path / "a.png")
    (figure,) = figures
    axes, beside = figure.axes
    assert axes.images[0].get_array().T.tolist() == [list(each) for each in found.scores]
    assert {tuple(map(int, point)) for line in axes.lines for point in line.get_xydata()} == found.far
    renderer = FigureCanvasAgg(figure).get_renderer()
    for each in (*figure.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), *beside.get_yticklabels()):
        box = each.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0, each.get_text()


def test_the_picture_is_a_picture(tmp_path):
    draw_heads(made(30, 3), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    draw_heads(made(30, 3, 0), tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


# The command.


REFUSED = {
    "part": (["--far", "half"], ["--far 'half'", "--far 50%"]),
    "more than all": (["--far", "101%"], ["101%", "100%"]),
    "no percent": (["--far", "0.5"], ["--far '0.5'"]),
    "window": (["--window", "0"], ["--window 0"]),
    "sinks": (["--sinks", "-1"], ["--sinks -1"]),
    "tokens": (["--tokens", "0"], ["--tokens 0"]),
    "spec": (["--kv", "int5"], ["int5"]),
    "rows that stay": (["--kv", "int8+window:20"], ["a codec alone"]),
    "picture": (["--plot", "a.jpg"], ["PNG or SVG"]),
    "text": (["--text", "nowhere.txt"], ["nowhere.txt"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_is_refused_before_a_model_is_loaded(case, monkeypatch, capsys):
    monkeypatch.setattr("kvik.cli.heads.load_model", lambda *_: pytest.fail("the model was loaded"))
    options, wanted = REFUSED[case]
    check_refused(capsys, command(monkeypatch, "heads", *options), *wanted)


def test_the_command_prints_draws_and_its_spec_is_taken(monkeypatch, capsys, folder, tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("A text of one's own. " * 20)
    common = ["--model", folder, "--text", mine]
    options = ["heads", *common, "--window", 30, "--kv", "k8v4", "--far", "25%"]
    assert command(monkeypatch, *options, "--plot", tmp_path / "a.png") == 0
    out, errors = capsys.readouterr()
    spec = out.splitlines()[-1]
    assert spec.startswith("k8v4+window:30,sinks:4; layers ") and "420 tokens of mine.txt" in out
    assert told(errors) == [f"drawn: {tmp_path / 'a.png'}"] and (tmp_path / "a.png").exists()
    assert command(monkeypatch, *options, "--json", "--tokens", 300) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] == 300 and len(facts["far"]) == 1
    assert command(monkeypatch, "run", "--model", folder, "--kv", spec, "--raw", "--max-tokens", 2, "--json", "Hi") == 0
    assert json.loads(capsys.readouterr().out)["spec"] == spec


def test_more_tokens_than_there_are_is_refused(monkeypatch, capsys, folder, tmp_path):
    short, empty = tmp_path / "short.txt", tmp_path / "empty.txt"
    short.write_text("short"), empty.write_text("")
    heads = ["heads", "--model", folder]
    check_refused(capsys, command(monkeypatch, *heads, "--tokens", 701), "--tokens 701", "700 positions", "at most 700")
    code = command(monkeypatch, *heads, "--tokens", 6, "--text", short)
    check_refused(capsys, code, "short.txt has 5 tokens", "--tokens 6 asks for")
    check_refused(capsys, command(monkeypatch, *heads, "--text", empty), "0 tokens")


def test_layers_that_share_rows_are_refused():
    theirs = tiny()
    shared = Model(theirs.config.sharing("pairs"), state(), weights="f32")
    with pytest.raises(SpecError, match="layer 1 keeps no rows and reads those of layer 0"):
        measure_heads(shared, ids(20))


@pytest.mark.weights
def test_smollm2s_farthest_head():
    """Layer 18's head 2 looks furthest, on any text; the middle layers look near."""
    model = kvik.load("smollm2")
    text = model.tokenizer.encode("Every evening the ferry crosses the lake, and its lamps are lit one by one. " * 12)
    found = measure_heads(model, text[:200], far=Fraction(1, 90))
    assert found.far == {(18, 2)} and found.spec == "int8+window:256,sinks:4; layers 18 heads 2: int8"
    assert max(found.scores[13]) < 0.1 < found.scores[0][0]
