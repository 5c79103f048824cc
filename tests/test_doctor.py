"""`kvik doctor`: what is found, a warning for each thing that costs speed, what is measured, the command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import kvik
import kvik.cli
from kvik.bench import examine, rates, render_machine
from kvik.bench.machine import (
    NOT_BUILT,
    Cuda,
    Held,
    Kernels,
    Machine,
    Measured,
    Models,
    Padding,
    Rate,
    Reading,
    Setting,
    Threads,
    Versions,
)
from kvik.bench.processor import Processor, cpu_name, last_cache
from kvik.bench.spread import Spread
from kvik.cache.limits import processors_allowed
from kvik.errors import WeightsError
from kvik.ops import loader

ISAS = ("baseline", "avx2")
FLAT = Spread(2e10, 1e10, 3e10)
SETTINGS = {"KVIK_OPS": None, "KVIK_ISA": None, "GOMP_SPINCOUNT": "3000", "OMP_WAIT_POLICY": None}
SETTINGS |= {"OMP_NUM_THREADS": None}


def machine(**changes):
    """One that has nothing to warn of; settings by name among the changes."""
    settings = SETTINGS | {name: changes.pop(name) for name in SETTINGS if name in changes}
    rate = Rate("int4", "native", 1, "B/s", FLAT), Rate("f32", "torch", 512, "op/s", Spread(9e10, 8e10, 1e11))
    paddings = Padding("int4", "native", 1), Padding("bf16", "torch", None), Padding("f32", "torch", 4)
    whole = Machine(
        versions=Versions("0.1.0", "3.12.0", "2.13.0", "5.20.0"),
        processor=Processor("A processor", 4, None, 32 << 20, 16 << 30, 12 << 30, 0.5),
        kernels=Kernels("/lib/_native.so", "avx2", ("baseline", "avx2", "avx512"), ISAS, "native", "native"),
        threads=Threads(4, 200, 4),
        settings=tuple(Setting(name, value, "you" if value else "") for name, value in settings.items()),
        cuda=Cuda(()),
        models=Models("/home/kvik", (Held("A model", "/home/kvik/models/a", "a.gguf", 3 << 20),)),
        measured=Measured(256 << 20, (Reading(1, FLAT), Reading(4, FLAT)), rate, paddings, 0.0),
    )  # fmt: skip
    return replace(whole, **changes)


def printed(found, width=80):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        render_machine(found, console)
    return capture.get()


PLAIN = Kernels(None, None, (), (), "reference", "torch packed")
OFF = Kernels("/lib/_native.so", None, ISAS, ISAS, "reference", "torch packed")
SLOW = replace(machine().kernels, isa="baseline")
WARNED = {
    "not built": ({"kernels": PLAIN}, "install a C++ compiler"),
    "switched off": ({"kernels": OFF, "KVIK_OPS": "reference"}, "KVIK_OPS=reference: plain torch"),
    "off and not built": ({"kernels": PLAIN, "KVIK_OPS": "reference"}, "KVIK_OPS=reference: plain torch"),
    "a worse instruction set": ({"kernels": SLOW, "KVIK_ISA": "baseline"}, "KVIK_ISA=baseline: this processor"),
    "too many of kvik's threads": ({"threads": Threads(8, 200, 4)}, "kvik's pool has 8 threads for 4 usable cores"),
    "too many of torch's": ({"threads": Threads(4, 200, 8)}, "torch has 8 threads for 4 usable cores"),
    "too few": ({"threads": Threads(4, 200, 1), "OMP_NUM_THREADS": "1"}, "torch computes with 1 of 4 usable cores"),
    "no limit to spinning": ({"GOMP_SPINCOUNT": None}, "GOMP_SPINCOUNT=3000 before torch"),
    "load": ({"processor": replace(machine().processor, load=2.1)}, "load 2.1 on 4 cores: figures are of a busy"),
    "steal": ({"measured": replace(machine().measured, stolen=0.125)}, "12% of the processors' time"),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNED)
def test_each_thing_that_costs_speed_gives_one_line(case):
    changes, wanted = WARNED[case]
    found = machine(**changes)
    assert len(found.warnings) == 1 and wanted in found.warnings[0]
    assert f"! {found.warnings[0]}" in printed(found, width=300)


def test_a_containers_limit_counts_as_cores():
    found = machine(processor=replace(machine().processor, quota=1.5), threads=Threads(4, 200, 2))
    assert found.processor.usable == 1.5
    assert len(found.warnings) == 1 and "kvik's pool has 4 threads for 2 usable cores" in found.warnings[0]
    assert "the container's limit is 1.50" in printed(found)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"processor": replace(machine().processor, load=2.0)},
        {"processor": replace(machine().processor, load=9.0), "measured": None},
        {"threads": Threads(4, 200, 2)},  # torch's own choice where two threads share a core
    ],
)
def test_nothing_is_made_of_what_costs_nothing(changes):
    found = machine(**changes)
    assert found.warnings == ()
    assert "nothing that costs speed was found" in printed(found)


def test_the_view_has_every_finding_in_80_columns():
    text = printed(machine())
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for figure in (
        "A processor", "4 cores usable", "16.0 GiB of memory, 12.0 GiB free", "/lib/_native.so", "avx2 in use",
        "also here: baseline", "built, not here: avx512", "GOMP_SPINCOUNT=3000, set by you",
        "OMP_NUM_THREADS not set", "none that torch can use", "1 prepared model, 3.0 MiB",
        "A model, 3.0 MiB, from a.gguf",
        "kvik 4, idle ones sleep after 200 µs · torch 4", "transformers 5.20.0",
    ):  # fmt: skip
        assert figure in text, figure
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "memory read, 4 threads 20.0 GB/s 10.0 to 30.0" in lines
    assert "int4 weights read, 1 row 20.0 GB/s 10.0 to 30.0 native" in lines
    assert "f32 products, 512 rows 90.0 GFLOP/s 80.0 to 100 torch" in lines
    words = " ".join(lines)
    assert "int4 (native): no padding needed" in words and "f32 (torch): rows are padded to 4" in words
    assert "bf16 (torch): refused here" in words


def test_what_is_not_there_is_said_with_its_consequence():
    text = printed(machine(kernels=PLAIN, threads=Threads(None, None, 4), measured=None, models=Models("/none", ())))
    assert "not built: plain torch is used, several times slower" in text
    assert "append, attend reference · products int4, int8 torch packed" in text
    assert "0 prepared models" in text and "measured" not in text


def test_json_is_the_same_findings():
    facts = json.loads(json.dumps(machine(kernels=PLAIN).to_dict(), allow_nan=False))
    assert facts["settings"]["GOMP_SPINCOUNT"] == {"value": "3000", "by": "you"}
    assert facts["settings"]["KVIK_OPS"] == {"value": None, "by": None}
    assert facts["warnings"] == [NOT_BUILT]
    assert facts["measured"]["memory"][0] == {"threads": 1, "figure": {"median": 2e10, "least": 1e10, "most": 3e10}}
    assert facts["measured"]["paddings"][2] == {"format": "f32", "arithmetic": "torch", "rows": 4}
    assert facts["models"]["nbytes"] == 3 << 20 and facts["processor"]["usable"] == 4
    assert json.loads(json.dumps(machine(measured=None).to_dict()))["measured"] is None


# What is looked at.


def test_this_machine_is_found(monkeypatch):
    monkeypatch.setenv("KVIK_OPS", "reference")
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    monkeypatch.setenv("KVIK_HOME", "/nowhere/kvik")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = examine(False, ours=["GOMP_SPINCOUNT"])
    assert found.measured is None
    assert (found.versions.kvik, found.versions.torch) == (kvik.__version__, torch.__version__)
    assert found.processor.cores == len(os.sched_getaffinity(0)) and found.processor.name == cpu_name()
    assert 0 < found.processor.free <= found.processor.memory
    assert found.kernels.rows == "reference" and found.kernels.isa is None
    assert (found.kernels.path is None) == (loader.built() is None)
    assert found.setting("GOMP_SPINCOUNT") == Setting("GOMP_SPINCOUNT", "77", "kvik")
    assert found.setting("KVIK_OPS") == Setting("KVIK_OPS", "reference", "you")
    assert found.setting("OMP_NUM_THREADS") == Setting("OMP_NUM_THREADS", None, "")
    assert found.models == Models("/nowhere/kvik", ())
    assert found.warnings[0].startswith("KVIK_OPS=reference")


@pytest.mark.skipif(loader.built() is None, reason="needs the kernels")
def test_the_kernels_in_use_are_found(monkeypatch):
    for name in ("KVIK_OPS", "KVIK_ISA"):
        monkeypatch.delenv(name, raising=False)
    found = examine(False)
    assert found.kernels.path == loader.built().__file__ and found.kernels.rows == "native"
    assert found.kernels.isa == found.kernels.available[-1] and set(found.kernels.available) <= set(found.kernels.built)
    assert (found.threads.kernels, found.threads.spin) == (loader.built().threads(), loader.built().spin())


def test_kernels_that_were_not_built_are_missed(monkeypatch):
    monkeypatch.delenv("KVIK_OPS", raising=False)
    monkeypatch.setattr(loader, "built", lambda: None)
    loader.native.cache_clear()
    try:
        found = examine(False)
    finally:
        loader.native.cache_clear()
    assert found.kernels == PLAIN and found.threads.kernels is None
    assert NOT_BUILT in found.warnings


def test_prepared_models_are_listed_and_damaged_folders_are_not(monkeypatch, tmp_path):
    monkeypatch.setenv("KVIK_HOME", str(tmp_path))
    values = {"config": {"name": "Small"}, "kvik": {"source": {"from": "small.gguf"}}}
    for name, text in (("a-1", json.dumps(values)), ("b-1", "{"), ("c-1", "[]"), (".preparing-1", json.dumps(values))):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text(text)
    (tmp_path / "models" / "a-1" / "model.safetensors").write_bytes(bytes(1000))
    models = examine(False).models
    assert [(each.name, each.source) for each in models.held] == [("Small", "small.gguf")]
    assert models.nbytes == 1000 + len(json.dumps(values))


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "400000 100000", "mine/cpu.max": "250000 100000"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
    ],
)
def test_limits_of_control_groups_are_read(files, wanted, tmp_path):
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text("0::/mine\n1:cpu,cpuacct:/\n")
    assert processors_allowed(tmp_path / "groups", tmp_path / "own") == wanted


def test_the_largest_cache_is_found(tmp_path):
    for index, size in enumerate(("32K", "512K", "16M", "odd")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert last_cache(tmp_path) == 16 << 20
    assert last_cache(tmp_path / "none") is None


# What is measured.


class Ticks:
    """A clock that goes on by some seconds each time it is looked at."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def __call__(self):
        self.now += self.seconds
        return self.now


def test_bytes_a_second_are_bytes_over_seconds(monkeypatch):
    monkeypatch.setattr(loader, "built", lambda: None)
    assert rates.bandwidth(torch.ones(8000, dtype=torch.uint8), Ticks(0.5)) == 16000


def test_a_figure_is_taken_often_enough_and_not_before_it_is_warm():
    clock, calls = Ticks(1e-3), []

    def figure():
        calls.append(1)
        return float(len(calls))

    taken = rates.repeated(figure, clock)
    assert taken == [float(number) for number in range(len(calls) - len(taken) + 1, len(calls) + 1)]
    assert len(calls) - len(taken) == pytest.approx(rates.WARM / 1e-3, abs=2)
    assert len(taken) == pytest.approx(rates.PATIENCE / 1e-3, abs=2)
    assert len(rates.repeated(figure, Ticks(100.0))) == rates.REPEATS


@pytest.mark.parametrize(
    ("cache", "free", "wanted"),
    [(32 << 20, 64 << 30, 128 << 20), (1 << 20, 64 << 30, 64 << 20), (1 << 30, 64 << 30, 1 << 30),
     (32 << 20, 80 << 20, 10 << 20)],
)  # fmt: skip
def test_the_buffer_is_well_beyond_the_caches_and_leaves_memory(cache, free, wanted):
    assert rates.buffer_bytes(cache, free) == wanted


def test_threads_are_as_many_as_asked_for_and_then_as_before():
    before, module = torch.get_num_threads(), loader.built()
    kernels = module and module.threads()
    with rates.threads(1):
        assert torch.get_num_threads() == 1 and (module is None or module.threads() == 1)
    assert torch.get_num_threads() == before and (module is None or module.threads() == kernels)


def test_everything_is_measured_once_and_the_progress_goes_to_the_end(monkeypatch):
    monkeypatch.setattr(rates, "PATIENCE", 0.0)
    monkeypatch.setattr(rates, "WARM", 0.0)
    monkeypatch.setattr("kvik.bench.examination.MODEST", (96, 64))
    monkeypatch.setattr("kvik.bench.examination.LAYERS", 1)
    monkeypatch.setattr(rates, "MOST_BUFFER", 1 << 20)
    told, state = [], torch.random.get_rng_state()
    measured = examine(True, lambda *said: told.append(said)).measured
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers go on as before"
    cores = len(os.sched_getaffinity(0))
    assert [reading.threads for reading in measured.memory] == sorted({1, cores})
    assert {(rate.format, rate.rows) for rate in measured.rates} == {
        ("int4", 1), ("int8", 1), ("int4", 512), ("int8", 512), ("bf16", 512), ("f32", 512),
    }  # fmt: skip
    assert {rate.unit for rate in measured.rates if rate.rows == 1} == {"B/s"}
    for spread in (*(each.figure for each in measured.memory), *(each.figure for each in measured.rates)):
        assert 0 < spread.least <= spread.median <= spread.most
    assert {padding.format for padding in measured.paddings} == {"int4", "int8", "bf16", "f32"}
    assert all(padding.rows for padding in measured.paddings) and 0 <= measured.stolen <= 1
    done, totals = [each for _, each, _ in told], {total for *_, total in told}
    assert done == sorted(done) and totals == {8} and done[-1] == 7


def test_a_format_that_is_refused_here_is_a_finding(monkeypatch):
    def refuse(*_):
        raise WeightsError("it rounds differently with the number of rows")

    monkeypatch.setattr("kvik.bench.examination.Linear", refuse)
    from kvik.bench.examination import _many_rows

    assert _many_rows("bf16") == (Padding("bf16", "torch", None), None)


# The command.


def kvik_doctor(*arguments, **environment):
    settings = {name: value for name, value in os.environ.items() if name not in SETTINGS} | environment
    command = [sys.executable, "-m", "kvik.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=100)


def test_the_command_tells_what_it_set_from_what_you_set():
    alone = json.loads(kvik_doctor("--no-measure", "--json").stdout)
    assert alone["settings"]["GOMP_SPINCOUNT"] == {"value": "3000", "by": "kvik"} and alone["measured"] is None
    yours = kvik_doctor("--no-measure", GOMP_SPINCOUNT="500", OMP_WAIT_POLICY="PASSIVE")
    assert yours.returncode == 0 and yours.stderr == ""
    assert "GOMP_SPINCOUNT=500, set by you" in yours.stdout and "OMP_WAIT_POLICY=PASSIVE" in yours.stdout


@pytest.mark.parametrize(("name", "wanted"), [("KVIK_OPS", "native or reference"), ("KVIK_ISA", "not available here")])
def test_settings_that_can_not_be_are_one_line(name, wanted, monkeypatch, capsys):
    if name == "KVIK_ISA" and loader.built() is None:
        pytest.skip("needs the kernels")
    monkeypatch.delenv("KVIK_OPS", raising=False)
    monkeypatch.setenv(name, "fast")
    monkeypatch.setattr(sys, "argv", ["kvik", "doctor"])
    with pytest.raises(SystemExit) as stopped:
        kvik.cli.main()
    out, errors = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert errors.count("\n") == 1 and f"{name}='fast'" in errors and wanted in errors


def test_help_loads_no_torch():
    script = "import sys, kvik.cli\ntry: kvik.cli.main()\nfinally: print({'torch', 'numpy'} & {*sys.modules})"
    arguments = [sys.executable, "-c", script, "doctor", "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and done.stdout.endswith("set()\n")
    assert "--no-measure" in done.stdout and "--json" in done.stdout


# Other commands tell of missing kernels.


@pytest.mark.parametrize(
    ("built", "environment", "device", "told"),
    [
        (None, "", "cpu", True),
        (None, "reference", "cpu", False),
        (None, "", "cuda", False),
        (object(), "", "cpu", False),
    ],
)
def test_missing_kernels_are_told_once_unless_they_are_not_wanted(
    built, environment, device, told, monkeypatch, capsys
):
    from kvik.cli import common

    monkeypatch.setenv("KVIK_OPS", environment)
    monkeypatch.setattr(loader, "built", lambda: built)
    model = SimpleNamespace(reading=None, encoder=None)
    monkeypatch.setattr("kvik.models.model.load", lambda *_, **__: model)
    assert common.load_model("smollm2", "auto", device) is model
    out, errors = capsys.readouterr()
    assert (out, errors) == ("", f"{common.NO_KERNELS}\n" if told else "")
