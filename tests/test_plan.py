"""`kvik plan`: sizes against checked facts, parameters against transformers, and what fits against the Spec itself."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from kvik.cache.spec import Spec
from kvik.errors import SpecError, UsageError
from kvik.models.shapes.wellknown import CONFIGS
from kvik.plan import from_config, known_models, list_plans, lookup, make_plan, render_list, render_plan, run_plan
from kvik.units import format_bytes, format_count, parse_bytes
from tiny_config import LLAMA


def printed(render: Any, what: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    render(what, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


# --- the facts ---


def test_opt_30b_f16_at_1024_tokens_and_batch_128_takes_exactly_180_388_626_432_bytes() -> None:
    plan = run_plan("OPT-30B", context=1024, batch=128, kv="f16")
    assert plan.total.payload == 180_388_626_432
    assert format_bytes(plan.total.payload) == "168.0 GiB"
    assert format_bytes(plan.total.payload, decimal=True, digits=2) == "180.39 GB"
    assert plan.textbook is not None
    assert plan.textbook.payload == plan.total.payload
    assert plan.reasons == ()


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("gpt2", 36_864),
        ("opt-6.7b", 524_288),
        ("llama-2-7b", 524_288),
        ("opt-13b", 819_200),
        ("llama-2-13b", 819_200),
        ("opt-30b", 1_376_256),
        ("opt-66b", 2_359_296),
        ("opt-175b", 4_718_592),
        ("gpt3", 4_718_592),
        ("llama-65b", 2_621_440),
        ("llama-3.1-8b", 131_072),
        ("mistral-7b-v0.3", 131_072),
        ("mistral-7b-v0.1", 131_072),
        ("llama-2-70b", 327_680),
        ("llama-3.1-70b", 327_680),
        ("llama-3.1-405b", 516_096),
        ("qwen3-8b", 147_456),
        ("qwen2.5-7b", 57_344),
        ("deepseek-v3", 70_272),
        ("deepseek-v2", 69_120),
        ("smollm2", 23_040),
    ],
)
def test_bytes_a_token_in_f16_are_the_checked_ones(name: str, each: int) -> None:
    assert run_plan(name).per_token.payload == each


def test_gpt3_keeps_9_gib_a_sequence_and_llama_65b_335_gb_at_128000_tokens() -> None:
    assert run_plan("gpt-3").per_sequence.payload == 9 * 2**30
    assert format_bytes(run_plan("llama-65b", context=128_000).total.payload, decimal=True) == "335.5 GB"


# --- arithmetic ---

SPECS = ["f32", "bf16", "int8", "k8v4", "int4", "int4+window:100,sinks:4", "int4; layers 0-1: bf16", "int8; page 64"]


@pytest.mark.parametrize("kv", SPECS)
@pytest.mark.parametrize("model", ["smollm2", "gemma-3-1b", "mistral-7b-v0.1", "t5-small"])
def test_the_terms_of_the_formula_add_up_to_the_payload_of_the_spec(model: str, kv: str) -> None:
    plan = run_plan(model, context=777, batch=3, kv=kv)
    own = Spec.parse(kv, plan.shape.layers).nbytes(777, 3)
    assert sum(term.payload for term in plan.terms) == plan.total.payload == own.payload + 3 * plan.cross.payload
    assert plan.total.payload + plan.total.overhead == plan.total.allocated


@pytest.mark.parametrize("kv", SPECS)
def test_sizes_beyond_all_windows_equal_the_specs_own(kv: str) -> None:
    shape = lookup("gemma-3-1b")
    for tokens in (1, 31, 512, 513, 600, 5000, 50_001):
        assert make_plan(shape, kv=kv, context=tokens).per_sequence == Spec.parse(kv, shape.layers).nbytes(tokens)


def test_the_printed_formula_has_the_numbers_of_the_plan_in_it() -> None:
    plan = run_plan("smollm2", context=1024)
    assert [term.text for term in plan.terms] == [
        "2 (k, v) · 2 B · 30 layers · 3 KV heads · 64 wide · 1,024 tokens · 1 sequence"
    ]
    assert plan.textbook is not None
    assert plan.textbook.text == "2 · 2 B · 30 layers · 576 d_model · 1,024 tokens · 1 sequence"
    assert plan.textbook_ratio == 3.0
    assert plan.reasons == ("9 query heads share 3 KV heads",)


@pytest.mark.parametrize(
    ("model", "ratio", "reason"),
    [
        ("deepseek-v3", 2 * 7168 / 576, "latent of 512"),
        ("t5-11b", 1024 / (128 * 128), "16,384 wide"),
        ("mistral-7b-v0.1", 4 * 8, "32 of 32 layers see the last 4,096"),
        ("qwen3-0.6b", 1.0, "2,048 wide"),
        ("gpt2", 1.0, None),
    ],
)
def test_where_the_textbook_is_wrong_the_plan_says_why(model: str, ratio: float, reason: str | None) -> None:
    plan = run_plan(model)
    assert plan.textbook_ratio == pytest.approx(ratio)
    assert (reason is None and plan.reasons == ()) or any(reason in line for line in plan.reasons if reason)


def test_a_window_as_long_as_the_text_is_no_reason() -> None:
    assert run_plan("mistral-7b-v0.1", context=4096).reasons == ("32 query heads share 8 KV heads",)


def test_the_cache_outweighs_the_weights_from_exactly_the_token_that_is_named() -> None:
    for model, kv, batch in (("smollm2", "f16", 1), ("gemma-3-1b", "int8", 3), ("whisper-base", "k8v4", 2)):
        plan = run_plan(model, kv=kv, batch=batch)
        at = plan.outweighs
        assert at is not None
        assert plan.weight_bytes is not None
        assert run_plan(model, kv=kv, batch=batch, context=at).total.allocated > plan.weight_bytes
        before = run_plan(model, kv=kv, batch=batch, context=at - 1)
        assert before.total.allocated <= plan.weight_bytes


def test_windows_can_keep_the_cache_below_the_weights_for_good() -> None:
    assert run_plan("mistral-7b-v0.1").outweighs is None
    assert run_plan("smollm2", kv="int8+window:64").outweighs is None
    assert "never" in printed(render_plan, run_plan("mistral-7b-v0.1"))


@pytest.mark.parametrize(("model", "kv", "memory"), [("smollm2", "int8", "1GiB"), ("gemma-3-1b", "f16", "2.25GiB")])
def test_what_fits_is_the_largest_that_the_spec_says_fits(model: str, kv: str, memory: str) -> None:
    plan = run_plan(model, kv=kv, memory=memory, batch=2, context=2000)
    fit, spec = plan.fit, Spec.parse(kv, plan.shape.layers)
    assert fit is not None
    assert fit.tokens is not None
    assert plan.weight_bytes is not None
    assert fit.room == parse_bytes(memory) - plan.weight_bytes
    assert spec.nbytes(fit.tokens, 2).allocated <= fit.room < spec.nbytes(fit.tokens + 1, 2).allocated
    assert spec.nbytes(2000, fit.batch).allocated <= fit.room < spec.nbytes(2000, fit.batch + 1).allocated
    assert fit.fits


def test_what_fits_holds_at_every_length_on_the_way_not_only_at_the_last() -> None:
    shape, kv = lookup("smollm2"), "int8+window:64,sinks:4"
    spec, weights = Spec.parse(kv, shape.layers), make_plan(shape).weight_bytes
    assert weights is not None
    assert spec.nbytes(128).allocated < spec.nbytes(127).allocated, "a window lets go of a page here"
    for tokens in range(90, 170):
        most = max(spec.nbytes(n).allocated for n in range(tokens + 1))
        fits = [make_plan(shape, kv=kv, context=tokens, memory=weights + most - less).fit for less in (0, 1)]
        assert [fit.batch for fit in fits if fit] == [1, 0]


def test_the_longest_context_is_any_where_windows_bound_it_and_none_where_weights_do_not_fit() -> None:
    bounded = run_plan("smollm2", kv="int8+window:64", memory="1GiB").fit
    assert bounded is not None
    assert bounded.tokens is None
    none = run_plan("llama-3.1-8b", memory="8GiB").fit
    assert none is not None
    assert (none.fits, none.batch, none.tokens, none.room) == (False, 0, 0, 0)
    assert "can't hold the weights" in printed(render_plan, run_plan("llama-3.1-8b", memory="8GiB"))


@pytest.mark.parametrize(("name", "each"), [("f32", 4), ("bf16", 2), ("f16", 2), ("int8", 1.0625), ("int4", 0.625)])
def test_weights_take_their_formats_bytes(name: str, each: float) -> None:
    assert run_plan("smollm2", weights=name).weight_bytes == 134_515_008 * each


def test_weights_come_in_the_configs_own_format_where_it_says_one() -> None:
    assert make_plan(from_config({**LLAMA, "torch_dtype": "float32"})).weights.name == "f32"
    assert make_plan(from_config({**LLAMA, "dtype": "bfloat16"})).weights.name == "bf16"


def test_a_context_beyond_the_models_own_is_allowed_with_a_note() -> None:
    assert any("8,192" in note for note in run_plan("smollm2", context=8193).notes)
    assert run_plan("smollm2", context=8192).notes == ()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"context": 0}, "--context 0"),
        ({"context": -5}, "--context -5"),
        ({"context": 10**12}, "--context 1000000000000"),
        ({"batch": 0}, "--batch 0"),
        ({"batch": 10**9}, "--batch"),
        ({"weights": "int3"}, "int3"),
        ({"memory": "lots"}, "lots"),
        ({"memory": "0"}, "less than one byte"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_naming_it(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        run_plan("smollm2", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["smollm2", "bert-base", "whisper-base"])
def test_a_wrong_spec_is_a_spec_error_for_every_model(model: str) -> None:
    with pytest.raises(SpecError, match="int9"):
        run_plan(model, kv="int9")


def test_cross_attention_is_filled_once_and_does_not_grow_or_lose_rows_to_the_spec() -> None:
    short, long = (run_plan("whisper-base", context=n, kv="int8+window:16") for n in (10, 400))
    assert short.cross == long.cross
    assert short.cross.payload == 2 * 6 * 8 * 64 * 1500
    assert long.per_sequence.payload == 2 * 6 * 8 * 64 * (16 + 1500)
    assert run_plan("t5-base").cross.payload == 2 * 2 * 12 * 12 * 64 * 512


def test_an_encoder_only_model_keeps_nothing_and_the_reason_is_said() -> None:
    plan = run_plan("bert-base", memory="1GiB")
    assert (plan.shape.layers, plan.total.allocated, plan.outweighs) == ((), 0, None)
    assert "nothing computed for a prefix stays valid" in plan.notes[0]
    assert plan.fit is not None
    assert plan.fit.fits


# --- output ---


def test_the_list_goes_from_small_to_large_and_fits_80_columns() -> None:
    plans, _ = list_plans()
    sizes = [plan.shape.parameters or 0 for plan in plans]
    assert sizes == sorted(sizes)
    assert len(plans) == len(CONFIGS) == len(known_models())
    text = printed(render_list, plans)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert all(name in text for name in CONFIGS)
    row = next(line for line in text.splitlines() if line.startswith("gemma-3-1b"))
    assert row.split()[1:3] == ["999.9M", "1.9"]
    assert "26→4 KiB" in row


@pytest.mark.parametrize("model", ["smollm2", "deepseek-v3", "gemma-3-1b", "whisper-large-v3", "bert-base"])
def test_a_plan_prints_its_exact_bytes_at_80_columns(model: str) -> None:
    plan = run_plan(model, batch=2, memory="64GiB")
    text = printed(render_plan, plan)
    assert max(map(len, text.splitlines())) <= 80
    assert f"{plan.weight_bytes:,}" in text
    assert plan.spec is None or f"{plan.total.payload:,}" in text
    assert "…" not in text


def test_a_plan_with_unknown_parameters_prints_and_says_so() -> None:
    text = printed(render_plan, make_plan(from_config({**LLAMA, "model_type": "novel"}), memory=2**30))
    assert "parameters unknown" in text
    assert "what fits can't be said" in text


def test_a_plan_is_plain_json_with_the_same_figures() -> None:
    plan = run_plan("opt-30b", context=1024, batch=128, memory="80GiB")
    told = json.loads(json.dumps(plan.to_dict()))
    assert told["cache"]["total"]["payload"] == 180_388_626_432
    assert told["textbook"] == {"text": plan.textbook.text, "bytes": 180_388_626_432, "ratio": 1.0}  # type: ignore[union-attr]
    assert told["weights"]["bytes"] == 59_949_080_576
    assert told["memory"]["largest_batch"] == plan.fit.batch  # type: ignore[union-attr]
    assert json.loads(json.dumps([p.to_dict() for p in list_plans("int8")[0]]))[0]["model"] == "minilm"


def test_planning_needs_no_torch() -> None:
    code = "import sys, kvik.plan as p; p.run_plan('smollm2'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- units ---


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 2**33),
        ("512MiB", 2**29),
        ("2GB", 2 * 10**9),
        ("1.5GiB", 3 * 2**29),
        (" 10 kb ", 10_000),
        ("4096", 4096),
    ],
)
def test_sizes_are_read_in_binary_and_decimal_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8XB", "-1GiB", "1e9", "8 GiB 3", "0", "0.1B", "٣GiB", "9" * 30])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="8GiB"):
        parse_bytes(text, "--memory")


def test_sizes_are_printed_in_the_largest_unit_that_leaves_one() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 2**20 - 1)] == ["0 B", "1023 B", "1.0 KiB", "1.0 MiB"]
    assert format_bytes(999_999, decimal=True) == "1.0 MB"
    assert [format_count(n) for n in (999, 1000, 999_999, 174_604_259_328)] == ["999", "1.0k", "1.0M", "174.6B"]
