"""`kvik train lm`, `images` and `compare`: they learn, go on where they were stopped, and leave what kvik runs."""

import json
import signal
from dataclasses import replace

import pytest
import torch

from kvik.errors import StorageError, UsageError
from kvik.models.model import load
from kvik.train import compare, lessons, pictures, series, sizes, tasks, text, trials
from kvik.train.compared import draw, gather, table
from kvik.train.lessons import Images, Text, learn
from kvik.train.loop import Loop, Schedule
from kvik.train.network import GPT
from test_cli import in_process

pytest.importorskip("sklearn")
SMALL = dict(operator="translution:k", width=16, layers=1, heads=2)


def lesson(steps=30, **more):
    return Text(schedule=Schedule(steps, 8), source="topics", length=16, **{**SMALL, **more})


def quiet(_):
    """Shows nothing."""


def never():
    return False


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    folder, shown = tmp_path_factory.mktemp("trained") / "deep" / "lm", []
    return learn(lesson(60), folder, False, shown.append, never), shown


def test_the_loss_falls_and_a_folder_is_left(learnt):
    done, shown = learnt
    losses = json.loads((done.folder / "training.json").read_text())["losses"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and len(losses) == 60 == done.steps
    assert [now.step for now in shown] == list(range(1, 61)) and shown[-1].items > 0
    assert {path.name for path in done.folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json", "loss.png",
    }  # fmt: skip
    assert 5 < done.figures["perplexity"] < 100 and done.figures["bits_a_byte"] < 7
    assert [path.name for path in done.folder.parent.iterdir()] == ["lm"]


def test_what_was_learnt_is_what_kvik_runs(learnt):
    done, _ = learnt
    model, held = load(done.folder), text.read("topics").held[:17]
    network = GPT(model.config)
    from safetensors.torch import load_file

    network.load_state_dict(load_file(done.folder / "model.safetensors"))
    with model.cache("f32").open() as sequence:
        got = model.run([(sequence, held[:16].tolist())], every=True)
    with torch.no_grad():
        assert (got - network(held[None, :16])[0]).abs().max() < 1e-4
    assert model.tokenizer.encode("é!") == list(model.tokenizer.encode("é")) + model.tokenizer.encode("!")
    assert model.tokenizer.decode(model.tokenizer.encode("déjà vu\n")) == "déjà vu\n"


def test_kvik_run_continues_a_text(learnt, monkeypatch, capsys):
    done, _ = learnt
    assert in_process(monkeypatch, "run", "--raw", "-m", done.folder, "--max-tokens", 4, "The ") == 0
    assert "4 prompt + 4 new tokens" in capsys.readouterr().err


def test_an_encoder_learns_what_is_hidden(tmp_path):
    given = lesson(150, operator="convolution:3", masked=True)
    done = learn(given, tmp_path / "it", False, quiet, never)
    assert done.figures["perplexity"] < 25 and set(done.figures) == {"perplexity"}
    model = load(done.folder)
    assert model.tokenizer.encode("a[MASK]") == [*model.tokenizer.encode("a"), 256] and model.config.vocab_size == 257
    found = model.unmask("the[MASK]value")
    assert len(found) == 9 and (found[:3], found[4:]) == ("the", "value")
    want = model.network.logits(torch.tensor(model.tokenizer.encode("the[MASK]value")))[3, :256].argmax()
    assert found[3] == model.tokenizer.decode([int(want)])
    with pytest.raises(UsageError, match="hides nothing"):
        model.unmask("the value")
    with pytest.raises(UsageError, match="nothing stays valid"):
        model.cache("bf16")
    with pytest.raises(UsageError, match="--masked out"):
        lesson(masked=True, operator="attention:rotary", share="pairs")


def test_sizes_by_the_name_of_a_model():
    assert sizes.like("GPT-2") == sizes.Sizes(12, 768, 12, 1024, "attention:learned")
    assert sizes.like("translution-tiny") == sizes.Sizes(6, 192, 3, 256, "translution:qkv")
    assert sizes.like("bert-base") == sizes.Sizes(12, 768, 12, 512, "attention:learned", masked=True)
    with pytest.raises(UsageError, match=r"gpt2, gpt2-medium.*minilm"):
        sizes.like("llama-2-7b")


@pytest.mark.parametrize("what", ["text", "images"])
def test_a_stopped_training_goes_on_as_if_it_never_had_been(what, tmp_path):
    schedule = Schedule(6, 4, seed=3)
    given = (
        Text(schedule=schedule, source="topics", length=16, **SMALL) if what == "text"
        else Images(schedule=schedule, source="digits", **{**SMALL, "operator": "lor:qkv,2"})
    )  # fmt: skip
    whole = learn(given, tmp_path / "whole", False, quiet, never)
    steps = iter([False, False, True])
    half = learn(given, tmp_path / "half", False, quiet, lambda: next(steps))
    assert half.stopped and half.steps == 2 and (tmp_path / "half.unfinished.safetensors").exists()
    with pytest.raises(StorageError, match="add --resume"):
        learn(given, tmp_path / "half", False, quiet, never)
    other = replace(given, width=32, schedule=Schedule(7, 4, seed=3))
    with pytest.raises(StorageError, match=r"\(steps 6 there, 7 here, width 16 there, 32 here\); repeat those"):
        learn(other, tmp_path / "half", True, quiet, never)
    state = (tmp_path / "half.unfinished.safetensors").read_bytes()
    (tmp_path / "half.unfinished.safetensors").write_bytes(state[:500])
    with pytest.raises(StorageError, match="no training that can go on; delete it"):
        learn(given, tmp_path / "half", True, quiet, never)
    (tmp_path / "half.unfinished.safetensors").write_bytes(state)
    done = learn(given, tmp_path / "half", True, quiet, never)
    assert done.steps == 6 and done.figures == whole.figures
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "half")]
    assert both[0] == both[1]
    assert not (tmp_path / "half.unfinished.safetensors").exists()
    with pytest.raises(StorageError, match="nothing to go on with; it was finished"):
        learn(given, tmp_path / "half", True, quiet, never)
    with pytest.raises(StorageError, match="nothing to go on with; leave --resume out"):
        learn(given, tmp_path / "new", True, quiet, never)


def test_what_was_trained_is_never_trained_over(learnt):
    done, _ = learnt
    before = (done.folder / "model.safetensors").read_bytes()
    with pytest.raises(StorageError, match=r"holds what was trained before.*name another"):
        learn(lesson(2), done.folder, False, quiet, never)
    assert (done.folder / "model.safetensors").read_bytes() == before


def test_what_is_larger_than_the_machine_is_refused_before_it_is_made(tmp_path, monkeypatch):
    """By weights, by matrices of an operator, and by a batch alone."""
    monkeypatch.setattr(lessons, "memory_available", lambda: 1 << 30)
    great = [
        {"width": 4096, "layers": 96},
        {"operator": "lor:qkv,999"},
        {"length": 8192, "schedule": Schedule(1, 4096)},
    ]
    for sizes_ in great:
        with pytest.raises(UsageError, match=r"(G|T)iB left; use smaller --width"):
            learn(replace(lesson(1), **sizes_), tmp_path / "it", False, quiet, never)
    monkeypatch.setattr(lessons, "memory_available", lambda: 1 << 10)
    with pytest.raises(UsageError, match="tokens a step take"):
        learn(Images(schedule=Schedule(1), source="digits", **SMALL), tmp_path / "it", False, quiet, never)
    assert not any(tmp_path.glob("it*"))


def test_a_full_disk_leaves_what_was_kept(tmp_path, monkeypatch):
    network = torch.nn.Linear(2, 2)
    loop = Loop(network, Schedule(3, 1), lambda g, n: (torch.ones(1, 2), torch.ones(1).long()), tasks.cross_entropy, 1)
    loop.run()
    loop.save(tmp_path / "state", "it")
    before = (tmp_path / "state").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        loop.save(tmp_path / "state", "it")
    assert (tmp_path / "state").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "state").write_bytes(before[:50])
    with pytest.raises(StorageError, match="no training that can go on"):
        loop.resume(tmp_path / "state", "it")


def test_the_rate_rises_and_falls():
    schedule = Schedule(100, rate=1e-2)
    assert schedule.rate_at(0) == pytest.approx(2e-3) and schedule.rate_at(4) == pytest.approx(1e-2, rel=0.01)
    assert schedule.rate_at(50) == pytest.approx(5e-3) and schedule.rate_at(99) < 1e-5


def test_texts_are_cut_into_bytes_or_learnt_pieces(tmp_path):
    source = tmp_path / "mine.txt"
    source.write_text("Ein schöner Tag. " * 400, encoding="utf-8")
    by_bytes, by_pieces = text.read(str(source)), text.read(str(source), "300")
    assert by_bytes.vocabulary == 256 and by_pieces.vocabulary <= 300
    whole = source.read_text(encoding="utf-8")
    assert by_bytes.learnt.tolist() + by_bytes.held.tolist() == by_bytes.tokenizer.encode(whole).ids
    assert len(by_bytes.held) == by_bytes.held_bytes > 3 * len(by_pieces.held)
    assert by_pieces.tokenizer.decode(by_pieces.held.tolist()) == by_bytes.tokenizer.decode(by_bytes.held.tolist())
    (tmp_path / "latin").write_bytes(b"sch\xf6n" * 900)
    for path, pieces, named in (
        ("nowhere.txt", "bytes", "name a text file"), (tmp_path / "latin", "bytes", "no UTF-8 at byte 3"),
        (source, "12", "257 to"), (source, "many", "257 to"),
    ):  # fmt: skip
        with pytest.raises((StorageError, UsageError), match=named):
            text.read(str(path), pieces)
    source.write_text("short")
    with pytest.raises(UsageError, match="5 characters"):
        text.read(str(source))


def test_moving_digits_are_shown_where_none_was_learnt():
    given = pictures.moving()
    (near, _), (far, _) = given.held, given.shifted
    assert len(near) == len(far) == 360 and len(given.learnt[0]) == 4 * 1437
    assert (near[:, :, 12:].sum(), near[:, :, :, 12:].sum()) == (0, 0)
    assert (far[:, :, :5].sum(), far[:, :, :, :5].sum()) == (0, 0)
    assert torch.equal(near.sum((1, 2, 3)), far.sum((1, 2, 3)))
    one = pictures.placed(near[:2, :, 4:12, 4:12], torch.tensor([[0, 8], [3, 5]]))
    assert torch.equal(one[0, :, :8, 8:], near[0, :, 4:12, 4:12])
    assert torch.equal(one[1, :, 3:11, 5:13], near[1, :, 4:12, 4:12])


def test_hidden_tokens_are_asked_for_and_no_others():
    texts = torch.arange(400).view(10, 40)
    seen, asked = tasks.masked(texts, 999, torch.Generator().manual_seed(0))
    assert torch.equal(seen == 999, asked != -100) and (asked != -100).any(1).all()
    assert torch.equal(torch.where(asked == -100, seen, asked), texts)


def test_a_comparison_is_fair_and_goes_on(tmp_path):
    asked = list(compare.questions(2, 2, 12, 2, compare.PARTS, compare.sizes("16", 1)))
    base = next(q.trial for q in asked if q.part == "text")
    for question in asked:
        if question.part == "text" and question.equal == "operations" and "bucketed" not in question.label:
            assert 0.4 < question.trial.operations / base.operations < 1.6, question.label
    corpus, path = text.read("topics"), tmp_path / "results.jsonl"
    some = [q for q in asked if q.trial.schedule.seed == 0][::7]
    shown = []
    known = compare.answer(some, corpus, path, lambda number, count, question: shown.append(question))
    assert len(known) == len(shown) == len({q.trial.key(corpus.digest) for q in some})
    with path.open("a") as file:
        file.write('{"key": "torn')
    again = []
    assert compare.answer(some, corpus, path, lambda *each: again.append(each)) == known and not again
    rows = gather(asked, known, corpus.digest)
    page = table(rows)
    assert "cache B/token" in page and "perplexity" in page and all(f"`{row.label}`" in page for row in rows)
    draw(rows, tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size > 10_000
    path.write_text("no result\n{}\n")
    with pytest.raises(StorageError, match="line 1 is no result"):
        compare.read(path)


def test_a_widths_parameters_come_near():
    base = trials.Trial("text", "attention:rotary", 2, 48, 2, 48, Schedule(1))
    for word in ("translution:qkv", "translution:k", "bucketed:qkv,16", "convolution:5"):
        found = compare.fitted(replace(base, operator=word), base, "parameters")
        assert 0.9 < found.parameters / base.parameters < 1.1, word


def test_a_step_through_a_cache_sees_a_series_as_a_pass_does():
    torch.manual_seed(0)
    given = pictures.digits()
    for word in ("attention:rotary", "translution:k", "bucketed:qkv,4"):
        watcher = series.Watcher(word, 16, 2, 2, 40).eval()
        frames, labels = series.drawn(given.held, 40, 1, torch.Generator().manual_seed(0))
        with torch.inference_mode():
            want = watcher(frames)[0]
        got = torch.stack([logits for logits, *_ in watcher.steps(frames[0], "f32")])
        assert (got - want).abs().max() < 1e-4, word
    watcher = series.Watcher("attention:rotary", 16, 1, 2, 40).eval()
    kv = ("none", "f32", "f32+window:12,sinks:4,relative")
    frames, labels = series.drawn(given.held, 160, 1, torch.Generator().manual_seed(0))
    none, full, window = series.follow(watcher, frames[0], labels[0], kv, every=20)
    assert none.right == full.right and full.held[-1] > window.held[-1]


def test_the_commands(tmp_path, monkeypatch, capsys):
    out = tmp_path / "lm"
    small = ("--width", 16, "--layers", 1, "--steps", 2, "--batch", 2, "--json")
    arguments = ("train", "lm", "topics", "--operator", "bucketed:k,4", "--length", 16, "--out", out, *small)
    assert in_process(monkeypatch, *arguments) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["steps"] == 2 and f"kvik run --raw -m {out}" in told.err
    for command in (("bench", "cache"), ("bench", "speed"), ("trace", "The", "--layer", 9)):
        assert in_process(monkeypatch, *command, "-m", out) == 2  # whatever else is wrong, this can't be mended
        assert "speaks of attention" in capsys.readouterr().err
    arguments = ("train", "images", "moving", "--operator", "translution:v", "--out", tmp_path / "vit", *small)
    assert in_process(monkeypatch, *arguments) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy_shifted"] <= 1
    assert load(tmp_path / "vit").encode(torch.rand(1, 16, 16)).shape == (17, 16)
    results = tmp_path / "results.jsonl"
    named = ("--like", "minilm", "--heads", 1, *small, "--length", 16, "--operator", "attention:rotary")
    assert in_process(monkeypatch, "train", "lm", "topics", *named, "--out", tmp_path / "named") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["lesson"]["masked"] and "unmask(" in told.err
    few = ("--parts", "share", "--seeds", 1, "--steps", 1, "--length", 12, "--widths", "16", "--results", results)
    assert in_process(monkeypatch, "train", "compare", *few, "--plot", tmp_path / "it.svg") == 0
    assert "`last-half`" in capsys.readouterr().out and (tmp_path / "it.svg").exists()
    for wrong, named in (
        (("lm", "topics", "--operator", "rnn"), "none that kvik has"), (("lm", "topics", "--width", 15), "a multiple"),
        (("lm", "topics", "--steps", 0), "--steps 0"), (("lm", "topics", "--like", "me"), "sizes are known of"),
        (("lm", "topics", "--device", "tpu"), "use cpu or cuda"), (("compare", "--device", "tpu"), "use cpu or cuda"),
        (("images", "cats"), "digits and moving"), (("lm", "topics", "--masked", "--share", "pairs"), "--masked out"),
        (("images", "digits", "--operator", "attention:rotary"), "two positions"),
        (("compare", "--seeds", 0), "use at least 1"), (("compare", "--plot", "it.gif"), "PNG or SVG"),
        (("compare", "--parts", "sound"), "use some of"), (("compare", "--widths", "a"), "--widths"),
    ):  # fmt: skip
        elsewhere = () if wrong[0] == "compare" else ("--out", tmp_path / "wrong")
        assert in_process(monkeypatch, "train", *wrong, *elsewhere) == 2, wrong
        assert named in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_learnt(tmp_path, monkeypatch, capsys):
    honest = Loop._step

    def step(self):
        if self.steps == 2:
            signal.raise_signal(signal.SIGINT)
        return honest(self)

    monkeypatch.setattr(Loop, "_step", step)
    out = tmp_path / "lm"
    arguments = ("train", "lm", "topics", "--width", 16, "--layers", 1, "--steps", 5, "--batch", 2, "--out", out)
    assert in_process(monkeypatch, *arguments) == 130
    assert "3 steps (stopped early; the same command with --resume goes on)" in capsys.readouterr().err
    monkeypatch.setattr(Loop, "_step", honest)
    assert in_process(monkeypatch, *arguments, "--resume") == 0
    assert "5 steps ·" in capsys.readouterr().err and lessons.NOTE in {path.name for path in out.iterdir()}
