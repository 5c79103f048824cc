"""The command line: what it prints, and one clear line with exit code 2 for what can't be used."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import kvik.cli
from kvik.cli.common import NO_KERNELS
from kvik.models.files.prepare import resolve


def in_process(monkeypatch, *arguments):
    """Runs `main` here; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["kvik", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        kvik.cli.main()
    return stopped.value.code


COMMANDS = ["", "run", "chat", "plan", "doctor", "eval", "tune", "translate", "train dates"]


@pytest.mark.parametrize("command", [name.split() for name in COMMANDS])
def test_help_names_every_option_and_imports_no_torch(command):
    script = "import sys, kvik.cli\ntry: kvik.cli.main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *command, "--help"], capture_output=True, text=True, timeout=9)
    assert done.returncode == 0
    assert done.stdout.endswith("False\n")
    wanted = {"run": ["--kv", "--weights", "--device", "--temperature", "--top-p", "--top-k", "--seed", "--max-tokens",
                      "--stop", "--raw", "--json"], "plan": ["--context", "--batch", "--memory", "--list"]}  # fmt: skip
    for option in wanted.get("".join(command), []):
        assert option in done.stdout


def test_plan_prints_the_exact_bytes_of_opt_30b(monkeypatch, capsys):
    code = in_process(monkeypatch, "plan", "opt-30b", "--context", 1024, "--batch", 128, "--kv", "f16", "--json")
    assert code == 0
    assert "180388626432" in capsys.readouterr().out


def test_plan_list_is_sorted_by_size(monkeypatch, capsys):
    assert in_process(monkeypatch, "plan", "--list", "--json") == 0
    plans = json.loads(capsys.readouterr().out)
    sizes = [plan["parameters"] for plan in plans]
    assert sizes == sorted(sizes)
    assert len(sizes) >= 40


@pytest.fixture
def broken(tmp_path):
    """Files that can't be used, by name."""
    (tmp_path / "truncated.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x07" * 20)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    (foreign / "config.json").write_text(json.dumps(config.to_dict()))
    save_file({"something.else": torch.zeros(3, 3)}, foreign / "model.safetensors")
    half = tmp_path / "half"
    LlamaForCausalLM(config).save_pretrained(half)
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "config.json").write_text('{"model_type": "frob"}')
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (tmp_path / "locked").write_text("a file where the home folder should be")
    return tmp_path


REFUSED = {
    "truncated GGUF": (["--model", "{}/truncated.gguf"], ["truncated.gguf"]),
    "foreign safetensors": (["--model", "{}/foreign"], ["something.else", "model.embed_tokens.weight"]),
    "truncated safetensors": (["--model", "{}/half"], ["model.safetensors"]),
    "no such model": (["--model", "{}/nothing-here"], ["nothing-here", "smollm2"]),
    "misspelled model": (["--model", "SmolLM"], ["'SmolLM' is no model", "did you mean smollm2?"]),
    "sizes alone": (["--model", "GPT-2"], ["'GPT-2' is no model", "'kvik plan' knows its sizes, not its weights"]),
    "a file of the folder": (["--model", "{}/half/config.json"], ["config.json", "give its folder", "/half; or"]),
    "another family": (["--model", "{}/another"], ["'frob'", "--backend transformers"]),
    "wrong codec": (["--kv", "int5"], ["int5", "int8"]),
    "wrong retention": (["--kv", "int8+windw:9"], ["windw:9", "window:1024"]),
    "wrong weights": (["--weights", "int3"], ["int3", "int4"]),
    "wrong device": (["--device", "tpu"], ["tpu", "cpu"]),
    "wrong memory": (["--memory", "lots"], ["lots", "8GiB"]),
    "wrong temperature": (["--temperature", "-1"], ["-1", "0.7"]),
    "spec without a codec": (["--kv", "page 64"], ["page 64", "bf16"]),
    "empty rule": (["--kv", "int8; ;"], ["no rule"]),
    "max-tokens 0": (["--max-tokens", "0"], ["max-tokens 0", "at least 1"]),
    "empty stop": (["--stop", ""], ["stop"]),
    "memory without a cache": (["--kv", "none", "--memory", "1MiB"], ["--memory"]),
    "unknown option": (["--kvv", "int8"], ["--kvv", "--help"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_input_that_cannot_be_used_gives_one_line_and_exit_code_2(case, broken, kvik_here):
    options, wanted = REFUSED[case]
    done = kvik_here("run", *(option.format(broken) for option in options), "hi", home=broken / "home")
    check_refusal(done, wanted)


def check_refusal(done, wanted):
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.strip() and line != NO_KERNELS]
    assert len(lines) == 1 and lines[0].startswith("kvik: "), done.stderr
    for text in wanted:
        assert text in lines[0]


def test_an_unwritable_home_folder_is_named_with_the_way_out(broken, kvik_here):
    check_refusal(kvik_here("run", "hi", home=broken / "locked"), ["locked", "KVIK_HOME"])


def test_plan_list_refuses_what_it_would_ignore(kvik_here):
    check_refusal(kvik_here("plan", "--list", "--context", 5), ["--context"])


def test_a_closed_standard_input_is_one_line():
    command = f"{sys.executable} -m kvik.cli run - <&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    check_refusal(done, ["standard input"])


def test_plan_without_a_model_says_what_to_give(kvik_here):
    check_refusal(kvik_here("plan"), ["kvik plan smollm2", "--list"])
    check_refusal(kvik_here("plan", "--list", "gpt2"), ["gpt2 is one", "leave one of the two out"])


@pytest.mark.parametrize(("words", "named"), [((), "\n  chat "), (("bench",), "\n  speed "), (("train",), "\n  lm ")])
def test_a_group_by_itself_shows_its_help_line_by_line(words, named, monkeypatch, capsys):
    assert in_process(monkeypatch, *words) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("Usage: kvik") and named in told.err
    assert in_process(monkeypatch, *words, "ben") == 2 and capsys.readouterr().err.count("\n") == 1


def test_memory_that_ran_out_is_one_line_and_other_faults_are_ours(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError(why)

    monkeypatch.setattr("kvik.plan.run_plan", fail)
    why = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"
    assert in_process(monkeypatch, "plan", "gpt2") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "memory ran out (CUDA out of memory. Tried to allocate 2.00 GiB.); use" in told
    why = "a shape is wrong"
    monkeypatch.setattr(sys, "argv", ["kvik", "plan", "gpt2"])
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        kvik.cli.main()


@pytest.mark.weights
def test_run_streams_an_answer_and_its_facts():
    command = [sys.executable, "-m", "kvik.cli", "run", "--max-tokens", "16", "What is the capital of Japan?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "Tokyo" in done.stdout
    assert "payload" in done.stderr and "tokens/s" in done.stderr


@pytest.mark.weights
def test_run_json_has_every_fact_and_the_bytes_add_up(kvik_here, loaded_once):
    done = kvik_here("run", "--json", "--kv", "k8v4", "--max-tokens", 6, "--raw", "-", stdin="The cat is on the")
    facts = json.loads(done.stdout)
    assert facts["new_tokens"] == len(facts["token_ids"]) == 6
    assert facts["finish_reason"] == "length" and facts["cached_tokens"] == 0 and facts["prompt_tokens"] == 5
    assert facts["kv_bytes"] == facts["kv_bytes_formula"] == (5 + 6 - 1) * 90 * (64 + 32)
    assert facts["kv_bytes"] + facts["kv_overhead_bytes"] == facts["kv_allocated_bytes"]
    assert facts["spec"] == "k8v4" and facts["weights"] == "int4"
    assert facts["ttft_s"] > 0 < facts["tokens_per_s"]


@pytest.mark.weights
def test_run_without_a_cache_gives_the_same_tokens(kvik_here, loaded_once):
    texts = [
        json.loads(kvik_here("run", "--json", "--kv", kv, "--max-tokens", 8, "Name a colour.").stdout)
        for kv in ("f32", "none")
    ]
    assert texts[0]["token_ids"] == texts[1]["token_ids"]
    assert texts[1]["kv_allocated_bytes"] == 0 and texts[1]["spec"] == "none"


@pytest.mark.weights
def test_seeded_sampling_repeats_itself_and_other_seeds_differ(kvik_here, loaded_once):
    def text(seed):
        arguments = ["--json", "--temperature", "1.5", "--seed", seed, "--max-tokens", 12, "Tell me something."]
        return json.loads(kvik_here("run", *arguments).stdout)["token_ids"]

    assert text(1) == text(1) != text(2)


@pytest.mark.weights
def test_chat_knows_its_earlier_turns(kvik_here, loaded_once):
    said = "What is the capital of Japan?\nThank you.\n/reset\nHi\n/exit\n"
    done = kvik_here("chat", "--json", "--max-tokens", 12, stdin=said)
    assert done.returncode == 0, done.stderr
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert "Tokyo" in turns[0]["text"]
    known = [turn["cached_tokens"] for turn in turns]
    assert known[0] == 0 and known[1] > 37 and known[2] == 0
    assert all(turn["kv_bytes"] + turn["kv_overhead_bytes"] == turn["kv_allocated_bytes"] for turn in turns)


@pytest.mark.weights
def test_ctrl_c_stops_an_answer_and_not_the_chat():
    command = [sys.executable, "-m", "kvik.cli", "chat"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        process.stdin.write(b"Write a very long story.\n")
        process.stdin.flush()
        assert process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(b"What is the capital of Japan?\n/exit\n", timeout=60)
    assert process.returncode == 0, errors
    assert b"(interrupted)" in errors and b"Tokyo" in out


@pytest.mark.weights
def test_a_prompt_beyond_the_context_and_a_budget_too_small_are_refused(kvik_here, loaded_once):
    long = kvik_here("run", "-", stdin="word " * 9000)
    check_refusal(long, ["8,192 positions", "shorten"])
    check_refusal(kvik_here("run", "--memory", "100KiB", "hi"), ["102,400", "raise the budget"])


@pytest.mark.weights
def test_a_template_that_reaches_for_python_internals_is_refused(tmp_path, kvik_here):
    prepared = resolve("smollm2")
    for file in prepared.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    check_refusal(kvik_here("run", "--model", tmp_path, "hi"), ["template"])


@pytest.mark.weights
def test_ctrl_c_ends_with_130_and_nothing_half_made():
    command = [sys.executable, "-m", "kvik.cli", "run", "Write a very long story."]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(5)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors and "(interrupted)" in errors


def test_output_to_a_closed_pipe_is_no_traceback(monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("kvik.plan.render_list", gone)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", _Terminal())
    assert in_process(monkeypatch, "plan", "--list") == 1


class _Terminal(io.StringIO):
    def fileno(self):
        return 1


def test_version_is_the_packages(monkeypatch, capsys):
    assert in_process(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == f"kvik {kvik.__version__}"
