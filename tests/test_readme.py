"""What the README and the examples say is run."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from kvik.models.files.prepare import resolve

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SLOW = {"transformers_document.py", "transformers_beams.py"}  # they read thousands of tokens, or write for ten seconds


@pytest.mark.weights
@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_block_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def commands():
    """The `kvik …` lines of the shell blocks, without their comments."""
    lines = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]
    return [line for line in lines if line.startswith("kvik ")]


def own_home(folder):
    """A home folder with the models of the real one, where a command may keep what it tuned."""
    (folder / "home").mkdir()
    (folder / "home" / "models").symlink_to(resolve("smollm2").parent)
    return folder / "home"


@pytest.mark.weights
@pytest.mark.parametrize("line", commands())
def test_command_runs_as_written(line, tmp_path, kvik_here, loaded_once):
    words = shlex.split(line, comments=True)[1:]
    stdin = "What is the capital of Japan?" if words[-2:] == ["<", "long.txt"] else ""
    words = words[:-2] if stdin else words
    if words[0] == "serve":
        pytest.skip("runs until it is stopped: see test_server_life.py")
    if "model.gguf" in words or "path/to/config.json" in words:
        pytest.skip("needs the reader's own file")
    words = [str(tmp_path / word) if word.endswith((".png", ".html", ".jsonl")) else word for word in words]
    if words[0] in ("run", "chat") and "--max-tokens" not in words:
        words += ["--max-tokens", "8"]
    if words[:2] == ["bench", "cache"]:
        words += ["--tokens", "16", "--rounds", "1", "--batch", "1"]  # the last of an option counts
    if words[:2] == ["bench", "speed"]:
        words += ["--contexts", "8", "--tokens", "1", "--rounds", "1"]
    if words[0] == "fuzz":
        words += ["--requests", "4", "--memory", "64MiB"]
    if words[0] == "doctor":
        words.append("--no-measure")
    if words[0] == "heads":
        (tmp_path / "my.txt").write_text(README)
        words = [str(tmp_path / word) if word == "my.txt" else word for word in words] + ["--tokens", "64"]
    if words[0] in ("eval", "tune"):
        words += ["--documents", "1", "--prefix", "48", "--scored", "2", "--weights", "int4"]
        if "--needles" in words:  # minutes
            del words[words.index("--needles") : words.index("--needle-plot") + 2]
        (tmp_path / "my.txt").write_text(README)
        words = [str(tmp_path / word) if word == "my.txt" else word for word in words]
    done = kvik_here(*words, stdin=stdin, home=own_home(tmp_path))
    assert done.returncode == 0, done.stderr
    assert words[0] == "chat" or done.stdout.strip()


def test_the_readme_has_commands_to_run():
    assert len(commands()) >= 8
    assert sum(language == "python" for language, _ in BLOCKS) >= 2


@pytest.mark.weights
@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.slow] if p.name in SLOW else [], id=p.name) for p in EXAMPLES]
)
def test_example_runs(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_every_file_that_documents_name_exists():
    for document in ("README.md", "DESIGN.md", "CONTRIBUTING.md", "docs/log.md"):
        text = (ROOT / document).read_text()
        for name in re.findall(
            r"`((?:ops|cache|models|engine|plan|trace|bench|eval|fuzz|docs|examples|benchmarks|scripts|tests)/[\w./-]+)`",
            text,
        ):
            assert (ROOT / name).exists() or (ROOT / "src/kvik" / name).exists(), f"{document} names {name}"
