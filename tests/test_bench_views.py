"""What `kvik bench cache` prints and draws, of a growth whose times follow from constants."""

from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from kvik.bench import curves, render, slope
from kvik.bench.counting import Counts
from kvik.bench.drawing import STYLE, WEIGHTS, WITH, WITHOUT
from kvik.bench.fit import grid
from kvik.bench.growth import Batch, Environment, Growth, Side
from kvik.bench.spread import Spread
from kvik.cache.spec import Bytes, LayerShape, Spec
from kvik.plan.work import Arithmetic


def synthetic(tokens=1024, kv="bf16"):
    """SmolLM2's sizes; a step with a cache takes 15 ms and 8 µs a row, one without 15 ms a chunk and 7 ps an operation
    of its products."""
    layers = [LayerShape(3, (("k", 64), ("v", 64)))] * 30
    specs = Spec.parse(kv, layers), Spec.parse("f32", layers)
    arithmetic = Arithmetic(*specs, 3, 106_168_320, 28_311_552, 94_906_100, 94_906_100)
    lengths = grid(tokens)

    def side(cached, seconds):
        steps = [arithmetic.step(n, cached=cached) for n in lengths]
        texts = [arithmetic.text(n, cached=cached) for n in lengths]
        spec = specs[0] if cached else specs[1]
        read = [sum(len(g.lanes) * g.retention.rows(n) for g in spec.groups) for n in lengths]
        held = [Bytes(spec.nbytes(n).payload, 200_000) for n in lengths]
        each = [Counts(1 if cached else n, w.rows, w.pairs, r) for n, w, r in zip(lengths, steps, read, strict=True)]
        whole = [Counts(n if cached else n * (n + 1) // 2, w.rows, w.pairs, r)
                 for n, w, r in zip(lengths, texts, read, strict=True)]  # fmt: skip
        return Side(tuple(each), tuple(whole), tuple(Spread(s, s, s) for s in seconds), tuple(held))

    cached = side(True, [0.015 + 8e-6 * specs[0].groups[0].retention.rows(n) for n in lengths])
    products = [arithmetic.step(n, cached=False).products for n in lengths]
    without = side(False, [0.015 * -(-n // 512) + 7e-12 * each for n, each in zip(lengths, products, strict=True)])
    batches = tuple(
        Batch(b, Spread(0.02, 0.02, 0.02), Spread(0.2 * b, 0.2 * b, 0.2 * b), specs[0].nbytes(128, b))
        for b in (1, 2, 4, 8)
    )
    where = Environment("A processor", "cpu", 2, "2.13.0", "3.12")
    return Growth("smollm2", kv, "int4", where, 3, lengths, arithmetic, cached, without, 128, batches)


def printed(growth, width=80, **options):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        render(growth, console, **options)
    return capture.get()


def test_the_table_has_the_figures_and_the_verdicts_in_80_columns():
    text = printed(synthetic())
    assert max(len(line) for line in text.splitlines()) <= 80
    for figure in (
        "47.2M", "92.2k", "48.5B", "141.7M", "111.5T", "275.4B",  # rows, pairs, products of 1,024 tokens
        "1.55 s", "23.2 ms", "66.9×", "92,160", "22.5 MiB", "90.5 MiB", "400",  # 400 tokens/s in a batch of 8
        "3,892 tokens", "4,120 tokens", "grows with a cache too: 15.0 ms + 8.00 ms for 1,000 rows",
        "all 19 lengths", "--plot curves.png",
        "+0.0 % with a cache, +0.0 % without",
    ):  # fmt: skip
        assert figure in text, figure
    assert "…" not in text
    assert "--plot" not in printed(synthetic(), pictures=True)


def test_speed_ups_of_a_token_and_of_the_text_are_named_apart():
    growth = synthetic()
    step, text = growth.step_reaches(2), growth.text_reaches(2)
    assert 8 < step < 16 < text < 32, "2 · 16.02 ms = 15.4 ms + 1.49 ms · 11.2"
    lines = printed(growth).splitlines()
    token_line, text_line = (
        next(line for line in lines if line.startswith(each)) for each in ("one tok", "whole text")
    )
    assert f"2× from {int(step) + 1} tokens" in token_line and f"2× from {int(text) + 1} tokens" in text_line


def test_a_speed_up_that_is_not_reached_is_said_so():
    growth = synthetic(tokens=16)
    assert growth.text_reaches(4) is None
    assert "4× not within 16 tokens" in printed(growth)


def test_counts_that_differ_from_their_formulas_are_told():
    growth = synthetic(tokens=64)
    wrong = (*growth.cached.steps[:-1], replace(growth.cached.steps[-1], pairs=1))
    text = " ".join(printed(replace(growth, cached=replace(growth.cached, steps=wrong))).split())
    assert "differs from the formulas: step of 64 tokens with a cache: 90 rows and 1 pairs" in text
    assert "by formula 90 and 17,280" in text


def test_a_windowed_cache_reads_fewer_rows_and_is_never_as_large_as_the_weights():
    text = printed(synthetic(kv="int8+window:128,sinks:4"))
    assert "11,880" in text and "92,160" in text and "at no length" in text


def colours(path):
    """How many pixels have exactly these colours."""
    image = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    flat = image[..., 0] << 16 | image[..., 1] << 8 | image[..., 2]
    return [int((flat == int(colour[1:], 16)).sum()) for colour in (WITH, WITHOUT, WEIGHTS)], int(flat[0, 0])


@pytest.mark.parametrize("kv", ["bf16", "int8+window:128,sinks:4"])
def test_the_curves_are_a_picture_in_their_colours_on_white(tmp_path, kv):
    before = {key: matplotlib.rcParams[key] for key in STYLE}
    curves(synthetic(kv=kv), tmp_path / "curves.png")
    assert before == {key: matplotlib.rcParams[key] for key in STYLE} != STYLE, "no setting leaks"
    data = (tmp_path / "curves.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1600, 2320)
    found, corner = colours(tmp_path / "curves.png")
    assert min(found) > 1000 and corner == 0xFFFFFF


def test_the_step_picture_says_how_a_step_grows(tmp_path, monkeypatch):
    slope(synthetic(), tmp_path / "step.png")
    data = (tmp_path / "step.png").read_bytes()
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1600, 880)
    slope(synthetic(), tmp_path / "step.svg")
    root = ElementTree.parse(tmp_path / "step.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("viewBox") == "0 0 576 316.8"
    words = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **__: words.extend(t.get_text() for t in self.findobj(Text))
    )
    slope(synthetic(), tmp_path / "step.png")
    for figure in ("2× from 10 tokens", "66.9×", "1.55 s", "23.2 ms", "+ 8.00 ms for each 1,000 rows", "predicted"):
        assert any(figure in each for each in words), figure


def test_an_svg_of_the_same_figures_is_the_same_file(tmp_path):
    for name in ("a.svg", "b.svg"):
        curves(synthetic(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("tokens", [16, 8192])
def test_short_and_long_texts_are_drawn_too(tmp_path, tokens):
    growth = synthetic(tokens=tokens)
    if tokens == 16:  # no faster at all, and all the same
        growth = replace(growth, without=replace(growth.without, seconds=growth.cached.seconds))
    curves(growth, tmp_path / "curves.svg")
    slope(growth, tmp_path / "step.svg")
    assert printed(growth)
