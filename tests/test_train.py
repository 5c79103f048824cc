"""`kvik train`: a training learns, its folder is transformers' and kvik's alike, and nothing half-made is left."""

import json
import os
import signal

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from kvik.errors import StorageError, UsageError
from kvik.models.model import load
from kvik.train import checkpoint, translator
from kvik.train.checkpoint import NOTE, check_folder, write
from kvik.train.examination import Answer, Exam, examine
from kvik.train.phrases import KINDS, Item
from kvik.train.recipe import Recipe
from kvik.train.translator import Cuts, Training
from test_cli import in_process

TINY = dict(vocabulary=300, pairs=16, width=32, heads=2, ffn=48, encoder_layers=1, decoder_layers=1)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Trainings learn their pieces from few sentences, and look at few held-out ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translator, "_LEARNT_FROM", 500)
        patch.setattr(translator, "_LOOK", 1)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training of a few steps, its folder, and what it showed."""
    training, shown = Training(Recipe(steps=40, **TINY)), []
    training.run(shown.append)
    exam = examine(training.as_kvik(), Cuts(training.tokenizer), 0, 3)
    write(training, folder := tmp_path_factory.mktemp("trained") / "deep" / "dates", exam, {"loss": 1.0})
    return training, folder, shown


def test_the_loss_falls_and_progress_is_told(trained):
    training, _, shown = trained
    assert sum(training.losses[-5:]) < 0.8 * sum(training.losses[:5])
    assert [now.step for now in shown] == list(range(1, 41)) == list(range(1, training.steps + 1))
    assert shown[0].exam is None and len(shown[-1].exam.answers) == 2
    assert shown[-1].seconds > shown[0].seconds > 0


def test_the_checkpoint_is_the_same_model_to_transformers_and_to_kvik(trained, recwarn):
    _, folder, _ = trained
    text = ">>kor<<There are 1,204 books."
    theirs = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    assert not torch.equal(theirs.lm_head.weight, theirs.shared.weight), "the head is its own"
    model = load(folder, weights="f32")
    source = model.tokenizer.encode(text, add_special_tokens=True)
    assert source == AutoTokenizer.from_pretrained(folder)(text).input_ids
    target = [0, *range(5, 60)]
    cache = model.cache("f32")
    with cache.open(source=model.fill(cache, source)) as sequence, torch.no_grad():
        got = model.run([(sequence, target)], every=True)
        want = theirs(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits[0]
    assert (got - want).abs().max() < 1e-4
    assert load(folder).weights == "bf16" and model.config.max_positions == translator.POSITIONS
    note = json.loads((folder / NOTE).read_text())
    assert note["steps"] == 40 and note["recipe"]["width"] == 32 and set(note["exact_by_kind"]) == set(KINDS)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_seed_gives_the_same_weights():
    def weights(seed):
        training = Training(Recipe(steps=3, seed=seed, **TINY))
        training.run()
        return training.network.state_dict()

    one, same, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not torch.equal(one["shared.weight"], other["shared.weight"])


def test_minutes_of_processor_time_end_a_training():
    training, shown = Training(Recipe(minutes=0.01, **TINY)), []
    training.run(shown.append)
    assert training.steps >= 1 and shown[-1].seconds < 0.6 and shown[-1].done < 1


def test_the_rate_rises_and_falls():
    recipe = Recipe(rate=1.0)
    assert recipe.rate_at(0) == 0 and recipe.rate_at(0.02) == pytest.approx(0.5, abs=0.01)
    assert recipe.rate_at(0.5) == pytest.approx(0.5) and recipe.rate_at(1) == pytest.approx(0, abs=1e-9)


def test_an_exam_counts_what_is_right_to_the_letter():
    item = Item("date", "Today is Monday.", {"zh": "今天是星期一。", "ko": "오늘은 월요일입니다."})
    said = [("zh", "今天是星期一。"), ("ko", "오늘은 월요일입니다"), ("ko", item.targets["ko"])]
    exam = Exam(tuple(Answer(item, *each) for each in said))
    assert (exam.share(), exam.share("zh"), exam.share("ko")) == (2 / 3, 1.0, 0.5)
    assert exam.share("zh", "date") == 1 and exam.share("zh", "price") == 0


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({"steps": 0}, "--steps 0"), ({"steps": 10**7}, "1,000,000"), ({"minutes": 0.0}, "--minutes 0.0"),
        ({"minutes": float("nan")}, "--minutes nan"), ({"minutes": -3.0}, "--minutes"), ({"seed": -1}, "--seed -1"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_are_refused(recipe, named):
    with pytest.raises(UsageError, match=named):
        Recipe(**recipe)


def test_folders_that_hold_something_else_stay(trained, tmp_path, monkeypatch):
    training, folder, _ = trained
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    for path, named in ((tmp_path / "mine", "was not trained"), (tmp_path / "file", "was not trained"),
                        (tmp_path / "file" / "below", "can't be written")):  # fmt: skip
        with pytest.raises(StorageError, match=named):
            check_folder(path)
    check_folder(folder)
    check_folder(tmp_path / "new" / "deep")
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(checkpoint, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space left"):
        write(training, folder, Exam(()), {})
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.fixture
def small(monkeypatch):
    """Whatever the command trains is tiny."""
    monkeypatch.setattr("kvik.train.recipe.Recipe", lambda **given: Recipe(**{"steps": 3, **given}, **TINY))


def test_kvik_train_dates_writes_a_folder_twice(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "home"))
    for _ in range(2):
        assert in_process(monkeypatch, "train", "dates", "--sentences", 2) == 0
        told = capsys.readouterr()
        assert told.out.strip() == str(tmp_path / "home" / "trained" / "dates")
        assert "3 steps · " in told.err and "right to the letter on 2 held-out sentences: zh 0" in told.err
    assert in_process(monkeypatch, "translate", "3 books", "-m", told.out.strip(), "--max-tokens", 4) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_ctrl_c_keeps_what_was_learnt(small, tmp_path, monkeypatch, capsys):
    """Pressed in the middle of a step: that step is finished, and the folder is written."""

    def press(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return examine(*arguments)

    monkeypatch.setattr(translator, "examine", press)
    out = tmp_path / "out"
    assert in_process(monkeypatch, "train", "dates", "--out", out, "--steps", 500, "--sentences", 2, "--json") == 130
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert facts["stopped"] and facts["steps"] == 51 and f"{facts['steps']} steps (stopped early)" in told.err
    assert load(out).config.layers == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--steps", 0], "--steps 0"), (["--steps", 3, "--minutes", 1], "leave one of the two out"),
        (["--minutes", "nan"], "--minutes nan"), (["--minutes", "soon"], "--minutes"),
        (["--sentences", 0], "--sentences 0"),
        (["--out", "{}/file/below"], "can't be written"), (["--out", "{}"], "was not trained by kvik"),
    ],
)  # fmt: skip
def test_kvik_train_refuses_in_one_line(options, named, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    assert in_process(monkeypatch, "train", "dates", *(str(o).format(tmp_path) for o in options)) == 2
    told = capsys.readouterr()
    assert named in told.err and len(told.err.splitlines()) == 1 and not told.out
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
