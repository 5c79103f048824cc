"""What `kvik trace` shows: terminal, JSON, and the command itself."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

import kvik
import kvik.cli
from helpers import text
from kvik.trace import collect, facts, make_page, record, render, view
from kvik.trace.tokens import visible
from test_trace_page import contents
from traces import TINY, tiny, traced


def shown(trace, width=80, layer=0, head=1, **options):
    out = io.StringIO()
    render(trace, Console(file=out, width=width, **options), layer=layer, head=head)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_view_has_every_step_and_fits(width):
    trace = traced(list(b"The cat is on the mat"), kv="k8v4", prefill=4)
    lines = shown(trace, width).splitlines()
    assert max(map(len, lines)) <= width
    whole = "\n".join(lines)
    assert "step 1 of 18 · prefill" in whole and "step 18 of 18 · decode" in whole
    assert "q 4×12 · Kᵀ 12×4 · V 4×12" in whole and "q 1×12 · Kᵀ 12×21 · V 21×12" in whole
    for frame in trace.frames:
        own = [line for line in lines if re.match(rf" *{frame.number}  ", line)]
        n, again = frame.length, int(frame.recomputed.rows[0, 0])
        assert f"{frame.nbytes.allocated:,}" in own[0] and f"{n}/{again}" in own[0] and own[0].endswith(" 0")
    assert "instead of 225" in whole and "instead of 1,761" in whole and "bit for bit" in whole


def test_the_view_of_a_long_text_is_short_and_says_what_it_leaves_out():
    plain = shown(traced(text(60), prefill=21))
    assert plain.count("· decode") == view.FIRST - 1 + view.LAST
    assert "… steps 6 to 37 are in the table below" in plain
    assert "48 more rows share" in plain
    assert len(plain.splitlines()) < 8 * 29 + 60
    assert "\x1b" not in plain and "\x1b[" in shown(traced(text(3)), force_terminal=True)


def test_no_number_is_cut_however_large_or_narrow():
    trace = traced(text(3))
    big = dataclasses.replace(
        trace.frames[-1].recomputed, pairs=np.full((2, 4), 22_500_864), rows=np.full((2, 2), 131_328)
    )
    frame = dataclasses.replace(trace.frames[-1], recomputed=big)
    trace = dataclasses.replace(trace, frames=(*trace.frames[:-1], frame))
    for width in (80, 50):
        told = "".join(shown(trace, width).split())
        assert "3/131,328" in told and "6/22,500,864" in told and f"{frame.nbytes.allocated:,}" in told


def test_the_view_says_what_a_window_hides_and_what_a_sink_is():
    told = shown(traced(text(40), kv="bf16+window:4,sinks:1; page 16", prefill=38))
    assert "not seen: 19 hidden by the window, 16 gone with their pages" in told
    assert "f32 rows and no window" in " ".join(told.split())
    trace = traced(text(5))
    assert "attention sink" not in shown(trace)
    for frame in trace.frames:
        frame.looks[0].weights[-1, 1] = torch.eye(frame.length)[0]
    assert "an attention sink" in " ".join(shown(trace).split())


def test_the_view_says_what_a_policy_let_go_and_why_it_may_have_let_nothing_go():
    kv = "bf16+snapkv:25%,sinks:1,recent:2,last:8; page 16"
    told = " ".join(shown(traced(text(40), kv=kv, prefill=38)).split())
    assert "not seen: 29 that the policy let go" in told and "f32 rows and every row" in told
    assert "window" not in told and "let no row" not in told
    told = " ".join(shown(traced(text(40), kv=kv)).split())
    assert "The policy let no row of this layer go. --prefill says" in told and "pages of 16 that are not full" in told
    assert "let no row" not in " ".join(shown(traced(text(9))).split())


def test_a_recomputation_that_differs_is_told_plainly():
    trace = traced(text(3))
    wrong = dataclasses.replace(trace.frames[-1], same=trace.frames[-1].plain)
    told = shown(dataclasses.replace(trace, frames=(*trace.frames[:-1], wrong)))
    assert "NOT what" in told and "bit for bit" not in told


def test_facts_are_json_and_the_traces_numbers():
    trace = traced(list(b"The cat"), kv="int8+window:3,sinks:1", prefill=2, text="The cat")
    told = json.loads(json.dumps(facts(trace, 1, 2), allow_nan=False))
    assert told["text"] == "The cat" and told["lane"] == 1 and told["heads_of_lane"] == [2, 3]
    assert [step["phase"] for step in told["steps"]] == ["prefill"] + ["decode"] * 5
    assert [token["text"] for token in told["tokens"]] == list("The cat")
    last, frame = told["steps"][-1], trace.frames[-1]
    look = frame.looks[1]
    assert last["shapes"] == {"q": [1, 12], "K_T": [12, 7], "V": [7, 12]}
    np.testing.assert_allclose(last["q"], look.q[:, 2], rtol=1e-6)
    np.testing.assert_allclose(last["K_T_new_columns"], look.k[1], rtol=1e-6)
    np.testing.assert_allclose(last["V_new_rows"], look.v[1], rtol=1e-6)
    assert [each["position"] for each in last["attention_weights"]] == [0, 4, 5, 6]
    assert sum(each["weight"] for each in last["attention_weights"]) == pytest.approx(1, abs=1e-5)
    assert last["rows"] == {"seen": 4, "hidden": 3, "gone": 0, "new": 1}
    assert last["bytes"]["payload"] + last["bytes"]["overhead"] == last["bytes"]["allocated"]
    assert last["rows_computed"] == {"with_cache": 7, "without": 2 + 3 + 4 + 5 + 6 + 7}
    assert (
        last["difference"]["recomputed"] == {"logits": 0, "attention": 0} and told["largest_difference"]["f32_rows"] > 0
    )


@pytest.mark.parametrize(
    ("raw", "signs"),
    [
        (" cat\n", "␣cat⏎"),
        ("a\x00\x1b[2J\x85", "a⟨U+0000⟩⟨U+001B⟩[2J⟨U+0085⟩"),
        ("\u202ea\u2028", "⟨U+202E⟩a⟨U+2028⟩"),
        ("\u0301", "◌\u0301"),
        ("né", "né"),
    ],
)
def test_what_is_invisible_is_shown(raw, signs):
    assert visible(raw) == signs


def test_the_smallest_model_has_a_trace(plain):
    model = tiny(layers=1, heads=1, lanes=1)
    trace = collect(model, [7], kv="int8")
    assert trace.frames[0].looks[0].weights.tolist() == [[[1.0]]]
    assert facts(trace, 0, 0)["heads_of_lane"] == [0]
    assert "1 layer, each with 1 query head over 1 lane" in shown(trace, head=0)
    assert contents(make_page(trace, layer=0, head=0))["tokens"] == ["⟨U+0007⟩"]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `kvik trace` here over the tiny model: (exit code, stdout, stderr)."""
    monkeypatch.setattr("kvik.cli.trace.load_model", lambda *_: TINY)

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["kvik", "trace", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as stopped:
            kvik.cli.main()
        return (stopped.value.code, *capsys.readouterr())

    return run


def test_the_command_prints_a_view_or_json_and_writes_a_page(command, tmp_path):
    code, out, _ = command("The cat", "--kv", "k8v4", "--prefill", 2)
    assert code == 0 and "step 6 of 6 · decode" in out and "looking at layer 1, head 3" in out
    target = tmp_path / "cat.html"
    code, out, told = command("-", "--json", "--head", 0, "--html", target, stdin="The cat")
    assert code == 0 and json.loads(out)["steps"][-1]["rows_computed"] == {"with_cache": 7, "without": 28}
    assert f"page: {target}, {target.stat().st_size:,} B" in told
    assert len(contents(target.read_text())["kept_layers"]) == 2 and contents(target.read_text())["head"] == 0


REFUSED = {
    "empty text": ([""], ["the text is empty"]),
    "layer too high": (["hi", "--layer", "2"], ["layer 2", "layers 0 to 1"]),
    "negative layer": (["hi", "--layer", "-1"], ["layer -1", "counted from 0"]),
    "head too high": (["hi", "--head", "4"], ["head 4", "heads 0 to 3"]),
    "prefill too long": (["hi", "--prefill", "3"], ["prefill 3", "1 to 2"]),
    "no prefill": (["hi", "--prefill", "0"], ["prefill 0", "1 or more"]),
    "too long": (["x" * 513], ["513 tokens", "512"]),
    "no cache": (["hi", "--kv", "none"], ["--kv none"]),
    "wrong spec": (["hi", "--kv", "int5"], ["int5", "int8"]),
    "folder": (["hi", "--html", "{}"], ["is a folder", "trace.html"]),
    "no parent": (["hi", "--html", "{}/no/page.html"], ["no folder"]),
    "no ordinary file": (["hi", "--html", os.devnull], [os.devnull, "no ordinary file"]),
    "no text": ([], ["text"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(case, command, tmp_path):
    arguments, wanted = REFUSED[case]
    code, out, told = command(*(argument.replace("{}", str(tmp_path)) for argument in arguments))
    assert (code, out) == (2, "") and told.count("\n") == 1 and told.startswith("kvik: ")
    assert all(words in told for words in wanted)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [["--layer", "-1"], ["--prefill", "0"], ["--kv", "int5"], ["--html", "/"]])
def test_options_are_checked_before_the_model_is_loaded(option, command, monkeypatch):
    monkeypatch.setattr("kvik.cli.trace.load_model", None)
    assert command("hi", *option)[0] == 2


def test_help_names_every_option_and_imports_no_torch():
    script = "import sys, kvik.cli\ntry: kvik.cli.main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, "trace", "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stdout.endswith("False\n")
    for option in ("--model", "--layer", "--head", "--kv", "--prefill", "--weights", "--device", "--json", "--html"):
        assert option in done.stdout


@pytest.fixture(scope="module")
def smollm2():
    return kvik.load("smollm2")


@pytest.mark.weights
def test_the_cat_behind_a_window(smollm2):
    tokens = smollm2.tokenizer.encode("The cat is on the mat")
    frames = list(record(smollm2, tokens, kv="k8v4+window:4,sinks:1", layers=[29]))
    assert (frames[-1].cached.rows == 6).all() and (frames[-1].recomputed.rows == 21).all()
    assert (frames[-1].cached.pairs == 20).all() and (frames[-1].recomputed.pairs == 56).all()
    assert all(frame.same.largest == 0 for frame in frames) and frames[-1].plain.largest > 0


@pytest.mark.weights
def test_the_cat_is_on_the_mat(smollm2, command, monkeypatch, tmp_path):
    monkeypatch.setattr("kvik.cli.trace.load_model", lambda *_: smollm2)
    target = tmp_path / "page.html"
    code, out, _ = command("The cat is on the mat", "--html", target, "--json")
    told = json.loads(out)
    assert code == 0 and [each["text"] for each in told["tokens"]] == ["The", " cat", " is", " on", " the", " mat"]
    last = told["steps"][-1]
    assert last["rows_computed"] == {"with_cache": 6, "without": 21}
    assert last["pairs"] == {"with_cache": 21, "without": 56}
    assert told["all_layers"]["rows_computed"] == {"with_cache": 6 * 90, "without": 21 * 90}
    assert told["all_layers"]["pairs"] == {"with_cache": 21 * 270, "without": 56 * 270}
    assert last["bytes"]["payload"] == 6 * 90 * 2 * 64 * 2 and told["largest_difference"]["recomputed"] == 0
    for step in told["steps"][2:]:  # what the default layer and head are for: later words look at the cat
        assert step["attention_weights"][1]["weight"] > 0.5
    assert len(contents(target.read_text())["kept_layers"]) == 30 and target.stat().st_size < 4_000_000
