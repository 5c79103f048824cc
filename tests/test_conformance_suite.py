"""The conformance suite sees what it is for: every case breaks for a cache that is wrong in its way, and says so."""

import json
import re
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kvik.errors import UsageError
from kvik.hf.conformance import view
from kvik.hf.conformance.__main__ import main
from kvik.hf.conformance.caches import Contender, contender
from kvik.hf.conformance.cases import CASES, chosen
from kvik.hf.conformance.given import Given
from kvik.hf.conformance.run import examine, run
from kvik.hf.conformance.verdicts import Finding, Verdict
from wrong_caches import WRONG, Restores, Right, refuses

HERE = Path(__file__).parent
BY_NAME = {case.name: case for case in CASES}
UNTRIED = {  # what it would take to break these alone is what others break with as well
    "num-return-sequences", "alibi-by-length", "latent-attention", "recurrent-layers", "encoder-decoder-relative",
    "encoder-decoder-learned", "encoder-decoder-sound", "encoder-decoder-turns",
}  # fmt: skip


def given(make, name="mine"):
    return Given(Contender(name, f"{make.__name__}(model)", lambda model, room: make(model), "wrong_caches"))


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_a_cache_that_is_wrong_in_one_way_is_seen(kind):
    for name in WRONG[kind]:
        found = examine(given(kind), BY_NAME[name])
        assert found.verdict.bad, f"{name}: {found.seen}"


def test_every_case_was_seen_to_break():
    broken = {name for names in WRONG.values() for name in names}
    elsewhere = {"growth", "encoder-decoder-alone", "interrupted", "no-patch-at-import"}  # below
    assert {case.name for case in CASES} - broken - UNTRIED == elsewhere


def test_encoders_see_a_lost_row():
    class LosesValues(Right):
        def update(self, keys, values, layer, *rest, **named):
            keys, values = super().update(keys, values, layer, *rest, **named)
            return keys, 0.9 * values

    for name in sorted(UNTRIED):
        assert examine(given(LosesValues), BY_NAME[name]).verdict is Verdict.BROKEN, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_transformers_ships_by_default_holds_but_for_three(case):
    found = examine(Given(contender("dynamic")), case)
    if case.name in ("growth", "encoder-decoder-alone", "interrupted"):
        assert found.verdict is Verdict.BROKEN and re.search(r"\d", found.seen)
    else:
        assert not found.verdict.bad, found.seen


@pytest.fixture(scope="module")
def kviks():
    """One for all cases, so that its models are built once."""
    return Given(contender("kvik"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kvik_holds_in_every_case(kviks, case):
    found = examine(kviks, case)
    assert found.verdict is Verdict.HOLDS, found.seen


def test_a_cache_of_fixed_size_does_not_grow():
    assert examine(Given(contender("static")), BY_NAME["growth"]).verdict is Verdict.HOLDS


def test_what_close_takes_back_is_not_left_behind():
    found = examine(given(Restores), BY_NAME["nothing-left-behind"])
    assert found.verdict is Verdict.HOLDS and found.seen == "as before, after close()"


def test_an_import_that_changes_transformers_is_seen(tmp_path, monkeypatch):
    (tmp_path / "imported.py").write_text(
        "from transformers import AttentionInterface\nfrom transformers.models.llama import modeling_llama\n"
        "AttentionInterface.register('mine', print)\nmodeling_llama.LlamaAttention.forward = print\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = Contender("mine", "", lambda model, room: Right(model), "imported")
    found = examine(Given(mine), BY_NAME["no-patch-at-import"])
    assert found.verdict is Verdict.BROKEN
    assert "ALL_ATTENTION_FUNCTIONS[mine]" in found.seen and "LlamaAttention.forward" in found.seen


def test_a_refusal_is_no_break_and_names_its_reason():
    found = examine(given(refuses), BY_NAME["mixed"])
    assert found.verdict is Verdict.UNFIT
    assert found.seen == "refuses such a model: NotImplementedError: llamas only"


def test_a_lossy_class_is_measured_by_its_own_loss():
    found = list(run(contender("quantized"), chosen(["alone", "padding-leak", "neighbours", "crop"])))
    assert [finding.verdict for finding in found] == [
        Verdict.HOLDS, Verdict.HOLDS, Verdict.BROKEN, Verdict.CRASHED
    ]  # fmt: skip
    assert found[0].seen.startswith("lossy: off by 0.") and found[3].seen.startswith("IndexError")


def test_columns_side_by_side(capsys):
    arguments = ["--cache", "dynamic", "--cache", "wrong_caches:SwapsRows", "--only", "alone", "--only", "padding-leak"]
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert re.search(r"^alone +holds +holds", out, re.M) and re.search(r"^padding-leak +holds +BROKEN", out, re.M)
    assert "SwapsRows(model)" in out and "DynamicCache(config=model.config)" in out


def test_columns_that_do_not_fit_are_numbered():
    mine, cases = [contender("dynamic"), contender("quantized:quanto")], chosen(["alone"])
    found = [Finding("alone", each.name, Verdict.BROKEN, "off by 3", 0.1) for each in mine]
    shown = []
    for width in (60, 40):
        file = StringIO()
        view.render(Console(width=width, file=file), mine, cases, found)
        shown.append(file.getvalue())
    assert re.search(r"^case +dynamic quantized:quanto", shown[0], re.M)
    assert re.search(r"^case +1 +2", shown[1], re.M) and "2: quantized:quanto" in shown[1]
    assert all("broken: alone: off by 3" in text for text in shown)


def test_json_says_how_and_what(capsys):
    assert main(["--cache", "transformers:DynamicCache", "--only", "alone", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["caches"]["transformers:DynamicCache"]["how"] == "DynamicCache(config=model.config)"
    assert found["cases"]["alone"] == BY_NAME["alone"].law and found["findings"][0]["verdict"] == "holds"
    assert set(found["versions"]) == {"transformers", "torch"}


def test_a_class_is_called_with_what_it_takes():
    assert contender("transformers:StaticCache").how == "StaticCache(config=model.config, max_cache_len=…)"
    assert contender("wrong_caches:Right").how == "Right(model)"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cache", "best"], "--cache best is unknown: give dynamic, "),
        (["--cache", "no.such:Cache"], "can't be imported: No module named 'no'"),
        (["--cache", "transformers:NoCache"], "can't be imported"),
        (["--cache", "wrong_caches:needs_more"], "needs budget; write a function of a model alone"),
        (["--cache", "wrong_caches:WRONG"], "is no class or function"),
        (["--cache", "kvik:int7"], "--cache kvik:int7"),
        (["--only", "speed"], "--only speed: no such case; --list names all"),
        (["--write", "/no/such/file.md", "--only", "alone"], "--write /no/such/file.md"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, arguments, said):
    assert main(arguments) == 2
    out, errors = capsys.readouterr()
    assert out == "" and errors.startswith("kvik: ") and said in errors and errors.count("\n") == 1


def test_the_list_names_every_case_with_its_law(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CASES) and all(case.law.endswith(".") and len(case.law) > 20 for case in CASES)


def test_a_table_goes_between_the_markers_of_a_file(tmp_path):
    file = tmp_path / "table.md"
    file.write_text(f"before\n{view.BEGIN}\nold\n{view.END}\nafter\n")
    assert main(["--only", "alone", "--write", str(file)]) == 0
    text = file.read_text()
    assert (
        text.startswith(f"before\n{view.BEGIN}\n") and text.endswith(f"{view.END}\nafter\n") and "\nold\n" not in text
    )
    assert f"| alone | {BY_NAME['alone'].law} | holds |" in text
    with pytest.raises(UsageError, match="has no lines"):
        view.between("nothing", "table")


def test_the_documentation_has_every_case():
    text = (HERE.parent / "docs" / "conformance.md").read_text()
    for case in CASES:
        assert f"| {case.name} | {case.law} |" in text, f"run the command in docs/conformance.md again: {case.name}"


def test_findings_with_one_reason_are_told_once():
    mine = contender("dynamic")
    found = [Finding(name, "dynamic", Verdict.CRASHED, "why", 0.1) for name in ("a", "b")]
    assert view.notable(found, mine) == [(Verdict.CRASHED, "why", ["a", "b"])]
    assert view.tally(found, mine) == "2 crashed"


def test_the_script_imports_nothing_of_kvik():
    source = (HERE.parent / "src/kvik/hf/conformance/registries.py").read_text()
    assert "import kvik" not in source and "from kvik" not in source
    assert "kvik" in sys.modules
