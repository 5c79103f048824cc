"""docs/models.md: a row for each kind of model, its figures measured here. `KVIK_WRITE=1` writes the file anew.

A new family is a row in `ROWS` below, and a tiny model in `tiny_models.py`, `readers.py` or `encoders.py`.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import encoders
import readers
from kvik.plan import run_plan
from tiny_models import FAMILIES, drawn, ours, their_logits, tokens

FILE = Path(__file__).parent.parent / "docs" / "models.md"
KV, COUNT, SOURCE = "bf16", 130, 40


@torch.no_grad()
def measured(row):
    """Of a model that continues a text."""
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


@torch.no_grad()
def read(row):
    """Of a model that reads a source of SOURCE rows, or as many as it hears, beside a text."""
    apart, sizes = 0.0, None
    for name in row.tiny:
        theirs = readers.drawn(name)
        assert theirs.config.model_type == row.kind
        model = readers.ours(theirs)
        given, text = readers.source(model, SOURCE), readers.tokens(COUNT, seed=1, first=model.reading.start_id)
        for kv in ("f32", KV):
            cache = model.cache(kv, memory=8 << 20)
            with cache.open(source=model.fill(cache, given)) as sequence:
                found = model.run([(sequence, text)], every=True)
                if kv == "f32":
                    apart = max(apart, float((found - readers.their_logits(theirs, given, text)).abs().max()))
                elif sizes is None:
                    sequence.settle()
                    sizes = model.spec(KV).nbytes(COUNT, source=readers.rows(model, SOURCE)), sequence.nbytes
    return *sizes, apart


@torch.no_grad()
def encoded(row):
    """Of a model that sees a source whole: how far its last states are from transformers'."""
    (name,) = row.tiny
    theirs, source = encoders.drawn(name), encoders.source(name, length=COUNT)
    assert theirs.config.model_type == row.kind
    model = encoders.ours(theirs)
    given = theirs(**({"input_ids": source[None]} if name == "bert" else {"pixel_values": source[None]}))
    apart = float((model.encode(source) - given.last_hidden_state[0]).abs().max())
    return model.spec(KV).nbytes(COUNT), model.spec(KV).nbytes(COUNT), apart


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: for people.
        kind: `model_type` of its config.json.
        keeps: what a token leaves in a layer.
        published: a model of `kvik plan --list` for its bytes; "" = there is none.
        tiny: names in `tiny_models.FAMILIES`, the first of which is measured in bytes, all in parity.
        measure: (formula, measured) bytes of the tiny model after COUNT tokens, and the largest difference of all.
    """

    name: str
    kind: str
    keeps: str
    published: str
    tiny: tuple[str, ...]
    measure: Callable = measured


HEADS, WINDOWS = "k and v of each KV head", "k and v of each KV head; some layers the last rows alone"
CROSS = "k and v of each head; of a source's rows the same, once"
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
    Row("T5, v1.1, Flan", "t5", CROSS, "t5-small", ("t5", "t5 v1.1"), read),
    Row("mT5", "mt5", CROSS, "", ("mt5",), read),
    Row("BART", "bart", CROSS, "bart-base", ("bart", "bart, scaled"), read),
    Row("Marian (Opus-MT)", "marian", CROSS, "opus-mt-en-de", ("marian", "marian, two vocabularies"), read),
    Row("Whisper", "whisper", CROSS, "whisper-tiny.en", ("whisper",), read),
    Row("BERT, MiniLM", "bert", "nothing", "minilm", ("bert",), encoded),
    Row("ViT", "vit", "nothing", "", ("vit",), encoded),
)  # fmt: skip
HEAD = (
    "family", "model_type", "a token leaves in each layer", f"{KV}, B a token", "as published",
    f"tiny model, {COUNT} tokens: formula, measured", "logits differ by at most",
)  # fmt: skip


def published(row):
    """(its name, its formula, bytes a token)."""
    if not row.published:
        return "", "as above", ""
    plan = run_plan(row.published, kv=KV, context=1)
    later = run_plan(row.published, kv=KV).per_token_later.payload
    size = f"{plan.per_token.payload:,}"
    size += f", then {later:,}" if later != plan.per_token.payload else ""
    size += f"; {plan.shape.source:,} rows of a source: {plan.cross.payload:,}" if plan.shape.cross else ""
    own = [term for term in plan.terms if "source rows" not in term.text]
    return row.published, " + ".join(_formula(term.text) for term in own) or "0", size


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
    formula, held, apart = row.measure(row)
    name, written, size = published(row)
    tiny = f"{formula.payload:,}, {held.payload:,}"
    return (row.name, f"`{row.kind}`", row.keeps, written, f"{name}: {size}" if name else "", tiny, apart)


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
