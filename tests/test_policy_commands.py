"""Specs whose rows leave by worth, in commands that answer: what they say was kept is what was kept."""

import io
import json
import sys

import pytest

from bench_models import told
from eval_models import command, reader

TEXT = "A long text that has many letters, each of them a token of its own. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return reader(tmp_path_factory)[0]


def run(monkeypatch, capsys, folder, kv, *options):
    code = command(monkeypatch, "run", "--model", folder, "--kv", kv, "--raw", "--max-tokens", 5, *options, TEXT)
    out, errors = capsys.readouterr()
    assert code == 0
    return out, " ".join(line for line in told(errors))


KEPT = {"int8+snapkv:25%": 72, "int8+h2o:50%": 140, "int8+window:30,sinks:4": 34, "int8+keydiff:64rows": 64 + 20}


@pytest.mark.parametrize("kv", KEPT)
def test_run_says_how_many_rows_stayed(kv, monkeypatch, capsys, folder):
    facts = json.loads(run(monkeypatch, capsys, folder, kv, "--json")[0])
    assert facts["prompt_tokens"] == 272 and facts["kv_tokens"] == 276 and facts["kv_rows"] == KEPT[kv]
    assert facts["kv_bytes"] == facts["kv_bytes_formula"] == KEPT[kv] * 4 * 24
    _, errors = run(monkeypatch, capsys, folder, kv)
    assert f"{facts['kv_bytes']:,} B payload ({KEPT[kv]} of 276 rows a head)" in errors


def test_where_all_stay_it_says_tokens(monkeypatch, capsys, folder):
    for kv in ("int8", "int8+snapkv:100%"):
        assert "payload (276 tokens)" in run(monkeypatch, capsys, folder, kv)[1]


def test_chat_says_how_many_rows_stayed_of_each_turn(monkeypatch, capsys, folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    chat = ["chat", "--model", folder, "--kv", "int8+snapkv:50%", "--max-tokens", 3]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TEXT}\nAnd then?\n"))
    assert command(monkeypatch, *chat, "--json") == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["kv_tokens"], first["kv_rows"]) == (first["prompt_tokens"] + 2, first["prompt_tokens"] // 2 + 2)
    assert (second["kv_tokens"], second["kv_rows"]) == (second["prompt_tokens"] + 2, second["prompt_tokens"] // 2 + 2)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TEXT}\n"))
    assert command(monkeypatch, *chat) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"{first['kv_rows']:.0f} of {first['kv_tokens']} rows a head" in said
