"""`kvik transcribe`, over a tiny model and over the real one."""

import json

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import kvik
from kvik.engine.transcription import Transcriber
from kvik.models.mel import RATE, log_mel
from kvik.plan.find import lookup
from readers import drawn
from test_cli import in_process
from test_hearing import END, GENERATION, SIZES, noise
from test_reader_files import saved
from test_sound import riff, sine, wav


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tiny model and sounds of 1, 1 (the same) and 3 seconds; a window has 1.2."""
    folder = tmp_path_factory.mktemp("hearing")
    saved(folder / "model", drawn("whisper", **SIZES | {"max_target_positions": 40}))
    settings = GENERATION | {"suppress_tokens": [91, 92]}
    (folder / "model" / "generation_config.json").write_text(json.dumps(settings))
    letters = {chr(33 + i): i for i in range(END)} | {"<|de|>": 93}
    backend = Backend(models.WordLevel(letters, unk_token="!"))
    backend.decoder = decoders.Fuse()
    backend.save(str(folder / "model" / "tokenizer.json"))
    for name, seconds, seed in (("a", 1, 1), ("b", 1, 1), ("c", 3, 2)):
        wav(folder / f"{name}.wav", noise(seconds, seed))
    return folder


def transcribe(monkeypatch, files, *arguments):
    return in_process(monkeypatch, "transcribe", "--model", files / "model", "--weights", "f32", *arguments)


def test_what_is_printed(files, monkeypatch, capsys):
    assert transcribe(monkeypatch, files, files / "a.wav", "--kv", "f32") == 0
    out, err = capsys.readouterr()
    assert out.strip() and "[" not in out.split()[0]
    assert "1.0 s of sound" in err and "1 window" in err and "1 encoder run" in err and "cache f32: 92,160 B" in err
    assert transcribe(monkeypatch, files, files / "c.wav", "--timestamps", "--beams", 3) == 0
    out, err = capsys.readouterr()
    assert all(line.startswith("[00:0") and "→" in line for line in out.splitlines())
    assert "once for 3 beams" in err


def test_the_same_sound_twice_is_encoded_once(files, monkeypatch, capsys):
    assert transcribe(monkeypatch, files, files / "a.wav", files / "b.wav", files / "c.wav", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    first, same, long = facts["files"]
    assert first["windows"] == same["windows"] and first["text"] == same["text"]
    assert facts["windows"] == 2 + len(long["windows"]) and facts["encoder_runs"] == 1 + len(long["windows"])
    assert len(long["windows"]) >= 3 and facts["sound_s"] == 5
    assert sum(each["seconds"] for each in long["windows"]) == pytest.approx(3, abs=0.01)
    assert facts["source_bytes"] == 60 * 2 * 3 * 64 * 2


@pytest.mark.parametrize("ending", ["txt", "srt", "vtt"])
def test_files_that_are_written(files, monkeypatch, capsys, tmp_path, ending):
    path = tmp_path / f"text.{ending}"
    sound = "c.wav" if ending == "srt" else "a.wav"  # several windows, or one
    assert transcribe(monkeypatch, files, files / sound, "--output", path) == 0
    written = path.read_text()
    assert capsys.readouterr().out.split()[0] in written
    assert ("-->" in written) == (ending != "txt") and written.startswith("WEBVTT\n\n") == (ending == "vtt")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["none.wav"], "none.wav: can't be read"), (["x.wav"], "no WAV file"), (["a.wav", "--beams", 0], "--beams 0"),
        (["a.wav", "--beams", 17], "use 1 to 16"), (["a.wav", "--output", "x.doc"], ".srt"),
        (["a.wav", "c.wav", "--output", "x.srt"], "one file's text"), (["a.wav", "--language", "de"], "one language"),
        (["a.wav", "--language", "xx"], "'xx'"), (["a.wav", "--output", "no/x.srt"], "no folder"),
        (["a.wav", "--memory", "4KiB"], "KiB|bytes"), (["a.wav", "--kv", "int5"], "int5"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_one_line(files, monkeypatch, capsys, arguments, named):
    (files / "x.wav").write_bytes(riff()[:20])
    monkeypatch.chdir(files)
    assert transcribe(monkeypatch, files, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert any(each in err for each in named.split("|"))


def test_commands_for_text_say_which_one_hears(files, monkeypatch, capsys):
    for command in (["run", "hello"], ["chat"]):
        assert in_process(monkeypatch, *command, "--model", files / "model") == 2
        assert "kvik transcribe" in capsys.readouterr().err


@pytest.fixture(scope="module")
def real():
    return kvik.load("whisper-tiny.en", weights="f32")


@pytest.mark.weights
def test_real_weights_give_transformers_tokens(real):
    """The same weights in transformers; sound that rises and falls like a voice."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = real.config
    theirs = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=config.vocab_size, d_model=384, encoder_layers=4, decoder_layers=4, encoder_ffn_dim=1536,
            decoder_ffn_dim=1536, encoder_attention_heads=6, decoder_attention_heads=6,
        )
    ).eval()  # fmt: skip
    loaded = kvik.models.files.prepare.load(kvik.models.files.prepare.resolve("whisper-tiny.en"))
    tensors = {name: tensor.float() for name, tensor in loaded.tensors.items() if not name.endswith("k_proj.bias")}
    missing = theirs.load_state_dict(tensors, strict=False)
    assert missing.missing_keys == ["proj_out.weight"] and not missing.unexpected_keys
    theirs.tie_weights()
    voice = sum(sine(hz, RATE, 3) * sine(0.7 + hz / 500, RATE, 3) for hz in (130, 260, 700, 1200)).float() * 0.1
    features = log_mel(voice, 80, 3000)
    cache = real.cache("f32", memory=64 << 20)
    source = real.fill(cache, features)
    prompt = config.begin(None, timed=False)
    ids = [*prompt, *range(1000, 1060)]
    with torch.no_grad(), cache.open(source=source) as sequence:
        want = theirs(input_features=features.t()[None], decoder_input_ids=torch.tensor([ids])).logits[0]
        got = real.run([(sequence, ids)], every=True)
    assert (got - want).abs().max() < 1e-3, "logits are about 10"
    with torch.no_grad():
        said = theirs.generate(
            features.t()[None], decoder_input_ids=torch.tensor([prompt]), max_new_tokens=40, do_sample=False,
            eos_token_id=config.eos_ids[0], suppress_tokens=[run[0] for run in config.constraints.never],
            begin_suppress_tokens=list(config.constraints.never_begin), pad_token_id=config.eos_ids[0],
            return_timestamps=False,
        )[0].tolist()  # fmt: skip
    from kvik.engine.beams import beams

    ours = beams(real, cache, prompt, source=source, count=1, max_tokens=40, early_stopping=True)[0].token_ids
    found = [token for token in said if token not in (*prompt, *config.eos_ids)]
    assert found == [token for token in ours if token not in config.eos_ids] and found


@pytest.mark.weights
def test_the_real_model_hears_silence_and_keeps_one_window(real):
    cache = real.cache("int8; cross: int4", memory=64 << 20)
    transcriber = Transcriber(real, cache)
    (window,) = transcriber(torch.zeros(RATE))
    assert not window.speech or len(window.token_ids) < 12
    assert transcriber.encoded == 1
    counted = sum(
        torch.Size(shape).numel() for name, shape in real.config.tensor_shapes().items() if "k_proj.bias" not in name
    )
    assert lookup("whisper-tiny.en").parameters == counted
