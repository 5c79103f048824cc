"""`kvik bench speed`: its arithmetic against sums by hand, what is timed against a clock of ticks, the command."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from bench_models import check_refused, ids, in_process, tiny, told, write_model
from kvik.bench import draw_speed, measure_speed, rates, render_speed
from kvik.bench.drawing import WEIGHTS, WITH
from kvik.bench.growth import Environment
from kvik.bench.speed import Floor, Parts, Reached, Speed
from kvik.bench.speed_runs import prompt, room
from kvik.bench.spread import Spread, spread
from kvik.bench.stopwatch import Stopwatch
from kvik.cache.spec import LayerShape, Spec
from kvik.engine.generation import CHUNK, prefill
from kvik.models import families
from kvik.models.model import Model
from kvik.plan.work import Arithmetic

LAYERS, TOKENS = 2, 3
ROW = 30 * 3 * 256  # bytes of a token's rows in SmolLM2, bf16


def same(value):
    return Spread(value, value, value)


def synthetic(contexts=(32, 1024, 4096, 8128), kv="bf16", tokens=32, rounds=3):
    """SmolLM2's sizes on a machine of 20 GB/s and 400 G operations a second: products take 10 ms, attention reads
    10 GB/s, appending 0.5 ms, the rest 1.5 ms; a prompt 1 ms a token."""
    layers = [LayerShape(3, (("k", 64), ("v", 64)))] * 30
    specs = Spec.parse(kv, layers), Spec.parse("f32", layers)
    arithmetic = Arithmetic(*specs, 3, 106_168_320, 28_311_552, 96_577_268, 96_577_012)
    lengths = []
    for context in contexts:
        attend = (context + tokens + 1) * ROW / 1e10
        step = 0.012 + attend
        asked = 8192 if context == 8128 else context
        parts = Parts(0.010, attend, 0.0005, step)
        figure = Spread(step, 0.9 * step, (1.3 if context == 8128 else 1.2) * step)
        lengths.append(Reached(context, asked, same(context * 1e-3), figure, parts, (500 << 20) + context * ROW))
    where = Environment("A processor", "cpu", 2, "2.13.0", "3.12")
    return Speed(
        "smollm2", kv, "int4", arithmetic, where, rounds, tokens, 96_000_000, same(2e10), same(4e11), tuple(lengths),
        500 << 20,
    )  # fmt: skip


# Arithmetic.


def test_shares_are_of_the_whole_step_and_add_up_to_one():
    parts = Parts(products=4.0, attend=2.0, append=0.5, total=8.0)
    assert parts.rest == 1.5
    assert parts.shares == {"products": 0.5, "attention": 0.25, "append": 0.0625, "rest": 0.1875}
    assert sum(parts.shares.values()) == 1


def test_a_floor_is_the_longer_of_reading_and_computing():
    floor = Floor(bytes_read=100.0, operations=50.0, reading=2.0, computing=0.5)
    assert floor.seconds == 2.0 and floor.reached(4.0) == {"reading": 0.5, "computing": 0.125}
    assert replace(floor, computing=3.0).seconds == 3.0


def test_the_floor_of_a_step_is_its_bytes_and_operations_over_what_the_machine_does():
    speed = synthetic(tokens=3)
    floor = speed.decode_floor(1024)
    lengths = (1025, 1027, 1029)  # plain steps; watched ones come in between
    rows = sum(length * ROW for length in lengths) / 3
    assert floor.bytes_read == 96_000_000 + rows
    assert floor.operations == 2 * (106_168_320 + 28_311_552) + sum(4 * 64 * 9 * 30 * n for n in lengths) / 3
    assert floor.reading == floor.bytes_read / 2e10 and floor.computing == floor.operations / 4e11
    assert speed.attended(1024) == sum(length * ROW for length in (1026, 1028, 1030)) / 3


@pytest.mark.parametrize("context", [1, 511, 512, 513, 1300])
def test_the_floor_of_a_prompt_is_the_sum_over_its_chunks(context):
    speed = synthetic((context,))
    floor = speed.prefill_floor(context)
    ends = [*range(CHUNK, context, CHUNK), context]
    assert floor.bytes_read == sum(96_000_000 + end * ROW for end in ends), (
        "a chunk reads what is there, its own included"
    )
    pairs = 270 * context * (context + 1) // 2
    assert floor.operations == 2 * (context * 106_168_320 + len(ends) * 28_311_552) + 4 * 64 * pairs


def test_rates_are_bytes_over_seconds_and_tokens_over_seconds():
    speed = synthetic()
    for each in speed.lengths:
        assert speed.product_rate(each) == 9.6e9
        assert speed.attention_rate(each) == pytest.approx(1e10)
        assert each.decode_tokens_per_s.median == 1 / each.step.median
        assert each.decode_tokens_per_s.least == 1 / each.step.most < each.decode_tokens_per_s.most
        assert each.prefill_tokens_per_s.median == pytest.approx(1000)


def test_a_window_bounds_what_a_step_reads():
    speed = synthetic((32, 4096), kv="bf16+window:100,sinks:4", tokens=4)
    assert speed.attended(4096) == 104 * ROW
    assert speed.held(4096) == speed.arithmetic.spec.nbytes(4104)


def test_a_policy_bounds_what_a_step_reads_from_the_prompts_end_on():
    speed = synthetic((32, 4096), kv="bf16+snapkv:25%", tokens=4)
    assert speed.attended(4096) == (1024 + (2 + 4 + 6 + 8) / 4) * ROW
    assert speed.held(4096) == speed.arithmetic.spec.nbytes(4104, prompt=4096)
    assert speed.prefill_floor(4096) == synthetic((32, 4096), tokens=4).prefill_floor(4096), "until then all rows stay"
    bound = synthetic((4096,), kv="bf16+keydiff:1024rows", tokens=4).prefill_floor(4096)
    chunks = range(0, 4096, 128)  # it is cut where the policy looks, and reads 1,024 rows and its own at the most
    assert bound.bytes_read == sum(96_000_000 + (min(start, 1024) + 128) * ROW for start in chunks)


def test_json_has_every_figure():
    facts = json.loads(json.dumps(synthetic().to_dict(), allow_nan=False))
    assert [each["context"] for each in facts["contexts"]] == [32, 1024, 4096, 8128]
    assert [each["asked"] for each in facts["contexts"]] == [32, 1024, 4096, 8192]
    for each in facts["contexts"]:
        assert set(each["decode_tokens_per_s"]) == set(each["prefill_tokens_per_s"]) == {"median", "least", "most"}
        assert sum(each["decode"]["shares"].values()) == pytest.approx(1)
        floor = each["decode"]["floor"]
        assert floor["reached"]["reading"] == floor["reading"] / each["decode"]["seconds"]["median"]
        assert each["prefill"]["floor"]["reached"]["computing"] > 0
        held = each["cache_formula"]
        assert (
            held["payload"] + held["overhead"] == held["allocated"] and held["payload"] == (each["context"] + 64) * ROW
        )
    assert facts["weights"] == {"format": "int4", "bytes": 96_577_268, "read": 96_000_000}
    assert facts["memory"] == {"peak": (500 << 20) + 8128 * ROW, "peak_before": 500 << 20}
    assert facts["read_bytes_per_s"]["median"] == 2e10 and facts["operations_per_s"]["median"] == 4e11


def test_prompts_begin_elsewhere_each_and_are_as_long_as_asked():
    text = ids(100)
    prompts = [prompt(text, 90, number, 12) for number in range(12)]
    assert {len(each) for each in prompts} == {90}
    assert len({tuple(each[:8]) for each in prompts}) == 12
    assert prompts[11] == (text + text)[91:181]


# What is timed.


class Ticks:
    """A clock that goes on by a second each time it is looked at."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        self.now += 1
        return float(self.now)


def gpt2():
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=48, n_layer=LAYERS, n_head=4, n_positions=64))
    config = families.from_hf(theirs.config.to_dict(), None, "tiny")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    return Model(config, {name: tensors[name] for name in config.tensor_shapes()}, weights="f32")


@pytest.mark.parametrize("make", [tiny, gpt2])
def test_every_product_append_and_attention_is_timed_once_a_step(make):
    model = make()
    decoder, blocks, head = model.decoder, list(model.decoder.blocks), model.decoder.head
    watch = Stopwatch(model, Ticks())
    with model.cache("bf16").open() as a, model.cache("bf16").open() as b:
        plain = prefill(model, [a], [3, 1, 2])
        watched = prefill(watch.model, [b], [3, 1, 2], watch=watch.watch)
    assert torch.equal(plain, watched), "timing changes no bit"
    assert (watch.products, watch.append, watch.attend) == (4 * LAYERS + 1, LAYERS, LAYERS)
    assert len(watch.linears) == 4 * LAYERS + 1
    assert model.decoder is decoder and list(decoder.blocks) == blocks and decoder.head is head, (
        "the model is left alone"
    )
    watch.reset()
    assert watch.products == watch.append == watch.attend == 0


@pytest.fixture(scope="module")
def quick():
    """No figure of the machine is taken longer than it must."""
    patch = pytest.MonkeyPatch()
    patch.setattr(rates, "PATIENCE", 0.0)
    patch.setattr(rates, "WARM", 0.0)
    patch.setattr(rates, "MOST_BUFFER", 1 << 20)
    yield
    patch.undo()


def test_by_a_clock_of_ticks_every_figure_is_known(quick):
    """Between two looks at the clock lies one second; a watched step looks twice for each thing that it times."""
    speed = measure_speed(tiny(), ids(200), [5, 40], tokens=TOKENS, rounds=2, clock=Ticks())
    inside = 2 * (4 * LAYERS + 1 + LAYERS + LAYERS) + 1
    for each in speed.lengths:
        assert each.parts == Parts(4 * LAYERS + 1, LAYERS, LAYERS, inside)
        assert each.parts.rest == inside - 6 * LAYERS - 1
        assert each.step == same(1.0) and each.prefill == same(1.0)
        assert each.prefill_tokens_per_s == same(each.context)
    assert speed.rate == same(2.0 * CHUNK * speed.arithmetic.row_weights)
    row = 2 * 2 * 2 * 12 * 2  # layers, lanes, k and v, width, bytes
    assert speed.attended(40) == (42 + 44 + 46) / 3 * row
    assert speed.attention_rate(speed.lengths[1]) == speed.attended(40) / LAYERS
    assert speed.product_bytes == 4 * (speed.arithmetic.row_weights + speed.arithmetic.head_weights)


def test_each_round_visits_all_lengths_with_prompts_of_its_own(quick, monkeypatch):
    seen, shown = [], []
    honest = Model.run

    def run(self, chunks, *rest, **options):
        seen.append((len(chunks[0][0]), list(chunks[0][1])))
        assert not chunks[0][0].cache.shares and chunks[0][0].cached == 0
        return honest(self, chunks, *rest, **options)

    monkeypatch.setattr(Model, "run", run)
    text = ids(300)
    speed = measure_speed(tiny(), text, [20, 60], tokens=2, rounds=3, show=lambda *said: shown.append(said))
    prompts = [tokens for start, tokens in seen if start == 0][1:]  # the first warms up
    assert [len(each) for each in prompts] == [20, 60, 20, 60, 20, 60]
    assert len({tuple(each[:16]) for each in prompts}) == 6
    assert prompts == [prompt(text, length, number, 6) for number, length in enumerate([20, 60] * 3)]
    assert sum(start > 0 for start, _ in seen) == 8 + 6 * 4 - 4, "two of each kind after every prompt; fewer to warm up"
    done = [each for _, each, _ in shown]
    assert done == sorted(done) and {total for *_, total in shown} == {done[-1]}
    assert [each.context for each in speed.lengths] == [20, 60] and speed.rounds == 3
    peaks = [speed.peak_before, *(each.peak for each in speed.lengths)]
    assert peaks[0] > 0 and peaks == sorted(peaks) and speed.peak == peaks[-1]


def test_every_prompt_is_one_so_that_a_policy_chooses_at_its_end(quick, monkeypatch):
    held, honest = [], Model.run

    def run(self, chunks, *rest, **options):
        held.append((len(chunks[0][0]), chunks[0][0].nbytes.payload // (2 * 2 * 2 * 12)))
        return honest(self, chunks, *rest, **options)

    monkeypatch.setattr(Model, "run", run)
    measure_speed(tiny(), ids(300), [60, 160], kv="int8+knorm:25%", tokens=1, rounds=1)
    assert [rows for tokens, rows in held if tokens == 60] == [36]
    assert [rows for tokens, rows in held if tokens == 160] == [40]


def test_the_round_of_the_median_gives_the_parts():
    from kvik.bench.speed_runs import _reached

    visits = [(total, 1.0, Parts(1.0, 1.0, 1.0, total)) for total in (9.0, 4.0, 30.0)]
    reached = _reached(10, 10, visits, 0)
    assert reached.parts.total == 9.0 and reached.prefill == spread([9.0, 4.0, 30.0])


def test_the_figures_that_need_a_window_or_other_weights_work_too(quick):
    torch.manual_seed(0)
    model = Model(
        tiny().config, {n: torch.randn(s) * 0.1 for n, s in tiny().config.tensor_shapes().items()}, weights="int4"
    )
    speed = measure_speed(model, ids(200), [90], kv="int8+window:40,sinks:2", tokens=TOKENS, rounds=1)
    assert speed.attended(90) == 42 * speed.arithmetic.spec.groups[0].layout.row_bytes * 4
    assert speed.weights == "int4" and speed.product_bytes < speed.arithmetic.row_weights * 4


# What is shown.


def printed(speed, width=80, **options):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        render_speed(speed, console, **options)
    return capture.get()


def test_the_tables_have_the_figures_in_80_columns():
    text = printed(synthetic())
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    attend = (8128 + 33) * ROW / 1e10
    step = 0.012 + attend
    floor = (96e6 + (8128 + 32) * ROW) / 2e10
    reading, computing = 100 * floor / step, 100 * (268_959_744 + 69_120 * (8128 + 32)) / 4e11 / step
    assert f"8,128 {1 / step:.1f} {1e3 * step:.1f} ms {reading:.0f} % {computing:.0f} %" in lines
    assert f"8,128 {100 * 0.010 / step:.0f} % 9.60 {100 * attend / step:.0f} % 10.0 2 % 5 %" in lines
    assert "1,024 1,000 1.02 s 1 % 62 % 522.5 MiB 23.9 MiB" in lines
    words = " ".join(lines)
    for figure in ("20.0 GB/s of memory", "400 G operations a second", "8,128 instead of 8,192", "--plot speed.png"):
        assert figure in words, figure
    assert f"{1 / step / 1.3:.1f} to {1 / step / 0.9:.1f} tokens/s at 8,128" in words and "measure again" in words
    assert "--plot" not in printed(synthetic(), picture=True)
    quiet = synthetic((32,))
    steps = Spread(0.0121, 0.0120, 0.0122)
    text = printed(replace(quiet, lengths=(replace(quiet.lengths[0], step=steps),)))
    assert "instead of" not in text and "82.0 to 83.3 tokens/s at 32" in text and "measure again" not in text


def test_the_picture_has_its_colours_and_figures(tmp_path, monkeypatch):
    draw_speed(synthetic(), tmp_path / "speed.png")
    data = (tmp_path / "speed.png").read_bytes()
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1600, 800)
    image = (matplotlib.image.imread(tmp_path / "speed.png")[..., :3] * 255).round().astype(int)
    flat = image[..., 0] << 16 | image[..., 1] << 8 | image[..., 2]
    assert all((flat == int(colour[1:], 16)).sum() > 1000 for colour in (WITH, WEIGHTS))
    for name in ("a.svg", "b.svg"):
        draw_speed(synthetic((1,), rounds=1), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    words = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **__: words.extend(t.get_text() for t in self.findobj(Text))
    )
    draw_speed(synthetic(), tmp_path / "speed.png")
    step = 0.012 + (8128 + 33) * ROW / 1e10
    for figure in (f"{1 / step:.1f}", f"{1e3 * step:.1f} ms", "20.0 GB/s and 400 G operations", "8,128", "products"):
        assert any(figure in each for each in words), figure


# The command.

REFUSED = {
    "contexts of words": (["--contexts", "32,many"], ["32,many", "--contexts 32,1024,4096,8192"]),
    "contexts of nothing": (["--contexts", "0"], ["--contexts '0'"]),
    "tokens": (["--tokens", 0], ["--tokens 0", "at least 1"]),
    "rounds": (["--rounds", 0], ["--rounds 0", "at least 1"]),
    "spec": (["--kv", "int5"], ["int5", "int8"]),
    "no cache": (["--kv", "none"], ["none"]),
    "picture of another kind": (["--plot", "{}/a.jpg"], ["--plot", "PNG or SVG"]),
    "text that is not there": (["--text", "{}/none.txt"], ["none.txt", "can't be read"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_measured_is_refused_before_a_model_is_loaded(case, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("kvik.cli.bench.load_model", lambda *_: pytest.fail("the model was loaded"))
    options, wanted = REFUSED[case]
    check_refused(capsys, in_process(monkeypatch, "speed", *(str(e).format(tmp_path) for e in options)), *wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model of 700 positions with a tokenizer of bytes."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


def test_contexts_beyond_the_model_or_the_text_are_refused(monkeypatch, capsys, tmp_path, folder):
    common = ["speed", "--model", folder]
    code = in_process(monkeypatch, *common, "--contexts", "10,697", "--tokens", 2)
    check_refused(capsys, code, "--contexts 697 with --tokens 2 takes 701", "700", "--contexts up to 696")
    code = in_process(monkeypatch, *common, "--contexts", "10", "--tokens", 350)
    check_refused(capsys, code, "--contexts 10 with --tokens 350", "fewer --tokens")
    code = in_process(monkeypatch, *common, "--tokens", 350)
    check_refused(capsys, code, "--tokens 350 takes 701 positions", "fewer --tokens")
    (tmp_path / "short.txt").write_text("twenty-two characters!")
    code = in_process(monkeypatch, *common, "--contexts", 23, "--text", tmp_path / "short.txt")
    check_refused(capsys, code, "short.txt has 22 tokens", "--contexts asks for 23", "longer text")
    assert room(700, 2) == 696


def test_the_command_measures_prints_and_draws(quick, monkeypatch, capsys, tmp_path, folder):
    options = ["speed", "--model", folder, "--tokens", 2, "--rounds", 1, "--contexts", "24,8", "--kv", "int8"]
    assert in_process(monkeypatch, *options, "--json", "--plot", tmp_path / "speed.svg") == 0
    out, errors = capsys.readouterr()
    facts = json.loads(out)
    assert (facts["model"], facts["spec"], facts["tokens"], facts["rounds"]) == ("tiny-llama", "int8", 2, 1)
    assert [each["context"] for each in facts["contexts"]] == [8, 24]
    assert ElementTree.parse(tmp_path / "speed.svg").getroot().tag.endswith("svg")
    assert told(errors) == [f"drawn: {tmp_path / 'speed.svg'}"]
    assert in_process(monkeypatch, *options) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("tiny-llama") and "tokens/s" in out and "--plot speed.png" in out


def test_contexts_by_default_are_cut_to_what_the_model_has(monkeypatch, capsys, folder):
    measured = []
    monkeypatch.setattr("kvik.cli.bench.CONTEXTS", "32,400,1024,4096")

    def measure(model, text, contexts, *, asked, **_):
        measured.append((contexts, asked, len(text)))
        return synthetic(tuple(contexts))

    monkeypatch.setattr("kvik.bench.speed_runs.measure_speed", measure)
    assert in_process(monkeypatch, "speed", "--model", folder, "--tokens", 2, "--json") == 0
    assert json.loads(capsys.readouterr().out)["contexts"][-1]["context"] == 696
    contexts, asked, available = measured[0]
    assert (contexts, asked) == ([32, 400, 696], [32, 400, 1024]) and available > 100_000
