"""`kvik bench cache`: counts against formulas, fits and crossings against known curves, the command, refusals."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from bench_models import check_refused, ids, in_process, tiny, told, write_model
from kvik.bench import measure
from kvik.bench.counting import Counts, Tally
from kvik.bench.fit import fit, grid, reached, smallest_errors, whole_text
from kvik.engine.generation import prefill
from kvik.ops.reads import Reads
from kvik.plan.work import Arithmetic

HEADS, LANES, SHARED = 8, 4, 2  # of both layers


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def measured(model):
    """A real measurement, short."""
    return measure(model, ids(70), kv="bf16", batch=(1, 3), rounds=2)


# Counts.


def test_counts_of_full_attention_are_n_and_its_powers(measured):
    for length, step, text in zip(measured.lengths, measured.cached.steps, measured.cached.texts, strict=True):
        assert step == Counts(1, LANES, HEADS * length, LANES * length)
        assert (text.tokens, text.rows, text.pairs) == (length, LANES * length, HEADS * length * (length + 1) // 2)
    for n, step, text in zip(measured.lengths, measured.without.steps, measured.without.texts, strict=True):
        assert step == Counts(n, LANES * n, HEADS * n * (n + 1) // 2, LANES * n)
        assert (text.rows, text.pairs) == (LANES * n * (n + 1) // 2, HEADS * n * (n + 1) * (n + 2) // 6)


@pytest.mark.parametrize(
    ("kv", "window"),
    [("bf16", None), ("int8+window:20", None), ("int4+window:9,sinks:3", None), ("bf16", 24), ("k8v4+window:16", 24),
     ("f32; layers 0: int8+window:16; layers 1 heads 1: bf16", None), ("int8+snapkv:25%,recent:4,last:8", None),
     ("k8v4+ada(expected):30%,recent:4,last:8", None), ("int8+keydiff:20rows,recent:4,every:6; page 16", None),
     ("int4+h2o:40%,recent:4,every:5; page 16", 24), ("bf16; layers 1 heads 0: int8+knorm:10%,recent:1", None)],
)  # fmt: skip
def test_what_is_counted_equals_the_formulas(kv, window):
    growth = measure(tiny(window), ids(70), kv=kv, batch=(1,), rounds=1)
    assert list(growth.differences()) == []
    for cached, side in ((True, growth.cached), (False, growth.without)):
        works = growth.texts(cached=cached)
        for length, counts, work in zip(growth.lengths, side.texts, works, strict=True):
            assert growth.products(counts, length) == work.products
    assert [held.payload for held in growth.cached.held] == [growth.held(length).payload for length in growth.lengths]
    drops = kv != "bf16" and not (window == 24 and "h2o" in kv)  # a narrower window of the model's own stays
    assert growth.windowed == drops
    assert growth.bounded == (window is not None or drops)
    assert growth.arithmetic.prompt == 35 and growth.chooses == [
        part.partition("+")[2] for part in kv.split("; ") if "%" in part and window is None
    ]


def test_counting_changes_no_policys_choice():
    """It asks a second question of every layer; the policy must not take that for the text's."""
    model, found = tiny(), []
    for watched in (False, True):
        tally = Tally(70, 2, SHARED)
        sequence = model.cache("f32+h2o:40%,recent:2; layers 1: f32+snapkv:40%,recent:2,last:8; page 16").open(ids(60))
        prefill(model, [sequence], ids(70), watch=tally.watch if watched else None)
        found.append([table.rows(70)[0].tolist() for table in sequence.tables])
    assert found[0] == found[1] and len(found[0][0][0]) == 34


def test_a_mask_that_shows_too_much_is_counted(monkeypatch, plain):
    model = tiny()
    monkeypatch.setattr(Reads, "visible", lambda self, asking, held: asking >= held)
    growth = measure(model, ids(40), kv="bf16+window:16", batch=(1,), rounds=1)
    assert "with a cache" in next(growth.differences())


@pytest.mark.parametrize("kv", ["bf16", "int8+window:20,sinks:2"])
def test_a_pass_in_chunks_counts_what_single_steps_and_steps_without_a_cache_do(model, kv):
    growth = measure(model, ids(40), kv=kv, batch=(1,), rounds=1)
    tally, cache = Tally(40, 2, SHARED), model.cache(kv, shares=False)
    with cache.open() as sequence:
        for token in ids(40):
            model.run([(sequence, [token])], watch=tally.watch)
            sequence.settle()
    assert [tally.step(n, cached=True) for n in growth.lengths] == list(growth.cached.steps)
    for n, counted in zip(growth.lengths, growth.without.steps, strict=True):
        alone = Tally(n, 2, SHARED)
        with model.cache("f32", shares=False).open() as sequence:
            model.run([(sequence, ids(n))], watch=alone.watch)
        assert (alone.rows.sum(), alone.pairs.sum()) == (counted.rows, counted.pairs)


def test_a_batch_is_counted_as_its_formula_says(model):
    tally, cache = Tally(50, 2, SHARED), model.cache("bf16", shares=False)
    sequences = [cache.open() for _ in range(3)]
    model.run([(sequence, ids(33)) for sequence in sequences])
    model.run([(sequence, [5]) for sequence in sequences], watch=tally.watch)
    work = Arithmetic.of(model, "bf16").step(34, batch=3)
    assert (tally.rows.sum(), tally.pairs.sum()) == (work.rows, work.pairs) == (3 * LANES, 3 * 34 * HEADS)


def test_watching_changes_no_logit(model):
    with model.cache("bf16").open() as a, model.cache("bf16").open() as b:
        plain, watched = model.run([(a, ids(40))]), model.run([(b, ids(40))], watch=Tally(40, 2, SHARED).watch)
    assert torch.equal(plain, watched)


def test_progress_goes_up_to_the_end_and_never_back(model):
    told = []
    measure(model, ids(20), batch=(2,), rounds=2, show=lambda what, done, total: told.append((what, done, total)))
    done = [each for _, each, _ in told]
    assert done == sorted(done) and len({total for *_, total in told}) == 1
    assert told[-1][2] == done[-1] + 2 * 20, "the last thing that is told of is the last batch without a cache"
    assert {"counting with a cache", "round 2 of 2: 20 tokens, without"} <= {what for what, *_ in told}


# Times: fits, sums, crossings.


@pytest.mark.parametrize("true", [(0.015, 6e-6), (0.01, 2e-9), (0.02, 0.0)])
def test_the_fit_finds_the_constants_that_made_the_times(true):
    lengths = grid(2048)
    terms = {"step": [1.0] * len(lengths), "row": [float(n) for n in lengths]}
    seconds = np.array(list(terms.values())).T @ true
    found = fit(terms, seconds, lengths)
    np.testing.assert_allclose(found.constants, true, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found.predicted, seconds)
    assert max(map(abs, found.errors)) < 1e-9
    assert next(n for n, tested in zip(lengths, found.tested, strict=True) if tested) > 1024


def test_the_longer_half_tests_and_is_not_fitted():
    lengths = grid(512)
    seconds = [0.01 + 1e-4 * n for n in lengths]
    honest = fit({"step": [1.0] * len(lengths), "token": lengths}, seconds, lengths)
    slower = [2 * s if n > 256 else s for n, s in zip(lengths, seconds, strict=True)]
    tested = fit({"step": [1.0] * len(lengths), "token": lengths}, slower, lengths)
    assert tested.constants == honest.constants
    assert tested.errors[-1] == pytest.approx(-0.5)
    assert abs(tested.errors[lengths.index(256)]) < 1e-9


def test_no_constant_is_negative_and_what_can_not_be_told_apart_counts_once():
    falling = smallest_errors(np.array([[1.0, n] for n in (1, 2, 3, 4)]), np.array([4.0, 3.0, 2.0, 1.0]))
    assert falling[1] == 0 < falling[0]
    alike = smallest_errors(np.array([[1.0, 128.0, 0.0]] * 4), np.full(4, 0.5))
    assert alike.tolist() == [0.5, 0.0, 0.0]


def test_noise_moves_constants_little():
    lengths, noise = grid(1024), np.random.default_rng(0)
    terms = {"chunk": [-(-n // 512) for n in lengths], "token": lengths, "pair": [n * (n + 1) / 2 for n in lengths]}
    true = np.array([0.015, 1.7e-3, 1e-6])
    seconds = np.array(list(terms.values()), float).T @ true * (1 + 0.02 * noise.standard_normal(len(lengths)))
    assert abs(fit(terms, seconds, lengths).errors[-1]) < 0.1


def test_a_text_takes_the_sum_of_its_steps():
    lengths = grid(200)
    linear = [0.01 + 1e-5 * n for n in lengths]
    want = [sum(0.01 + 1e-5 * m for m in range(1, n + 1)) for n in lengths]
    np.testing.assert_allclose(whole_text(lengths, linear), want)


def test_a_crossing_is_where_the_ratio_stays_above():
    lengths = [1, 10, 20, 40]
    assert reached(lengths, [1.0, 2.0, 3.0, 5.0], 4.0) == 30
    assert reached(lengths, [1.0, 2.5, 1.5, 2.5], 2.0) == 30, "what is lost again does not count"
    assert reached(lengths, [2.0, 2.0, 3.0, 5.0], 2.0) == 1
    assert reached(lengths, [1.0, 2.0, 3.0, 3.9], 4.0) is None


@pytest.mark.parametrize("longest", [16, 17, 100, 1024, 8192])
def test_the_grid_goes_from_one_to_the_longest_and_has_its_half(longest):
    lengths = grid(longest)
    assert lengths[0] == 1 and lengths[-1] == longest
    assert list(lengths) == sorted(set(lengths))
    assert round(longest / 2) in lengths


def test_json_has_what_was_measured_and_predicted(measured):
    facts = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
    assert facts["tokens"] == 70 and facts["rounds"] == 2 and facts["spec"] == "bf16"
    assert facts["weights"] == {
        "format": "f32",
        "bytes": measured.arithmetic.weight_bytes,
        "read": measured.arithmetic.read_bytes,
    }
    assert facts["environment"]["torch"] == torch.__version__ and facts["environment"]["threads"] >= 1
    for name in ("with_cache", "without"):
        assert [each["tokens"] for each in facts[name]["lengths"]] == list(measured.lengths)
        assert set(facts[name]["time_model"]) == {"constants", "fitted_up_to_tokens", "error_at_longest"}
        for each in facts[name]["lengths"]:
            assert (
                0
                < each["step"]["seconds"]["least"]
                <= each["step"]["seconds"]["median"]
                < each["step"]["seconds"]["most"] * 2
            )
            assert each["step"]["predicted_seconds"] > 0 and each["step"]["fitted"] == (each["tokens"] <= 35)
            assert each["held"]["payload"] + each["held"]["overhead"] == each["held"]["allocated"]
            for scope in ("step", "text"):
                counted, formula = each[scope]["counted"], each[scope]["formula"]
                assert [counted[k] for k in ("rows", "pairs", "products")] == [
                    formula[k] for k in ("rows", "pairs", "products")
                ]
    assert facts["equal_work_at_tokens"] == measured.arithmetic.equal_work
    assert facts["batch"]["context"] == 70 and [each["sequences"] for each in facts["batch"]["sizes"]] == [1, 3]
    assert set(facts["speedup"]["whole_text"]["reached_at_tokens"]) == {"2", "4"}


# The command.


REFUSED = {
    "tokens": (["--tokens", 15], ["--tokens 15", "at least 16"]),
    "rounds": (["--rounds", 0], ["--rounds 0", "at least 1"]),
    "batch of words": (["--batch", "1,two"], ["1,two", "--batch 1,2,4,8"]),
    "batch of nothing": (["--batch", ""], ["--batch ''"]),
    "batch of 0": (["--batch", "0,1"], ["0,1"]),
    "batch beyond reason": (["--batch", "1,99999"], ["99999", "1,024"]),
    "spec": (["--kv", "int5"], ["int5", "int8"]),
    "no cache": (["--kv", "none"], ["none"]),
    "picture of another kind": (["--plot", "{}/a.jpg"], ["--plot", "a.jpg", "PNG or SVG", "a.png"]),
    "picture in no folder": (["--plot-step", "{}/none/a.png"], ["--plot-step", "no folder", "none"]),
    "picture that is a folder": (["--plot", "{}/folder.png"], ["folder.png", "can't be written"]),
    "pictures in one file": (["--plot", "{}/a.png", "--plot-step", "{}/a.png"], ["both", "a.png"]),
    "text that is not there": (["--text", "{}/none.txt"], ["none.txt", "can't be read"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_measured_is_refused_before_a_model_is_loaded(case, monkeypatch, capsys, tmp_path):
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr("kvik.cli.bench.load_model", lambda *_: pytest.fail("the model was loaded"))
    options, wanted = REFUSED[case]
    check_refused(capsys, in_process(monkeypatch, "cache", *(str(each).format(tmp_path) for each in options)), *wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer of bytes."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def test_the_command_measures_prints_and_draws(monkeypatch, capsys, tmp_path, folder):
    (tmp_path / "text.txt").write_text("What the cache keeps, no step computes again. " * 3)
    common = ["--model", folder, "--text", tmp_path / "text.txt", "--tokens", 40, "--rounds", 1, "--batch", "2,1"]
    assert in_process(monkeypatch, "cache", *common, "--json", "--plot", tmp_path / "all.svg") == 0
    out, errors = capsys.readouterr()
    facts = json.loads(out)
    assert (facts["model"], facts["tokens"], facts["weights"]["format"]) == ("tiny-llama", 40, "f32")
    assert [each["sequences"] for each in facts["batch"]["sizes"]] == [1, 2]
    assert facts["with_cache"]["lengths"][-1]["text"]["counted"]["rows"] == 40 * LANES
    assert ElementTree.parse(tmp_path / "all.svg").getroot().tag.endswith("svg")
    assert told(errors) == [f"drawn: {tmp_path / 'all.svg'}"]
    assert in_process(monkeypatch, "cache", *common, "--plot-step", tmp_path / "step.PNG") == 0
    out, _ = capsys.readouterr()
    assert out.startswith("tiny-llama") and "all 6 lengths" in out
    assert (tmp_path / "step.PNG").read_bytes()[:4] == b"\x89PNG"


def test_lengths_beyond_the_model_or_the_text_are_refused(monkeypatch, capsys, tmp_path, folder):
    code = in_process(monkeypatch, "cache", "--model", folder, "--tokens", 701)
    check_refused(capsys, code, "--tokens 701", "700 positions", "at most 700")
    (tmp_path / "short.txt").write_text("twenty-two characters!")
    code = in_process(monkeypatch, "cache", "--model", folder, "--tokens", 23, "--text", tmp_path / "short.txt")
    check_refused(capsys, code, "short.txt has 22 tokens", "23")


def test_a_picture_that_fails_leaves_the_figures(monkeypatch, capsys, tmp_path, folder):
    def full(growth, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvik.bench.picture.curves", full)
    options = ["--model", folder, "--tokens", 16, "--rounds", 1, "--batch", 1, "--plot", tmp_path / "a.png"]
    code = in_process(monkeypatch, "cache", *options)
    out, errors = capsys.readouterr()
    assert code == 2 and "whole text" in out
    assert len(told(errors)) == 1 and "No space left" in errors


@pytest.mark.parametrize("command", [[], ["cache"], ["speed"]])
def test_help_loads_neither_torch_nor_matplotlib(command):
    script = (
        "import sys, kvik.cli\ntry: kvik.cli.main()\nfinally: print({'torch', 'matplotlib', 'numpy'} & {*sys.modules})"
    )
    arguments = [sys.executable, "-c", script, "bench", *command, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and done.stdout.endswith("set()\n"), done.stderr
    wanted = {"": "What a cache saves and costs", "cache": "--plot-step", "speed": "--contexts"}
    assert wanted["".join(command)] in done.stdout


def test_the_packages_names_can_be_had_and_others_not():
    import kvik.bench

    assert sorted(dir(kvik.bench)) == [
        "Growth", "Machine", "Speed", "curves", "draw_speed", "examine", "measure", "measure_speed", "render",
        "render_machine", "render_speed", "slope",
    ]  # fmt: skip
    assert all(getattr(kvik.bench, name).__doc__ for name in dir(kvik.bench))
    with pytest.raises(AttributeError, match="no attribute 'speeed'"):
        kvik.bench.speeed  # noqa: B018


@pytest.mark.weights
def test_smollm2s_figures(monkeypatch, capsys):
    assert in_process(monkeypatch, "cache", "--tokens", 16, "--rounds", 1, "--batch", 1) == 0
    out = capsys.readouterr().out
    assert "from 3,892 tokens on" in out and "tokens on as many bytes" in out and "all 5 lengths" in out
