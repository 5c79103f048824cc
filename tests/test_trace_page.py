"""A trace as a page: every number is there, hostile text is only text, and it runs in a browser."""

import base64
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from helpers import text
from kvik.errors import StorageError
from kvik.models import families
from kvik.trace import layers_that_fit, make_page, page, write_page
from traces import rows_of, traced

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
