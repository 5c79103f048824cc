"""The comparison's page shows the figures that were measured, and its driver does the arithmetic."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import peers

ROOT = Path(__file__).parent.parent
PAGE, FOUND = (ROOT / "docs/performance.md").read_text(), json.loads((ROOT / "docs/peers.json").read_text())


def test_the_page_has_the_tables_of_the_figures():
    assert peers.tables(FOUND).strip() in PAGE


def test_a_ratio_is_to_the_best_peer_at_that_length():
    engine = {"setting": "x", "prefill_tokens_per_s": {"1024": 100.0}, "peak_bytes": 2_000_000}
    found = {
        "contexts": [1024],
        "engines": [
            {**engine, "engine": "kvik", "decode_tokens_per_s": {"1024": 30.0}},
            {**engine, "engine": "a", "decode_tokens_per_s": {"1024": 20.0}},
            {**engine, "engine": "b", "decode_tokens_per_s": {"1024": 12.0}},
        ],
    }
    decode, prefill, *_ = peers.tables(found).split("\n\n")
    assert "| kvik x | 30 (1.50×) | 2 |" in decode and "| b x | 12 | 2 |" in decode
    assert "| kvik x | 100 (1.00×) |" in prefill


@pytest.mark.parametrize("word", ["1.5, 2.0, 2.8, 3.3", "0.95, 1.02"])
def test_the_aims_are_compared_with_what_the_tables_say(word):
    of = {(e["engine"], e["setting"]): e for e in FOUND["engines"]}
    mine, key = of["kvik", "int8"], "decode_tokens_per_s" if word.startswith("1.5") else "prefill_tokens_per_s"
    contexts = ("32", "1024", "4096", "8128") if word.startswith("1.5") else ("1024", "4096")
    best = [max(e[key].get(n, 0) for e in FOUND["engines"] if e["engine"] != "kvik") for n in contexts]
    ratios = [mine[key][n] / other for n, other in zip(contexts, best, strict=True)]
    assert word in PAGE
    for said, ratio in zip(word.split(", "), ratios, strict=True):
        assert abs(float(said) - ratio) < (0.06 if word.startswith("1.5") else 0.006)
