"""Parts of the server by themselves: calls in what a model says, and what is remembered of requests."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi", reason="pip install 'kvik[serve]'")

from kvik.engine.job import Known
from kvik.errors import BudgetError, ContextError, EngineError, QueueError, UsageError
from kvik.server import records
from kvik.server.problems import ProblemError, encoded
from kvik.server.records import Records
from kvik.server.tools import CallReader

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "</a>"}}\n</tool_call>'
SAID = [
    ("plain < text <tool", "plain < text <tool", []),
    (f"Well. {CALL}", "Well. ", ['{"x": "</a>"}']),
    (f"{CALL}\n{CALL}\n", "", ['{"x": "</a>"}'] * 2),
    ('<tool_call>{"name": "g"}</tool_call>', '<tool_call>{"name": "g"}</tool_call>', []),
    ("<tool_call>no JSON</tool_call> so", "<tool_call>no JSON</tool_call> so", []),
    ('<tool_call>{"name": "f"}', '<tool_call>{"name": "f"}', []),
    ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call> done', " done", ["{}"]),
]


@pytest.mark.parametrize(("text", "said", "calls"), SAID)
@given(data=st.data())
def test_where_a_text_is_cut_changes_nothing(text, said, calls, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    reader, found, plain = CallReader(["f"]), [], ""
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        more, new = reader.take(text[start:stop])
        plain, found = plain + more, found + new
    plain += reader.finish()
    assert plain.strip() == said.strip() and [call.arguments for call in found] == calls
    assert len({call.id for call in found}) == len(found) and found == reader.calls


def test_one_call_where_only_one_is_wanted():
    reader = CallReader(["f"], most=1)
    assert len(reader.take(CALL * 3)[1]) == 1 == len(reader.calls)


def remembered(kept, id, tokens, cached, tenant="a", salt="s", evicted=0):
    record = kept.add(id, tenant, [(tokens, salt)])
    record.prompts[0].known, record.prompts[0].evicted = Known(len(tokens), cached, ""), evicted
    return lambda: kept.explain(id, tenant)["prompts"][0]["why"]


def test_why_a_prompt_was_not_known():
    kept, text = Records(page=32), list(range(100))
    first = remembered(kept, "first", text, 0)
    assert "none of your earlier" in first()
    assert remembered(kept, "again", text, 99)().startswith("all that can be known")
    assert "again shares the first 100 tokens, 96 of them in pages" in remembered(kept, "open", text, 96)()
    assert "the first 70 tokens; token 70 is another" in remembered(kept, "other", [*text[:70], *[7] * 40], 70)()
    assert "had been dropped" in remembered(kept, "later", text, 32, evicted=9)()
    assert "of which only 0 had been computed" in remembered(kept, "soon", text, 0, evicted=9)()
    assert "none of your earlier" in remembered(kept, "apart", text, 0, salt="t")()


def test_nobody_hears_of_anothers_requests():
    kept, text = Records(page=32), list(range(100))
    remembered(kept, "first", text, 0, tenant="a")
    second = remembered(kept, "second", text, 0, tenant="b")
    assert "first" not in second() and "none of your earlier" in second()
    assert kept.explain("first", "b") is None and kept.explain("nothing", "a") is None


def test_what_is_remembered_is_bounded(monkeypatch):
    kept = Records(page=32)
    for number in range(records.MOST + 5):
        kept.add(f"r{number}", "a", [([1, 2], "")])
    assert kept.explain("r4", "a") is None and kept.explain("r5", "a") is not None
    monkeypatch.setattr(records, "MOST_TOKENS", 100)
    kept.add("large", "a", [([1] * 99, "")])
    assert kept.explain("r1020", "a") is None and kept.explain("large", "a")["prompts"][0]["why"] == "it has not begun"
    kept.add("larger", "a", [([1] * 500, "")])
    assert kept.explain("large", "a") is None and kept.explain("larger", "a") is not None


@pytest.mark.parametrize(
    ("error", "status", "code", "waits"),
    [
        (ContextError("long"), 400, "context_length_exceeded", False),
        (BudgetError("large", needed=2, available=1), 400, "cache_budget_exceeded", False),
        (QueueError("full"), 429, "queue_full", True),
        (EngineError("gone"), 503, "engine_unavailable", True),
        (UsageError("wrong"), 400, "invalid_value", False),
    ],
)
def test_every_error_has_its_status(error, status, code, waits):
    problem = ProblemError.of(error)
    assert (problem.status, problem.code, "retry-after" in problem.headers) == (status, code, waits)
    kinds = {400: "invalid_request_error", 429: "rate_limit_error", 503: "server_error"}
    assert problem.body["error"]["type"] == kinds[status] and problem.body["error"]["message"] == str(error)


def test_any_text_can_be_sent():
    assert json.loads(encoded({"text": "\ud800 é \x00"})) == {"text": "\ud800 é \x00"}
