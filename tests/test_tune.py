"""`kvik tune`: which spec wins on made-up measurements, what is measured at all, and what `--kv tuned` then takes."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

import kvik
from bench_models import check_refused, ids, tiny, told
from eval_models import SETUP, WHERE, command, made, reader
from kvik.cache.spec import Bytes
from kvik.errors import ContextError, SpecError, StorageError, UsageError
from kvik.eval import render_tuning, tune
from kvik.eval.caches import fitting
from kvik.eval.tuning import PREFIX, Candidate, Tuning, ladder
from kvik.models.tuned import path_of, recall, remember
from tiny_models import FAMILIES, drawn, ours

FIGURES = {"bf16": (256, 5e-5), "int8-rot": (133, 2e-4), "int8": (132, 8e-4), "k8v4": (100, 5e-3), "int4": (72, 5e-2)}


def tuning(memory=None, max_kl=None, **figures):
    """Candidates of (bytes, KL); what is over the memory was not measured."""
    candidates = tuple(
        Candidate(
            spec, Bytes(size - 2, 2), size,
            None if memory is not None and size > memory else made(spec, kl, float(size)),
        )
        for spec, (size, kl) in (figures or FIGURES).items()
    )  # fmt: skip
    return Tuning(SETUP, WHERE, 4096, memory, max_kl, candidates)


@pytest.mark.parametrize(
    ("memory", "max_kl", "wanted"),
    [
        (300, None, "bf16"),
        (256, None, "bf16"),
        (255, None, "int8-rot"),
        (132, None, "int8"),
        (99, None, "int4"),
        (None, 1.0, "int4"),
        (None, 0.05, "int4"),
        (None, 0.049, "k8v4"),
        (None, 1e-3, "int8"),
        (None, 3e-4, "int8-rot"),
        (150, 0.01, "int8-rot"),
        (110, 0.01, "k8v4"),
    ],
)
def test_memory_takes_the_lowest_kl_that_fits_and_a_kl_the_fewest_bytes(memory, max_kl, wanted):
    assert tuning(memory, max_kl).winner.spec == wanted


def test_of_equals_the_better_one_wins():
    assert tuning(max_kl=1.0, a=(100, 0.2), b=(100, 0.1)).winner.spec == "b"
    assert tuning(memory=200, a=(110, 0.1), b=(100, 0.1)).winner.spec == "b"


def test_where_none_fits_the_nearest_and_the_way_out_are_named():
    none = tuning(memory=71)
    assert none.winner is None
    for said in ("4,096 tokens in 71 B", "'int4', takes 72 B", "--memory", "--context", "--lossy"):
        assert said in none.why_none
    far = tuning(max_kl=1e-5)
    assert far.winner is None
    for said in ("at most 1.0e-5", "'bf16', has 5.0e-5", "raise --max-kl"):
        assert said in far.why_none
    both = tuning(memory=110, max_kl=1e-3)
    assert both.winner is None and "'k8v4', has 5.0e-3; raise --max-kl or --memory" in both.why_none


def test_the_frontier_is_of_what_was_measured():
    assert [each.spec for each in tuning(memory=140).frontier] == ["int4", "k8v4", "int8", "int8-rot"]
    found = tuning(max_kl=1.0, a=(100, 0.2), b=(100, 0.1), c=(120, 0.15))
    assert [each.spec for each in found.frontier] == ["b"]


def printed(found):
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        render_tuning(found, console)
    return capture.get()


def test_the_table_says_why_each_was_left():
    found = tuning(140, 0.04, **FIGURES, worse=(139, 9e-3))
    text = printed(found)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "bf16 256 B too large" in lines
    assert "int8-rot 133 B 2.0e-4 4.4e-4 75.0 % 10.0 ms taken" in lines
    assert any(line.startswith("worse 139 B") and line.endswith("beaten") for line in lines)
    assert any(line.startswith("int4 72 B") and line.endswith("too far") for line in lines)
    words = " ".join(lines)
    assert "asked at most 140 B for 4,096 tokens and a mean KL of 0.040; of those, the lowest KL" in words
    assert "taken int8-rot: 133 B, mean KL 2.0e-4, 95 % of the mean 1.0e-4 to 3.0e-4" in words
    assert "taken" not in " ".join(printed(tuning(memory=71)).split())


def test_what_must_fit_is_the_most_that_is_held_at_any_time():
    """A policy that chooses at the prompt's end has taken all of it in."""
    plain, part = Candidate("int8", Bytes(98, 2), 100, made("int8", 0.01, 100.0)), "int8+snapkv:25%"
    dropping = Candidate(part, Bytes(24, 1), 100, made(part, 0.2, 25.0, kept=0.25))
    found = Tuning(SETUP, WHERE, 4096, 60, None, (plain, replace(dropping, measured=None)))
    assert found.winner is None and "takes 100 B" in found.why_none
    close = Tuning(SETUP, WHERE, 4096, None, 0.3, (plain, dropping))
    assert close.winner is dropping, "without a limit of memory, what stays counts"
    text = " ".join(printed(close).split())
    assert "int8+snapkv:25% 25 B 100 B 0.20" in text and "at most on the way there" in text
    assert "at most on the way" not in " ".join(printed(tuning(max_kl=1.0)).split())
    assert close.to_dict()["candidates"][1]["bytes"] == {"payload": 24, "overhead": 1, "allocated": 25, "peak": 100}


def test_json_has_every_candidate_and_the_winner():
    facts = json.loads(json.dumps(tuning(140, 0.04).to_dict(), allow_nan=False))
    assert facts["winner"] == "int8-rot" and facts["frontier"] == ["int4", "k8v4", "int8", "int8-rot"]
    first, *_, last = facts["candidates"]
    assert (first["fits"], first["close"], first["measured"]) == (False, False, None)
    assert last["fits"] and not last["close"] and last["bytes"]["allocated"] == 72
    assert tuning(memory=71).to_dict()["winner"] is None


# What is measured.


@pytest.fixture(scope="module")
def model():
    return tiny()


def test_candidates_that_a_model_cannot_have_are_left_out():
    latent = ours(drawn(FAMILIES["deepseek3"]))
    assert fitting(latent, ["bf16", "k8v4", "int4", "int4; layers 0: int8"]) == ["bf16", "int4", "int4; layers 0: int8"]


def test_the_ladder_fits_every_model():
    for layers in (1, 2, 5, 30):
        for lossy in (False, True):
            specs = ladder(layers, 4096, lossy=lossy)
            assert len(set(specs)) == len(specs)
            assert any("window" in spec for spec in specs) == any("kvzip" in spec for spec in specs) == lossy
    assert "int8+window:2048,sinks:4" in ladder(30, 4096, lossy=True)
    assert {"int4; layers 0-14: k8v4", "int4; layers 10-14: k8v4", "int4; layers 0-1: int8"} < {*ladder(30, 4096)}
    assert "int4; layers 2-2: k8v4" in ladder(6, 4096)


def test_what_is_too_large_by_the_formula_is_not_measured(model, monkeypatch):
    taken = []
    honest = kvik.Model.cache
    monkeypatch.setattr(
        kvik.Model, "cache", lambda self, kv, **options: taken.append(kv) or honest(self, kv, **options)
    )
    memory = model.spec("int8").nbytes(500).allocated
    found = tune(model, ids(400), ["bf16", "int8", "int4"], context=500, memory=memory, prefix=60, scored=10)
    assert {*taken} == {"f32", "int8", "int4"}
    assert [each.measured is None for each in found.candidates] == [True, False, False]
    assert [each.nbytes for each in found.candidates] == [model.spec(kv).nbytes(500) for kv in ("bf16", "int8", "int4")]
    assert found.winner.spec == "int8"
    taken.clear()
    nothing = tune(model, ids(400), ["bf16", "int8"], context=500, memory=100, prefix=60, scored=10)
    assert not taken and nothing.winner is None


def test_the_full_cache_is_a_candidate_only_where_it_is_asked_for(model):
    found = tune(model, ids(400), ["f32", "int4"], context=500, max_kl=1e-9, prefix=60, scored=10)
    assert found.winner.spec == "f32" and found.winner.measured.kl == 0


def test_what_drops_rows_is_measured_over_the_whole_context(model):
    windows = ["int8", "int8+window:30"]
    found = tune(model, ids(800), windows, context=200, max_kl=9.0, scored=50, documents=2)
    assert (found.setup.prefix, found.setup.scored) == (150, 50)
    plain = tune(model, ids(1402), windows[:1], context=200, max_kl=9.0, scored=50, documents=2)
    assert plain.setup.prefix == 650 == min(PREFIX, 700 - 50), "as many as the model has positions for"
    with pytest.raises(UsageError, match=r"'int8\+window:30' drops rows of 200 tokens, which --prefix 100"):
        tune(model, ids(800), windows, context=200, max_kl=9.0, prefix=100, scored=50, documents=2)
    tune(model, ids(800), windows[1:], context=30, max_kl=9.0, prefix=20, scored=4, documents=2)  # drops nothing
    with pytest.raises(ContextError):
        tune(model, ids(800), windows, context=701, max_kl=9.0)


# What is kept, and --kv tuned.


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_what_was_chosen_is_taken_by_the_word_tuned(model, home):
    with pytest.raises(SpecError, match=r"nothing was tuned for tiny with weights f32 here; run 'kvik tune"):
        model.spec("tuned")
    path = remember(model.fingerprint, "tiny", "f32", "int4; layers 0: int8", {"asked": None})
    assert path == path_of(model.fingerprint) and path.parent.parent == home
    assert str(model.spec("tuned")) == str(model.cache("tuned").spec) == "int4; layers 0: int8"
    remember(model.fingerprint, "tiny", "f32", "k8v4", {})
    assert str(model.spec("tuned")) == "k8v4" and len(list(path.parent.iterdir())) == 1
    with pytest.raises(SpecError, match="nothing was tuned"):
        recall("0" * 64, "tiny", "int4")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kvik": "tuned-1"}', "null"])
def test_a_damaged_choice_is_refused_with_its_file(model, home, text):
    path = remember(model.fingerprint, "tiny", "f32", "int8", {})
    path.write_text(text)
    with pytest.raises(StorageError, match=r"damaged.*run 'kvik tune' again"):
        model.spec("tuned")
    values = {"kvik": "tuned-1", "fingerprint": "another", "spec": "int8"}
    path.write_text(json.dumps(values))
    with pytest.raises(StorageError, match="damaged"):
        model.spec("tuned")


REFUSED = {
    "no limit": ([], ["--memory 64MiB", "--max-kl 0.01"]),
    "memory": (["--memory", "lots"], ["lots", "8GiB"]),
    "kl": (["--max-kl", "0"], ["--max-kl 0", "above 0"]),
    "no number": (["--max-kl", "nan"], ["--max-kl nan", "above 0"]),
    "context": (["--memory", "1MiB", "--context", "0"], ["--context 0", "at least 1"]),
    "spec": (["--max-kl", "1", "--specs", "int8|int5"], ["int5"]),
    "empty spec": (["--max-kl", "1", "--specs", "int8|"], ["''"]),
    "lossy beside specs": (["--max-kl", "1", "--specs", "int8", "--lossy"], ["--lossy", "leave one"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_limits_that_are_none_are_refused_before_a_model_is_loaded(case, monkeypatch, capsys):
    monkeypatch.setattr("kvik.cli.tune.load_model", lambda *_: pytest.fail("the model was loaded"))
    options, wanted = REFUSED[case]
    check_refused(capsys, command(monkeypatch, "tune", *options), *wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reader(tmp_path_factory)[0]


def test_the_command_measures_keeps_and_run_takes_it(monkeypatch, capsys, folder, home):
    common = ["tune", "--model", folder, "--prefix", 64, "--scored", 8, "--documents", 2, "--context", 300]
    asked = ["run", "--model", folder, "--kv", "tuned", "--raw", "--max-tokens", 2, "--json", "Hi"]
    check_refused(capsys, command(monkeypatch, *asked), "nothing was tuned", "kvik tune")
    assert command(monkeypatch, *common, "--max-kl", 100, "--specs", "int8|int4; layers 0: int8") == 0
    out, errors = capsys.readouterr()
    assert "taken" in out and told(errors)[0].startswith("kept: ") and str(home) in errors
    assert command(monkeypatch, *asked) == 0
    assert json.loads(capsys.readouterr().out)["spec"] == "int4; layers 0: int8"
    assert command(monkeypatch, *common, "--memory", "1KiB", "--specs", "int8") == 2
    out, errors = capsys.readouterr()
    assert "too large" in out, "what was found is still printed"
    assert len(told(errors)) == 1 and "no spec tried holds 300 tokens in 1.0 KiB" in errors
    assert command(monkeypatch, *asked) == 0
    assert json.loads(capsys.readouterr().out)["spec"] == "int4; layers 0: int8", "an earlier choice stays"
    why = json.loads(next((home / "tuned").iterdir()).read_text())["why"]
    assert why["asked"]["max_kl"] == 100 and why["measured"]["documents"] == 2


def test_a_context_beyond_the_model_is_refused(monkeypatch, capsys, folder):
    code = command(monkeypatch, "tune", "--model", folder, "--memory", "1MiB", "--context", 701)
    check_refused(capsys, code, "--context 701", "700 positions", "at most 700")


def test_a_short_reason_is_kept_beside_the_spec():
    reasons = replace(tuning(140), memory=140).reasons()
    assert reasons["asked"] == {"memory": 140, "max_kl": None, "context": 4096}
    assert reasons["measured"]["bytes"] == 133 and reasons["measured"]["text"] == "a text"
