"""docs/models.md: a row for each kind of model, its figures measured here. `KVIK_WRITE=1` writes the file anew.

A new family is a row in `ROWS` below, and a tiny model in `tiny_models.py`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvik.plan import run_plan
from tiny_models import FAMILIES, drawn, ours, their_logits, tokens

FILE = Path(__file__).parent.parent / "docs" / "models.md"
KV, COUNT = "bf16", 130


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: for people.
        kind: `model_type` of its config.json.
        keeps: what a token leaves in a layer.
        published: a model of `kvik plan --list` for its bytes; "" = there is none.
        tiny: names in `tiny_models.FAMILIES`, the first of which is measured in bytes, all in parity.
    """

    name: str
    kind: str
    keeps: str
    published: str
    tiny: tuple[str, ...]


HEADS, WINDOWS = "k and v of each KV head", "k and v of each KV head; some layers the last rows alone"
ROWS = (
    Row("Llama, SmolLM", "llama", HEADS, "smollm2", tuple(n for n in FAMILIES if n.startswith("llama"))),
    Row("Mistral", "mistral", "k and v of each KV head, the last rows alone", "mistral-7b-v0.1", ("mistral, window",)),
    Row("GPT-2", "gpt2", "k and v of each head", "gpt2", ("gpt2",)),
    Row("OPT", "opt", "k and v of each head", "opt-6.7b", ("opt", "opt, no biases")),
    Row("Qwen2, Qwen2.5", "qwen2", HEADS, "qwen2.5-0.5b", ("qwen2", "qwen2, windows")),
    Row("Qwen3", "qwen3", HEADS, "qwen3-0.6b", ("qwen3", "qwen3, biases and windows")),
    Row("Gemma 2", "gemma2", WINDOWS, "gemma-2-2b", ("gemma2",)),
    Row("Gemma 3, text", "gemma3_text", WINDOWS, "gemma-3-1b", ("gemma3", "gemma3, scaled ropes, capped logits")),
    Row("DeepSeek-V2", "deepseek_v2", "one latent and one turned key for all heads", "deepseek-v2",
        ("deepseek2", "deepseek2, plain queries, any group, biases")),
    Row("DeepSeek-V3", "deepseek_v3", "one latent and one turned key for all heads", "deepseek-v3",
        ("deepseek3", "deepseek3, yarn")),
)  # fmt: skip
HEAD = (
    "family", "model_type", "a token leaves in each layer", f"{KV}, B a token", "as published",
    f"tiny model, {COUNT} tokens: formula, measured", "logits differ by at most",
)  # fmt: skip


@torch.no_grad()
def measured(row):
    """(formula, measured) bytes of rows of the tiny model after COUNT tokens, and the largest difference of logits."""
    ids, apart, sizes = tokens(COUNT), 0.0, None
    for name in row.tiny:
        theirs = drawn(FAMILIES[name])
        assert theirs.config.model_type == row.kind
        model = ours(theirs)
        with model.cache("f32", memory=8 << 20).open() as sequence:
            apart = max(
                apart, float((model.run([(sequence, ids)], every=True) - their_logits(theirs, ids)).abs().max())
            )
        if sizes is None:
            with model.cache(KV, memory=8 << 20).open() as sequence:
                model.run([(sequence, ids)])
                sequence.settle()
                sizes = model.spec(KV).nbytes(COUNT), sequence.nbytes
    return *sizes, apart


def published(row):
    """(its name, its formula, bytes a token)."""
    plan = run_plan(row.published, kv=KV, context=1)
    later = run_plan(row.published, kv=KV).per_token_later.payload
    size = f"{plan.per_token.payload:,}"
    return (
        row.published,
        " + ".join(_formula(term.text) for term in plan.terms),
        size + (f", then {later:,}" if later != plan.per_token.payload else ""),
    )


def _formula(text):
    """Without the length and the number of sequences."""
    return " · ".join(text.split(" · ")[:-2])


def above(value):
    """The power of ten above: what can be said on any machine."""
    power = -12
    while 10.0**power < value:
        power += 1
    return f"1e{power}"


def line(cells):
    return "| " + " | ".join(cells) + " |"


def cells_of(row):
    """The row's texts, and the largest difference of logits."""
    formula, held, apart = measured(row)
    name, written, size = published(row)
    tiny = f"{formula.payload:,}, {held.payload:,}"
    return (row.name, f"`{row.kind}`", row.keeps, written, f"{name}: {size}", tiny, apart)


@pytest.fixture(scope="module")
def table():
    """The file's rows, by family."""
    found = [tuple(cell.strip() for cell in text.strip("|").split(" | ")) for text in FILE.read_text().splitlines()]
    return {cells[0]: cells for cells in found if len(cells) == len(HEAD)}


@pytest.mark.skipif("KVIK_WRITE" in os.environ, reason="the file is being written")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_says_what_is_measured(row, table):
    *want, apart = cells_of(row)
    *said, most = table[row.name]
    assert said == want
    assert apart <= float(most) <= 1e-4, "no difference is larger than the table says, nor than it may be"


def test_the_table_has_these_rows_and_no_others(table):
    assert [name for name in table if name != HEAD[0] and not re.fullmatch("-+", name)] == [row.name for row in ROWS]


@pytest.mark.skipif("KVIK_WRITE" not in os.environ, reason="writes docs/models.md")
def test_write_the_table():
    before, _, rest = FILE.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- end -->\n")[2]
    found = [cells_of(row) for row in ROWS]
    rows = [line(HEAD), line(["---"] * len(HEAD)), *(line([*cells, above(3 * apart)]) for *cells, apart in found)]
    FILE.write_text(before + "<!-- table -->\n" + "\n".join(rows) + "\n<!-- end -->\n" + after)
