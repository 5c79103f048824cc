"""What `kvik trace` shows: terminal, JSON, a page that is harmless whatever the text, and the command itself."""

import base64
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

import kvik
import kvik.cli
from helpers import text
from kvik.errors import StorageError
from kvik.models import families
from kvik.trace import collect, facts, layers_that_fit, make_page, page, record, render, view, write_page
from kvik.trace.tokens import visible
from traces import TINY, rows_of, tiny, traced

# What is shown.


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


# The page.

HOSTILE = (
    '</script><script>document.documentElement.dataset.hacked=1</script><!--\n\t\u2028<img src=x onerror="alert(1)">'
)


class Elements(HTMLParser):
    """Script elements by their type, and every attribute of a page."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.attributes, self._open = {}, [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.attributes += [name for name, _ in attributes]
        if tag == "script":
            self._open = dict(attributes).get("type", "code")
            assert self._open not in self.scripts, "one of each"
            self.scripts[self._open] = ""

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.scripts[self._open] += data


def contents(text):
    return json.loads(Elements(text).scripts["application/json"])


def decoded(array, *shape):
    numbers = np.frombuffer(base64.b64decode(array["data"]), "<f2").astype(np.float32)
    return numbers.reshape(shape) * array["scale"]


def test_the_page_holds_every_step_layer_and_head():
    trace = traced(text(9), kv="k8v4", prefill=3)
    data = contents(make_page(trace, layer=1, head=3))
    assert [(step["start"], step["end"]) for step in data["steps"]] == [(0, 3)] + [(i, i + 1) for i in range(3, 9)]
    assert data["kept_heads"] == [0, 1, 2, 3] and [kept["layer"] for kept in data["kept_layers"]] == [0, 1]
    for kept in data["kept_layers"]:
        layer = kept["layer"]
        looks = [frame.looks[layer] for frame in trace.frames]
        k, v = rows_of(trace, layer)
        wanted = {"k": k, "v": v, "q": torch.cat([look.q for look in looks]).transpose(0, 1)}
        wanted["out"] = torch.cat([look.out for look in looks]).transpose(0, 1)
        for name, want in wanted.items():
            scale = kept[name]["scale"]
            np.testing.assert_allclose(decoded(kept[name], *want.shape), want, atol=scale / 1000, rtol=1e-3)
        triangle = decoded(kept["weights"], 4, 45)
        for query in range(9):
            look = next(look for frame, look in zip(trace.frames, looks, strict=True) if query < frame.length)
            want = look.weights[query - (look.weights.shape[2] - look.weights.shape[0]), :, : query + 1]
            np.testing.assert_allclose(triangle[:, query * (query + 1) // 2 :][:, : query + 1], want, atol=1e-3)
        mine, theirs = (data["shared"][place] for place in kept["pairs"][2])
        assert mine == [int(frame.cached.pairs[layer, 2]) for frame in trace.frames]
        assert theirs == [int(frame.recomputed.pairs[layer, 2]) for frame in trace.frames]
        mine, theirs = (data["shared"][place] for place in kept["rows"][1])
        assert (mine[-1], theirs[-1]) == (9, 3 + 4 + 5 + 6 + 7 + 8 + 9)


def test_the_page_knows_what_a_window_hides():
    data = contents(make_page(traced(text(40), kv="bf16+window:4,sinks:1; page 16", prefill=38), layer=0, head=0))
    kept = data["kept_layers"][0]
    assert data["hides"] and data["shared"][kept["seen"][0]][-1] == [0, 1, 36, 40]
    assert data["shared"][kept["held"][0]][-1] == [0, 16, 32, 40]


def test_the_page_knows_what_a_policy_let_go():
    trace = traced(text(40), kv="bf16+snapkv:25%,sinks:1,recent:2,last:8; page 16", prefill=38)
    whole = make_page(trace, layer=0, head=0)
    data, look = contents(whole), trace.frames[-1].looks[0]
    assert data["hides"] == "every row" and data["prompt"] == 38
    edges = data["shared"][data["kept_layers"][0]["held"][0]][-1]
    runs = [set(range(start, stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    assert set.union(*runs) == set(look.held[0].nonzero().flatten().tolist()) and len(runs) >= 2


def test_hostile_text_is_only_text():
    tokens = list(HOSTILE.encode())
    whole = make_page(traced(tokens, text=HOSTILE, prefill=len(tokens) - 1), layer=0, head=0)
    elements = Elements(whole)
    assert set(elements.scripts) == {"application/json", "code"}
    assert not any(name.startswith("on") or name == "src" for name in elements.attributes)
    data = json.loads(elements.scripts["application/json"])
    assert "".join(data["tokens"])[:9] == "</script>" and "⏎" in data["tokens"]
    assert not re.search("[<>&\u2028\u2029]", elements.scripts["application/json"])


def test_the_page_allows_its_own_script_alone_and_reaches_for_nothing():
    whole = make_page(traced(text(2)), layer=0, head=0)
    code = Elements(whole).scripts["code"]
    wanted = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{wanted}'" in whole
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", whole)
    assert "{{" not in whole and "innerHTML" not in whole


def test_a_large_page_keeps_the_chosen_head_alone(monkeypatch):
    trace = traced(text(9))
    monkeypatch.setattr(page, "ARRAYS", 100)
    data = contents(make_page(trace, layer=1, head=3))
    assert data["kept_heads"] == [3] and data["kept_lanes"] == [1]
    np.testing.assert_allclose(
        decoded(data["kept_layers"][1]["k"], 9, 12), rows_of(trace, 1)[0][1], atol=1e-2, rtol=1e-3
    )


@pytest.mark.parametrize("tokens", [1, 20, 60, 200, 512])
def test_a_page_stays_small(tokens):
    sizes = families.from_hf(LlamaConfig(vocab_size=9, num_hidden_layers=30).to_dict(), None, "any")  # 32 heads of 128
    layers = layers_that_fit(sizes, tokens, 3)
    assert layers in ([3], list(range(30)))
    one = page._size(tokens, 1, 1, sizes.head_dim)
    assert one <= page.ARRAYS < 4_000_000 - 500_000
    assert len(layers) == 1 or len(layers) * page._size(tokens, 32, 32, 128) <= page.ARRAYS


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    assert write_page(target, "née") == 4 and target.read_text() == "née"
    os.chmod(target, 0o640)
    write_page(target, "second")
    assert target.read_text() == "second" and stat.S_IMODE(target.stat().st_mode) == 0o640

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        write_page(target, "third")
    assert target.read_text() == "second" and list(tmp_path.iterdir()) == [target]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
def test_the_page_runs_in_a_browser(tmp_path):
    trace = traced(list(HOSTILE.encode()[:12]), kv="k8v4", prefill=2)
    write_page(tmp_path / "page.html", make_page(trace, layer=0, head=0))
    flags = ["--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--dump-dom"]  # fmt: skip
    flags += [f"--user-data-dir={tmp_path / 'profile'}"] + ["--no-sandbox"] * (os.geteuid() == 0)
    address = f"file://{tmp_path}/page.html#step=4&layer=1&head=2"
    done = subprocess.run([CHROMIUM, *flags, address], capture_output=True, text=True, timeout=60)
    html = done.stdout
    seen = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html.split("</noscript>")[0]))
    frame = trace.frames[3]
    assert "step 4 of 11 decode" in seen, done.stderr[-500:]
    assert f"5with the cache {frame.recomputed.rows[1, 1]}without".replace(" ", "") in seen.replace(" ", "")
    assert f"15with the cache {frame.recomputed.pairs[1, 2]}without".replace(" ", "") in seen.replace(" ", "")
    assert "1 row of k and v computed, 4 reused" in seen and "5 rows of k and v computed, 4 of them again" in seen
    assert "Heads 2 and 3 share lane 1" in seen and "Bit for bit the same" in seen
    shares = re.findall(r'class="share">([\d.]+)', html.split('id="bars"')[1])
    np.testing.assert_allclose([float(s) / 100 for s in shares], frame.looks[1].weights[0, 2], atol=6e-4)
    assert "data-hacked" not in html.split("<body>")[0]


def test_the_smallest_model_has_a_trace(plain):
    model = tiny(layers=1, heads=1, lanes=1)
    trace = collect(model, [7], kv="int8")
    assert trace.frames[0].looks[0].weights.tolist() == [[[1.0]]]
    assert facts(trace, 0, 0)["heads_of_lane"] == [0]
    assert "1 layer, each with 1 query head over 1 lane" in shown(trace, head=0)
    assert contents(make_page(trace, layer=0, head=0))["tokens"] == ["⟨U+0007⟩"]


# The command.


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


# Real weights.


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
